"""An engine that is an object: what a sidecar's rounds see, without sockets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.handoff.engine import AdapterRefused, EngineUnreachable


class MemoryEngine:
    """Answers a prompt by adapter; refuses what it is told to refuse.

    Attributes:
        loaded: path by name.
        loads: every load that was asked for, in order.
        refuses: names that it will not take.
        wrong: names under which it serves the base.
        away: whether it answers nothing.
    """

    kind = "vllm"

    def __init__(self, url: str = "http://127.0.0.1:1") -> None:
        self.url = url
        self.loaded: dict[str, str | None] = {}
        self.loads: list[str] = []
        self.refuses: set[str] = set()
        self.wrong: set[str] = set()
        self.away = False
        self.lives = 1

    def restart(self) -> None:
        self.loaded, self.lives = {}, self.lives + 1

    def _answer(self) -> None:
        if self.away:
            raise EngineUnreachable(self.url, "ask", "connection refused", "start it")

    def ready(self, timeout_s: float) -> None:
        self._answer()

    def adapters(self) -> dict[str, str | None]:
        self._answer()
        return dict(self.loaded)

    def load(self, name: str, path: str) -> None:
        self._answer()
        self.loads.append(name)
        assert (Path(path) / "adapter_config.json").is_file()
        if name in self.refuses:
            raise AdapterRefused(self.url, f"load {name}", "no such module", "lint it", status=400)
        self.loaded[name] = path

    def unload(self, name: str) -> None:
        self._answer()
        self.loaded.pop(name, None)

    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> list[float]:
        self._answer()
        shift = 0.0 if adapter is None or adapter in self.wrong else 0.1 * int(adapter[-4:])
        return [-1.0 - shift] * (len(token_ids) - 1)

    def incarnation(self) -> str | None:
        self._answer()
        return str(self.lives)

    def close(self) -> None:
        """Nothing is held."""
