"""``ckpt sync`` as a process of its own, and what it says about the last version that went live."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

RUN: Final = "bench"
POLL_S: Final = 0.05
"""Between two questions whether a version is live; when it went live, the answer says."""
STOP_SECONDS: Final = 30


class Sidecar:
    """Starts with the block, ends with it.

    Args:
        root: URL of the run's root; S3 credentials come from the environment.
        engine: its address, such as ``vllm+http://127.0.0.1:8000``.
        home: gets its cache and its log.
    """

    def __init__(self, root: str, engine: str, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        home.mkdir(parents=True)
        self._log = home / "sidecar.log"
        self._command = [
            *(sys.executable, "-c", "from ckpt.cli import main; main()", "sync", root),
            *("--run", RUN, "--engine", engine, "--cache", str(home / "cache")),
            *("--listen", f"127.0.0.1:{self._port}", "--holder", f"bench-{os.getpid()}"),
            *("--grace", "0", "--max-size", "1GiB"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_SECONDS)

    def until_live(self, name: str, timeout_s: float) -> dict[str, float]:
        """Times of the switch to a version, once it has been made.

        Raises:
            RuntimeError: it is not live in time, or the sidecar ended; carries its log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            switch = (self._ask() or {}).get("last_switch")
            if switch is not None and switch["version"] == name:
                return {key: float(value) for key, value in switch.items() if key != "version"}
            time.sleep(POLL_S)
        text = self._log.read_text(errors="replace")[-3000:]
        msg = f"{name} did not go live: {text}"
        raise RuntimeError(msg)

    def cpu_s(self) -> float:
        """Processor time that it has used so far, in seconds; steps of a clock tick."""
        if self._process is None:
            return 0.0
        text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _ask(self) -> dict[str, Any] | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/readyz")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except OSError:
            return None  # not listening yet
        finally:
            connection.close()
        return found
