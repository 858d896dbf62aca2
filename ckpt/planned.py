"""What a PEFT file will consist of, tensor by tensor, before a byte of one is read."""

from __future__ import annotations

from dataclasses import dataclass

from .types import TensorRecord, TensorRule


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One PEFT tensor: the rule, the checkpoint tensor it is made from, and its final shape."""

    rule: TensorRule
    record: TensorRecord
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.rule.key


@dataclass(frozen=True, slots=True)
class PlannedStack:
    """One PEFT tensor for all experts of a layer.

    Attributes:
        key: its name in the file.
        side: ``"A"`` or ``"B"``.
        parts: for each expert the tensors that share its ranks in turn: of A one below the other,
            of B side by side, each on rows of its own.
        width: ranks of each expert.
        shape: ``(experts * width, in)`` for A, expert by expert; ``(out, width * experts)`` for B,
            rank by rank.
    """

    key: str
    side: str
    parts: tuple[tuple[PlannedTensor, ...], ...]
    width: int
    shape: tuple[int, ...]
