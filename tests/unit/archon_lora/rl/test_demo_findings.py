"""Every check of the demonstration fails where its claim does not hold."""

import json
import math

import pytest
from rich.console import Console

from archon_lora.rl.demo import findings
from archon_lora.rl.demo.report import Report, draw


def record(step, **changes):
    return {
        "step": step, "loss": 0.1 * step - 0.3, "reward": 0.1 + 0.05 * step, "kl": 0.01 * step,
        "grad_norm": 0.2, "clip_fraction": 0.0, "lr": 0.02, "tokens": 384,
        "staleness": min(step, 1), "world": 2, "stall_ms": 2.0, "step_ms": 50.0,
    } | changes  # fmt: skip


STEPS = 8
REFERENCE = {step: record(step) for step in range(STEPS + 2)}
STARTS = [
    {"restored": None, "step_from": 0, "world": 2, "in_flight": []},
    {"restored": 3, "step_from": 4, "world": 2, "in_flight": [4]},
    {"restored": 7, "step_from": 8, "world": 1, "in_flight": [8]},
]


def verdict(check, *args, **kwargs):
    report = Report()
    check(report, *args, **kwargs)
    return [c.passed for c in report.checks]


def resume(lines=None, **kwargs):
    lines = [record(step) for step in (*range(5), *range(4, STEPS))] if lines is None else lines
    options = {"starts": STARTS, "killed_at": 4} | kwargs
    reference = {step: r for step, r in REFERENCE.items() if step < STEPS}
    return verdict(findings.check_resume, reference=reference, job_lines=lines, **options)


def test_a_resume_that_repeats_every_bit_passes():
    assert resume() == [True, True]


@pytest.mark.parametrize("key", findings.EXACT)
@pytest.mark.parametrize("step", [4, 7])
def test_one_bit_of_one_value_fails_the_resume(key, step):
    lines = [record(s) for s in (*range(5), *range(4, STEPS))]
    value = lines[step + 1][key]
    lines[step + 1][key] = math.nextafter(value, math.inf)
    assert resume(lines) == [True, False]


def test_a_missing_step_or_a_run_without_a_resume_fails():
    assert resume([record(s) for s in range(STEPS) if s != 5])[1] is False
    assert resume([record(s) for s in range(4)])[1] is False


def test_a_restore_of_nothing_or_of_something_old_fails():
    fresh = [STARTS[0], STARTS[1] | {"restored": None}, STARTS[2]]
    assert resume(starts=fresh)[0] is False
    old = [STARTS[0], STARTS[1] | {"restored": 0}, STARTS[2]]
    assert resume(starts=old)[0] is False
    assert resume(killed_at=2)[0] is False


def test_the_reward_must_rise():
    assert verdict(findings.check_reward, REFERENCE, margin=0.3) == [True]
    assert verdict(findings.check_reward, REFERENCE, margin=0.5) == [False]


def one_rank(start=STARTS[2], **changes):
    job = dict(REFERENCE)
    for step in (8, 9):
        job[step] = record(step, **({"world": 1} | changes))
    return verdict(findings.check_one_rank, REFERENCE, job, start)


def test_one_rank_must_go_on_with_the_same_batch():
    assert one_rank() == [True]
    assert one_rank(loss=REFERENCE[8]["loss"] + 1e-6) == [True]
    assert one_rank(loss=REFERENCE[8]["loss"] + 1e-3) == [False]
    assert one_rank(reward=0.5001) == [False]
    assert one_rank(world=2) == [False]
    assert one_rank(STARTS[2] | {"in_flight": []}) == [False]


def comparison(state=None, logits=None, **changes):
    found = {
        "restored": 7,
        "state": {"tensors": 9, "optimizer_tensors": 6, "bytes": 90, "written_by_ranks": 2,
                  "different": []} | (state or {}),
        "logits": {"max_difference": 1e-6, "adapter_effect": 3.0} | (logits or {}),
    } | changes  # fmt: skip
    return verdict(findings.check_comparison, found, step=7, world=2)


def test_state_and_logits_must_agree():
    assert comparison() == [True, True]
    assert comparison(state={"different": ["optim.x.exp_avg"]}) == [False, True]
    assert comparison(state={"optimizer_tensors": 0}) == [False, True]
    assert comparison(restored=6) == [False, True]
    assert comparison(logits={"max_difference": 2e-4}) == [True, False]
    # An adapter that does nothing would agree with anything.
    assert comparison(logits={"adapter_effect": 0.0}) == [True, False]


def storage(verified=None, steps=(7, 8, 9), versions=("a-v1", "a-v2"), state="committed"):
    verified = {"ok": True, "checked": [{"bytes": 5, "problems": []}]} | (verified or {})
    listed = {
        "steps": [{"step": s, "state": state} for s in steps],
        "versions": [{"name": n, "state": state} for n in versions],
    }
    return verdict(findings.check_storage, verified, listed, last_step=9)


def test_storage_must_verify_and_hold_what_was_saved():
    assert storage() == [True, True]
    assert storage({"ok": False}) == [False, True]
    assert storage({"checked": []}) == [False, True]
    assert storage(steps=(7, 8)) == [True, False]
    assert storage(versions=("a-v1",)) == [True, False]
    assert storage(state="damaged") == [True, False]


def test_staleness_must_be_bounded_and_used():
    assert verdict(findings.check_staleness, REFERENCE.values(), bound=1) == [True]
    assert verdict(findings.check_staleness, [record(3, staleness=2)], bound=1) == [False]
    assert verdict(findings.check_staleness, [record(3, staleness=0)], bound=1) == [False]


def test_a_report_without_checks_or_with_notes_alone_does_not_pass(tmp_path):
    report = Report()
    assert not report.passed
    findings.note_costs(report, REFERENCE, REFERENCE)
    assert not report.passed
    report.check("a", "1", passed=True)
    assert report.passed
    report.check("b", "2", passed=False)
    assert not report.passed
    report.write(tmp_path / "r.json")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert [c["passed"] for c in saved["checks"]] == [None, True, False]
    assert saved["figures"]["stall_ms_median"] == 2.0


def test_the_table_shows_claims_measurements_and_verdicts():
    report = Report()
    report.check("the sky is blue", "470 nm", passed=True)
    report.check("pigs fly", "0 m", passed=False)
    console = Console(record=True, width=100)
    report.show(console)
    text = console.export_text()
    for row in (("the sky is blue", "470 nm", "pass"), ("pigs fly", "0 m", "FAIL")):
        assert any(all(cell in line for cell in row) for line in text.splitlines())


def test_the_picture_is_drawn(tmp_path):
    path = tmp_path / "p.png"
    draw(path, reference=REFERENCE, joined=REFERENCE, killed_after=4, resumed_at=4, moved_at=8)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
