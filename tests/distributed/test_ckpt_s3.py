"""Two ranks on an S3 server: commit, damage, resume and publish through the object protocol."""

from __future__ import annotations

import pytest
from support import ranks_ckpt
from support.spawn import run_ranks

from ckpt.storage import open_storage
from ckpt.versions import read_version

pytestmark = [pytest.mark.dist, pytest.mark.s3]


def test_two_ranks_on_s3(s3):
    url = s3.url("run")
    digests = run_ranks(2, ranks_ckpt.three_saves, url)
    assert digests[0] == digests[1]
    storage = open_storage(url)
    steps = [entry.name for entry in storage.list("steps")]
    assert len(steps) == 3
    for start, reasons, digest in run_ranks(2, ranks_ckpt.damaged, url):
        assert (start, reasons) == (2, [])
        assert digest == digests[0][2]

    (attempt,) = [e.name for e in storage.list(f"steps/{steps[2]}") if e.is_dir]
    shard = f"steps/{steps[2]}/{attempt}/shard-00001-of-00002.safetensors"
    data = bytearray(storage.read(shard))
    data[len(data) // 2] ^= 8
    storage.put(shard, bytes(data))
    for start, reasons, digest in run_ranks(2, ranks_ckpt.damaged, url):
        assert start == 1
        assert "shard-00001-of-00002" in reasons[0]
        assert digest == digests[0][1]


def test_versions_on_s3(s3):
    url = s3.url("run")
    answers = run_ranks(2, ranks_ckpt.publish_both_ways, url)
    assert answers[0] == answers[1]
    storage = open_storage(url)
    for answer in answers[0]:
        name, sha256 = answer.split()
        assert read_version(storage, name).adapter_sha256 == sha256
    assert [e.name for e in storage.list("adapters") if e.name.startswith(".parts")] == []
