"""Services in processes of their own, which may be killed; started fast, by a warm server."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt.service import Limits, RootSpec, ServiceConfig
from ckpt.service.server import Service
from ckpt.storage.faultpoints import ENVIRONMENT
from support.warm_start import start


def _serve(root: str, options: Any, settings: Mapping[str, Any], told: str) -> None:
    config = ServiceConfig(
        [RootSpec.parse(root, options)],
        port=0,
        drain_s=2.0,
        limits=Limits(per_second=1e6, burst=10**6),
        **settings,
    )
    service = Service(config)

    def tell() -> None:
        while not service.started:
            time.sleep(0.01)
        Path(f"{told}.new").write_text(str(service.addresses[0][1]))
        Path(f"{told}.new").rename(told)

    threading.Thread(target=tell, daemon=True).start()
    service.run()


class Killable:
    """A service in a process."""

    def __init__(self, process: Any, port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"
        self.port = port

    def memory(self) -> int:
        """Bytes that it uses now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024

    def died(self, within_s: float = 30) -> bool:
        """Whether it was killed within the time."""
        self.process.join(within_s)
        return bool(self.process.exitcode == -signal.SIGKILL)


@contextmanager
def killable(
    root: str | Path,
    *,
    fault: str = "",
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Killable]:
    """A service that dies at a named point, or with the block."""
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        told = Path(folder, "port")
        environment = {ENVIRONMENT: fault} if fault else {}
        process = start(_serve, str(root), options, settings, str(told), environment=environment)
        try:
            deadline = time.monotonic() + 60
            while not told.exists() and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            yield Killable(process, int(told.read_text()))
        finally:
            process.kill()
            process.join(30)
            process.close()
