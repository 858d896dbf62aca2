"""``python -m benchmarks``: measure, print the table, write results.json and results.md."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .report import Case, as_json, as_markdown
from .stall import measure
from .workload import WORKLOADS


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="qwen2-7b-r16")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="world sizes (1 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="results go here")
    parser.add_argument("--folder", type=Path, help="write below this folder (the temporary one)")
    args = parser.parse_args()
    if args.repeats < 1 or min(args.ranks) < 1:
        parser.error("--repeats and --ranks must be at least 1")
    cases = []
    for world in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            cases.append(Case(world, *measure(world, args.workload, args.repeats, Path(folder))))
    text = as_markdown(args.workload, args.repeats, cases)
    document = json.dumps(as_json(args.workload, args.repeats, cases), indent=1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(document + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
