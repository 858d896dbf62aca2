"""HuggingFace weights into an Archon model, plain or sharded; each rank reads its own part.

There is no collective here: a rank needs only the files and its own placements, so a rank that
fails cannot leave the others waiting in this function.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from archon_lora.errors import ModelLoadError, UnmappedName
from archon_lora.names import canonical_fqn
from archon_lora.placement import copy_local_, local_slice

from .base import BaseStateDictAdapter
from .hf_files import HFWeights, read_config
from .registry import get_model_spec

_SAMPLED_TENSORS = 512
_SAMPLED_ELEMENTS = 1024

VOLATILE_KEYS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of ``config.json`` that say how a model was saved or is run, not what it computes."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one rank loaded.

    Attributes:
        tensors: model tensors of which this rank holds a part.
        bytes_read: bytes of tensor data read by this rank.
    """

    tensors: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Read:
    """A tensor of which this rank holds a part, and where that part lies in it.

    Attributes:
        hf_names: the HF tensor, or for a stack its slices along the first dimension.
        tensor: the model's.
        index: this rank's part, one slice a dimension.
    """

    hf_names: tuple[str, ...]
    tensor: Tensor
    index: tuple[slice, ...]

    @property
    def is_stack(self) -> bool:
        """Whether the HF tensors have one dimension less."""
        return len(self.hf_names) > 1


def load_hf_weights(
    model: nn.Module, adapter: BaseStateDictAdapter, directory: str | Path
) -> LoadReport:
    """Fill a model's base weights from a HuggingFace directory, converting to the model's dtypes.

    Adapter parameters are left as they are: they are initialised or loaded on their own. A pipeline
    stage reads what it has; that the rest of the model is there is checked all the same.

    Args:
        model: materialised (not on the meta device); its parameters may be DTensors.
        adapter: the model's names.
        directory: holds ``model.safetensors`` or an index with its files.

    Returns:
        What this rank read.

    Raises:
        ModelLoadError: files missing or damaged, or keys missing, unexpected or misshapen: all of
            them in one message, and before any tensor is touched.
    """
    with HFWeights(directory) as weights:
        targets = base_tensors(model)
        _check_materialised(targets)
        stage = getattr(model, "stage", None)
        elsewhere: frozenset[str] = frozenset() if stage is None else stage.elsewhere
        hf_names = _match(targets, adapter, weights, elsewhere)
        reads = [
            _Read(hf_names[fqn], tensor, local_slice(tensor))
            for fqn, tensor in targets.items()
            if _holds_any(tensor)
        ]
        _check_aliases(reads, adapter, weights)
        for read in reads:
            _copy(read, weights)
        return LoadReport(tensors=len(reads), bytes_read=weights.bytes_read)


def _copy(read: _Read, weights: HFWeights) -> None:
    """Fill this rank's part of a tensor; of a stack, from the slices that it holds."""
    if not read.is_stack:
        copy_local_(read.tensor, weights.read(read.hf_names[0], read.index))
        return
    held, *rest = read.index
    tensor = read.tensor
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    for part, hf_name in zip(local.detach(), read.hf_names[held], strict=True):
        copy_local_(part, weights.read(hf_name, tuple(rest)))


def load_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, BaseStateDictAdapter]:
    """Build the model that a directory describes, on one device, with its weights.

    Args:
        directory: a HuggingFace model directory.
        dtype: of the parameters.
        device: where they go.

    Returns:
        The model in eval mode and its state-dict adapter.

    Raises:
        ModelLoadError: the directory cannot be loaded; see :func:`load_hf_weights`.
    """
    raw = read_config(Path(directory))
    spec = get_model_spec(str(raw.get("model_type")))
    config = spec.config_cls.from_hf(raw)
    with torch.device("meta"):
        model = spec.model_cls(config)
    model.to(dtype).to_empty(device=device)
    adapter = spec.state_dict_adapter_cls(config)
    load_hf_weights(model, adapter, directory)
    return model.eval(), adapter


def base_fingerprint(directory: str | Path, *, name: str | None = None) -> dict[str, str]:
    """Identity of a base model: its name and a hash of its configuration.

    The hash is SHA-256 over ``config.json`` as canonical JSON (sorted keys, no spaces, ASCII)
    without null entries and without :data:`VOLATILE_KEYS`. So it survives a copy, another storage
    dtype and a save by another patch version; weights are not read, and a fine-tuned model of the
    same shape has the same hash: :func:`weights_fingerprint` tells the two apart.

    Args:
        directory: the model directory.
        name: what users and engines call the model; by default the directory as given.

    Returns:
        ``{"name": ..., "config_hash": ...}``.

    Raises:
        ModelLoadError: no readable ``config.json``.
    """
    raw = read_config(Path(directory))
    kept = {key: v for key, v in raw.items() if v is not None and key not in VOLATILE_KEYS}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    return {"name": str(directory) if name is None else name, "config_hash": digest}


def weights_fingerprint(directory: str | Path) -> str:
    """A hash that tells a base model from another of the same configuration.

    SHA-256 over the names and shapes of up to 512 tensors, taken evenly by name, and over up to
    1024 elements from the middle of each, rounded to bfloat16. So it reads about a megabyte
    whatever the model's size, does not depend on the path or on how tensors are split into files,
    and a copy stored in bfloat16 is the same model as its fp32 original. It is no proof of
    equality: a change that misses every sample goes unseen.

    Args:
        directory: a model directory with safetensors weights.

    Returns:
        64 hex digits.

    Raises:
        ModelLoadError: the weights cannot be read.
    """
    digest = hashlib.sha256()
    with HFWeights(directory) as weights:
        names = sorted(name for name, shape in weights.shapes.items() if all(shape) and shape)
        for name in names[:: math.ceil(len(names) / _SAMPLED_TENSORS) or 1]:
            *outer, last = weights.shapes[name]
            block = (*(slice(n // 2, n // 2 + 1) for n in outer), slice(0, _SAMPLED_ELEMENTS))
            sample = weights.read(name, block).to(torch.bfloat16).contiguous()
            digest.update(f"{name} {outer} {last}\n".encode())
            # NumPy may not be installed.
            digest.update(bytes(sample.view(torch.uint8).flatten().tolist()))
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the base model by canonical name."""
    adapter_names: set[str] = set()
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        # Here and not above: a model without LoRA imports none of its code.
        from archon_lora.adapter import get_adapter_params

        adapter_names = set(get_adapter_params(model, frozen=True))
    tensors = {canonical_fqn(name): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if name not in adapter_names}


def _check_materialised(tensors: Mapping[str, Tensor]) -> None:
    on_meta = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if on_meta:
        msg = (
            f"{len(on_meta)} tensors are on the meta device ({on_meta[0]}, ...); "
            "call model.to_empty(device=...) before loading"
        )
        raise ModelLoadError(msg)


def _match(
    targets: Mapping[str, Tensor],
    adapter: BaseStateDictAdapter,
    weights: HFWeights,
    elsewhere: frozenset[str],
) -> dict[str, tuple[str, ...]]:
    """HF names of every target, after comparing both sides completely.

    ``elsewhere`` names what other pipeline stages take.

    Raises:
        ModelLoadError: lists every missing, unexpected and misshapen key.
    """
    hf_names: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for fqn, tensor in targets.items():
        hf_names[fqn] = adapter.stored_as(fqn)
        wanted = tuple(tensor.shape)[1 if len(hf_names[fqn]) > 1 else 0 :]
        for hf_name in hf_names[fqn]:
            stored = weights.shapes.get(hf_name)
            if stored is None:
                problems.append(f"missing: {hf_name} (for {fqn}, shape {wanted})")
            elif stored != wanted:
                problems.append(f"wrong shape: {hf_name} is {stored}, the model wants {wanted}")
    taken = {hf_name for names in hf_names.values() for hf_name in names}
    for fqn in sorted(elsewhere):
        names = adapter.stored_as(fqn)
        taken.update(names)
        problems += [
            f"missing: {hf_name} (for {fqn})" for hf_name in names if hf_name not in weights.shapes
        ]
    problems += [
        f"unexpected: {hf_name}"
        for hf_name in sorted(set(weights.shapes) - taken)
        if not _is_harmless(hf_name, adapter)
    ]
    if problems:
        msg = f"{weights.directory} does not fit the model:\n  " + "\n  ".join(problems)
        raise ModelLoadError(msg)
    return hf_names


def _is_harmless(hf_name: str, adapter: BaseStateDictAdapter) -> bool:
    """Whether a stored tensor that no target takes is known to carry nothing of its own."""
    if hf_name in adapter.hf_aliases():
        return True
    try:
        return adapter.from_hf_name(hf_name) is None
    except UnmappedName:
        return False


def _holds_any(tensor: Tensor) -> bool:
    """Whether this rank holds any element: small tensors leave some ranks with nothing."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() > 0


def _check_aliases(reads: list[_Read], adapter: BaseStateDictAdapter, weights: HFWeights) -> None:
    """A second stored copy of a tied tensor must equal the first, on this rank's block.

    Raises:
        ModelLoadError: it differs, so that one of the two would be lost.
    """
    by_name = {read.hf_names[0]: read for read in reads if not read.is_stack}
    for alias, original in adapter.hf_aliases().items():
        read = by_name.get(original)
        if alias not in weights.shapes or read is None:
            continue
        same = weights.shapes[alias] == weights.shapes[original] and torch.equal(
            weights.read(alias, read.index),
            weights.read(original, read.index),
        )
        if not same:
            msg = (
                f"{weights.directory}: {alias} differs from {original}, but the model ties them; "
                "set tie_word_embeddings to false in config.json to keep both"
            )
            raise ModelLoadError(msg)
