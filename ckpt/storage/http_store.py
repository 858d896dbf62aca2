"""A root behind a service, read like any other root.

What is read are the root's own documents and files, so every reader verifies them here, by the
manifests, as it does on a disk. Nothing is written through it but leases, pins and replica records,
which the service has operations for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from ckpt.errors import ConfigError, NoCheckpoint, ObjectNotFound, ReadOnly, StorageError
from ckpt.layout import REPLICAS, parse_replica

from .base import Buffer, Entry
from .http_session import Address, HttpSession, quoted
from .paths import as_views, checked_path
from .traffic import Traffic

WAIT_S: Final = 30.0
"""Longest time for which a service is asked to wait at once."""


class ServedStorage:
    """A root that a service serves.

    Args:
        url: address of the service, or of one of its runs.
        options: ``token`` or ``token_file`` (else ``CKPT_TOKEN``, ``CKPT_TOKEN_FILE``),
            ``timeout_s``.

    Raises:
        ConfigError: an unusable address or option.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._given, self._options = url, dict(options)
        self._address = Address.parse(url)
        self.session = HttpSession(self._address, options)
        self._run = self._address.run
        self._renames: bool | None = None

    def __repr__(self) -> str:
        return f"ServedStorage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections do not travel to another process; the settings do."""
        return type(self), (self._given, self._options)

    @property
    def url(self) -> str:
        """Address of the service, with the run if it was named."""
        run = "" if self._run is None else f"/runs/{self._run}"
        return f"{self._address.base}{run}"

    @property
    def run(self) -> str:
        """The run's name in the service.

        Raises:
            ConfigError: the service has several, and none is named.
            StorageError: it does not answer.
        """
        if self._run is None:
            rows = self.session.get("/v1/runs", f"runs of {self._address.base}").json()["runs"]
            names = [row["run"] for row in rows]
            if len(names) != 1:
                shown = ", ".join(names[:5])
                msg = (
                    f"{self._address.base} serves {len(names)} runs ({shown}); name one: "
                    f"{self._address.base}/runs/NAME"
                )
                raise ConfigError(msg)
            self._run = str(names[0])
        return self._run

    @property
    def has_rename(self) -> bool:
        """Whether the root itself lies on a file system."""
        if self._renames is None:
            row = self.session.get(f"/v1/runs/{self.run}", f"run {self.run}").json()
            self._renames = bool(row["has_rename"])
        return self._renames

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes so far."""
        return self.session.meter.read()

    def local_path(self, path: str) -> Path | None:
        """None."""
        return None

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self.session.close()

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` of a file."""
        if end is not None and not 0 <= start <= end:
            raise StorageError(f"{self._show(path)}: {start} to {end} is not a range of bytes")
        if end == start:
            if end > self.size(path):
                raise StorageError(f"{self._show(path)}: too short: wanted bytes up to {end}")
            return b""
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        answer = self.session.get(
            self._file(path), self._show(path), headers=headers, fine=frozenset({416})
        )
        data = answer.content
        if answer.status_code == 416 or (end is not None and len(data) != end - start):
            if end is None:
                return b""
            raise StorageError(f"{self._show(path)}: too short: wanted bytes up to {end}")
        return data

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of a file from ``start`` on."""
        view = target.cast("B")
        view[:] = self.read(path, start, start + len(view))

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        answer = self.session.request("HEAD", self._file(path), self._show(path))
        return int(answer.headers["content-length"])

    def exists(self, path: str) -> bool:
        """Whether a file lies at the path."""
        try:
            self.size(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, path: str) -> list[Entry]:
        """Immediate children, sorted by name; unfinished work is not among them."""
        where = f"/v1/runs/{self.run}/entries/{quoted(checked_path(path))}"
        rows = self.session.get(where, self._show(path)).json()["entries"]
        return [Entry(row["name"], row["is_dir"], row["bytes"]) for row in rows]

    def newest(self, run_name: str | None) -> bytes | None:
        """The sealed manifest of the newest whole version, or None if there is none."""
        try:
            answer = self.session.get(
                f"/v1/runs/{self.run}/latest",
                f"newest version of {self.url}",
                params={"run_name": run_name},
            )
        except NoCheckpoint:
            return None
        return str(answer.json()["manifest"]).encode()

    def newer(self, run_name: str | None, number: int, wait_s: float) -> bytes | None:
        """The sealed manifest of the newest version above a number, as soon as there is one.

        Args:
            run_name: of which run, or None for the only one.
            number: -1 stands below all.
            wait_s: after so long, or :data:`WAIT_S`, None is the answer.
        """
        wait_s = min(wait_s, WAIT_S)
        answer = self.session.get(
            f"/v1/runs/{self.run}/wait",
            f"versions of {self.url}",
            params={
                "run_name": run_name,
                "newer_than": None if number < 0 else number,
                "timeout_s": f"{max(0.0, wait_s):.3f}",
            },
            wait_s=wait_s,
        )
        return None if answer.status_code == 204 else str(answer.json()["manifest"]).encode()

    def take_lease(self, version: str, holder: str, ttl_s: float) -> tuple[str, str]:
        """Take or renew a lease; when it was renewed and until when it holds."""
        answer = self.session.request(
            "PUT", self._lease(version, holder), f"lease of {version}", json={"ttl_s": ttl_s}
        ).json()
        return str(answer["renewed"]), str(answer["expires"])

    def release_lease(self, version: str, holder: str) -> None:
        """Give a lease back."""
        self.session.request("DELETE", self._lease(version, holder), f"lease of {version}")

    def put_pin(self, name: str, note: str) -> tuple[str, str]:
        """Pin a step or version; on which machine and when that was recorded."""
        answer = self.session.request(
            "PUT", f"/v1/runs/{self.run}/pins/{name}", f"pin of {name}", json={"note": note}
        ).json()
        return str(answer["host"]), str(answer["created"])

    def delete_pin(self, name: str) -> bool:
        """Take a pin away; whether there was one."""
        path = f"/v1/runs/{self.run}/pins/{name}"
        answer = self.session.request("DELETE", path, f"pin of {name}", fine=frozenset({404}))
        return answer.status_code != 404

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """What a sidecar says of its engines; nothing else can be written from here."""
        holder = parse_replica(path.removeprefix(f"{REPLICAS}/"))
        if holder is None or not path.startswith(f"{REPLICAS}/"):
            self._refuse(path)
        where = f"/v1/runs/{self.run}/replicas/{holder}"
        body = b"".join(as_views(data))
        headers = {"Content-Type": "application/json"}
        self.session.request("PUT", where, self._show(path), content=body, headers=headers)

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Not possible here."""
        self._refuse(path)

    def put_new(self, path: str, data: Buffer) -> None:
        """Not possible here."""
        self._refuse(path)

    def delete(self, path: str) -> None:
        """As :meth:`put`."""
        holder = parse_replica(path.removeprefix(f"{REPLICAS}/"))
        if holder is None or not path.startswith(f"{REPLICAS}/"):
            self._refuse(path)
        where = f"/v1/runs/{self.run}/replicas/{holder}"
        self.session.request("DELETE", where, self._show(path))

    def delete_tree(self, path: str) -> None:
        """Not possible here."""
        self._refuse(path)

    def rename_dir(self, source: str, target: str) -> None:
        """Not possible here."""
        self._refuse(source)

    def _refuse(self, path: str) -> NoReturn:
        msg = (
            f"{self._show(path)}: a root behind a service is only read; run this where the root "
            "itself can be reached"
        )
        raise ReadOnly(msg)

    def _file(self, path: str) -> str:
        return f"/v1/runs/{self.run}/files/{quoted(checked_path(path))}"

    def _lease(self, version: str, holder: str) -> str:
        return f"/v1/runs/{self.run}/versions/{version}/leases/{holder}"

    def _show(self, path: str) -> str:
        return f"{self.url}/{path}"
