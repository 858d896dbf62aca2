"""What a root holds: states of steps, choice of a step, checks of bytes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from support.steps import tiny_adapter, write_step, write_writer

from ckpt.catalog import check_step, find_step, list_steps, read_lineage, read_writers
from ckpt.errors import DamagedError, NoCheckpoint
from ckpt.layout import MANIFEST, STATE
from ckpt.storage import Storage, open_storage

TENSORS, EXPORT = tiny_adapter()
SHARD = "shard-00001-of-00002.safetensors"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def states(storage: Storage) -> dict[tuple[int, int], str]:
    return {(entry.step, entry.epoch): entry.state for entry in list_steps(storage)}


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_an_empty_root(storage: Storage) -> None:
    assert list_steps(storage) == []
    assert read_writers(storage) == []
    with pytest.raises(NoCheckpoint, match="no steps in"):
        find_step(storage)


def test_what_later_writers_left_behind_is_abandoned(storage: Storage) -> None:
    for step in (10, 20, 30):
        write_step(storage, step, TENSORS)
    write_writer(storage, 2, parent=(20, 1))
    write_step(storage, 25, TENSORS, epoch=2)
    assert states(storage) == {
        (10, 1): "committed",
        (20, 1): "committed",
        (25, 2): "committed",
        (30, 1): "abandoned",
    }
    assert [record.epoch for record in read_writers(storage)] == [1, 2]
    assert find_step(storage).step == 25
    assert find_step(storage, 10).epoch == 1
    message = r"step 30 of .* was abandoned: .*epochs with that step: 1"
    with pytest.raises(NoCheckpoint, match=message):
        find_step(storage, 30)
    taken = find_step(storage, 30, epoch=1)
    assert (taken.step, taken.state) == (30, "abandoned")


def test_the_newest_try_at_a_step_that_counts_is_taken(storage: Storage) -> None:
    write_step(storage, 10, TENSORS)
    write_step(storage, 20, TENSORS)
    write_writer(storage, 2, parent=(10, 1))
    write_step(storage, 20, TENSORS, epoch=2)
    assert find_step(storage, 20).epoch == 2
    assert find_step(storage, 20, epoch=1).state == "abandoned"
    write_writer(storage, 3, parent=(20, 2))
    write_step(storage, 20, TENSORS, epoch=3)
    assert states(storage)[20, 2] == "committed"
    assert find_step(storage, 20).epoch == 3
    assert find_step(storage, 20, epoch=2).epoch == 2


def test_entries_know_their_size_and_content(storage: Storage) -> None:
    manifest = write_step(storage, 1, TENSORS, world=2, export=EXPORT, policy_version=5)
    (entry,) = list_steps(storage)
    assert entry.manifest == manifest
    assert entry.bytes == sum(file.size for file in manifest.files)
    assert entry.problem is None


def test_damage_is_seen_and_passed_over(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 7):
        write_step(storage, step, TENSORS, world=2)
    steps = tmp_path / "steps"
    flip(steps / "step-00000006.w0001" / MANIFEST, 40)
    (steps / "step-00000005.w0001" / SHARD).unlink()
    with (steps / "step-00000004.w0001" / SHARD).open("ab") as file:
        file.write(b"x")
    (steps / "step-00000003.w0001" / MANIFEST).unlink()
    shutil.copy(steps / "step-00000001.w0001" / MANIFEST, steps / "step-00000002.w0001" / MANIFEST)
    problems = {entry.step: entry.problem for entry in list_steps(storage)}
    assert states(storage) == {(1, 1): "committed"} | {(n, 1): "damaged" for n in range(2, 7)}
    assert problems[1] is None
    assert "its manifest is that of step 1, writer 1" in str(problems[2])
    assert "no MANIFEST.json" in str(problems[3])
    assert f"step-00000004.w0001/{SHARD} has " in str(problems[4])
    assert f"step-00000005.w0001/{SHARD} is missing" in str(problems[5])
    assert "step-00000006.w0001/MANIFEST.json" in str(problems[6])
    with caplog.at_level(logging.WARNING):
        assert find_step(storage).step == 1
    assert sum("passing over damaged step" in line for line in caplog.messages) == 5
    with pytest.raises(DamagedError, match=r"step 5 of .* is damaged: .* is missing"):
        find_step(storage, 5)
    shutil.rmtree(steps / "step-00000001.w0001")
    with pytest.raises(NoCheckpoint, match=r"none of the 5 step\(s\)"):
        find_step(storage)


def test_a_step_that_is_not_there_says_what_is(storage: Storage) -> None:
    for step in range(1, 11):
        write_step(storage, step, TENSORS)
    with pytest.raises(NoCheckpoint, match=r"no step 77 in .*; newest steps: 10, 9, .* 3, …"):
        find_step(storage, 77)
    with pytest.raises(NoCheckpoint, match="no step 5 by writer 3"):
        find_step(storage, 5, epoch=3)


def test_foreign_names_are_no_steps(storage: Storage, tmp_path: Path) -> None:
    write_step(storage, 1, TENSORS)
    for name in (".tmp-00000002-abcdef", "step-2", "step-00000002.w0000", ".trash-step"):
        (tmp_path / "steps" / name).mkdir()
    (tmp_path / "steps" / "step-00000009.w0001").write_text("a file")
    (tmp_path / "writers" / "notes.txt").write_text("x")
    assert states(storage) == {(1, 1): "committed"}


@pytest.mark.parametrize("kind", ["flipped", "swapped"])
def test_a_damaged_writer_record_hides_what_lies_behind_it(
    storage: Storage, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_step(storage, 1, TENSORS)
    write_writer(storage, 2, parent=(1, 1))
    write_step(storage, 2, TENSORS, epoch=2)
    record = tmp_path / "writers" / "0002.json"
    if kind == "flipped":
        flip(record, 30)
    else:
        record.write_bytes((tmp_path / "writers" / "0001.json").read_bytes())
    assert states(storage) == {(1, 1): "abandoned", (2, 2): "committed"}
    assert "writers/0002.json" in caplog.text
    assert read_lineage(storage, [(1, 1), (2, 2)]) == ([(2, 2)], {(1, 1)})
    with pytest.raises(DamagedError, match=r"writers/0002\.json"):
        read_writers(storage)


def test_a_lost_record_of_a_pruned_writer_hides_what_is_older(storage: Storage) -> None:
    for epoch, parent in ((1, None), (3, (2, 2))):
        write_writer(storage, epoch, parent=parent)
        write_step(storage, epoch, TENSORS, epoch=epoch)
    assert read_lineage(storage, [(1, 1), (3, 3)]) == ([(3, 3)], {(1, 1)})


def test_a_damaged_record_of_a_writer_without_steps_is_an_error(
    storage: Storage, tmp_path: Path
) -> None:
    write_step(storage, 1, TENSORS)
    write_writer(storage, 2, parent=(1, 1))
    flip(tmp_path / "writers" / "0002.json", 30)
    with pytest.raises(DamagedError, match=r"writers/0002\.json.*Delete the record"):
        list_steps(storage)


def test_a_directory_named_after_a_writer_that_never_was_counts_for_nothing(
    storage: Storage, tmp_path: Path
) -> None:
    write_step(storage, 1, TENSORS)
    steps = tmp_path / "steps"
    shutil.copytree(steps / "step-00000001.w0001", steps / "step-00000001.w0007")
    assert read_lineage(storage, [(1, 1), (1, 7)]) == ([(1, 1)], frozenset())


def test_without_rename_a_missing_manifest_means_incomplete(tmp_path: Path) -> None:
    storage = open_storage(f"memory://{tmp_path.name}")
    write_step(storage, 1, TENSORS)
    manifest = write_step(storage, 2, TENSORS)
    assert manifest.files[0].name.startswith(f"{manifest.attempt}/")
    storage.delete(f"steps/step-00000002.w0001/{MANIFEST}")
    assert states(storage) == {(1, 1): "committed", (2, 1): "incomplete"}
    assert find_step(storage).step == 1
    with pytest.raises(NoCheckpoint, match=r"step 2 of .* was never committed"):
        find_step(storage, 2)
    incomplete = list_steps(storage)[1]
    assert list(check_step(storage, incomplete)) == []


class TestCheckStep:
    def test_every_byte_counts(self, storage: Storage, tmp_path: Path) -> None:
        write_step(storage, 1, TENSORS, world=2)
        (entry,) = list_steps(storage)
        seen: list[int] = []
        assert list(check_step(storage, entry, seen.append)) == []
        assert sum(seen) == entry.bytes
        directory = tmp_path / entry.path
        for name in (SHARD, STATE):
            for position in range(0, (directory / name).stat().st_size, 97):
                flip(directory / name, position)
                (problem,) = check_step(storage, entry)
                assert (problem.file, problem.block) == (name, 0)
                assert f"{directory / name}: bytes 0 to" in problem.message
                flip(directory / name, position)
        assert list(check_step(storage, entry)) == []

    def test_missing_and_damaged_files_are_all_named(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        write_step(storage, 1, TENSORS, world=2)
        (tmp_path / "steps" / "step-00000001.w0001" / SHARD).unlink()
        flip(tmp_path / "steps" / "step-00000001.w0001" / STATE)
        (entry,) = list_steps(storage)
        assert [(problem.file, problem.block) for problem in check_step(storage, entry)] == [
            (SHARD, None),
            (STATE, 0),
        ]

    def test_a_damaged_manifest_is_the_problem(self, storage: Storage, tmp_path: Path) -> None:
        write_step(storage, 1, TENSORS)
        flip(tmp_path / "steps" / "step-00000001.w0001" / MANIFEST, 60)
        (problem,) = check_step(storage, list_steps(storage)[0])
        assert problem.file == MANIFEST
