"""Uploads that a killed process leaves on a server, seen and cleared away by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.s3_server import S3Server
from typer.testing import CliRunner

import ckpt
from ckpt.cli_commands import app

pytestmark = pytest.mark.s3

_KILLED = """
import sys
from ckpt.storage import open_storage, s3
s3.SINGLE_PUT_BYTES = 2**20
open_storage(sys.argv[1]).put("steps/big", bytes(12 * 2**20))
"""


def prune(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["prune", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_a_killed_upload_leaves_is_pruned(s3: S3Server) -> None:
    url = s3.url("run")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, url],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(ckpt.__file__).parent.parent),
            "ARCHON_CKPT_FAULT": "object.multipart.before_complete=kill",
        },
        timeout=120,
    )
    assert done.returncode == -9
    key = f"{url.partition(s3.bucket)[2].lstrip('/')}/steps/big"
    client = s3.client()
    elsewhere = f"{s3.url('elsewhere').rpartition('/')[2]}/big"
    client.create_multipart_upload(Bucket=s3.bucket, Key=elsewhere)

    def unfinished() -> list[str]:
        found = client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])
        return sorted(upload["Key"] for upload in found if upload["Key"] in {elsewhere, key})

    assert unfinished() == sorted([elsewhere, key])
    # Not old enough yet; a dry run; and then for good. What is not below the root stays.
    (row,) = prune(url, "--uploads", "--older-than", "7d", "--dry-run")["entries"]
    begun = client.list_multipart_uploads(Bucket=s3.bucket, Prefix=key)["Uploads"][0]["Initiated"]
    fresh = datetime.now(UTC) - begun < timedelta(days=7)  # moto dates every upload to 2010
    assert (row["path"], row["keep"]) == ("steps/big", fresh)
    (row,) = prune(url, "--uploads", "--older-than", "0s", "--dry-run")["entries"]
    assert (row["path"], row["keep"]) == ("steps/big", False)
    assert len(unfinished()) == 2
    result = CliRunner().invoke(app, ["prune", url, "--uploads", "--older-than", "0s"])
    assert result.exit_code == 0, result.output
    assert "steps/big" in result.stdout
    assert "1 of 1 removed" in result.stdout
    assert unfinished() == [elsewhere]
    assert prune(url, "--uploads", "--older-than", "0s")["entries"] == []
    client.close()


def test_a_directory_has_no_uploads(tmp_path) -> None:
    result = CliRunner().invoke(app, ["prune", str(tmp_path), "--uploads"])
    assert result.exit_code == 2
    assert "only S3 stores have unfinished uploads" in result.stderr
    result = CliRunner().invoke(app, ["prune", str(tmp_path)])
    assert result.exit_code == 2
    assert "--uploads for unfinished uploads" in result.stderr
