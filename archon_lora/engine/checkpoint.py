"""What ``ArchonEngine.save`` and ``load`` do, by format and by whether LoRA is on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from archon_lora.errors import LoRANotEnabled
from ckpt.errors import StateError

from .agree import attempt, deadline_of, rank_of
from .resumable import FOLDER, load_train_state, save_train_state, train_state_numbers
from .types import SaveLoadMeta

if TYPE_CHECKING:
    from .engine import ArchonEngine

_ADAPTER_CONFIG = "adapter_config.json"


def save(engine: ArchonEngine, meta: SaveLoadMeta) -> None:
    """Save an engine; every rank must call. Returns when all of it is durable.

    ``"hf"`` writes a PEFT adapter directory with LoRA and a HuggingFace model directory without;
    ``with_optim`` adds the resumable checkpoint below ``train_state``, which is complete in
    itself and written first. ``"dcp"`` writes that alone.

    Args:
        engine: the engine.
        meta: where and what.

    Raises:
        StateError: weights alone are to be saved over a checkpoint with optimizer state: the two
            would not belong together any more.
        Exception: what the parts raise; see their functions.
    """
    if meta.weight_format == "dcp" or meta.with_optim:
        save_train_state(engine, meta.path, with_optim=meta.with_optim)
    elif train_state_numbers(engine, meta.path):
        msg = (
            f"{meta.path}/{FOLDER} holds the optimizer state of an earlier save, which would not "
            "belong to these weights: set with_optim=true, or save to another path"
        )
        raise StateError(msg)
    if meta.weight_format == "hf":
        _save_weights(engine, meta)
    _save_processing(engine, meta)


def load(engine: ArchonEngine, meta: SaveLoadMeta) -> None:
    """Load what :func:`save` wrote; every rank must call.

    ``with_optim`` and ``"dcp"`` restore the resumable checkpoint, which holds the weights too.
    ``"hf"`` alone reads the weights as other tools would. Nothing falls through to another kind
    of checkpoint than was asked for.

    Args:
        engine: the engine.
        meta: where and what.

    Raises:
        LoRANotEnabled: the path holds an adapter and the engine has no LoRA.
        AdapterNotFound: the engine has LoRA and the path holds no adapter.
        NoCheckpoint: there is no resumable checkpoint.
        Exception: what the parts raise; see their functions.
    """
    if engine.lora_config is None:
        # Agreed on: the directory may be there on some hosts only.
        what = f"looking at {Path(meta.path).absolute()}"
        with attempt(engine.cpu_group, what=what, timeout=deadline_of(engine)):
            _refuse_adapter(Path(meta.path))
    if meta.weight_format == "dcp" or meta.with_optim:
        load_train_state(engine, meta.path, with_optim=meta.with_optim)
    elif engine.lora_config is not None:
        from .lora_checkpoint import load_lora_adapter

        load_lora_adapter(engine, meta.path)
    else:
        from .full_checkpoint import load_full_model

        load_full_model(engine, meta.path)


def _refuse_adapter(path: Path) -> None:
    if (path / _ADAPTER_CONFIG).is_file():
        msg = (
            f"{path.absolute()} holds a LoRA adapter, but LoRA is not enabled on this engine: set "
            "use_lora=true (EngineConfig(lora=LoRAConfig(...))), or set path to a whole model"
        )
        raise LoRANotEnabled(msg)


def _save_weights(engine: ArchonEngine, meta: SaveLoadMeta) -> None:
    if engine.lora_config is not None:
        from .lora_checkpoint import save_lora_adapter

        save_lora_adapter(engine, meta.path, meta.base_model_path or engine.base_name)
    else:
        from .full_checkpoint import save_full_model

        save_full_model(engine, meta.path)


def _save_processing(engine: ArchonEngine, meta: SaveLoadMeta) -> None:
    parts = [part for part in (meta.tokenizer, meta.processor) if part is not None]
    group, timeout = engine.cpu_group, deadline_of(engine)
    with attempt(group, what=f"saving the tokenizer to {meta.path}", timeout=timeout):
        if rank_of(group) == 0:
            for part in parts:
                part.save_pretrained(meta.path)
