"""Handing weights to rollout targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from archon_lora.errors import ArchonLoraError

from .agree import agree, deadline_of, gather_json, rank_of
from .gather import Gather
from .types import FullWeightSink, WeightSink

if TYPE_CHECKING:
    from ckpt import SaveHandle

    from .engine import ArchonEngine


def update_weights(
    engine: ArchonEngine, version: int, *, normalise: bool = True
) -> SaveHandle | None:
    """Serve the weights as a policy version; every rank must call.

    First every sink of every rank loads them, then ``engine.manager``, if there is one, publishes
    them in the background. Sinks on the first rank alone save the other ranks the transfer.

    Args:
        engine: its ``sinks`` and ``manager`` are served.
        version: the policy version; not below the engine's, which takes this value once all sinks
            have loaded.
        normalise: with LoRA, the serving form rather than the training form, for the sinks; what
            is published is always in the serving form.

    Returns:
        The handle of the publication, or None without a manager.

    Raises:
        ValueError: the version is below the engine's: its name may stand for other weights.
        ArchonLoraError: a sink of the wrong kind.
        PeerFailed: a sink on another rank failed. Some sinks may serve the new version then, but
            the engine keeps its old one.
    """
    before = engine.get_version()
    if version < before:
        msg = (
            f"version {version} is below the engine's {before}; versions only grow, so that a name "
            "never stands for two policies"
        )
        raise ValueError(msg)
    if engine.lora_config is not None:
        _hand_over_adapter(engine, version, normalise=normalise)
    else:
        _hand_over_model(engine, version)
    engine.set_version(version)
    if engine.manager is None:
        return None
    return engine.manager.publish(engine.train_state())


def _check_sinks(engine: ArchonEngine, kind: type) -> list[int]:
    """Number of sinks on every rank.

    Raises:
        ArchonLoraError: a sink that cannot take what this engine has.
    """
    wrong = [type(sink).__name__ for sink in engine.sinks if not isinstance(sink, kind)]
    error: Exception | None = None
    if wrong:
        msg = f"{', '.join(wrong)} cannot take these weights: the sink must be a {kind.__name__}"
        error = ArchonLoraError(msg)
    timeout = deadline_of(engine)
    agree(engine.cpu_group, error, what="checking the sinks", timeout=timeout)
    return [int(n) for n in gather_json(engine.cpu_group, len(engine.sinks), timeout=timeout)]


def _hand_over_adapter(engine: ArchonEngine, version: int, *, normalise: bool) -> None:
    from safetensors.torch import load

    from .adapter_stream import AdapterStream

    counts = _check_sinks(engine, WeightSink)
    if not any(counts):
        return
    group, timeout = engine.cpu_group, deadline_of(engine)
    stream = AdapterStream(engine, base_model_name=engine.base_name, normalise=normalise)
    error: Exception | None = None
    data = b""
    if stream.is_writer:
        try:
            data = b"".join(stream.weights().chunks)
        except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
            error = caught
    stream.finish()
    agree(group, error, what="gathering the adapter", timeout=timeout)
    if any(counts[1:]):
        data = _broadcast(data, group, timeout)
    try:
        if engine.sinks:
            tensors = load(data)
            for sink in engine.sinks:
                if isinstance(sink, WeightSink):
                    sink.load_adapter(version, stream.peft_config, tensors)
    except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
        error = caught
    agree(group, error, what=f"loading version {version} into a sink", timeout=timeout)


def _broadcast(data: bytes, group: dist.ProcessGroup | None, timeout: float) -> bytes:
    size = gather_json(group, len(data), timeout=timeout)[0]
    shared = bytearray(data or bytes(size))
    dist.broadcast(torch.frombuffer(shared, dtype=torch.uint8), group=group, group_src=0)
    return bytes(shared)


def _hand_over_model(engine: ArchonEngine, version: int) -> None:
    from .full_checkpoint import gather_model

    counts = _check_sinks(engine, FullWeightSink)
    group, timeout = engine.cpu_group, deadline_of(engine)
    if any(counts[1:]):
        msg = "without LoRA only the first rank's sinks are served: its copy is the only whole one"
        raise ArchonLoraError(msg)
    for index in range(counts[0]):
        gather = gather_model(engine)
        error: Exception | None = None
        if rank_of(group) == 0:
            sink = engine.sinks[index]
            try:
                if isinstance(sink, FullWeightSink):
                    sink.load_weights(version, _whole(gather))
            except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
                error = caught
        gather.drain()
        agree(group, error, what=f"loading version {version} into a sink", timeout=timeout)


def _whole(gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """What arrives on the first rank, where no tensor is None."""
    for name, tensor in gather:
        if tensor is not None:
            yield name, tensor
