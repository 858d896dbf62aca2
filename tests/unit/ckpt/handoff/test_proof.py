"""A replica proves a version by what it answers, or it does not serve it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from support.handovers import World, loads_of

from ckpt.errors import DamagedError
from ckpt.handoff.engine import ProofError
from ckpt.handoff.probe import Probe
from ckpt.handoff.proof import check_directory, prove


def test_without_a_probe_difference_and_digest_count(world: World):
    handover = world.handover()
    version, path = world.version(probe=False)
    report = handover.make_live(version, path)
    report.raise_if_failed()
    assert report.replicas[0].evidence.by == "difference"
    version, path = world.version(probe=False)
    for server in world.servers:
        server.faults({"at": "load", "do": "base"})
    assert "serves the base model" in handover.make_live(version, path).explain()
    for server in world.servers:
        server.faults()
    version, path = world.version(probe=False)
    weights = path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    report = handover.make_live(version, path)
    assert not report.live
    assert "SHA-256" in report.explain()
    assert all(loads_of(server, version.name) == 0 for server in world.servers)


def test_an_adapter_that_changes_nothing_is_proven_as_such(world: World):
    """A fresh adapter has B = 0: its answers are the base's, and rightly so."""
    handover = world.handover()
    version, path = world.version(probe=False, zero=True)
    report = handover.make_live(version, path)
    report.raise_if_failed()
    assert report.replicas[0].evidence.by == "no effect"
    version, path = world.version(zero=True)
    report = handover.make_live(version, path)
    report.raise_if_failed()
    assert not report.replicas[0].evidence.telling


def test_another_base_model_is_named(world: World):
    version, path = world.version()
    assert version.probe is not None
    base = tuple(value - 1.0 for value in version.probe.base_logprobs or ())
    probe = dataclasses.replace(version.probe, base_logprobs=base)
    report = world.handover().make_live(dataclasses.replace(version, probe=probe), path)
    assert "another base model" in report.explain()


def test_a_probe_that_cannot_tell_needs_a_difference(world: World):
    """Recorded without the base's values, and the base would match: then they must differ."""
    version, path = world.version(zero=True)
    assert version.probe is not None
    probe = Probe(version.probe.token_ids, version.probe.logprobs)
    world.engines[0].load(version.name, str(path))
    with pytest.raises(ProofError, match="base model"):
        prove(world.engines[0], dataclasses.replace(version, probe=probe), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "no such file"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b""), "0 bytes"),
        (lambda path: (path / "extra.safetensors").write_bytes(b"x"), "foreign"),
        (lambda path: (path / "old.bin").write_bytes(b"x"), "foreign"),
    ],
)
def test_a_directory_that_is_not_the_version_is_not_given_to_an_engine(
    world: World, damage: Callable[[Path], object], message: str
):
    version, path = world.version()
    damage(path)
    report = world.handover().make_live(version, path)
    assert not report.live
    assert message in report.explain()
    assert report.replicas[0].stage == "files"
    assert all(loads_of(server, version.name) == 0 for server in world.servers)


def test_each_version_has_a_directory_of_its_own(world: World, tmp_path: Path):
    version, path = world.version()
    (tmp_path / "link").mkdir()
    (tmp_path / "current").symlink_to(path)
    check_directory(version, (tmp_path / "current").resolve(), digest=True)
    with pytest.raises(DamagedError, match="must be called"):
        check_directory(version, tmp_path / "current", digest=False)
    with pytest.raises(DamagedError, match="cannot be read"):
        check_directory(version, tmp_path / "nowhere" / version.name, digest=False)
