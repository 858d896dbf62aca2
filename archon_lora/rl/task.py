"""Tasks with a verifiable reward: a program, not a model, judges a completion.

A task is a pure function of (seed, position): prompt number ``position`` is the same on every
rank, on every topology and after every resume.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from archon_lora.errors import TrainConfigError
from archon_lora.rl.config import TaskSection

KINDS: dict[str, Callable[[str], bool]] = {
    "digits": lambda c: c in string.digits,
    "lower": lambda c: c in string.ascii_lowercase,
    "upper": lambda c: c in string.ascii_uppercase,
    "vowels": lambda c: c in "aeiouAEIOU",
    "punctuation": lambda c: c in string.punctuation,
}
"""Kinds of characters by name, each with the test for one character."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answer's key, which only the reward reads."""

    prompt: str
    key: str


class Task(Protocol):
    """What a loop needs to know of a task."""

    def question(self, position: int) -> Question:
        """Question number ``position`` (from 0, without end)."""
        ...

    def reward(self, question: Question, completion: str) -> float:
        """How well the completion answers, from 0 to 1."""
        ...


@dataclass(frozen=True, slots=True)
class KindsTask:
    """Write ``length`` characters of the kind that the prompt names.

    The reward is the fraction of right characters, so that even a small random model sees a
    gradient from the first step. A text longer than asked counts by its own length.
    """

    kinds: tuple[str, ...]
    length: int

    def question(self, position: int) -> Question:
        """The kinds in turn."""
        kind = self.kinds[position % len(self.kinds)]
        return Question(prompt=f"{self.length} {kind}: ", key=kind)

    def reward(self, question: Question, completion: str) -> float:
        """Right characters over the number asked for."""
        right = sum(map(KINDS[question.key], completion))
        return right / max(self.length, len(completion))


@dataclass(frozen=True, slots=True)
class AdditionTask:
    """Write the sum of two numbers; the reward is 1 for the right number, else 0."""

    digits: int
    seed: int

    def question(self, position: int) -> Question:
        """Summands drawn from a hash of (seed, position)."""
        digest = hashlib.sha256(f"addition:{self.seed}:{position}".encode()).digest()
        limit = 10**self.digits
        left = int.from_bytes(digest[:8], "big") % limit
        right = int.from_bytes(digest[8:16], "big") % limit
        return Question(prompt=f"{left}+{right}=", key=str(left + right))

    def reward(self, question: Question, completion: str) -> float:
        """Whether the first number in the completion is the sum."""
        found = re.search(r"-?\d+", completion)
        return float(found is not None and int(found.group()) == int(question.key))


def make_task(section: TaskSection, *, seed: int) -> Task:
    """The task that the config names.

    Raises:
        TrainConfigError: an unknown kind, or none.
    """
    if section.name == "addition":
        return AdditionTask(digits=section.digits, seed=seed)
    for kind in section.kinds:
        if kind not in KINDS:
            msg = f"task.kinds: unknown kind {kind!r}; the kinds are {', '.join(KINDS)}"
            raise TrainConfigError(msg)
    if not section.kinds:
        msg = f"task.kinds must name at least one of {', '.join(KINDS)}, got none"
        raise TrainConfigError(msg)
    return KindsTask(kinds=section.kinds, length=section.length)
