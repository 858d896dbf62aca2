"""Expert parallelism: the ranks of a mesh dimension share the experts out and exchange rows.

Ranks have tokens of their own. Each sends every row to the rank that holds the row's expert and
gets the result back, by two exchanges forward and two backward. An expert's gradient is so made of
the rows of all ranks that share the experts, without a reduction between them.

Shape suffixes: R rows sorted by expert, D hidden, X experts, P ranks, L experts of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from archon_lora.errors import ParallelConfigError

from .experts import MoE
from .parallel_dims import ParallelMesh


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backward sends the gradients the opposite way."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = (received, sent, group)
        return _exchange(x_RD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_RD,) = grads
        return _exchange(grad_RD, *ctx.way), None, None, None


def _exchange(
    x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_RD = x_RD.new_empty((sum(received), *x_RD.shape[1:]))
    dist.all_to_all_single(out_RD, x_RD.contiguous(), received, sent, group=group)
    return out_RD


class ExpertExchange:
    """Computes experts that lie on the ranks of a mesh dimension.

    Every rank of it must call for every layer, with any number of rows, none among them.

    Args:
        mesh: one dimension, whose ranks hold the experts in order.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, experts: nn.Module, x_RD: Tensor, counts_X: Tensor) -> Tensor:
        """Results of this rank's rows.

        Args:
            experts: those of this rank.
            x_RD: this rank's rows, sorted by expert.
            counts_X: rows for each of all experts, int64.

        Returns:
            (R, D), in the order of the rows.
        """
        # Collectives whose sizes only the data tell are no part of a compiled graph.
        outside = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        y_RD: Tensor = outside(experts, x_RD, counts_X)
        return y_RD

    def _run(self, experts: nn.Module, x_RD: Tensor, counts_X: Tensor) -> Tensor:
        group, ranks = self.mesh.get_group(), self.mesh.size()
        sent_PL = counts_X.view(ranks, -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=group)
        sent, received = sent_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        arrived_RD: Tensor = _Exchange.apply(x_RD, sent, received, group)  # type: ignore[no-untyped-call]
        # They come rank by rank, each rank's by expert; the experts want them by expert alone.
        number_PL = torch.arange(received_PL.shape[1], device=counts_X.device).expand_as(
            received_PL
        )
        expert_R = number_PL.flatten().repeat_interleave(received_PL.flatten())
        order_R = expert_R.argsort(stable=True)
        y_RD: Tensor = experts(arrived_RD[order_R], received_PL.sum(0))
        y_RD = y_RD[order_R.argsort()]
        back_RD: Tensor = _Exchange.apply(y_RD, received, sent, group)  # type: ignore[no-untyped-call]
        return back_RD


def shard_experts(
    blocks: Iterable[nn.Module],
    layout: ParallelMesh,
    *,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
) -> None:
    """Share the experts of every block out over ``layout.ep``, and shard what each rank has.

    To be called before the blocks themselves are sharded. The stacks and the adapters beside them
    become DTensors over the experts' own mesh; rank ``i`` of ``ep`` has the ``i``-th part of
    dimension 0. No communication.

    Args:
        blocks: of a decoder; those without experts are passed over.
        layout: with ``ep`` above 1.
        policy: as for the blocks.
        reshard_after_forward: as for the blocks.

    Raises:
        ParallelConfigError: no block has experts, or their number does not divide.
    """
    mesh, dims, whole_mesh = layout.ep, layout.dims, layout.experts
    if mesh is None or whole_mesh is None:
        return
    found = [module for block in blocks for module in block.modules() if isinstance(module, MoE)]
    if not found and layout.pp is None:  # a pipeline stage may have none
        raise ParallelConfigError(f"ep={dims.ep}, but the model has no experts; set ep to 1")
    for moe in found:
        if moe.total % mesh.size():
            msg = f"ep={dims.ep} does not divide the {moe.total} experts of a layer"
            raise ParallelConfigError(msg)
        _share_out(moe.experts, whole_mesh)
        moe.exchange = ExpertExchange(mesh)
        fully_shard(
            moe.experts,
            mesh=layout.expert_fsdp,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
        )
        _divide_gradients(moe.experts, layout)


def _share_out(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Put this rank's part of every parameter in its place.

    Over the first dimension of the mesh; ranks of a second one, ``tp``, have the same experts.
    """
    placements: list[Placement] = [Shard(0), *[Replicate()] * (mesh.ndim - 1)]
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.detach().chunk(mesh.size(0))[mesh.get_local_rank(0)].clone()
            shared = DTensor.from_local(local, mesh, placements, run_check=False)
            module.register_parameter(
                name, nn.Parameter(shared, requires_grad=parameter.requires_grad)
            )


def _divide_gradients(experts: nn.Module, layout: ParallelMesh) -> None:
    """Gradients of experts are means over all ranks with rows, as those of everything else.

    FSDP2 would divide by the ranks that it reduces over, and those are fewer: the rows of the
    ranks of ``ep`` have been added up by the exchange.
    """
    if not isinstance(experts, FSDPModule):
        msg = f"{type(experts).__name__} is not sharded"
        raise TypeError(msg)
    experts.set_gradient_divide_factor(float(layout.dims.dp))
    shards = layout.expert_fsdp.size(layout.expert_fsdp.ndim - 1)
    if layout.root.device_type == "cpu" and shards > 1:
        # gloo cannot scale before it adds. Over a single shard torch (2.13) divides twice with
        # this option, and needs no scaling collective.
        experts.set_force_sum_reduction_for_comms(True)
