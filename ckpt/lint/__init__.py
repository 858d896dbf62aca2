"""What PEFT, vLLM and SGLang would make of an adapter, said before one of them is asked.

Loaders differ: what one computes, another refuses, a third takes and computes something else, or
dies of it at the first request. :data:`~ckpt.lint.codes.RULES` holds what is known about each;
:func:`lint_adapter` reads a PEFT directory anywhere and applies it.
"""

from .base import BaseModel
from .codes import RULES
from .finding import ENGINES, Effect, Engine, Finding, Rule, Severity
from .gate import check_publishable
from .run import lint_adapter, lint_export
from .subject import LintLimits, TensorForm

__all__ = [
    "ENGINES",
    "RULES",
    "BaseModel",
    "Effect",
    "Engine",
    "Finding",
    "LintLimits",
    "Rule",
    "Severity",
    "TensorForm",
    "check_publishable",
    "lint_adapter",
    "lint_export",
]
