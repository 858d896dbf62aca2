"""PEFT's form of adapters on stacked experts, read as one adapter for each expert.

With ``target_parameters`` PEFT adapts the tensors in which transformers 5 stacks experts: one for
the gate and up projections together, ``experts.gate_up_proj`` of ``(E, 2 F, D)``, and
``experts.down_proj`` of ``(E, D, F)``. Wrapped twice, the first one's factors are saved under
``experts.base_layer``, the second one's under ``experts``. For ``E`` experts and rank ``R``

- A is ``(E R, in)``, expert by expert: row ``e R + k`` is row ``k`` of expert ``e``;
- B is ``(out, R E)``, rank by rank: column ``k E + e`` is column ``k`` of expert ``e``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from .config import LoRAConfig
from .errors import AdapterMismatch, LoRAConfigError
from .peft_keys import Factor, parse_peft_key, peft_key
from .sites import AdapterSite

FUSED: Final = "gate_up_proj"
"""The stack of gate over up; the other one is called like the projection, ``down_proj``."""

_PARTS: Final[Mapping[str, str]] = {
    "gate_proj": FUSED,
    "up_proj": FUSED,
    "down_proj": "down_proj",
}
_EXPERT: Final = re.compile(r"(?P<block>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<projection>[^.]+)")
_SINCE: Final = (0, 19, 1)


class TensorReader(Protocol):
    """Where adapter tensors come from; a rank asks only for the part it holds."""

    def keys(self) -> Iterable[str]:
        """PEFT keys of all tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, one slice a dimension; slices may have steps."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one expert's factors lie in a stack.

    Attributes:
        a: key of the stack of A.
        b: key of the stack of B.
        parameter: HF name of the adapted tensor; patterns are matched with it.
        expert: the expert's number.
        experts: how many there are.
        width: ranks of the stack, R.
        first: first of them that is this projection's.
        rank: how many are.
        row: first row of B that is this projection's.
        rows: how many are.
    """

    a: str
    b: str
    parameter: str
    expert: int
    experts: int
    width: int
    first: int
    rank: int
    row: int
    rows: int

    def index(self, factor: Factor, wanted: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of one factor lies in the stack."""
        if factor == "A":
            start = self.expert * self.width + self.first
            return (_shifted(wanted[0], start), wanted[1])
        columns = _shifted(wanted[1], self.first)
        return (_shifted(wanted[0], self.row), self.columns(columns.start, columns.stop))

    def columns(self, first: int, last: int) -> slice:
        """The columns of ranks ``[first, last)`` of this expert."""
        if first >= last:
            return slice(0, 0)
        return slice(
            first * self.experts + self.expert,
            (last - 1) * self.experts + self.expert + 1,
            self.experts,
        )


class StackedAdapter:
    """An adapter whose experts are stacked, as a reader of one adapter for each expert.

    The gate and the up projection share the ranks of their stack. A model whose rank equals the
    stack's takes A for both and the halves of B; one of a lower rank takes the first half of the
    ranks for the gate and the second for the up projection, where the file keeps them apart (B is
    zero elsewhere), as PEFT does when it converts and as exports of this package are.

    Args:
        inner: the file's tensors.
        config: the file's ranks and scalings.
        parameters: its ``target_parameters``.
        sites: the live adapter, by HF name.

    Raises:
        AdapterMismatch: the stacks do not fit the live experts.
        LoRAConfigError: ``target_parameters`` names something else than stacked experts.
    """

    def __init__(
        self,
        inner: TensorReader,
        config: LoRAConfig,
        parameters: Sequence[str],
        sites: Mapping[str, AdapterSite],
    ) -> None:
        self._inner = inner
        self._config = config
        self._places: dict[str, _Place] = {}
        there = frozenset(inner.keys())
        blocks: dict[str, dict[str, tuple[re.Match[str], AdapterSite]]] = {}
        for hf, site in sites.items():
            match = None if site.index is None else _EXPERT.fullmatch(hf)
            if match is not None and match["projection"] in _PARTS:
                blocks.setdefault(match["block"], {})[hf] = (match, site)
        names = {f"{block}.{part}" for block in blocks for part in set(_PARTS.values())}
        for entry in parameters:
            if not any(_selects(entry, name) for name in names):
                msg = (
                    f"target_parameters entry {entry!r} is not supported: only the stacked experts "
                    "that this model adapts can take such adapters "
                    f"({', '.join(sorted(names)[:2]) or 'it adapts none'})"
                )
                raise LoRAConfigError(msg)
        for block, members in blocks.items():
            adapted = [
                part
                for part in (FUSED, "down_proj")
                if any(_selects(entry, f"{block}.{part}") for entry in parameters)
            ]
            for hf, (match, site) in members.items():
                part = _PARTS[match["projection"]]
                module = block if len(adapted) < 2 or part != FUSED else f"{block}.base_layer"
                keys = peft_key(module, "A"), peft_key(module, "B")
                if part in adapted and there.issuperset(keys):
                    self._places[hf] = self._place(keys, match, site, part)

    def _place(
        self, keys: tuple[str, str], match: re.Match[str], site: AdapterSite, part: str
    ) -> _Place:
        a, b = keys
        parameter = f"{match['block']}.{part}"
        experts, width = int(site.a.shape[0]), self._config.rank_for(parameter)
        rows = site.out_features * (2 if part == FUSED else 1)
        for key, wanted in ((a, (experts * width, site.in_features)), (b, (rows, width * experts))):
            if self._inner.shape(key) != wanted:
                msg = (
                    f"{key} has shape {self._inner.shape(key)}, but {experts} experts of the model "
                    f"and rank {width} of the stack want {wanted}"
                )
                raise AdapterMismatch(msg)
        halved = part == FUSED and site.rank < width
        if halved and (width % 2 or site.rank > width // 2):
            msg = (
                f"{a} gives gate and up projections {width} ranks together, the model has "
                f"{site.rank} for each: set rank to {width}"
            )
            raise AdapterMismatch(msg)
        rank = width // 2 if halved else width
        second = match["projection"] == "up_proj"
        return _Place(
            a=a,
            b=b,
            parameter=parameter,
            expert=int(match["number"]),
            experts=experts,
            width=width,
            first=rank if halved and second else 0,
            rank=rank,
            row=site.out_features if second else 0,
            rows=site.out_features,
        )

    def keys(self) -> list[str]:
        """The keys of single experts in place of those of the stacks."""
        stacks = {key for place in self._places.values() for key in (place.a, place.b)}
        plain = [key for key in self._inner.keys() if key not in stacks]  # noqa: SIM118 - no mapping
        return plain + [peft_key(hf, f) for hf in self._places for f in ("A", "B")]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one expert's factor, or of any other tensor."""
        place, factor = self._find(key)
        if place is None:
            return self._inner.shape(key)
        if factor == "A":
            return (place.rank, self._inner.shape(place.a)[1])
        return (place.rows, place.rank)

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """A part of one expert's factor, or of any other tensor.

        Raises:
            AdapterMismatch: the ranks of gate and up projections are not kept apart.
        """
        place, factor = self._find(key)
        if place is None:
            return self._inner.read(key, index)
        if factor == "A":
            return self._inner.read(place.a, place.index("A", index))
        if place.rank < place.width:
            rows = _shifted(index[0], place.row)
            # The gate has the first half of the ranks, so the second half must be zero, and so on.
            other = place.rank - place.first
            others = place.columns(other, other + place.rank)
            if torch.count_nonzero(self._inner.read(place.b, (rows, others))):
                msg = (
                    f"{place.b} mixes the ranks of gate and up projections, and the model has "
                    f"fewer than the {place.width} that it would need: set rank to {place.width}"
                )
                raise AdapterMismatch(msg)
        return self._inner.read(place.b, place.index("B", index))

    def rank_for(self, hf: str) -> int:
        """Rank that the file gives to a module."""
        place = self._places.get(hf)
        return self._config.rank_for(hf) if place is None else place.rank

    def scaling_for(self, hf: str) -> float:
        """Scaling that the file gives to a module."""
        place = self._places.get(hf)
        return self._config.scaling_for(hf if place is None else place.parameter)

    def _find(self, key: str) -> tuple[_Place | None, Factor]:
        hf, factor = parse_peft_key(key)
        return self._places.get(hf), factor


def check_layout(parameters: Sequence[str], version: object) -> None:
    """Refuse stacks whose layout is not the one described above.

    Args:
        parameters: the file's ``target_parameters``.
        version: its ``peft_version``.

    Raises:
        LoRAConfigError: written by a release that laid them out in another way, or by who knows.
    """
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if numbers is None or tuple(map(int, numbers.groups())) < _SINCE:
        wanted = ".".join(map(str, _SINCE))
        msg = (
            f"target_parameters={list(parameters)!r} with peft_version={version!r}: releases of "
            f"PEFT before {wanted} laid the factors of stacked experts out in another way; load "
            "the adapter with a newer one and save it again"
        )
        raise LoRAConfigError(msg)


def _selects(entry: str, name: str) -> bool:
    """Whether an entry of ``target_parameters`` means this tensor, as PEFT decides it."""
    return name == entry or name.endswith(f".{entry}")


def _shifted(place: slice, by: int) -> slice:
    return slice(place.start + by, place.stop + by)
