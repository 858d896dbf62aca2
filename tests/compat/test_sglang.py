"""The hand-over against a real SGLang server; skipped where the environment names none."""

from __future__ import annotations

import pytest
from support.real_engines import EngineSuite

pytestmark = [
    pytest.mark.compat,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # PEFT reads a property that transformers is about to rename.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class TestSglang(EngineSuite):
    kind = "sglang"
