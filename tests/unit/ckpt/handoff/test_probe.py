"""A probe: its record comes back as it was, and no record that cannot be gets in."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ckpt.errors import ConfigError, DamagedError
from ckpt.handoff.probe import MAX_TOKENS, Probe, distance

PROBE = Probe((5, 6, 7), (-1.5, -2.25), (-1.0, -2.0), 0.05, "bfloat16")


def test_comes_back_from_json():
    for probe in (PROBE, Probe((0, 1), (-0.0,))):
        record = json.loads(json.dumps(probe.to_dict()))
        assert Probe.from_dict(record) == probe


def test_effect_is_the_distance_from_the_base():
    assert PROBE.effect == pytest.approx((0.5**2 / 2 + 0.25**2 / 2) ** 0.5)
    assert Probe((0, 1), (-1.0,)).effect is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", [1]),
        ("token_ids", [1, -2, 3]),
        ("token_ids", [1, True, 3]),
        ("token_ids", "abc"),
        ("token_ids", list(range(MAX_TOKENS + 1))),
        ("logprobs", [-1.0]),
        ("logprobs", [-1.0, None]),
        ("logprobs", {"a": 1}),
        ("logprobs", [-1.0, math.nan]),
        ("base_logprobs", [-1.0]),
        ("base_logprobs", [-1.0, -math.inf]),
        ("base_logprobs", 3),
        ("tolerance", 0),
        ("tolerance", -0.1),
        ("tolerance", math.inf),
        ("tolerance", 10**400),
        ("tolerance", True),
        ("tolerance", "0.1"),
        ("dtype", ""),
        ("dtype", 7),
        ("schema", 0),
        ("schema", 2),
        ("colour", "red"),
    ],
)
def test_a_record_that_cannot_be_is_refused_by_field(field: str, value: Any):
    record = {**PROBE.to_dict(), field: value}
    where = field if field != "tolerance" or value != 10**400 else "too large"
    with pytest.raises(DamagedError, match=where) as caught:
        Probe.from_dict(record, "run-v00000001/MANIFEST.json: probe")
    assert str(caught.value).startswith("run-v00000001/MANIFEST.json: probe")


@pytest.mark.parametrize("field", sorted(PROBE.to_dict()))
def test_a_missing_member_is_named(field: str):
    record = PROBE.to_dict()
    del record[field]
    with pytest.raises(DamagedError, match=f"{field} is missing"):
        Probe.from_dict(record)


def test_constructor_refuses_what_the_reader_refuses():
    with pytest.raises(ConfigError, match=r"Probe\.logprobs must be a tuple of 2 numbers"):
        Probe((1, 2, 3), (-1.0,))


def test_distance():
    assert distance([-1.0, -2.0], [-1.5, -2.0]) == pytest.approx(0.5 / 2**0.5)
    assert distance([-1.0, -2.0], [-1.3, -2.3]) == pytest.approx(0.3)
    assert distance([], []) == 0.0
    assert math.isnan(distance([-1.0, math.nan], [-1.0, -2.0]))
    with pytest.raises(ConfigError, match="cannot be of one prompt"):
        distance([-1.0], [-1.0, -2.0])
