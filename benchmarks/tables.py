"""Results as Markdown: the numbers to reach first, then every section in full."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .adapters import PlainPut, SaveFile, SaveFileSynced
from .handoff import PARTS, PlainGet
from .loads import HuggingFace
from .rounds import Spread, ratio, values_of
from .rows import Row
from .savers import Memcpy, RawWrite, RawWriteSynced
from .slowdown import IDLE

_HEADS = {
    "layers": "The LoRA layer, forward and backward",
    "saves-1": "Saves, 1 rank, on disk",
    "saves-2": "Saves, 2 ranks of DTensors (FSDP2), on disk",
    "saves-memory": "Saves, 1 rank, on a memory file system",
    "slowdown": "A Python-bound training step while a save goes on",
    "publishes": "The adapter, on disk",
    "publishes-memory": "The adapter, on a memory file system",
    "uploads": "The adapter, to an S3 server (moto on loopback)",
    "handoff-memory": "From publish to live, on a memory file system",
    "handoff": "From publish to live, on disk",
    "handoff-s3": "From publish to live, over S3",
    "service": "ckpt serve: lookups, news, listings",
    "loads": "Loads, from a warm page cache",
}
_FLOORS = {
    "saves-1": RawWriteSynced.name,
    "saves-2": RawWriteSynced.name,
    "saves-memory": RawWrite.name,
    "publishes": SaveFileSynced.name,
    "publishes-memory": SaveFile.name,
    "uploads": PlainPut.name,
    "loads": HuggingFace.name,
}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def reached_table(found: Sequence[Row]) -> str:
    """The numbers to reach."""
    lines = [
        "| | measured | quartiles | to reach | | same number of a peer |",
        "|---|---:|---:|---:|:---:|---:|",
    ]
    for row in found:
        note = f" ({row.note})" if row.note else ""
        peer = ""
        if row.peer is not None:
            peer = f"{_number(row.peer[1].middle, row.unit)} ({row.peer[0]})"
        spread = f"{row.measured.low:.2f} to {row.measured.high:.2f}"
        if row.measured.count == 1:
            spread = ""
        lines.append(
            f"| {row.what}{note} | {_number(row.measured.middle, row.unit)} | {spread} "
            f"| ≤ {_number(row.target, row.unit)} | {'yes' if row.reached else '**no**'} | {peer} |"
        )
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}x" if unit == "x" else f"{value:.1f} {unit}"


def describe(options: str, workload: str) -> str:
    """One sentence on how the figures came about."""
    env = environment()
    return (
        f"`python -m benchmarks{options}` on {env['cpus']} CPUs ({env['machine']}), Python "
        f"{env['python']}, torch {env['torch']}; workload `{workload}`. Medians of interleaved "
        "rounds in one run, ratios taken within each round, quartiles as the spread; of several "
        "ranks the slowest counts."
    )


def as_markdown(
    options: str, workload: str, found: Sequence[Row], sections: Mapping[str, Any]
) -> str:
    """The whole document."""
    parts = ["# Results", describe(options, workload), "## Numbers to reach", reached_table(found)]
    for name, head in _HEADS.items():
        if name in sections:
            parts += [f"## {head}", _section(name, sections[name])]
    if "memory" in sections:
        parts += ["## Memory", _memory(sections["memory"])]
    if "growth" in sections:
        parts += ["## Growth", _growth(sections["growth"])]
    skipped = {
        peer: reason
        for section in sections.values()
        if isinstance(section, dict)
        for peer, reason in section.get("skipped", {}).items()
    }
    if skipped:
        lines = [f"- {peer}: {reason}" for peer, reason in sorted(skipped.items())]
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, section: Any) -> str:
    rounds = section["rounds"]
    if name == "layers":
        return _layers(section)
    if name == "slowdown":
        return _plain_table(rounds, "step", IDLE, "step ms", "/ no save")
    if name.startswith("handoff"):
        return _handoff(section)
    if name == "service":
        return _service(section)
    if not name.startswith("saves"):
        size = f"{section['bytes'] / 1e6:.1f} MB.\n\n"
        return size + _plain_table(
            rounds, "total", _FLOORS[name], "ms", f"/ {_FLOORS[name]}", requests=name == "uploads"
        )
    floor = _FLOORS[name]
    lines = [
        f"{section['bytes_per_rank'] / 1e6:.1f} MB in {section['tensors']} tensors a rank.",
        "",
        f"| | stall ms | / memcpy | complete after ms | / {floor} | CPU ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for saver in rounds:
        stall = Spread.of(values_of(rounds, saver, "stall"))
        total = Spread.of(values_of(rounds, saver, "total"))
        over_copy = ratio(rounds, (saver, "stall"), (Memcpy.name, "stall"))
        over_floor = ratio(rounds, (saver, "total"), (floor, "total"))
        whole = f"{_spread(total)} | {over_floor.middle:.2f}" if saver != Memcpy.name else " | "
        cpu = Spread.of(values_of(rounds, saver, "cpu")).middle
        lines.append(
            f"| {saver} | {_spread(stall)} | {over_copy.middle:.2f} | {whole} | {cpu:.0f} |"
        )
    return "\n".join(lines)


def _plain_table(
    rounds: Any, key: str, floor: str, unit: str, quotient: str, *, requests: bool = False
) -> str:
    cpu = all("cpu" in sample for samples in rounds.values() for sample in samples)
    heads = [unit, quotient, *(["CPU ms"] if cpu else []), *(["requests"] if requests else [])]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name in rounds:
        spread = Spread.of(values_of(rounds, name, key))
        over = ratio(rounds, (name, key), (floor, key)).middle
        line = f"| {name} | {_spread(spread)} | {over:.2f} |"
        if cpu:
            line += f" {Spread.of(values_of(rounds, name, 'cpu')).middle:.0f} |"
        if requests:
            line += f" {Spread.of(values_of(rounds, name, 'requests')).middle:.0f} |"
        lines.append(line)
    return "\n".join(lines)


def _layers(section: Any) -> str:
    rounds = section["rounds"]
    lines = [
        f"The linears of one block of a Qwen2-0.5B, {section['tokens']} tokens, rank "
        f"{section['rank']}, fp32 adapters (tiny: seven of 64 to 64, 16 tokens).",
        "",
        "| | ms | CPU ms | kept for backward, MB |",
        "|---|---:|---:|---:|",
    ]
    for name in rounds:
        spread = Spread.of(values_of(rounds, name, "total"))
        cpu, kept = (Spread.of(values_of(rounds, name, key)).middle for key in ("cpu", "kept"))
        lines.append(f"| {name} | {_spread(spread)} | {cpu:.1f} | {kept / 1e6:.3f} |")
    return "\n".join(lines)


def _handoff(section: Any) -> str:
    rounds = section["rounds"]
    trials = [name for name in rounds if name != PlainGet.name]
    lines = [f"{section['bytes'] / 1e6:.1f} MB (a real engine's own model has another size)."]
    if "server" in section:
        floor = Spread.of(values_of(rounds, PlainGet.name, "total"))
        lines[0] += f" Server: {section['server']}. {PlainGet.name}: {_spread(floor)} ms."
    lines += ["", f"| ms | {' | '.join(trials)} |", f"|---|{'---:|' * len(trials)}"]
    for key, text in (*((part, part) for part in PARTS), *_SUMS):
        cells = [_spread(Spread.of(values_of(rounds, name, key))) for name in trials]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _service(section: Any) -> str:
    rounds = section["rounds"]
    lines = [
        f"{section['objects']} objects lie in the steps of the large root.",
        "",
        f"| | {' | '.join(rounds)} |",
        f"|---|{'---:|' * len(rounds)}",
    ]
    for key, text in _ASKED:
        cells = [_spread(Spread.of(values_of(rounds, name, key))) for name in rounds]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    for key, text in _LISTED:
        cells = [f"{section['listings'][name][key]:.0f}" for name in rounds]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


_ASKED = (
    ("rate", "lookups of the newest version in a second, 4 callers"),
    ("lookup", "one of them, ms"),
    ("notice", "commit to server-sent event, ms"),
    ("notice_p99", "the same, 99th percentile"),
    ("poll", "commit to a reader that lists the root every 20 ms, ms"),
    ("poll_p99", "the same, 99th percentile"),
)
_LISTED = (
    ("first", "all steps page by page, the first time, ms"),
    ("again", "the same once more, ms"),
    ("entries", "names of all steps, ms"),
)

_SUMS = (
    ("ours", "all but load"),
    ("after_commit", "of that, after the commit"),
    ("cpu", "processor time, trainer and sidecar"),
)


def _spread(spread: Spread) -> str:
    return f"{spread.middle:.1f} ({spread.low:.1f} to {spread.high:.1f})"


def _memory(section: Mapping[str, Any]) -> str:
    lines = [
        "| | held after the first saves, / state | on top for each save, / state |",
        "|---|---:|---:|",
    ]
    for name, found in section.items():
        held, per_save = (found[key] / found["state"] for key in ("held", "per_save"))
        lines.append(f"| {name} | {held:.2f} | {per_save:.2f} |")
    return "\n".join(lines)


def _growth(cases: Sequence[Any]) -> str:
    lines = [
        "| ranks | tensors | MB a rank | saver | stall ms | complete after ms |",
        "|---:|---:|---:|---|---:|---:|",
    ]
    for case in cases:
        for saver in case["rounds"]:
            stall = Spread.of(values_of(case["rounds"], saver, "stall"))
            total = Spread.of(values_of(case["rounds"], saver, "total"))
            lines.append(
                f"| {case['ranks']} | {case['tensors']} | {case['bytes_per_rank'] / 1e6:.1f} "
                f"| {saver} | {_spread(stall)} | {_spread(total)} |"
            )
    return "\n".join(lines)
