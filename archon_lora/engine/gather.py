"""Sharded tensors brought whole to the first rank, one at a time, over a gloo group.

``DTensor.full_tensor()`` would be shorter, but it gathers on the training mesh, which is often the
default group, and it makes the whole tensor on every rank. Here each rank says once which boxes of
which tensors it holds; then the owner of each box sends it, and only the first rank assembles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from archon_lora.errors import AdapterMismatch

from .agree import gather_json, rank_of


class _Box(NamedTuple):
    """A contiguous piece of a tensor (offsets and extents, one a dimension) and who sends it."""

    owner: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


class Whole(NamedTuple):
    """A tensor as all ranks together know it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[_Box, ...]


class Gather:
    """One pass over tensors that several ranks hold, each brought whole to the first rank.

    Making it is collective, and all ranks must iterate to the end, once. Ranks may hold different
    names (pipeline stages); a name that several ranks hold must have one shape and dtype.

    Args:
        tensors: DTensors of any placement without partial sums, or plain tensors, which count as
            replicas.
        group: a gloo group, or None for a single process.
        timeout: seconds to wait for the others at the start.

    Attributes:
        catalogue: shape and dtype of every tensor of any rank, by name, in the order of the pass,
            which is that of the names.

    Raises:
        AdapterMismatch: ranks disagree about a tensor, or their pieces do not cover it once.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, *, timeout: float
    ) -> None:
        self._tensors = tensors
        self._group = group
        self._rank = rank_of(group)
        held = gather_json(group, {n: _describe(t) for n, t in tensors.items()}, timeout=timeout)
        found = _catalogue(held)
        self.catalogue: dict[str, Whole] = {name: found[name] for name in sorted(found)}
        self._pass = self._run()

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """The rest of the pass: (name, tensor), the tensor None on all ranks but the first.

        The first rank gets a fresh contiguous CPU tensor each time, and holds one at a time unless
        the caller keeps them.
        """
        return self._pass

    def drain(self) -> None:
        """Take part in what is left of the pass and drop it, so that no other rank waits."""
        for _ in self._pass:
            pass

    def _run(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, whole in self.catalogue.items():
            if self._rank == 0:
                yield name, _assemble(name, whole, self._tensors.get(name), self._group)
                continue
            for box in whole.boxes:
                if box.owner == self._rank:
                    dist.send(as_bytes(_local(self._tensors[name])), group=self._group, group_dst=0)
            yield name, None


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 ``[bytes]``; gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The row-major bytes of a host tensor, as a copy of their own."""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        target = torch.frombuffer(data, dtype=torch.uint8)
        target.copy_(as_bytes(tensor.contiguous()))
    return memoryview(data)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        msg = f"{name!r} names no torch dtype"
        raise TypeError(msg)
    return dtype


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece, on the host and contiguous."""
    piece = tensor.detach()
    if isinstance(piece, DTensor):
        piece = piece.to_local()
    return piece.cpu().contiguous()


def _describe(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype and the boxes held here, as JSON."""
    if isinstance(tensor, DTensor):
        # DCP's own protocol for asking a tensor where its pieces lie.
        chunks = [
            (list(chunk.offsets), list(chunk.sizes))
            for chunk in tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            if math.prod(chunk.sizes) > 0
        ]
    else:
        chunks = [([0] * tensor.dim(), list(tensor.shape))]
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "chunks": chunks if tensor.numel() > 0 else [],
    }


def _catalogue(held: list[dict[str, dict[str, Any]]]) -> dict[str, Whole]:
    """Choose one owner per box: the lowest rank that holds it."""
    whole: dict[str, Whole] = {}
    for owner, names in enumerate(held):
        for name, entry in names.items():
            shape, dtype = tuple(entry["shape"]), dtype_named(entry["dtype"])
            known = whole.get(name, Whole(shape, dtype, ()))
            if (known.shape, known.dtype) != (shape, dtype):
                msg = (
                    f"{name} is {known.dtype} {known.shape} on an earlier rank, "
                    f"but {dtype} {shape} on rank {owner}"
                )
                raise AdapterMismatch(msg)
            boxes = {(b.offsets, b.sizes): b for b in known.boxes}
            for offsets, sizes in entry["chunks"]:
                box = _Box(owner, tuple(offsets), tuple(sizes))
                boxes.setdefault((box.offsets, box.sizes), box)
            whole[name] = Whole(shape, dtype, tuple(boxes.values()))
    for name, tensor in whole.items():
        _check_cover(name, tensor)
    return whole


def _check_cover(name: str, whole: Whole) -> None:
    """Refuse pieces that overlap or leave a hole: the file would hold wrong numbers."""
    held = sum(math.prod(box.sizes) for box in whole.boxes)
    if held == math.prod(whole.shape):
        if len(whole.boxes) <= 1:
            return
        filled = torch.zeros(whole.shape, dtype=torch.bool)
        for box in whole.boxes:
            filled[box.place] = True
        if bool(filled.all()):
            return
    boxes = ", ".join(f"rank {b.owner}: {b.offsets}+{b.sizes}" for b in whole.boxes)
    msg = f"the pieces of {name} do not cover its shape {whole.shape} exactly once ({boxes})"
    raise AdapterMismatch(msg)


def _assemble(
    name: str, whole: Whole, mine: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Receive the boxes of the other ranks and lay them next to this rank's own."""
    full = torch.empty(whole.shape, dtype=whole.dtype)
    for box in whole.boxes:
        if box.owner == 0:
            if mine is None:
                msg = f"{name} was announced by rank 0, which does not hold it"
                raise AdapterMismatch(msg)
            full[box.place] = _local(mine)
        else:
            piece = torch.empty(box.sizes, dtype=whole.dtype)
            dist.recv(as_bytes(piece), group=group, group_src=box.owner)
            full[box.place] = piece
    return full
