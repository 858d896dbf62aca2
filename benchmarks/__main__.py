"""``python -m benchmarks``: measure, print the tables, write results.json, results.md and plots."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .adapters import publishes, uploads
from .growth import growth
from .handoff import handoff, handoff_s3
from .layers import layers
from .loads import loads
from .memory import SECTIONS
from .plots import write_plots
from .processes import Settings, run_section
from .readme import refresh
from .rows import rows
from .saves import core_saves, saves
from .service import service
from .slowdown import slowdown
from .tables import as_markdown, describe, environment, reached_table
from .workload import WORKLOADS

HERE = Path(__file__).parent
MEMORY_FOLDER = Path("/dev/shm")
"""A file system in memory: what the software costs, without the disk."""


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="qwen2-7b-r16")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every section (5)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="after this a section begins no more rounds (20)"
    )
    parser.add_argument("--only", nargs="+", choices=[*_sections()], help="these sections alone")
    parser.add_argument("--full", action="store_true", help="growth curves too (long)")
    parser.add_argument("--out", type=Path, default=HERE, help="results go here (benchmarks/)")
    parser.add_argument("--folder", type=Path, help="write below this folder (the temporary one)")
    parser.add_argument(
        "--memory-folder", type=Path, default=MEMORY_FOLDER, help="a file system in memory"
    )
    parser.add_argument(
        "--readme", type=Path, help="measure nothing: put the results that are there into this file"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def _sections() -> Mapping[str, Callable[[Settings, Settings], Any]]:
    """Every section by name; it is given settings for the disk and for memory."""
    return {
        "layers": lambda disk, memory: run_section(layers, disk),
        "saves-1": lambda disk, memory: run_section(saves, disk),
        "saves-2": lambda disk, memory: run_section(saves, disk, world=2),
        "saves-memory": lambda disk, memory: run_section(core_saves, memory),
        "slowdown": lambda disk, memory: run_section(slowdown, disk),
        "publishes": lambda disk, memory: run_section(publishes, disk),
        "publishes-memory": lambda disk, memory: run_section(publishes, memory),
        "uploads": lambda disk, memory: run_section(uploads, disk),
        "handoff": lambda disk, memory: run_section(handoff, disk),
        "handoff-memory": lambda disk, memory: run_section(handoff, memory),
        "handoff-s3": lambda disk, memory: run_section(handoff_s3, disk),
        "service": lambda disk, memory: run_section(service, disk),
        "loads": lambda disk, memory: run_section(loads, disk),
        "memory": lambda disk, memory: {
            name: run_section(section, disk) for name, section in SECTIONS.items()
        },
    }


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    disk = Settings.of(args.workload, args.repeats, args.seconds, folder)
    memory = Settings.of(args.workload, args.repeats, args.seconds, args.memory_folder)
    found = {}
    for name, section in _sections().items():
        if args.only is None or name in args.only:
            _say(name)
            found[name] = section(disk, memory)
    if args.full:
        found["growth"] = growth(disk, _say)
    return found


def main() -> None:
    """Run the benchmarks, or put their results into the README."""
    args = _arguments()
    if args.readme is not None:
        changed = refresh(args.readme, args.out / "results.json")
        print(f"{args.readme}: {'refreshed' if changed else 'up to date'}")
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sections = _measure(args, Path(folder))
    found = rows(sections)
    options = "".join(f" {shlex.quote(option)}" for option in sys.argv[1:])
    text = as_markdown(options, args.workload, found, sections)
    document = {
        "workload": args.workload,
        "environment": environment(),
        "description": describe(options, args.workload),
        "table": reached_table(found),
        "rows": [row.to_json() for row in found],
        "sections": sections,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    data = json.dumps(document, indent=1, ensure_ascii=False)
    (args.out / "results.json").write_text(data + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(text, encoding="utf-8")
    write_plots(found, sections, args.out)
    print(text)


if __name__ == "__main__":
    main()
