"""What a trainer's state.json must look like, and objects that refuse their saved values."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from support.ranks_faults import Toy

from ckpt import CheckpointManager, StateError
from ckpt.errors import DamagedError
from ckpt.state_form import check_form


def form() -> tuple[dict[str, Any], list[Any]]:
    toy = Toy()
    toy.step()
    return toy.state.shared_values(toy.state.live()), [toy.state.rank_values()]


def test_what_is_saved_has_the_form() -> None:
    shared, ranks = form()
    assert check_form(shared, ranks, "x") == (shared, ranks)
    assert check_form({**shared, "optimizer": None}, ranks, "x")[0]["optimizer"] is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("shared.extra", []),
        ("shared.optimizer", 3),
        ("shared.optimizer.kind", None),
        ("shared.optimizer.groups", {}),
        ("shared.optimizer.groups", [{"lr": 1.0}]),
        ("shared.optimizer.groups", [{"params": "ab"}]),
        ("shared.optimizer.values", {"a": 1}),
        ("shared.optimizer.tensors", {"a": [1]}),
        ("shared.optimizer.tensors", {1: ["a"]}),
        ("ranks[0]", None),
        ("ranks[0].per_rank", []),
        ("ranks[0].rng", {}),
        ("ranks[0].rng.python", (3, (1, 2), None)),
        ("ranks[0].rng.torch", torch.zeros(3, dtype=torch.uint8)),
        ("ranks[0].rng.torch", "x"),
        ("ranks[0].rng.numpy", ("MT19937", [1], 0, 0, 0.0)),
        ("ranks[0].rng.cuda", [1]),
    ],
)
def test_another_form_is_damage_that_names_the_place(place: str, value: Any) -> None:
    shared, ranks = copy.deepcopy(form())
    before = random.getstate(), torch.get_rng_state()
    document: dict[str, Any] = {"shared": shared, "ranks[0]": ranks[0]}
    *path, last = place.split(".")
    inner: Any = document
    for part in path:
        inner = inner[part]
    inner[last] = value
    named = place if last not in {"python", "torch", "numpy"} else place.rpartition(".")[0]
    with pytest.raises(DamagedError, match="is not what a trainer saves there") as caught:
        check_form(document["shared"], [document["ranks[0]"]], "x")
    assert named in str(caught.value)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("ranks", [[], {}, None])
def test_there_is_a_rank(ranks: Any) -> None:
    with pytest.raises(DamagedError, match="ranks"):
        check_form(form()[0], ranks, "x")


def test_a_restore_checks_the_form(tmp_path) -> None:
    """The checksum of such a state.json is right; the older step is taken, with the reason."""
    toy = Toy()
    with CheckpointManager(tmp_path) as manager:
        toy.step()
        manager.save(1, toy.state)
        manager.wait()
        kept = toy.digest()
        toy.state.rank_values = lambda: {"rng": 1, "dataloader": None, "per_rank": {}}
        toy.step()
        manager.save(2, toy.state)
    fresh = Toy()
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(fresh.state) == 1
        (damaged,) = manager.last_restore.damaged
    assert "ranks[0].rng is not what a trainer saves there" in damaged.reason
    assert fresh.digest() == kept


def test_an_object_that_refuses_its_value_is_named(tmp_path, monkeypatch) -> None:
    toy = Toy()
    toy.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, toy.state)
    fresh = Toy()

    def refuse(_state: object) -> None:
        raise KeyError("shuffle")

    monkeypatch.setattr(fresh.position, "load_state_dict", refuse)
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(StateError, match=r"KeyError: 'shuffle'.*build it anew") as caught,
    ):
        manager.restore(fresh.state)
    assert isinstance(caught.value.__cause__, KeyError)
