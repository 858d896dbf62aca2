"""Which modules are adapted: PEFT's matching rules, made strict.

Matching runs on HuggingFace module names. The rules are those of
``peft.tuners.tuners_utils.check_target_module_exists``; stricter than PEFT, every entry of a list
and every pattern must be for some module, and ``"all-linear"`` leaves MoE routers out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from .config import ALL_LINEAR, LoRAConfig, pattern_matches
from .errors import TargetError

_HEADS = frozenset({"lm_head", "output"})
_GATES = frozenset({"gate", "router", "shared_expert_gate"})
_SHOWN = 20

COMPOSITE_PREFIX = "model.language_model."
"""Before the names of a language model inside a model of text and images, as HF has them."""


def selects(selector: str | Sequence[str], name: str) -> bool:
    """Whether a list of names, or a regular expression, selects a module.

    Args:
        selector: a regular expression that must match the whole name, or names, each of which
            selects the module of that name and any whose name ends in ``.<name>``.
        name: HF module name.
    """
    if isinstance(selector, str):
        return re.fullmatch(selector, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in selector)


def match_targets(
    config: LoRAConfig,
    names: Iterable[str],
    *,
    linear_names: Collection[str],
    output_names: Collection[str] = (),
) -> tuple[str, ...]:
    """Choose the modules to adapt.

    Args:
        config: target and exclusion settings, rank and alpha patterns.
        names: HF names of all modules of the model, the root (``""``) left out or not.
        linear_names: those that are linear layers.
        output_names: those that are output heads, which ``"all-linear"`` leaves out.

    Returns:
        The chosen names, in the order given.

    Raises:
        TargetError: nothing is chosen, or entries of ``target_modules``, ``exclude_modules``,
            ``rank_pattern`` or ``alpha_pattern`` are for no module; all of them are named.
    """
    everything = tuple(name for name in names if name)
    excluded = {
        n for n in everything if config.exclude_modules and selects(config.exclude_modules, n)
    }
    if config.target_modules == ALL_LINEAR:
        routers = router_names(everything)
        targeted = tuple(
            n
            for n in everything
            if n in linear_names and n not in output_names and n not in routers
        )
    else:
        targeted = tuple(n for n in everything if selects(config.target_modules, n))
    chosen = tuple(n for n in targeted if n not in excluded)
    problems = _idle_entries("exclude_modules", config.exclude_modules, everything, everything)
    if config.target_modules != ALL_LINEAR:
        problems += _idle_entries("target_modules", config.target_modules, everything, chosen)
    if problems:
        raise TargetError("; ".join(problems))
    if not chosen:
        msg = (
            f"target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r} selects no module"
        )
        raise TargetError(msg)
    problems = [
        f"{setting} key {key!r} is for none of the adapted modules{_near(key, chosen)}"
        for setting, patterns in (
            ("rank_pattern", config.rank_pattern),
            ("alpha_pattern", config.alpha_pattern),
        )
        for key in patterns
        if not any(pattern_matches(key, n) for n in chosen)
    ]
    if problems:
        raise TargetError("; ".join(problems))
    return chosen


def router_names(names: Iterable[str]) -> frozenset[str]:
    """The routers of mixture-of-experts layers: they choose experts and are not adapted.

    A module is one if a component of its name is ``router``, or if it is called ``gate`` or
    ``shared_expert_gate`` and has a sibling ``experts`` (a ``gate`` elsewhere is a projection).
    """
    known = frozenset(names)
    found = set()
    for name in known:
        parent, _, last = name.rpartition(".")
        siblings = f"{parent}.experts" if parent else "experts"
        if "router" in name.split(".") or (last in _GATES and siblings in known):
            found.add(name)
    return frozenset(found)


def head_names(names: Iterable[str]) -> frozenset[str]:
    """Output heads by convention: ``lm_head`` at any depth, ``output`` at the root."""
    return frozenset(n for n in names if n in _HEADS or n.endswith(".lm_head"))


def target_names(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest list of target names that selects exactly the chosen modules.

    Args:
        chosen: HF names of the adapted modules.
        everything: HF names of all modules.

    Returns:
        Sorted: the last components of the names when those select nothing else, as every engine
        expects them, else full names. Full names also inside a composite model: its other parts,
        which are not among the names given, may have modules that are called alike.
    """
    wanted = frozenset(chosen)
    if any(name.startswith(COMPOSITE_PREFIX) for name in wanted):
        return sorted(wanted)
    suffixes = sorted({name.rpartition(".")[2] for name in wanted})
    if all(name in wanted for name in everything if selects(suffixes, name)):
        return suffixes
    return sorted(wanted)


def _idle_entries(
    setting: str,
    selector: str | Sequence[str],
    everything: Sequence[str],
    chosen: Sequence[str],
) -> list[str]:
    """What is wrong with each entry that is for no module, or for excluded ones only."""
    problems = []
    entries = ([selector] if selector else []) if isinstance(selector, str) else selector
    for entry in entries:
        one = entry if isinstance(selector, str) else [entry]
        if any(selects(one, name) for name in chosen):
            continue
        if any(selects(one, name) for name in everything):
            problems.append(
                f"{setting} entry {entry!r} selects only modules that exclude_modules leaves out"
            )
        elif isinstance(selector, str):
            problems.append(_unmatched_expression(setting, entry, everything))
        else:
            problems.append(f"{setting} entry {entry!r} is for no module{_near(entry, everything)}")
    return problems


def _unmatched_expression(setting: str, expression: str, names: Sequence[str]) -> str:
    """A string is taken for a regular expression, which is often not what was meant."""
    # The longest name: the outer modules come first and say least.
    example = max(names, key=len, default="")
    such = f", such as {example!r}" if example else ""
    msg = (
        f"{setting}={expression!r} is for no module: a string is a regular expression that must "
        f"match a whole name{such}"
    )
    if any(selects([expression], name) for name in names):
        msg += f"; give a list, [{expression!r}], for all modules whose names end so"
    return msg


def _near(entry: str, names: Sequence[str]) -> str:
    """What is wanted: the names that were probably meant, or those that there are."""
    if entry.lower() == ALL_LINEAR:
        return f"; to adapt every linear layer give {ALL_LINEAR!r} as a string, not in a list"
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    meant = difflib.get_close_matches(entry.rpartition(".")[2], last, n=3, cutoff=0.5)
    if meant:
        return f"; did you mean {', '.join(map(repr, meant))}?"
    # Numbers alone tell nothing, unless there is nothing else, as in an nn.Sequential.
    there = [name for name in last if not name.isdigit()] or list(names)
    more = ", ..." if len(there) > _SHOWN else ""
    return f"; there are {', '.join(there[:_SHOWN])}{more}" if there else ""
