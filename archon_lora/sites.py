"""Where a model's adapter sits, module by module as HuggingFace counts them: experts one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .adapter import AppliedLoRA
from .embedding import LoRAEmbedding
from .errors import NoAdapterError
from .experts import LoRAGroupedExperts, factor_names
from .linear import LoRALinear
from .names import DEFAULT_ADAPTER, canonical_modules
from .peft_keys import Factor, peft_key

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """The adapter of one linear layer, or of one projection of one expert.

    Attributes:
        a: parameter A, ``(r, in)``; of an expert the stack that it lies in, ``(E, r, in)``.
        b: parameter B, ``(out, r)``, or ``(E, out, r)``.
        a_name: canonical FQN of ``a``.
        b_name: canonical FQN of ``b``.
        index: the expert's place in the stacks, or None.
        rank: inner dimension.
        scaling: factor on the update.
        embedding: the layer is an embedding: ``in`` counts its rows, ``out`` is their width.
    """

    a: Tensor
    b: Tensor
    a_name: str
    b_name: str
    index: int | None
    rank: int
    scaling: float
    embedding: bool = False

    def key(self, hf: str, factor: Factor) -> str:
        """What PEFT calls a factor, given the module's HF name."""
        return peft_key(hf, factor, embedding=self.embedding)

    def parameter(self, factor: Factor) -> Tensor:
        """The parameter that holds a factor."""
        return self.a if factor == "A" else self.b

    def source(self, factor: Factor) -> str:
        """Canonical FQN of that parameter."""
        return self.a_name if factor == "A" else self.b_name

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return int(self.a.shape[-1])

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return int(self.b.shape[-2])


def adapter_sites(
    model: nn.Module, record: AppliedLoRA, *, adapter: str = DEFAULT_ADAPTER
) -> dict[str, AdapterSite]:
    """Every adapted module by its HF name, in the order in which they matched; experts last.

    Args:
        model: the model, sharded or wrapped or not.
        record: what ``apply_lora()`` did to it.
        adapter: which one; modules that do not hold it are left out.

    Raises:
        NoAdapterError: modules that were adapted are gone.
    """
    modules = {m.fqn: m for _, m in canonical_modules(model) if isinstance(m, _HOLDERS)}
    sites: dict[str, AdapterSite] = {}
    gone: list[str] = []
    for fqn, hf in record.matched.items():
        layer = modules.get(fqn)
        if isinstance(layer, LoRAEmbedding):
            if adapter in layer.adapter_names():
                sites[hf] = _embedding_site(layer, fqn, adapter)
            continue
        if not isinstance(layer, LoRALinear):
            gone.append(fqn)
            continue
        names = [f"{fqn}.{name}" for name in layer.params_of(adapter)]
        if not names:
            continue
        held = layer.adapter_of(adapter)
        a, b = held.lora_a.weight, held.lora_b.weight
        sites[hf] = AdapterSite(a, b, names[0], names[1], None, held.rank, held.scaling)
    for name, hf_names in record.experts.items():
        fqn, _, stack = name.rpartition(".")
        experts = modules.get(fqn)
        if not isinstance(experts, LoRAGroupedExperts):
            gone.append(name)
            continue
        if adapter not in experts.adapter_names():
            continue
        inner = experts.adapter_of(adapter)
        a, b = (inner.get_parameter(factor) for factor in factor_names(stack))
        a_name, b_name = (f"{inner.fqn}.{factor}" for factor in factor_names(stack))
        for index, hf in enumerate(hf_names):
            rank, scaling = inner.ranks[stack], inner.scalings[stack]
            sites[hf] = AdapterSite(a, b, a_name, b_name, index, rank, scaling)
    if gone:
        shown = ", ".join(gone[:_SHOWN]) + (" and more" if len(gone) > _SHOWN else "")
        msg = f"modules that apply_lora() adapted no longer hold their adapters: {shown}"
        raise NoAdapterError(msg)
    return sites


def _embedding_site(layer: LoRAEmbedding, fqn: str, adapter: str) -> AdapterSite:
    held = layer.adapter_of(adapter)
    a_name, b_name = (f"{fqn}.{name}" for name in layer.params_of(adapter))
    a, b = held.lora_embedding_a, held.lora_embedding_b
    return AdapterSite(a, b, a_name, b_name, None, held.rank, held.scaling, embedding=True)


_HOLDERS = (LoRALinear, LoRAEmbedding, LoRAGroupedExperts)
