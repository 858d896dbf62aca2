"""What the ranks of the tests of the examples do: run each of them, and run it again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from support import ranks_areal, ranks_hf

ROOT = Path(__file__).parents[2]
LOOPS = ("peft_loop", "verl_worker", "torchtitan_trainer")


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def everything(rank: int, world: int, root: Path, model: Path) -> dict[str, Any]:
    """Each loop: whole at once, and in two parts on a root of its own."""
    ranks_hf.quiet()
    sys.path.insert(0, str(ranks_areal.SITE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name in LOOPS:
            module = example(name)
            whole = module.main(["--out", str(root / name / "whole"), "--steps", "6"])
            # A run that ends after its third step, as far as a resume is concerned.
            out = str(root / name / "parts")
            first = stopped(module, out)
            second = module.main(["--out", out, "--steps", "6"])
            found[name] = {"whole": whole, "first": first, "second": second}
        actor = example("areal_lora")
        words = ["--model", str(model), "--out", str(root / "areal"), "--dtype", "float32"]
        words += ["--ranks", str(world), "--steps", "2"]
        found["areal_lora"] = {"first": actor.main(words), "second": actor.main(words)}
    return found


class Stop(Exception):
    """Ends a loop as a crash would."""


def stopped(module: ModuleType, out: str) -> int:
    """Run a loop until its third save is committed; the number of steps that it saved."""
    manager = module.CheckpointManager

    class Stopping(manager):  # type: ignore[misc, valid-type]  # the class is a value here
        def save(self, step: int, *args: Any, **options: Any) -> Any:
            handle = super().save(step, *args, **options)
            if step == 2:
                handle.wait()
                self.close()
                raise Stop
            return handle

    module.CheckpointManager = Stopping  # type: ignore[attr-defined]
    try:
        module.main(["--out", out, "--steps", "6"])
    except Stop:
        return 3
    finally:
        module.CheckpointManager = manager  # type: ignore[attr-defined]
    return 0
