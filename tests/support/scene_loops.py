"""What the how-tos for loops and for migration find: what other trainers have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ckpt import CheckpointManager, TrainState
from support import sources, stock
from support.pages import ROOT, Scene, Stage

SITE = ROOT / "tests/support/areal_site"


def areal(stage: Stage) -> None:
    stage.patch.syspath_prepend(str(SITE))
    recovery_of_areal(stage)


def recovery_of_areal(stage: Stage) -> None:
    saved = stock.state_dict(*stock.model_and_optimizer(), flat=True)
    stock.save({"dcp": saved}, stage.folder / "recover_checkpoint")


def areal_end(stage: Stage) -> None:
    from areal.api.cli_args import TrainEngineConfig

    (settings,) = stage.read
    known = {field.name for field in dataclasses.fields(TrainEngineConfig)} | {"backend"}
    assert settings["actor"].keys() <= known
    assert settings["saver"] == {"mode": "sync"}


def torchtitan(stage: Stage) -> None:
    model, optimizer = stock.model_and_optimizer()
    found = stock.state_dict(model, optimizer, flat=True)
    saved = found["model"] | {"optimizer": found["optim"], "dataloader": {"a": 1}}
    stock.save(saved, stage.folder / "outputs/checkpoint/step-1000")


def torchtitan_import(stage: Stage) -> None:
    (stage.folder / "runs/titan").rename(stage.folder / "runs/shown")  # the page has used it


def verl(stage: Stage) -> None:
    sources.verl(stage.folder / "checkpoints/project/experiment/global_step_400")


def migrate(stage: Stage) -> None:
    stock.save(stock.state_dict(*stock.model_and_optimizer()), stage.folder / "stock")
    torchtitan(stage)
    recovery_of_areal(stage)
    verl(stage)
    sources.prime_rl(stage.folder / "outputs/step_300")
    sources.peft(stage.folder / "my-adapter")
    sources.torchtune(stage.folder / "epoch_0")


def migrate_end(stage: Stage) -> None:
    for root, step in (("first", 1000), ("titan", 1000), ("areal", 0), ("verl", 400)):
        imported(f"runs/{root}", step)(stage)
    found = [path.parent.name for path in stage.folder.glob("runs/*/adapters/*/MANIFEST.json")]
    assert sorted(found) == ["run-v00000001", "run7-v00000001"]
    assert (stage.folder / "runs/prime/steps/step-00000300.w0001/MANIFEST.json").exists()


def imported(root: str, step: int) -> Callable[[Stage], None]:
    """The step is in a root, and a trainer resumes from it."""

    def end(stage: Stage) -> None:
        model, optimizer = stock.model_and_optimizer(seed=1)
        with CheckpointManager(stage.folder / root) as manager:
            assert manager.restore(TrainState(model, optimizer), strict=False) == step

    return end


SCENES = {
    "docs/howto/areal.md": Scene(areal, end=areal_end),
    "docs/howto/migrate.md": Scene(migrate, end=migrate_end),
    "docs/howto/torchtitan.md": Scene(
        torchtitan,
        before={
            "ckpt import outputs/checkpoint/step-1000 runs/titan --step 1000 --model '' "
            "--skip dataloader": torchtitan_import
        },
        end=imported("runs/titan", 1000),
    ),
    "docs/howto/verl.md": Scene(verl, end=imported("runs/verl", 400)),
}
