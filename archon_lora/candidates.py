"""Which modules of a model can take an adapter, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from .bases import check_base
from .embedding import check_embedding
from .errors import TargetError
from .targets import head_names


@runtime_checkable
class Untargetable(Protocol):
    """A module that holds, or is, what PEFT or the engines would not adapt alike."""

    def untargetable(self, hf_name: str) -> Mapping[str, str]:
        """Why not, by the HF names concerned, given the module's own.

        The names may be of no module here, as those of experts that lie stacked in one tensor.
        """
        ...


def untargetable(modules: Mapping[str, nn.Module], hf_names: Mapping[str, str]) -> dict[str, str]:
    """Why not, by HF name, of all that modules say must not be adapted."""
    return {
        name: reason
        for fqn, module in modules.items()
        if fqn and isinstance(module, Untargetable)
        for name, reason in module.untargetable(hf_names[fqn]).items()
    }


def check_targetable(chosen: tuple[str, ...], refused: Mapping[str, str]) -> None:
    """Refuse targets that modules say must not be adapted.

    Adapting the rest in silence would train less than was asked for.

    Raises:
        TargetError: names the first of them, and why.
    """
    wrong = [name for name in chosen if name in refused]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        msg = f"target_modules selects {wrong[0]}{more}, but {refused[wrong[0]]}"
        raise TargetError(msg)


def output_names(
    model: nn.Module, modules: Mapping[str, nn.Module], hf_names: Mapping[str, str]
) -> frozenset[str]:
    """HF names of the output heads: what the model says, else by convention."""
    ask = getattr(model, "get_output_embeddings", None)  # transformers' PreTrainedModel
    if callable(ask):
        head = ask()
        return frozenset(hf_names[n] for n, m in modules.items() if n and m is head)
    heads = head_names(hf_names.values()) | {hf_names[n] for n in head_names(hf_names)}
    return frozenset(heads)


def other_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """For a model without linear layers below its head: what it has instead, or nothing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if any(isinstance(m, nn.Linear) for m in modules.values() if m is not head):
        return ""
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Embedding | nn.Linear) or weight is None or weight.dim() != 2:
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"; the model's layers are {kind} (as {name}), and only nn.Linear takes an adapter"
    return ""


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each module and each parameter object occurs."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners.setdefault(id(module), []).append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def check_candidate(
    modules: Mapping[str, nn.Module], fqn: str, hf: str, owners: Mapping[int, list[str]]
) -> None:
    """Make sure that one module can be adapted.

    Args:
        modules: all modules of the model by canonical FQN.
        fqn: the candidate's.
        hf: its HF name, for errors.
        owners: what :func:`owners_of` gives.

    Raises:
        TargetError: it is no layer that takes an adapter, is read past its forward, or shares its
            weight with another place.
    """
    module = modules[fqn]
    if isinstance(module, nn.Embedding):
        check_embedding(module, hf)
    else:
        check_base(module, hf)
    _check_parent(modules.get(fqn.rpartition(".")[0]), hf)
    _check_not_shared(module, hf, owners)


def _check_parent(parent: nn.Module | None, hf: str) -> None:
    """Torch's attention (and the encoder layer's fast path) reads weights past any forward."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        msg = (
            f"module {hf!r} lies in a {type(parent).__name__}, which reads its weight without "
            "calling it: an adapter would have no effect; leave it out with exclude_modules"
        )
        raise TargetError(msg)


def _check_not_shared(module: nn.Module, hf: str, owners: Mapping[int, list[str]]) -> None:
    places = owners[id(module)]
    if len(places) > 1:
        msg = f"module {hf!r} is used in several places ({', '.join(places)}); adapt none of them"
        raise TargetError(msg)
    for local, parameter in module.named_parameters(recurse=False):
        places = owners[id(parameter)]
        if len(places) > 1:
            msg = (
                f"{hf}.{local} is tied to another parameter ({', '.join(places)}): an adapter "
                "beside it would exist on one side only, and engines treat it in different ways; "
                "leave it out with exclude_modules"
            )
            raise TargetError(msg)
