"""The examples run on two ranks, resume bit for bit, and take ten lines of ours or fewer each."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from support import ranks_examples
from support.spawn import run_ranks

from archon_lora.models.tiny import write_tiny_qwen2
from ckpt.peft import read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [*ranks_examples.LOOPS, "areal_lora"]
MARK = re.compile(r"#\s*ckpt$")
OURS = ("ckpt", "archon_lora")
MOST = 10

pytestmark = pytest.mark.e2e


def marked(text: str) -> set[int]:
    """Numbers of the lines that are ours."""
    return {n for n, line in enumerate(text.splitlines(), 1) if MARK.search(line)}


def unmarked_uses(text: str) -> list[str]:
    """Lines that use what is ours, or what came of it, without the mark."""
    ours = marked(text)
    tree = ast.parse(text)
    names = set()
    for node in ast.walk(tree):
        if getattr(node, "lineno", None) not in ours:
            continue
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    # A loop's counter is the reader's own, whoever says where it begins.
    names -= {"step", "engine"}
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", None)
        if line in ours:
            continue
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in OURS:
            found.append(f"line {line}: import of {node.module}")
        if isinstance(node, ast.Name) and node.id in names:
            found.append(f"line {line}: {node.id}")
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.append(f"line {line}: .{node.attr}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_example_takes_ten_lines_or_fewer(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert 1 <= len(marked(text)) <= MOST
    assert unmarked_uses(text) == []


def test_an_unmarked_line_is_found() -> None:
    text = "from ckpt import A  # ckpt\nimport os\nx = A()  # ckpt\nx.go()\nfrom ckpt import B\n"
    assert unmarked_uses(text) == ["line 5: import of ckpt", "line 4: x"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two ranks' losses of every example, and where they wrote."""
    root = tmp_path_factory.mktemp("examples")
    write_tiny_qwen2(str(root / "model"))
    answers = run_ranks(2, ranks_examples.everything, root, root / "model", timeout=240)
    return root, answers  # type: ignore[return-value]  # what everything() returns


@pytest.mark.dist
@pytest.mark.parametrize("name", ranks_examples.LOOPS)
def test_an_example_that_was_stopped_goes_on_bit_for_bit(
    ran: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    for rank in ran[1]:
        assert rank[name]["first"] == 3
        assert rank[name]["second"] == rank[name]["whole"][3:]
        assert len(rank[name]["whole"]) == 6


@pytest.mark.dist
@pytest.mark.parametrize("name", ["peft_loop", "verl_worker"])
def test_what_an_example_publishes_loads_in_peft(
    ran: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    version = max((ran[0] / name / "whole/adapters").glob("run-v*/"))
    config, tensors = read_adapter(version)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in tensors


@pytest.mark.dist
def test_areals_engine_trains_saves_and_goes_on(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in ran[1]:
        norms = [
            stats["grad_norm"] for part in ("first", "second") for stats in rank["areal_lora"][part]
        ]
        assert len(set(norms)) == 4, "the second run went on, and did not repeat the first"
    config, _ = read_adapter(ran[0] / "areal/adapter")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
