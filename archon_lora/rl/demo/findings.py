"""What the demonstration claims, each claim with its measurement."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from archon_lora.rl.demo.report import Report

Record = Mapping[str, Any]

EXACT = ("loss", "reward", "kl", "grad_norm", "clip_fraction", "lr", "tokens", "staleness")
"""What a resumed run must repeat bit for bit."""

LOGITS_TOLERANCE = 1e-4
"""Largest difference of fp32 logits between the Archon model and PEFT over the export."""

ONE_RANK_TOLERANCE = 1e-4
"""The first loss on one rank: the same batch and weights, summed in another order."""


def bits(value: float) -> str:
    """A number's exact value."""
    return float(value).hex()


def check_reward(report: Report, records: Mapping[int, Record], *, margin: float) -> None:
    """The policy learns."""
    rewards = [record["reward"] for record in records.values()]
    quarter = max(1, len(rewards) // 4)
    first, last = statistics.fmean(rewards[:quarter]), statistics.fmean(rewards[-quarter:])
    report.figures |= {"reward_first_quarter": first, "reward_last_quarter": last}
    report.check(
        f"the reward rises by at least {margin} (mean of the first and the last quarter)",
        f"{first:.3f} → {last:.3f}",
        passed=last >= first + margin,
    )


def check_resume(
    report: Report,
    *,
    reference: Mapping[int, Record],
    job_lines: Sequence[Record],
    starts: Sequence[Record],
    killed_at: int,
) -> None:
    """The killed and resumed run equals the undisturbed one, bit for bit.

    Args:
        report: takes the findings.
        reference: records of the undisturbed run by step.
        job_lines: every line of the killed and resumed run; a step may occur twice.
        starts: the job's start events: first, resumed, on one rank.
        killed_at: last step that was logged before the kill.
    """
    resumed = starts[1]
    restored = resumed["restored"]
    report.check(
        "resumed from a committed step near the kill",
        f"killed after step {killed_at}, restored step {restored}, "
        f"in flight: {resumed['in_flight']}",
        passed=restored is not None and 0 <= killed_at - restored <= 3,
    )
    different = sorted(
        {
            record["step"]
            for record in job_lines
            for key in EXACT
            if bits(record[key]) != bits(reference[record["step"]][key])
        }
    )
    covered = {record["step"] for record in job_lines}
    missing = sorted(set(reference) - covered)
    after = sum(record["step"] > (restored or 0) for record in job_lines)
    report.check(
        "losses, rewards, KL and gradient norms equal the uninterrupted run's, bit for bit",
        f"{len(covered)} steps, {len(job_lines)} lines ({after} after the resume); "
        f"different: {different or 'none'}; missing: {missing or 'none'}",
        passed=not different and not missing and after > 0,
    )


def check_one_rank(
    report: Report, reference: Mapping[int, Record], job: Mapping[int, Record], start: Record
) -> None:
    """The job goes on, on one rank, with the batch that two ranks had sampled."""
    step = start["step_from"]
    ours, theirs = job[step], reference[step]
    gap = abs(ours["loss"] - theirs["loss"])
    steps = [record for number, record in job.items() if number >= step]
    report.figures["one_rank_loss_difference"] = gap
    report.check(
        "goes on with 1 rank: same batch, same reward, same loss up to the order of sums",
        f"{len(steps)} steps on {start['world']} rank; first loss differs by {gap:.1e}",
        passed=start["world"] == 1
        and start["in_flight"] == [step]
        and all(record["world"] == 1 for record in steps)
        and ours["reward"] == theirs["reward"]
        and gap <= ONE_RANK_TOLERANCE,
    )


def check_comparison(report: Report, found: Mapping[str, Any], *, step: int, world: int) -> None:
    """The committed bytes against a 1-rank restore, and the export against PEFT."""
    state, logits = found["state"], found["logits"]
    report.check(
        "restored on 1 rank, adapter and optimizer equal the committed bytes",
        f"step {found['restored']} of {state['written_by_ranks']} ranks: {state['tensors']} "
        f"tensors ({state['optimizer_tensors']} of the optimizer), {state['bytes']} bytes; "
        f"different: {state['different'] or 'none'}",
        passed=not state["different"]
        and found["restored"] == step
        and state["written_by_ranks"] == world
        and state["optimizer_tensors"] > 0,
    )
    report.figures |= {
        "logits_max_difference": logits["max_difference"],
        "logits_adapter_effect": logits["adapter_effect"],
    }
    report.check(
        f"PEFT and transformers compute the same logits from the export (within "
        f"{LOGITS_TOLERANCE:.0e})",
        f"max difference {logits['max_difference']:.1e}; the adapter moves them by "
        f"{logits['adapter_effect']:.2f}",
        passed=logits["max_difference"] <= LOGITS_TOLERANCE
        and logits["adapter_effect"] > 100 * LOGITS_TOLERANCE,
    )


def check_storage(
    report: Report, verified: Mapping[str, Any], listed: Mapping[str, Any], *, last_step: int
) -> None:
    """Every byte on storage verifies, and what should be there is."""
    checked = verified["checked"]
    size = sum(item["bytes"] or 0 for item in checked)
    report.check(
        "ckpt verify: every byte of every step and version matches its checksum",
        f"{len(checked)} checked, {size} bytes, "
        f"{sum(bool(item['problems']) for item in checked)} damaged",
        passed=verified["ok"] and size > 0,
    )
    committed = [entry["step"] for entry in listed["steps"] if entry["state"] == "committed"]
    names = [entry["name"] for entry in listed["versions"] if entry["state"] == "committed"]
    report.check(
        "ckpt ls: the newest step and the published versions are there",
        f"steps {committed}; versions {', '.join(names)}",
        passed=last_step in committed and len(names) >= 2 and len(set(names)) == len(names),
    )


def check_staleness(report: Report, records: Iterable[Record], *, bound: int) -> None:
    """No batch is older than allowed, and batches really are made ahead."""
    found = {record["staleness"] for record in records}
    report.check(
        f"rollouts run ahead of the trainer by at most {bound} step",
        f"staleness {sorted(found)}",
        passed=max(found) == bound,
    )


def note_costs(report: Report, reference: Mapping[int, Record], job: Mapping[int, Record]) -> None:
    """Stall and pace of the undisturbed run, as measured."""
    # The first save of a process lays out its buffers; it is in the picture.
    saves = [record["stall_ms"] for step, record in reference.items() if step > 0]
    pace = statistics.median(record["step_ms"] for record in reference.values())
    median, longest = statistics.median(saves), max(saves)
    report.figures |= {
        "stall_ms_median": median,
        "stall_ms_max": longest,
        "step_ms_median": pace,
        "saves": float(len(reference) + len(job)),
    }
    report.note(
        f"a save every step: time that save() kept the trainer ({len(saves)} saves)",
        f"median {median:.1f} ms, longest {longest:.1f} ms; a step takes {pace:.0f} ms",
    )
