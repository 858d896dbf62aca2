"""Tensor parallelism, recomputation, compilation and FSDP2 of a decoder of any family."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .decoder import Decoder, TransformerBlock
from .parallel_dims import ParallelMesh, mesh_of


def parallelize(
    model: Decoder,
    mesh: DeviceMesh | ParallelMesh,
    *,
    activation_checkpointing: bool = False,
    compile: bool = False,
    compile_backend: str = "inductor",
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
) -> Decoder:
    """Prepare a model for training on a mesh, in place.

    Adapters go in before (``apply_lora``): sharding places them as it meets them. Weights may be
    on the meta device; call ``to_empty()`` and load afterwards. No step changes a parameter's name.

    Args:
        model: the model, not yet sharded.
        mesh: a layout (see :func:`archon_lora.models.parallel_dims.build_mesh`); or a mesh of one
            dimension to shard over, or of two: replicate over the first, shard over the second.
        activation_checkpointing: compute each block's activations again in backward.
        compile: compile each block.
        compile_backend: of ``torch.compile``.
        param_dtype: dtype of gathered parameters and of the computation; None keeps each
            parameter's own.
        reduce_dtype: dtype of the gradient reduction.
        reshard_after_forward: free a block's gathered parameters after its forward.

    Returns:
        The same model.

    Raises:
        ValueError: a block is wrapped already; wrapped, it would be left out or named otherwise.
        ParallelConfigError: the layout does not fit the model.
        LoRAConfigError: the layout does not fit the adapter.
    """
    blocks = []
    for name, block in model.layers.items():
        if not isinstance(block, TransformerBlock):
            msg = (
                f"layers.{name} is a {type(block).__name__}, expected TransformerBlock: "
                "parallelize() comes before any wrapper"
            )
            raise ValueError(msg)  # noqa: TRY004 - the class is the sign of a wrong order of calls
        blocks.append(block)
    layout = mesh if isinstance(mesh, ParallelMesh) else mesh_of(mesh)
    if layout.tp is not None:
        from .tensor_plan import split_tensors

        split_tensors(
            model,
            layout.tp,
            sequence_parallel=layout.dims.sequence_parallel,
            experts_apart=layout.ep is not None,
        )
    for block in blocks:
        block.recompute = activation_checkpointing
        if compile:
            # The method, unlike torch.compile(block), leaves names as they are.
            block.compile(backend=compile_backend)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    place = None
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        # Here and not above: a model without LoRA imports none of its code.
        from archon_lora.parallel import adapter_shard_placement

        place = adapter_shard_placement(model, shards=layout.dims.dp_shard)
    if layout.ep is not None:
        from .expert_parallel import shard_experts

        shard_experts(blocks, layout, policy=policy, reshard_after_forward=reshard_after_forward)
    for block in blocks:
        fully_shard(
            block,
            mesh=layout.fsdp,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=place,
        )
    # The root holds embedding and head: used last in forward and first in backward.
    fully_shard(
        model,
        mesh=layout.fsdp,
        mp_policy=policy,
        reshard_after_forward=False,
        shard_placement_fn=place,
    )
    return model
