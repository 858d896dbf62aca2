"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .rounds import Spread, values_of
from .rows import Row
from .savers import Memcpy

_OURS = "#1b6ca8"
_OTHERS = "#b8b8b8"
_SAVES = {"saves-1": "1 rank", "saves-2": "2 ranks of DTensors"}
_AXES = {"bytes": "bytes a rank", "tensors": "tensors", "ranks": "ranks"}


def write_plots(found: Sequence[Row], sections: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the PNG files; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    written = [_rows(found, out / "numbers.png")]
    for name, title in _SAVES.items():
        if name in sections:
            written.append(_saves(sections[name]["rounds"], title, out / f"{name}.png"))
    if "growth" in sections:
        written.append(_growth(sections["growth"], out / "growth.png"))
    return written


def _rows(found: Sequence[Row], path: Path) -> Path:
    """Every number as a share of its target, with that of the peer."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(found) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(found)):
        if row.peer is not None:
            share = max(row.peer[1].middle / row.target, 1e-2)
            axes.barh(place + 0.2, share, 0.35, color=_OTHERS, label="peer, same rounds")
        share = max(row.measured.middle / row.target, 1e-2)
        axes.barh(place - 0.2, share, 0.35, color=_OURS, label="ckpt")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), [row.what for row in reversed(found)], fontsize=7)
    axes.set_xlabel("measured / number to reach (left of 1 is reached)")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _saves(rounds: Any, title: str, path: Path) -> Path:
    """Stall and end-to-end time of every saver."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = list(reversed(rounds))
    for axes, key, label in ((left, "stall", "stall, ms"), (right, "total", "complete after, ms")):
        shown = [name for name in names if key == "stall" or name != Memcpy.name]
        spreads = [Spread.of(values_of(rounds, name, key)) for name in shown]
        errors = [
            [max(0.0, s.middle - s.low) for s in spreads],
            [max(0.0, s.high - s.middle) for s in spreads],
        ]
        colours = [_OURS if name.startswith("ckpt") else _OTHERS for name in shown]
        axes.barh(shown, [s.middle for s in spreads], xerr=errors, color=colours)
        axes.set_xlabel(label)
        axes.tick_params(labelsize=7)
    figure.suptitle(f"Saving the training state, {title}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _growth(cases: Sequence[Any], path: Path) -> Path:
    """Stall and end-to-end time against bytes, tensors and ranks."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for column, (axis, label) in enumerate(_AXES.items()):
        mine = [case for case in cases if case["axis"] == axis]
        savers = mine[0]["rounds"] if mine else ()
        colours = {name: f"C{index}" for index, name in enumerate(savers)}
        for row, key in enumerate(("stall", "total")):
            axes = grid[row][column]
            for name, colour in colours.items():
                if key == "total" and name == Memcpy.name:
                    continue
                x = [case["bytes_per_rank" if axis == "bytes" else axis] for case in mine]
                y = [Spread.of(values_of(case["rounds"], name, key)).middle for case in mine]
                axes.plot(x, y, marker="o", color=colour, label=name)
            axes.set_xscale("log")
            if axis == "ranks":
                axes.set_xticks([case[axis] for case in mine], [str(case[axis]) for case in mine])
                axes.minorticks_off()
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel("stall, ms" if key == "stall" else "complete after, ms")
    grid[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
