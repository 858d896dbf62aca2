"""How a decoder of any family is split over the ranks of tensor parallelism, by its names.

Attention is split by heads and the feed-forward block by its inner width: their first matrices by
column, their last by row, so that each block has two sums over ranks in forward and two in
backward. Embedding and head are split over the vocabulary, and the logits are gathered. What lies
between is whole on every rank or, with sequence parallelism, split by position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional

from archon_lora.errors import ParallelConfigError
from archon_lora.layouts import BY_SEQUENCE, WHOLE, gather_features, relayout
from archon_lora.tensor_parallel import (
    ColumnParallel,
    Entered,
    Gathered,
    RowParallel,
    VocabularyParallel,
    Whole,
)

from .decoder import Decoder

Rule = Callable[[Placement], ParallelStyle]
"""From the layout of the residual stream to the style of a module."""


def _norm(stream: Placement) -> ParallelStyle:
    # By position, each rank has the gradient of its own positions only.
    return Whole(grad=WHOLE if isinstance(stream, Replicate) else Partial())


def _head(stream: Placement) -> ParallelStyle:
    return ColumnParallel(input_layout=stream, output_layout=WHOLE)


RULES: tuple[tuple[str, Rule], ...] = (
    (r"tok_embeddings", lambda stream: VocabularyParallel(output_layout=stream)),
    (r"layers\.\d+\.(attention|ffn)(_post)?_norm|norm", _norm),
    (r"layers\.\d+\.(attention|feed_forward)", lambda stream: Entered(layout=stream)),
    (r"layers\.\d+\.attention\.w[qkv]", lambda _: ColumnParallel(input_layout=None)),
    # A head's norm is one for all heads, and each rank has some of them.
    (r"layers\.\d+\.attention\.[qk]_norm", lambda _: Whole(grad=Partial())),
    (r"layers\.\d+\.attention\.wo", lambda stream: RowParallel(output_layout=stream)),
    (r"layers\.\d+\.feed_forward\.w[13]", lambda _: ColumnParallel(input_layout=None)),
    (r"layers\.\d+\.feed_forward\.w2", lambda stream: RowParallel(output_layout=stream)),
    (r"layers\.\d+\.moe", lambda stream: Gathered(layout=stream)),
    (r"output", _head),
)
"""Style by pattern of a module's name; a module with parameters that no rule covers is refused."""


def split_tensors(
    model: Decoder,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = False,
    experts_apart: bool = False,
) -> None:
    """Split a decoder over a mesh dimension, in place; adapters go in before.

    Args:
        model: the model, not yet sharded; may be on the meta device.
        mesh: one dimension.
        sequence_parallel: split activations between the matrices by position.
        experts_apart: leave experts as they are: expert parallelism shares them out.

    Raises:
        ParallelConfigError: heads or widths that do not divide, a module without a rule, or a
            pipeline stage with sequence parallelism.
        LoRAConfigError: an adapter with dropout.
    """
    _check_divides(model, mesh.size())
    if sequence_parallel and not (model.embeds and model.predicts):
        msg = (
            "sequence_parallel does not go with pp above 1: stages hand whole sequences to each "
            "other; set one of them back"
        )
        raise ParallelConfigError(msg)
    stream: Placement = BY_SEQUENCE if sequence_parallel else WHOLE
    planned = [(name, module, rule(stream)) for name, module, rule in _match(model)]
    for _, module, style in planned:
        if isinstance(style, Gathered) and experts_apart:
            style.apart = "experts."
        # What parallelize_module() does with a plan; its own patterns pass over a name in silence.
        style._apply(module, mesh)
    if sequence_parallel:
        model.sequence_multiple = mesh.size()
    if model.output is None:
        model.tied_head = _TiedHead(mesh, stream, model.config.vocab_size)


def _match(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Every module that a rule names.

    Raises:
        ParallelConfigError: a module with parameters lies under none.
    """
    covered: set[int] = set()
    for name, module in model.named_modules():
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        if rule is None:
            continue
        yield name, module, rule
        if not isinstance(rule(WHOLE), Entered):
            covered |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            msg = f"tensor parallelism has no rule for {name}; see RULES in models/tensor_plan.py"
            raise ParallelConfigError(msg)


def _check_divides(model: Decoder, tp: int) -> None:
    """Heads and widths must split evenly; a vocabulary need not.

    Raises:
        ParallelConfigError: names what does not, and the numbers.
    """
    config = model.config
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    if any(re.fullmatch(r"layers\.\d+\.feed_forward", name) for name, _ in model.named_modules()):
        sizes["intermediate_size"] = config.intermediate_size
    for name, size in sizes.items():
        if size % tp:
            msg = f"tp={tp} does not divide {name}={size} of this model; choose a tp that does"
            raise ParallelConfigError(msg)


class _TiedHead:
    """The head of a tied model: the embedding's rows, split over the vocabulary."""

    def __init__(self, mesh: DeviceMesh, stream: Placement, vocab: int) -> None:
        self.mesh = mesh
        self.stream = stream
        self.vocab = vocab

    def __call__(self, h_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """(B, S, V) logits of all positions, whole."""
        h_BSD = relayout(h_BSD, self.mesh, self.stream, WHOLE, grad=Partial())
        local_VD = weight_VD.to_local() if isinstance(weight_VD, DTensor) else weight_VD
        logits = functional.linear(h_BSD, local_VD)
        return gather_features(logits, self.mesh, self.vocab)
