"""A stand-in for a vLLM or SGLang server: a process of its own, real sockets, no model needed.

Use::

    with FakeEngine("vllm") as engine:          # or "sglang"
        driver = open_engine(engine.address)    # vllm+http://127.0.0.1:<port>
        ...
        engine.faults({"at": "load", "do": "base", "times": 1})
        engine.restart()                        # same port; adapters are forgotten

It speaks the requests that the drivers send and the ones that rollouts need (``/v1/completions``
with token ids, ``/generate``), with the answers that vLLM 0.32 and SGLang 0.5.23 gave to them:

- vLLM: 200 for a load whose keys match no module, and then the base's answers; 400 for a name on
  the list; 404 without an adapter at the path; 500 with masked paths for a rank above the limit or
  a key that is none. Log-probabilities are of temperature 1.
- SGLang: 400 for a name on the list; a rank that lies or half a pair loads with 200 and ends the
  process at first use; a request that names an unloaded adapter reads its directory again; over
  ``max_loaded`` the adapter used least recently goes, without a word; unloading waits for
  requests. Log-probabilities of new tokens are of the sampling temperature.

Answers come from the prompt's and the adapter's bytes; ``engine.expected(ids, directory)`` gives
what it will say, for a probe. With ``model=DIR`` a real Qwen2 answers (fp32, adapter merged).

A fault is a dict: ``at`` (``load``, ``unload``, ``models``, ``generate``, ``health``,
``incarnation``, ``any``: every request), ``do``, and optionally ``name`` (of one adapter),
``times`` (how often; for ever without it) and ``after`` (do the work first, then fail). What to do:

- anywhere: ``error`` (``status``, 500 without it), ``hang`` (``seconds``, then go on), ``drop``
  (the connection), ``die`` (the process);
- at ``load``, each with a 200: ``base`` (serve the base), ``other`` (serve the adapter in
  ``path``), ``half`` (serve half of the tensors), ``unlisted`` (do not list it);
- at ``answer``: ``nan`` (NaN from now on, also for the base).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from support.engine_brains import make_brain, prompt_logprobs

START_SECONDS = 60


class FakeEngine:
    """Starts with the ``with`` block, ends with it."""

    def __init__(
        self,
        kind: str,
        *,
        model: str | Path | None = None,
        api_key: str | None = None,
        max_lora_rank: int = 16,
        max_loaded: int | None = None,
    ) -> None:
        self.kind, self.port = kind, 0
        self._model = None if model is None else str(model)
        self._options = ["--kind", kind, "--max-lora-rank", str(max_lora_rank)]
        if self._model is not None:
            self._options += ["--model", self._model]
        if api_key is not None:
            self._options += ["--api-key", api_key]
        if max_loaded is not None:
            self._options += ["--max-loaded", str(max_loaded)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FakeEngine:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        """What ``open_engine`` and ``ckpt sync --engine`` take."""
        return f"{self.kind}+{self.url}"

    def start(self) -> None:
        """Start the process; the port stays the same over its lives."""
        here = Path(__file__).resolve().parents[1]
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "support.engine_server", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self.kill()
            raise RuntimeError(f"the stand-in did not start on port {self.port}")
        self.port = int(line)

    def kill(self) -> None:
        """End the process at once, as SIGKILL does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it again; adapters, faults and the log are forgotten."""
        self.kill()
        self.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_for_end(self, timeout: float = 30) -> None:
        """Until a process that is about to end by itself has."""
        self._process.wait(timeout=timeout)

    def faults(self, *faults: dict[str, Any]) -> None:
        """Replace the faults; none clears them."""
        self._post("/_faults", list(faults))

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """POST requests so far, each with ``path`` and ``body``; of one path, or of all."""
        log = json.loads(self._post("/_log", {}))
        return [item for item in log if path in (None, item["path"])]

    def expected(self, ids: list[int], directory: str | Path | None) -> list[float]:
        """What it answers for a prompt under the adapter in a directory, or the base."""
        return prompt_logprobs(make_brain(self._model), list(ids), directory, self.kind)

    def _post(self, path: str, body: Any) -> bytes:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()
