"""What the benchmarks make of what they measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.adapters import PlainPut, Publish
from benchmarks.handoff import PARTS, STAND_IN, PlainGet
from benchmarks.layers import KINDS, PEFT, RANK, TORCHTUNE, Trained, ours, trial_name
from benchmarks.layers import OURS as OUR_LAYER
from benchmarks.peers import DcpAsync, DcpSave
from benchmarks.readme import BEGIN, END, refresh
from benchmarks.rounds import Sample, Spread, interleave, ratio
from benchmarks.rows import OURS, Row, rows
from benchmarks.savers import Memcpy, RawWriteSynced, TorchSave
from benchmarks.service import OBJECTS, commit, fill
from benchmarks.tables import as_markdown, reached_table
from ckpt.catalog import list_steps
from ckpt.handoff import Registry
from ckpt.manifest import VersionManifest
from ckpt.storage import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_checkpointing.*")


def samples(**values: list[float]) -> list[dict[str, float]]:
    return [
        dict(zip(values, numbers, strict=True)) for numbers in zip(*values.values(), strict=True)
    ]


def saves(*, stall: list[float], plan_collectives: int = 0) -> dict[str, object]:
    count = len(stall)
    return {
        "ranks": 2,
        "bytes_per_rank": 100,
        "tensors": 4,
        "skipped": {"a peer": "ModuleNotFoundError: no such module"},
        "plan": {"ms": [0.5] * count, "collectives": plan_collectives},
        "rounds": {
            Memcpy.name: samples(stall=[10.0] * count, total=[10.0] * count, cpu=[50.0] * count),
            OURS: samples(stall=stall, total=[100.0] * count, cpu=[50.0] * count),
            DcpSave.name: samples(
                stall=[900.0] * count,
                total=[900.0] * count,
                plan=[70.0] * count,
                cpu=[50.0] * count,
            ),
            DcpAsync.name: samples(stall=[30.0] * count, total=[400.0] * count, cpu=[50.0] * count),
            TorchSave.name: samples(
                stall=[200.0] * count, total=[200.0] * count, cpu=[50.0] * count
            ),
            RawWriteSynced.name: samples(
                stall=[90.0] * count, total=[90.0] * count, cpu=[50.0] * count
            ),
        },
    }


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_ratios_are_taken_within_rounds() -> None:
    # The second round was disturbed: both took ten times as long, and the ratio stays.
    rounds = {"a": samples(t=[2.0, 20.0, 2.2]), "b": samples(t=[1.0, 10.0, 1.0])}
    assert ratio(rounds, ("a", "t"), ("b", "t")).middle == pytest.approx(2.0)


class Recorder:
    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self._calls = name, calls

    def measure(self, number: int) -> dict[str, float]:
        self._calls.append((self.name, number))
        return {"t": float(number)}


def test_rounds_are_interleaved_and_begin_with_another_trial_each(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.rounds.dist.get_world_size", lambda: 1)
    calls: list[tuple[str, int]] = []
    trials = [Recorder(name, calls) for name in "abc"]
    rounds = interleave(trials, repeats=4, seconds=60)
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]  # warm-up
    assert "".join(name for name, _ in calls[3:]) == "abcbcacababc"
    assert {name: [s["t"] for s in found] for name, found in rounds.items()} == {
        name: [1.0, 2.0, 3.0, 4.0] for name in "abc"
    }


def test_no_further_round_begins_once_the_time_is_over_but_three_are_run(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.rounds.dist.get_world_size", lambda: 1)
    assert len(interleave([Recorder("a", [])], repeats=9, seconds=0)["a"]) == 3


def test_the_numbers_follow_from_the_rounds() -> None:
    found = {row.what: row for row in rows({"saves-1": saves(stall=[12.0, 11.0, 14.0])})}
    stall = found["stall of `save()` / memcpy of the same bytes, plain tensors"]
    assert stall.measured.middle == pytest.approx(1.2)
    assert stall.reached
    assert stall.peer is not None
    assert stall.peer[1].middle == pytest.approx(3.0)
    assert found["full durable save / `torch.save + fsync`"].measured.middle == pytest.approx(0.5)


def test_a_number_that_is_not_reached_is_said_to_be_so() -> None:
    found = rows({"saves-2": saves(stall=[16.0, 16.0, 16.0], plan_collectives=1)})
    assert [row.reached for row in found] == [False, False]  # the plan is fast, but not alone
    text = reached_table(found)
    assert text.count("**no**") == 2
    assert "1 collectives" in text


def test_the_document_names_what_was_not_measured() -> None:
    section = saves(stall=[12.0, 12.0, 12.0])
    text = as_markdown("", "tiny", rows({"saves-1": section}), {"saves-1": section})
    assert "## Not measured\n\n- a peer: ModuleNotFoundError: no such module" in text
    assert "## Saves, 1 rank, on disk" in text


def results(folder: Path, table: str) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"description": "Measured.", "table": table}), encoding="utf-8")
    return path


def test_the_readme_quotes_the_results_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    assert refresh(readme, results(tmp_path, "| new |"))
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n{BEGIN}\n\nMeasured.\n\n| new |\n\n{END}\nafter\n"
    assert not refresh(readme, results(tmp_path, "| new |"))


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="each once"):
        refresh(readme, results(tmp_path, "| new |"))
    assert readme.read_text(encoding="utf-8") == text


def test_this_readme_has_its_markers() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


def test_an_upload_with_too_many_requests_does_not_reach_its_number() -> None:
    def uploads(requests: float) -> list[Row]:
        rounds = {
            Publish.name: samples(total=[10.0] * 3, requests=[requests] * 3, cpu=[7.0] * 3),
            PlainPut.name: samples(total=[10.0] * 3, requests=[1.0] * 3, cpu=[5.0] * 3),
        }
        return rows({"uploads": {"bytes": 1, "rounds": rounds}})

    assert [row.reached for row in uploads(3.0)] == [True]
    assert [row.reached for row in uploads(4.0)] == [False]


def test_a_row_is_reached_at_its_target_and_not_above() -> None:
    row = Row("what", Spread(1.2, 1.1, 1.3, 5), 1.2)
    assert row.reached
    assert not Row("what", Spread(1.21, 1.1, 1.3, 5), 1.2).reached
    assert row.to_json()["reached"] is True


def test_the_tables_say_what_a_saver_asks_of_the_processor() -> None:
    text = as_markdown("", "tiny", [], {"saves-1": saves(stall=[12.0] * 3)})
    line = next(line for line in text.splitlines() if line.startswith(f"| {Memcpy.name} |"))
    assert line.split("|")[-2].strip() == "50"
    rounds = {Publish.name: samples(total=[10.0] * 3, requests=[3.0] * 3, cpu=[7.0] * 3)}
    rounds[PlainPut.name] = samples(total=[10.0] * 3, requests=[1.0] * 3, cpu=[5.0] * 3)
    text = as_markdown("", "tiny", [], {"uploads": {"bytes": 1, "rounds": rounds}})
    assert f"| {Publish.name} | 10.0 (10.0 to 10.0) | 1.00 | 7 | 3 |" in text


def handed_over(*, ours: float, write: float = 10.0) -> dict[str, list[dict[str, float]]]:
    parts = dict.fromkeys(PARTS, [1.0] * 3) | {"write": [write] * 3, "load": [70.0] * 3}
    sums = {"total": [ours + 70] * 3, "ours": [ours] * 3, "after_commit": [ours - write] * 3}
    return {STAND_IN: samples(**parts, **sums, cpu=[90.0] * 3)}


def test_a_hand_over_counts_everything_but_the_engines_own_load() -> None:
    sections = {
        "handoff": {"bytes": 1, "rounds": handed_over(ours=251.0)},
        "handoff-memory": {"bytes": 1, "rounds": handed_over(ours=250.0)},
    }
    found = rows(sections)
    assert [(row.measured.middle, row.reached) for row in found] == [(250.0, True), (251.0, False)]
    assert "the stand-in's load took 70 ms" in found[0].note
    text = as_markdown("", "tiny", found, sections)
    for part in PARTS:
        assert f"| {part} |" in text


def test_over_s3_a_hand_over_is_held_against_a_plain_get() -> None:
    rounds = handed_over(ours=30.0, write=12.0) | {PlainGet.name: samples(total=[10.0] * 3)}
    section = {"bytes": 1, "server": "moto on loopback", "rounds": rounds}
    after, all_of_it = rows({"handoff-s3": section})
    assert (after.measured.middle, after.reached) == (pytest.approx(1.8), True)
    assert (all_of_it.measured.middle, all_of_it.reached) == (pytest.approx(3.0), False)
    assert "the upload alone is 1.20x" in all_of_it.note
    assert "Server: moto on loopback" in as_markdown("", "tiny", [], {"handoff-s3": section})


def layer_rounds(**ours: float) -> dict[str, object]:
    theirs = {PEFT: {"cpu": 9.0, "kept": 8.0}, TORCHTUNE: {"cpu": 7.0, "kept": 9.0}}
    return {
        "rounds": {
            trial_name(name, kind): [{"total": 1.0, **found}] * 3
            for kind in KINDS
            for name, found in {OUR_LAYER: ours, **theirs}.items()
            if name != TORCHTUNE or kind.base is torch.float32
        }
    }


def test_a_layer_is_held_against_the_faster_peer_and_the_least_memory() -> None:
    found = rows({"layers": layer_rounds(cpu=7.0, kept=8.0)})
    assert [row.reached for row in found] == [True] * len(KINDS)
    assert found[0].measured.middle == pytest.approx(1.0)
    assert TORCHTUNE in found[0].what
    slower = rows({"layers": layer_rounds(cpu=8.0, kept=8.0)})
    # With a bf16 base torchtune has no number, and PEFT is the one to beat.
    assert [row.reached for row in slower] == [kind.base is not torch.float32 for kind in KINDS]
    wider = rows({"layers": layer_rounds(cpu=7.0, kept=8.5)})
    assert not any(row.reached for row in wider)


def test_figures_of_the_service() -> None:
    def asked(lookup: float, notice: float) -> list[Sample]:
        return [
            {
                "rate": 4e3 / lookup,
                "lookup": lookup,
                "notice": notice,
                "notice_p99": 5 * notice,
                "poll": 40.0,
                "poll_p99": 90.0,
            }
        ] * 3

    listed = {"first": 5000.0, "again": 50.0, "entries": 9.0, "steps": 10_000.0}
    section = {
        "rounds": {"few": asked(2.0, 6.0), "many": asked(2.2, 9.0)},
        "listings": {"few": {**listed, "steps": 10.0}, "many": listed},
        "objects": 100_000,
    }
    found = rows({"service": section})
    assert [row.reached for row in found] == [True, False, True, True, True]
    assert [row.measured.middle for row in found] == pytest.approx([1.1, 1.5, 9.0, 45.0, 0.5])
    assert found[2].peer == ("listing the root every 20 ms", Spread.of([40.0] * 3))
    text = as_markdown("", "tiny", found, {"service": section})
    assert "| commit to server-sent event, ms | 6.0 (6.0 to 6.0) | 9.0 (9.0 to 9.0) |" in text
    assert "| names of all steps, ms | 9 | 9 |" in text


def test_the_roots_of_the_service_are_what_they_say(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    storage = open_storage(tmp_path)
    assert {entry.state for entry in list_steps(storage)} == {"committed"}
    assert len(list(tmp_path.glob("steps/*/*"))) == 12 * OBJECTS
    newest = Registry(storage).latest()
    assert newest is not None
    assert newest.number == 12
    template = VersionManifest.from_bytes(
        storage.read(f"adapters/{newest.name}/MANIFEST.json"), "newest"
    )
    commit(tmp_path, template, 13)
    found = Registry(storage).latest()
    assert found is not None
    assert found.number == 13


def test_layers_have_a_table_of_their_own() -> None:
    section = {**layer_rounds(cpu=7.0, kept=2.5e6), "tokens": 128, "rank": 16, "skipped": {}}
    sections = {"layers": section}
    text = as_markdown("", "tiny", rows(sections), sections)
    assert "128 tokens, rank 16" in text
    assert f"| {trial_name(OUR_LAYER, KINDS[0])} | 1.0 (1.0 to 1.0) | 7.0 | 2.500 |" in text


def test_a_layer_of_ours_runs_forward_and_backward_in_every_eager_kind() -> None:
    for kind in KINDS:
        if not kind.compiled:
            small = replace(kind, features=((8, 4), (4, 8)), tokens=3, times=2)
            sample = Trained(OUR_LAYER, ours, small).measure(0)
            # The input and what A made of it, in the adapter's fp32.
            assert sample["kept"] == 4 * 3 * (8 + 4 + 2 * RANK)
            assert sample["total"] > 0
