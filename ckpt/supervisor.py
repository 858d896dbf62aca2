"""Keeps an uploader alive beside a trainer: starts it, watches it, starts it again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .errors import CkptError, ConfigError
from .layout import MIRROR
from .session import OPTIONS_VARIABLE, Beat, Session, read_beat
from .tier import Tier

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 0.5
SILENT_SECONDS: Final = 120.0
"""Without a heartbeat for so long an uploader is stopped or starved: it is ended and replaced."""
STUCK_SECONDS: Final = 3600.0
"""One that beats but gets nowhere for so long hangs: longer than a slow request with all its
repetitions may take (64 MiB at 256 KiB/s, six times)."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0


class Supervisor:
    """One manager's thread that sees to it that the tier has an uploader.

    Args:
        tier: the tier; its session is replaced by ``session``.
        session: what the uploader is to do.
        storage_options: for the root's store; they reach the uploader in its environment and
            are written nowhere.

    Raises:
        ConfigError: the options do not travel as JSON.
        StorageError: the tier cannot be written.
    """

    def __init__(
        self, tier: Tier, session: Session, storage_options: Mapping[str, Any] | None
    ) -> None:
        self._tier = tier
        self._session = session
        self._options = _as_json(storage_options)
        self._root = Path(tier.storage.url)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = FIRST_PAUSE
        self._beat: Beat | None = None
        self._told = False
        self._stop = threading.Event()
        session.save(tier.storage)
        self._trainer = tier.hold_trainer()
        self._thread = threading.Thread(target=self._watch, name="ckpt-tier", daemon=True)
        self._thread.start()

    @property
    def beat(self) -> Beat | None:
        """The uploader's last heartbeat that was seen, of whatever session."""
        return self._beat

    def close(self) -> None:
        """Leave the uploader to itself; it goes on until its queue is empty."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            running = self._process is not None and self._process.poll() is None
            if self._tier.queue() and not running and not self._tier.uploader_alive():
                self._start()  # it was just being restarted, or handing over
        except CkptError as error:
            logger.warning("no uploader for what is left in %s: %s", self._tier.storage.url, error)
        if self._process is not None and self._process.poll() is None:
            # It is meant to outlive us; Popen would complain about a child that is left behind.
            self._process.returncode = 0
        if self._trainer is not None:
            self._trainer.release()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except (CkptError, OSError) as error:
                logger.warning("cannot look after the uploader of %s: %s", self._root, error)
            self._stop.wait(WATCH_SECONDS)

    def _look(self) -> None:
        """Start an uploader if there is none; end one that hangs."""
        beat = read_beat(self._root)
        if beat is not None:
            self._beat = beat
            self._tier.note = beat.problem or ""
        process = self._process
        if process is None:
            if not self._tier.uploader_alive():
                self._start()
            elif beat is not None and beat.age > SILENT_SECONDS and not self._told:
                self._told = True  # not our child: whether to end it is for its owner to say
                logger.warning(
                    "uploader %d of an earlier trainer holds %s but gives no sign of life; nothing "
                    "is mirrored until it has ended",
                    beat.pid,
                    self._root,
                )
            return
        status = process.poll()
        if status is None:
            silent, stuck = time.monotonic() - self._started, 0.0
            if beat is not None and beat.pid == process.pid:
                silent, stuck = beat.age, beat.stuck
            if silent > SILENT_SECONDS or stuck > STUCK_SECONDS:
                logger.warning(
                    "the uploader %d gave no sign of life for %.0f s and got nowhere for %.0f s; "
                    "it is ended",
                    process.pid,
                    silent,
                    silent + stuck,
                )
                process.kill()
            return
        self._process = None
        if status:
            logger.warning(
                "the uploader of %s ended (%s) and is started again in %.1f s; its log is %s",
                self._root,
                f"signal {-status}" if status < 0 else f"status {status}",
                self._pause,
                self._root / MIRROR / "uploader.log",
            )
        if time.monotonic() - self._started > 2 * LONGEST_PAUSE:
            self._pause = FIRST_PAUSE
        self._stop.wait(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _start(self) -> None:
        """Start an uploader in a session of its own, so that no signal to ours reaches it."""
        environment = dict(os.environ)
        environment.pop(OPTIONS_VARIABLE, None)
        if self._options is not None:
            environment[OPTIONS_VARIABLE] = self._options
        package = str(Path(__file__).resolve().parent.parent)
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, inherited)))
        log = os.open(
            self._root / MIRROR / "uploader.log",
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
        try:
            # -P: a directory that happens to be current must not shadow a module. No descriptor
            # but these three is passed on: a socket, pipe or device of the trainer would else
            # stay open after its death.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
                [sys.executable, "-P", "-m", "ckpt.upload", str(self._root)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=True,
                start_new_session=True,
            )
        finally:
            os.close(log)
        self._started = time.monotonic()
        logger.info("uploader %d started for %s", self._process.pid, self._root)


def _as_json(options: Mapping[str, Any] | None) -> str | None:
    if not options:
        return None
    try:
        return json.dumps(dict(options))
    except (TypeError, ValueError):
        msg = (
            "with a local tier the storage_options travel to the uploader as JSON; give values "
            "that JSON has, or leave credentials to the environment or a profile"
        )
        raise ConfigError(msg) from None
