"""Ranks of ``archon-lora train`` as real processes, without a launcher."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from archon_lora.rl.demo.processes import Child


def environment() -> dict[str, str]:
    """What children get: nothing that would lead them elsewhere."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MASTER_"))}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return env | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback[0]}


def start_ranks(config: Path, world: int, folder: Path, **settings: object) -> list[Child]:
    """Ranks without a launcher: nobody but they themselves notices a dead peer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "archon_lora.cli", "train", str(config)]
    for key, value in settings.items():
        command += ["--set", f"{key.replace('__', '.')}={value}"]
    return [
        Child(
            command,
            log=folder / f"rank{rank}.log",
            env=environment() | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
