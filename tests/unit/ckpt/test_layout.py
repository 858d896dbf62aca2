"""Names on storage: made from checked numbers, recognised strictly."""

from __future__ import annotations

import re

import pytest

from ckpt import layout
from ckpt.errors import ConfigError


def test_the_names_of_the_format() -> None:
    assert layout.writer_path(3) == "writers/0003.json"
    assert layout.step_dir(42, 3) == "steps/step-00000042.w0003"
    assert layout.tmp_step_dir(42, "abcd1234") == "steps/.tmp-00000042-abcd1234"
    assert layout.shard_name(0, 2) == "shard-00000-of-00002.safetensors"
    assert layout.version_dir("run7", 42) == "adapters/run7-v00000042"
    assert layout.claim_path("run7", 42) == "adapters/run7-v00000042.claim.json"
    assert layout.tmp_version_dir("run7-v00000042", "abcd") == "adapters/.tmp-run7-v00000042-abcd"
    assert layout.trash_path("steps/step-00000042.w0003") == "steps/.trash-step-00000042.w0003"
    assert layout.trash_path("x") == ".trash-x"
    assert layout.lease_path("run7-v00000042", "vllm-0") == "leases/run7-v00000042/vllm-0.json"


@pytest.mark.parametrize("step", [0, 1, 99_999_999])
@pytest.mark.parametrize("epoch", [1, 9_999])
def test_steps_parse_back(step: int, epoch: int) -> None:
    assert layout.parse_step_dir(layout.step_dir(step, epoch)) == (step, epoch)
    assert layout.parse_step_dir(layout.step_name(step, epoch)) == (step, epoch)


@pytest.mark.parametrize(
    "name",
    [
        "step-42.w0003",
        "step-00000042",
        "step-00000042.w0000",
        "step-00000042.w00003",
        "step-000000042.w0003",
        "step-0000004２.w0003",  # noqa: RUF001 - a full-width digit is what is tested
        ".trash-step-00000042.w0003",
        "step-00000042.w0003/x",
        "step-00000042.w0003\n",
        "adapters/step-00000042.w0003",
    ],
)
def test_foreign_step_names_are_not_ours(name: str) -> None:
    assert layout.parse_step_dir(name) is None


def test_other_names_parse_back() -> None:
    assert layout.parse_writer("0003.json") == 3
    assert layout.parse_writer("0000.json") is None
    assert layout.parse_writer("3.json") is None
    assert layout.parse_writer(".tmp-0003.json") is None
    assert layout.parse_tmp_step_dir("steps/.tmp-00000042-abcd1234") == (42, "abcd1234")
    assert layout.parse_tmp_step_dir("steps/.tmp-42-abcd1234") is None
    assert layout.parse_shard_name("shard-00001-of-00002.safetensors") == (1, 2)
    assert layout.parse_shard_name("shard-00002-of-00002.safetensors") is None
    assert layout.parse_shard_name("shard-00000-of-00000.safetensors") is None
    assert layout.parse_version_name("a-v1-v00000042") == ("a-v1", 42)
    assert layout.parse_version_name("-v00000042") is None
    assert layout.parse_version_name("run7-v42") is None
    assert layout.parse_claim("run7-v00000042.claim.json") == ("run7", 42)
    assert layout.parse_claim("run7-v00000042") is None


@pytest.mark.parametrize("step", [-1, 100_000_000, True, 1.0, "1", None])
def test_a_step_number_is_checked(step: object) -> None:
    with pytest.raises(ConfigError, match="step must be an integer from 0 to 99999999, got"):
        layout.step_dir(step, 1)


@pytest.mark.parametrize("epoch", [0, 10_000, True])
def test_an_epoch_is_checked(epoch: object) -> None:
    with pytest.raises(ConfigError, match="writer epoch must be"):
        layout.step_dir(1, epoch)


@pytest.mark.parametrize(
    "run", ["", "-run", "_run", "a/b", "../a", "a.b", "ä", "a" * 101, "a\n", 3]
)
def test_a_run_name_is_checked(run: object) -> None:
    with pytest.raises(ConfigError, match="run name must be"):
        layout.version_dir(run, 1)


def test_a_version_name_may_not_grow_too_long() -> None:
    assert len(layout.version_name("a" * 90, 1)) == 100
    with pytest.raises(ConfigError, match="run name must be at most 90 characters"):
        layout.version_name("a" * 91, 1)


@pytest.mark.parametrize("attempt", ["", "abc", "ABCD", "ab/cd", "a" * 65, None])
def test_an_attempt_is_checked(attempt: object) -> None:
    with pytest.raises(ConfigError, match="attempt must be"):
        layout.tmp_step_dir(1, attempt)


def test_attempts_are_fresh_and_valid() -> None:
    attempts = {layout.check_attempt(layout.new_attempt()) for _ in range(100)}
    assert len(attempts) == 100


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0), (0, 100_000)])
def test_ranks_are_checked(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match="must be an integer from"):
        layout.shard_name(rank, world)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "is empty"),
        ("/a", "is absolute"),
        ("a\\b", "contains a backslash"),
        ("a\0b", "unprintable"),
        ("a\ud800", "unprintable"),
        ("a/../b", r"'\.\.'"),
        ("..", r"'\.\.'"),
        ("./a", r"'\.'"),
        ("a//b", "''"),
        ("a/", "''"),
        ("a" * 256, "255 bytes"),
        ("ä" * 200, "255 bytes"),
        ("a/" * 600 + "a", "1024"),
        (7, "not text"),
    ],
)
def test_unsafe_paths_are_named(path: object, problem: str) -> None:
    found = layout.path_problem(path)
    assert found is not None
    assert re.search(problem, found)


@pytest.mark.parametrize("path", ["a", "a/b", "...", "a..b/c", ".tmp-x", "ä b", "attempt/x.bin"])
def test_safe_paths_pass(path: str) -> None:
    assert layout.path_problem(path) is None
