"""What the fork servers import and read once, so that a forked rank need not."""

from __future__ import annotations

import functools
from typing import Any

import botocore.loaders
import botocore.session

# Optimizers import it when they are made, which alone takes longer than a whole cell.
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import archon_lora.engine
import archon_lora.models.registry  # noqa: F401
import ckpt.dcp
import ckpt.service.server  # noqa: F401
import support.ranks_faults  # noqa: F401


def remember_botocore_files() -> None:
    """Have botocore parse its descriptions of S3 once, not in every process."""
    read = botocore.loaders.JSONFileLoader().load_file

    @functools.cache
    def load_file(path: str) -> Any:
        return read(path)

    botocore.loaders.JSONFileLoader.load_file = lambda _self, path: load_file(path)
    session = botocore.session.get_session()
    session.create_client("s3", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")


remember_botocore_files()
