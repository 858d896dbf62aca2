"""``ckpt.lint``: what each engine does about an adapter, row by row, and what the rest is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lint_more_rows import MORE
from support.lint_rows import BASE_CONFIG, ROWS

from ckpt.lint import ENGINES, RULES, BaseModel, Effect, Severity, lint_adapter

GRAVITY = (None, Effect.TAKEN, Effect.REFUSED, Effect.WRONG, Effect.DIES)


@pytest.fixture
def base():
    return BaseModel.from_config(BASE_CONFIG)


@pytest.mark.parametrize("name", [*ROWS, *MORE])
def test_every_row(tmp_path, base, name):
    row = {**ROWS, **MORE}[name]
    made = row.build()
    if row.family is not None:
        base = BaseModel.from_config({"model_type": row.family, "num_hidden_layers": 2})
    known = base if row.base or row.family is not None else None
    found = lint_adapter(made.write(tmp_path / made.name), base=known)
    assert {one.code for one in found} == row.codes
    for engine in ENGINES:
        effects = [one.effect for one in found if one.engine == engine]
        assert max(effects, key=GRAVITY.index, default=None) == getattr(row, engine), engine
    for one in found:
        taken = row.doubtful or one.effect is Effect.TAKEN
        assert one.severity is (Severity.warning if taken else Severity.error), one
        assert one.where
        assert one.remedy


def test_every_rule_is_broken_by_some_row():
    broken = {code for row in (*ROWS.values(), *MORE.values()) for code in row.codes}
    assert broken | {"sglang-max-rank"} == set(RULES)  # that one needs a limit, in the test below


def table() -> str:
    lines = ["| code | what | PEFT | vLLM | SGLang |", "|---|---|---|---|---|"]
    for rule in RULES.values():
        cells = []
        for engine in ENGINES:
            effect, words = rule.effects.get(engine, (None, ""))
            cells.append(f"**{effect}**: {words}" if effect else "")
        lines.append(f"| `{rule.code}` | {rule.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_guide_has_every_rule():
    guide = (Path(__file__).parents[3] / "docs" / "portable-adapters.md").read_text("utf-8")
    _, _, rest = guide.partition("<!-- rules -->\n")
    shown, _, _ = rest.partition("\n<!-- end of rules -->")
    assert shown == table()
