"""Rewards are computed by a rule that anybody can check by hand."""

import pytest

from archon_lora.errors import TrainConfigError
from archon_lora.rl.config import TaskSection
from archon_lora.rl.task import KINDS, KindsTask, Question, make_task


def test_kinds_are_asked_in_turn():
    task = KindsTask(kinds=("digits", "upper"), length=5)
    assert [task.question(i).key for i in range(4)] == ["digits", "upper", "digits", "upper"]
    assert task.question(0).prompt == "5 digits: "


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("12345", 1.0),
        ("1234a", 0.8),
        ("", 0.0),
        ("12", 0.4),  # too short: what is missing counts as wrong
        ("1234567890", 1.0),
        ("12345abcde", 0.5),  # too long: judged by its own length
        ("٣٤٥٦٧", 0.0),  # digits of another script are not what is asked
    ],
)
def test_the_reward_is_the_fraction_of_right_characters(completion, reward):
    task = KindsTask(kinds=("digits",), length=5)
    assert task.reward(task.question(0), completion) == reward


def test_every_kind_accepts_its_own_and_refuses_others():
    right = {"digits": "7", "lower": "q", "upper": "Q", "vowels": "e", "punctuation": "?"}
    assert set(right) == set(KINDS)
    for name, accept in KINDS.items():
        assert accept(right[name])
        assert not accept(" ")


def test_addition_is_right_or_wrong():
    task = make_task(TaskSection(name="addition", digits=2), seed=3)
    question = task.question(11)
    assert question == task.question(11)
    left, right = question.prompt.rstrip("=").split("+")
    assert question.key == str(int(left) + int(right))
    assert task.reward(question, f" {question.key}\n") == 1.0
    assert task.reward(question, f"{question.key}0") == 0.0
    assert task.reward(question, "none") == 0.0
    assert task.reward(Question("7+5=", "12"), "12 or 13") == 1.0


def test_addition_depends_on_the_seed():
    a, b = (make_task(TaskSection(name="addition", digits=4), seed=s) for s in (0, 1))
    assert [a.question(i) for i in range(8)] != [b.question(i) for i in range(8)]


def test_unknown_kinds_are_refused():
    with pytest.raises(TrainConfigError, match=r"task.kinds: unknown kind 'runes'"):
        make_task(TaskSection(kinds=("digits", "runes")), seed=0)
    with pytest.raises(TrainConfigError, match=r"task.kinds must name at least one"):
        make_task(TaskSection(kinds=()), seed=0)
