"""The numbers to reach: what each is, how it follows from the rounds, and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapters import (
    DcpHuggingFace,
    PlainPut,
    Publish,
    PublishObstore,
    SaveFile,
    SaveFileSynced,
)
from .handoff import STAND_IN, PlainGet
from .layers import KINDS, PEFT, TORCHTUNE, Kind, trial_name
from .layers import OURS as OUR_LAYER
from .loads import HuggingFace, Restore
from .peers import DcpAsync, DcpSave
from .rounds import Spread, ratio, values_of
from .savers import Manager, Memcpy, RawWrite, RawWriteSynced, TorchSave
from .slowdown import IDLE

OURS = Manager.name
UPLOAD_REQUESTS = 3
"""Of a publish by one rank: ranks + 2."""
SAME_SPEED = 1.02
"""No slower than a peer: two runs of the very same layer differ by up to 2 %."""


@dataclass(frozen=True)
class Row:
    """One number to reach.

    Attributes:
        what: the number, in words.
        measured: its spread over the rounds.
        target: what it must not exceed.
        unit: ``"x"`` or ``"ms"``.
        peer: the same number for the named peer, measured in the same rounds, or None.
        note: what else belongs to the number.
    """

    what: str
    measured: Spread
    target: float
    unit: str = "x"
    peer: tuple[str, Spread] | None = None
    note: str = ""
    also_holds: bool = True

    @property
    def reached(self) -> bool:
        """Whether the median is within the target, and what the note says is as it must be."""
        return self.measured.middle <= self.target and self.also_holds

    def to_json(self) -> dict[str, Any]:
        """The row for ``results.json``."""
        return {
            "what": self.what,
            "unit": self.unit,
            "measured": self.measured.to_json(),
            "target": self.target,
            "reached": self.reached,
            "peer": None if self.peer is None else {self.peer[0]: self.peer[1].to_json()},
            "note": self.note,
        }


def rows(sections: Mapping[str, Any]) -> list[Row]:
    """The rows that the measured sections allow.

    Args:
        sections: results by name; ``layers``, ``saves-1``, ``saves-2``, ``saves-memory``,
            ``slowdown``, ``publishes``, ``publishes-memory``, ``uploads``, ``handoff``,
            ``handoff-memory``, ``handoff-s3``, ``loads``, ``service``, ``memory``.
    """
    found: list[Row] = []
    if "layers" in sections:
        found += _layers(sections["layers"])
    if "saves-1" in sections:
        found += [_stall(sections["saves-1"], "plain tensors", 1.3)]
    if "saves-2" in sections:
        found += [_stall(sections["saves-2"], "2 ranks of DTensors", 1.5)]
    if "saves-1" in sections:
        found += [_whole(sections["saves-1"], RawWriteSynced.name, "raw write + fsync, on disk")]
    if "saves-memory" in sections:
        found += [_whole(sections["saves-memory"], RawWrite.name, "raw write, in memory")]
    if "slowdown" in sections:
        found += [_slowdown(sections["slowdown"])]
    for name, baseline, place in (
        ("publishes-memory", SaveFile.name, ", in memory"),
        ("publishes", SaveFileSynced.name, ", on disk"),
    ):
        if name in sections:
            found += [_publish(sections[name], baseline, place)]
    if "saves-1" in sections:
        found += [_durable(sections["saves-1"])]
    if "saves-2" in sections:
        found += [_plan(sections["saves-2"])]
    if "loads" in sections:
        found += [_load(sections["loads"])]
    if "uploads" in sections:
        found += [_upload(sections["uploads"])]
    for name, place in (("handoff-memory", "in memory"), ("handoff", "on disk")):
        if name in sections:
            found += [_handoff(sections[name], place)]
    if "handoff-s3" in sections:
        found += _handoff_s3(sections["handoff-s3"])
    if "service" in sections:
        found += _service(sections["service"])
    if "memory" in sections:
        found += [_memory(sections["memory"])]
    return found


def _layers(section: Any) -> list[Row]:
    found = []
    for kind in KINDS:
        names = [trial_name(peer, kind) for peer in (PEFT, TORCHTUNE)]
        names = [name for name in names if name in section["rounds"]]
        if names:
            found.append(_layer(section["rounds"], kind, names))
    return found


def _layer(rounds: Any, kind: Kind, peers: list[str]) -> Row:
    ours = trial_name(OUR_LAYER, kind)
    fastest = min(peers, key=lambda name: Spread.of(values_of(rounds, name, "cpu")).middle)
    kept = values_of(rounds, ours, "kept")[0]
    least = min(values_of(rounds, name, "kept")[0] for name in peers)
    return Row(
        f"`LoRALinear`, forward and backward / {fastest}, the faster peer",
        ratio(rounds, (ours, "cpu"), (fastest, "cpu")),
        SAME_SPEED,
        note=f"activations {kept / least:.2f} of the least of a peer",
        also_holds=kept <= least,
    )


def _stall(section: Any, kind: str, target: float) -> Row:
    rounds, floor = section["rounds"], (Memcpy.name, "stall")
    return Row(
        f"stall of `save()` / memcpy of the same bytes, {kind}",
        ratio(rounds, (OURS, "stall"), floor),
        target,
        peer=(DcpAsync.name, ratio(rounds, (DcpAsync.name, "stall"), floor)),
    )


def _whole(section: Any, floor: str, what: str) -> Row:
    rounds = section["rounds"]
    return Row(
        f"save, checksummed and committed / {what}",
        ratio(rounds, (OURS, "total"), (floor, "total")),
        1.2,
        peer=(DcpAsync.name, ratio(rounds, (DcpAsync.name, "total"), (floor, "total"))),
    )


def _slowdown(section: Any) -> Row:
    rounds, idle = section["rounds"], (IDLE, "step")
    peer = None
    if DcpAsync.name in rounds:
        peer = (DcpAsync.name, ratio(rounds, (DcpAsync.name, "step"), idle))
    return Row(
        "slow-down of a Python-bound training step during a save",
        ratio(rounds, (OURS, "step"), idle),
        1.15,
        peer=peer,
    )


def _publish(section: Any, baseline: str, place: str) -> Row:
    rounds, floor = section["rounds"], (baseline, "total")
    return Row(
        f"publish of the adapter, commit included / `{baseline}`{place}",
        ratio(rounds, (Publish.name, "total"), floor),
        1.2,
        peer=(DcpHuggingFace.name, ratio(rounds, (DcpHuggingFace.name, "total"), floor)),
    )


def _durable(section: Any) -> Row:
    rounds, floor = section["rounds"], (TorchSave.name, "total")
    return Row(
        f"full durable save / `{TorchSave.name}`",
        ratio(rounds, (OURS, "total"), floor),
        0.6,
        peer=(DcpSave.name, ratio(rounds, (DcpSave.name, "total"), floor)),
    )


def _plan(section: Any) -> Row:
    plan = section["plan"]
    return Row(
        "second plan of a known layout, 2 ranks",
        Spread.of(plan["ms"]),
        5.0,
        unit="ms",
        peer=(DcpSave.name, Spread.of(values_of(section["rounds"], DcpSave.name, "plan"))),
        note=f"{plan['collectives']} collectives",
        also_holds=plan["collectives"] == 0,
    )


def _load(section: Any) -> Row:
    return Row(
        f"verified load / `{HuggingFace.name}`",
        ratio(section["rounds"], (Restore.name, "total"), (HuggingFace.name, "total")),
        1.2,
        peer=(
            "dcp FileSystemReader",
            ratio(
                section["rounds"],
                ("dcp FileSystemReader", "total"),
                (HuggingFace.name, "total"),
            ),
        ),
    )


def _upload(section: Any) -> Row:
    rounds, floor = section["rounds"], (PlainPut.name, "total")
    requests = Spread.of(values_of(rounds, Publish.name, "requests"))
    ours = {Publish.name, PublishObstore.name, PlainPut.name}
    peers = [name for name in rounds if name not in ours]
    peer = (peers[0], ratio(rounds, (peers[0], "total"), floor)) if peers else None
    return Row(
        "publish of the adapter to S3 / one plain PUT of its bytes",
        ratio(rounds, (Publish.name, "total"), floor),
        1.15,
        peer=peer,
        note=f"{requests.middle:.0f} requests, at most {UPLOAD_REQUESTS} wanted",
        also_holds=requests.middle <= UPLOAD_REQUESTS,
    )


def _handoff(section: Any, place: str) -> Row:
    rounds = section["rounds"]
    load, cpu = (Spread.of(values_of(rounds, STAND_IN, key)).middle for key in ("load", "cpu"))
    return Row(
        f"publish to live without the engine's own load, {place}",
        Spread.of(values_of(rounds, STAND_IN, "ours")),
        250.0,
        unit="ms",
        note=f"processor time {cpu:.0f} ms; the stand-in's load took {load:.0f} ms",
    )


def _handoff_s3(section: Any) -> list[Row]:
    rounds, floor = section["rounds"], (PlainGet.name, "total")
    write = ratio(rounds, (STAND_IN, "write"), floor).middle
    return [
        Row(
            f"{what} to live on S3 without the engine's own load / one plain GET of the adapter",
            ratio(rounds, (STAND_IN, key), floor),
            2.0,
            note=note,
        )
        for what, key, note in (
            ("commit", "after_commit", ""),
            ("publish", "ours", f"the upload alone is {write:.2f}x"),
        )
    ]


def _memory(section: Any) -> Row:
    ours = section[OURS]
    peer = section.get(DcpAsync.name)
    state = ours["state"]
    return Row(
        "memory that each save takes on top / the state's bytes",
        Spread.of([ours["per_save"] / state]),
        0.05,
        peer=None if peer is None else (DcpAsync.name, Spread.of([peer["per_save"] / state])),
        note=f"held from the first save on, arena included: {ours['held'] / state:.1f}",
    )


def _service(section: Any) -> list[Row]:
    rounds = section["rounds"]
    small, *_, large = rounds
    polling = Spread.of(values_of(rounds, large, "poll"))
    listed = section["listings"][large]
    return [
        Row(
            f"lookup of the newest version over HTTP, {large} / {small}",
            ratio(rounds, (large, "lookup"), (small, "lookup")),
            1.2,
        ),
        Row(
            f"commit to server-sent event, {large} / {small}",
            ratio(rounds, (large, "notice"), (small, "notice")),
            1.2,
        ),
        Row(
            f"commit to server-sent event, {large}",
            Spread.of(values_of(rounds, large, "notice")),
            25.0,
            unit="ms",
            peer=("listing the root every 20 ms", polling),
        ),
        Row(
            "the same, 99th percentile",
            Spread.of(values_of(rounds, large, "notice_p99")),
            100.0,
            unit="ms",
        ),
        Row(
            f"listing {listed['steps']:.0f} steps with {section['objects']} objects, a step",
            Spread.of([listed["first"] / listed["steps"]]),
            1.0,
            unit="ms",
            note="page by page, the first time",
        ),
    ]
