"""A LoRA adapter to and from a PEFT directory, over any number of ranks.

The directory is what PEFT itself writes: ``adapter_model.safetensors`` with the names
``base_model.model.<HF module>.lora_A.weight`` (in the model, after torchtune, the factors are
``lora_a`` and ``lora_b``) and ``adapter_config.json``. Values are in the training form and dtype,
so a load gives back the same bits. Barriers and transfers are on ``engine.cpu_group``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from archon_lora.adapter import get_adapter_params
from archon_lora.errors import AdapterNotFound, NoAdapterError
from archon_lora.names import DEFAULT_ADAPTER
from archon_lora.peft import adapter_values, peft_export
from archon_lora.placement import copy_local_
from ckpt.errors import ObjectNotFound
from ckpt.peft import (
    CONFIG_NAME,
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_NAME,
    WeightsFile,
    is_lora_adapter_dir,
    read_adapter,
)
from ckpt.peft_config import config_bytes
from ckpt.storage import Buffer, Storage, open_storage
from ckpt.takeover import WarmStart
from ckpt.takeover import warm_start as start_from
from ckpt.types import ExpertForm

from .adapter_stream import AdapterStream, require_lora
from .agree import agree, attempt, deadline_of, gather_json, rank_of
from .gather import as_bytes, dtype_name, dtype_named
from .reference import keep_reference
from .types import EngineLike

if TYPE_CHECKING:
    from .engine import ArchonEngine


def is_lora_adapter_checkpoint(path: str | Path) -> bool:
    """Whether a local directory holds a PEFT LoRA adapter (weights and configuration)."""
    return is_lora_adapter_dir(path)


def save_lora_adapter(
    engine: EngineLike,
    path: str | Path,
    base_model_path: str | None = None,
    *,
    experts: ExpertForm = "single",
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Write the adapter as a PEFT directory; every rank must call, the first one writes.

    The bytes are the same for every number of ranks. Other files in the directory stay. An
    adapter that is there is replaced: the weights in one step, and where the configuration changes
    too, it is taken away until the new weights are in place, so that a reader finds the old
    adapter, none, or the new one, and never a mixture.

    Args:
        engine: its LoRA must be on.
        path: the directory, on a file system that the first rank sees, or a URL that
            :func:`ckpt.storage.open_storage` knows.
        base_model_path: what the configuration names as the base model; by default
            ``engine.config.path``.
        experts: form of the adapters on experts. ``"stacked"`` is written with one rank and
            ``alpha = r``, the scaling in B, since no other stack means the same to every reader.
        adapter: which one, of those that the model holds.

    Raises:
        LoRANotEnabled: LoRA is off; the message names the setting.
        NoAdapterError: LoRA is on, but there are no adapter parameters.
        ConfigError: experts cannot be stacked; there are none, or not all are adapted.
        NonFiniteError: a value is NaN or infinite; nothing was replaced.
        StorageError: the first rank could not write. The other ranks raise ``PeerFailed``.
    """
    where = shown(path)
    require_lora(engine, f"saving an adapter to {where}")
    base = str(engine.config.path) if base_model_path is None else base_model_path
    stream = AdapterStream(
        engine,
        base_model_name=base,
        normalise=experts == "stacked",
        experts=experts,
        adapter=adapter,
    )
    error: Exception | None = None
    if stream.is_writer:
        try:
            _write(open_storage(str(path)), stream.weights(), stream.peft_config)
        except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
            error = caught
    stream.finish()
    agree(
        engine.cpu_group,
        error,
        what=f"writing the adapter to {where}",
        timeout=deadline_of(engine),
    )


def load_lora_adapter(
    engine: EngineLike, path: str | Path, *, adapter: str = DEFAULT_ADAPTER
) -> None:
    """Read a PEFT adapter into the model; every rank must call, only the first one reads.

    Takes ``adapter_model.safetensors`` or a legacy ``adapter_model.bin`` (tensors only, never a
    pickle that runs code). All keys, shapes and values are checked, on all ranks, before any rank
    changes anything. Each rank then takes its part of every tensor, whatever the placement.

    Args:
        engine: its LoRA must be on.
        path: the directory, on a file system that the first rank sees.
        adapter: which one takes the values.

    Raises:
        LoRANotEnabled: LoRA is off; the message names the setting.
        NoAdapterError: LoRA is on, but there are no adapter parameters.
        AdapterNotFound: a file is missing; the message has the full path and what was expected.
        AdapterMismatch: lists what is missing, unexpected or of another shape.
        DamagedError: a file that does not parse.
        PeerFailed: the above happened on another rank.
    """
    where = shown(path)
    require_lora(engine, f"loading the adapter at {where}")
    group, timeout = engine.cpu_group, deadline_of(engine)
    parts = [part for part in engine.model_parts if get_adapter_params(part)]
    mine = [rule["key"] for part in parts for rule in peft_export(part, adapter=adapter)["rules"]]
    everybodys = {k for keys in gather_json(group, mine, timeout=timeout) for k in keys}
    if not everybodys:
        msg = (
            f"LoRA is configured, but the model has no adapter parameters, so the adapter at "
            f"{where} cannot be loaded; check target_modules"
        )
        raise NoAdapterError(msg)
    config, tensors = _read_everywhere(path, group, timeout)
    plan: list[tuple[Tensor, Tensor]] = []
    with attempt(group, what=f"checking the adapter at {where}", timeout=timeout):
        for part in parts:
            held = get_adapter_params(part, frozen=True)
            rules = peft_export(part, adapter=adapter)["rules"]
            own = {rule["key"] for rule in rules if rule["source"] in held}
            # What belongs to another part is not this one's to refuse.
            given = {k: t for k, t in tensors.items() if k in own or k not in everybodys}
            plan += adapter_values(part, given, config, adapter=adapter)
    for parameter, value in plan:
        copy_local_(parameter, value)
    agree(group, None, what=f"loading the adapter at {where}", timeout=timeout)


def warm_start(
    engine: ArchonEngine,
    url: str | Path,
    *,
    rescale: bool = False,
    any_base: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> WarmStart:
    """Begin with the values of an adapter that exists; every rank must call, each reads its part.

    An engine with ``reference="warm-start"`` keeps a frozen copy of it as its reference.

    Unlike :func:`load_lora_adapter` it takes the URL of any store, reads no tensor whole, compares
    the base models, and refuses an adapter of another ``alpha / r`` unless told to fold it in.

    Args:
        engine: its LoRA must be on; its optimizer should have made no step.
        url: a PEFT directory, or a published version's.
        rescale: fold a scaling that is not the engine's into B.
        any_base: do not compare the base models.
        storage_options: for the directory's store.

    Raises:
        LoRANotEnabled: LoRA is off; the message names the setting.
        CkptError: see :func:`ckpt.takeover.take_over`; nothing was changed.
    """
    require_lora(engine, f"a warm start from {shown(url)}")
    taken = start_from(
        engine.train_state(),
        url,
        rescale=rescale,
        any_base=any_base,
        storage_options=storage_options,
        process_group=engine.cpu_group,
        timeout=deadline_of(engine),
    )
    if engine.config.reference == "warm-start":
        keep_reference(engine)
    return taken


def shown(path: str | Path) -> str:
    """A path as errors show it: absolute, or the URL."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


def _write(storage: Storage, weights: WeightsFile, config: dict[str, Any]) -> None:
    new = config_bytes(config)
    changed = storage.exists(CONFIG_NAME) and storage.read(CONFIG_NAME) != new

    def chunks() -> Iterator[Buffer]:
        yield from weights.chunks
        if changed:
            # All bytes are out by now and only the switch is left: a failure before this point
            # leaves the old adapter whole.
            storage.delete(CONFIG_NAME)

    storage.put_stream(WEIGHTS_NAME, chunks(), weights.size)
    storage.put(CONFIG_NAME, new)


def _read_everywhere(
    path: str | Path, group: dist.ProcessGroup | None, timeout: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read on the first rank and give every rank the same configuration and tensors."""
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    with attempt(group, what=f"reading the adapter at {shown(path)}", timeout=timeout):
        if rank_of(group) == 0:
            config, tensors = _read(path)
    said = {
        "config": config,
        "tensors": {k: (list(t.shape), dtype_name(t.dtype)) for k, t in tensors.items()},
    }
    first = gather_json(group, said, timeout=timeout)[0]
    if group is None or dist.get_world_size(group) == 1:
        return config, tensors
    whole = {}
    for key, (shape, dtype) in first["tensors"].items():
        tensor = (
            tensors[key].contiguous() if tensors else torch.empty(shape, dtype=dtype_named(dtype))
        )
        dist.broadcast(as_bytes(tensor), group=group, group_src=0)
        whole[key] = tensor
    return first["config"], whole


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if "://" in str(path):
        msg = f"{path} is a URL; warm_start(engine, url) reads an adapter from any store"
        raise AdapterNotFound(msg)
    try:
        return read_adapter(path)
    except ObjectNotFound as error:
        directory = Path(path)
        there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else None
        found = (
            "no such directory" if there is None else f"it holds {', '.join(there) or 'nothing'}"
        )
        msg = (
            f"no LoRA adapter at {shown(path)}: expected {WEIGHTS_NAME} (or {LEGACY_WEIGHTS_NAME}) "
            f"and {CONFIG_NAME}, but {found}; set path to a directory that save_lora_adapter() or "
            "PEFT wrote"
        )
        raise AdapterNotFound(msg) from error
