"""What one node's own tier holds of a step: ``PART.json``, beside the step's manifest.

The manifest describes the whole step, wherever its files lie. A part says which of the files are
here, whether this tier's uploader writes the manifest at the root, and where here lie copies of
chunks that the manifest places in another node's file: values that all ranks hold alike, such as
an optimizer's step count. So a node that reads what it wrote needs no other one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from .envelope import Fields, seal, unseal
from .errors import DamagedError
from .manifest import StepManifest
from .types import Chunk, TensorRecord

PART_FORMAT: Final = "ckpt.part"
SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One tier's share of a step.

    Attributes:
        files: names of the files that are here, as in the manifest.
        coordinator: whether this tier's uploader writes the manifest at the root.
        copies: (tensor, chunk) for chunks that are here as well as where the manifest says.
    """

    files: tuple[str, ...]
    coordinator: bool
    copies: tuple[tuple[str, Chunk], ...] = ()

    def to_bytes(self) -> bytes:
        """The file ``PART.json``."""
        body = {
            "files": list(self.files),
            "coordinator": self.coordinator,
            "copies": copies_json(self.copies),
        }
        return seal(PART_FORMAT, SCHEMA, body)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Part:
        """Read and verify.

        Raises:
            DamagedError: anything that does not verify.
        """
        fields = Fields(unseal(data, PART_FORMAT, SCHEMA, where), where)
        files, coordinator = fields.raw("files"), fields.raw("coordinator")
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            fields.refuse("files", "must be a list of names", files)
        if not isinstance(coordinator, bool):
            fields.refuse("coordinator", "must be true or false", coordinator)
        copies = _parse_copies(fields)
        fields.done()
        return cls(tuple(files), coordinator, copies)

    def localised(self, manifest: StepManifest) -> StepManifest:
        """The manifest with chunks of files that are not here replaced by their copies.

        Raises:
            DamagedError: a copy lies outside its file or is not of the tensor's bytes.
        """
        sizes = {record.name: record.size for record in manifest.files}
        copies = {}
        for name, chunk in self.copies:
            if chunk.file not in self.files or not 0 <= chunk.start <= chunk.end <= sizes.get(
                chunk.file, -1
            ):
                raise DamagedError(f"a copy of {name} lies outside the files of this part")
            copies[name, chunk.offsets, chunk.sizes, chunk.end - chunk.start] = chunk
        return replace(
            manifest,
            tensors=tuple(
                replace(
                    tensor,
                    chunks=tuple(self._nearest(tensor.name, c, copies) for c in tensor.chunks),
                )
                for tensor in manifest.tensors
            ),
        )

    def _nearest(self, name: str, chunk: Chunk, copies: dict[Any, Chunk]) -> Chunk:
        if chunk.file in self.files:
            return chunk
        key = (name, chunk.offsets, chunk.sizes, chunk.end - chunk.start)
        return copies.get(key, chunk)


def copies_of(records: Iterable[TensorRecord]) -> tuple[tuple[str, Chunk], ...]:
    """(tensor, chunk) for every chunk of some records."""
    return tuple((record.name, chunk) for record in records for chunk in record.chunks)


def copies_json(copies: Iterable[tuple[str, Chunk]]) -> list[dict[str, Any]]:
    """Copies as JSON."""
    return [{"tensor": name, **asdict(chunk)} for name, chunk in copies]


def parse_copies(value: Any, where: str) -> tuple[tuple[str, Chunk], ...]:
    """Copies from JSON.

    Raises:
        DamagedError: it is something else.
    """
    return _parse_copies(Fields({"copies": value}, where))


def _parse_copies(fields: Fields) -> tuple[tuple[str, Chunk], ...]:
    copies = []
    for item in fields.objects("copies"):
        chunk = Chunk(
            offsets=item.integers("offsets"),
            sizes=item.integers("sizes"),
            file=item.path("file"),
            start=item.integer("start"),
            end=item.integer("end"),
        )
        copies.append((item.text("tensor"), chunk))
        item.done()
    return tuple(copies)
