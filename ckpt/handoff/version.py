"""A published adapter as readers see it."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.layout import version_dir
from ckpt.manifest import VersionManifest
from ckpt.types import BaseIdentity, FileRecord

from .probe import Probe


@dataclass(frozen=True, slots=True)
class Version:
    """A published adapter, as its manifest describes it: immutable.

    Attributes:
        run: first part of its name.
        number: its number; numbers of a run only grow.
        name: ``<run>-v<number>``, never used twice.
        url: its directory: a path, or the URL of a prefix.
        step: the training step it is from, if any.
        policy_version: the trainer's count of policy updates, if any.
        epoch: the writer's epoch.
        adapter_sha256: of ``adapter_model.safetensors``.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        base: the base model it belongs to, if known.
        created: ISO 8601, UTC.
        files: its two adapter files.
        probe: what an engine must answer once it has the version loaded, if recorded.
    """

    run: str
    number: int
    name: str
    url: str
    step: int | None
    policy_version: int | None
    epoch: int
    adapter_sha256: str
    dtype: str
    base: BaseIdentity | None
    created: str
    files: tuple[FileRecord, ...]
    probe: Probe | None

    @property
    def bytes(self) -> int:
        """Size of the adapter files."""
        return sum(file.size for file in self.files)

    @classmethod
    def of(cls, manifest: VersionManifest, root_url: str) -> Version:
        """The version of a verified manifest in the root with that URL.

        Raises:
            DamagedError: its probe cannot be read.
        """
        run = manifest.name[: manifest.name.rindex("-v")]
        url = f"{root_url}/{version_dir(run, manifest.number)}"
        record = manifest.probe
        return cls(
            run=run,
            number=manifest.number,
            name=manifest.name,
            url=url,
            step=manifest.step,
            policy_version=manifest.policy_version,
            epoch=manifest.epoch,
            adapter_sha256=manifest.adapter_sha256,
            dtype=manifest.dtype,
            base=manifest.base,
            created=manifest.created,
            files=manifest.files,
            probe=None if record is None else Probe.from_dict(record, f"{url}: probe"),
        )
