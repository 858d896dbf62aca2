"""The service's pages over roots that somebody forged: never an error of ours, never a script."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_report import MODE
from support.serving import serving
from support.shown_root import RUN, fill

from ckpt.envelope import seal
from ckpt.errors import ConfigError
from ckpt.layout import step_name

settings.register_profile(
    "pages",
    deadline=None,
    max_examples=300 if os.environ[MODE] == "full" else 12,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pages = settings.get_profile("pages")

SAVES = 6
EVIL = "<script>alert(1)</script>"
KINDS = {
    "ckpt.step": f"steps/{step_name(SAVES - 1, 1)}/MANIFEST.json",
    "ckpt.version": f"adapters/{RUN}-v00000002/MANIFEST.json",
    "ckpt.timeline": "metrics/*.json",
    "ckpt.replicas": "replicas/sync-gpu-1.json",
    "ckpt.lease": f"leases/{RUN}-v00000002/eval-box.json",
    "ckpt.writer": "writers/0001.json",
}
PATHS = (
    "/",
    "/runs/root",
    f"/runs/root/steps/{step_name(SAVES - 1, 1)}",
    "/runs/root/versions",
    f"/runs/root/versions/{RUN}-v00000002",
    f"/runs/root/versions/{RUN}-v00000002/norms",
)

values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 0.0, -1.5, 1e300, "", EVIL, "\n\x00", "é" * 600]),
    st.sampled_from([[], {}, [EVIL], {EVIL: EVIL}, [[]], [{"shape": 3}], "0001-01-01T00:00:00Z"]),
)


@pytest.fixture(scope="module")
def filled() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shown-") as folder:
        fill(Path(folder, "root"), saves=SAVES, layers=1, versions=2)
        yield Path(folder, "root")


def replaced(document: Any, data: st.DataObject, value: Any) -> Any:
    """The document with one part of it, anywhere, put in the place of by the value."""
    if not isinstance(document, dict | list) or not document or data.draw(st.integers(0, 4)) == 0:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = data.draw(st.sampled_from(keys))
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = replaced(copy[key], data, value)
    return copy


@settings(pages)
@given(data=st.data(), value=values, kind=st.sampled_from(sorted(KINDS)))
def test_a_forged_document(filled: Path, data: st.DataObject, value: Any, kind: str) -> None:
    """Its hash is right and its content is not."""
    with tempfile.TemporaryDirectory(prefix="forged-") as folder:
        root = Path(shutil.copytree(filled, Path(folder, "root")))
        (path,) = root.glob(KINDS[kind])
        whole = json.loads(path.read_bytes())
        schema = whole["schema"]
        body = replaced(whole, data, value)
        if isinstance(body, dict):
            for fixed in ("format", "schema", "sha256"):
                body.pop(fixed, None)
            try:
                path.write_bytes(seal(kind, schema, body))
            except ConfigError:
                path.write_bytes(b"")
        with serving(root) as client:
            for place in PATHS:
                answer = client.get(place)
                assert answer.status_code in (200, 202, 404, 409, 422), (place, answer.text)
                assert EVIL not in answer.text
                assert len(answer.content) < 1_000_000
