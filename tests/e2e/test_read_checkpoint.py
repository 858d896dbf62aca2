"""``examples/read_checkpoint.py``: a reader made from docs/format.md alone, against real roots."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ranks_reader
from support.spawn import run_ranks
from support.steps import tiny_adapter, write_step

from ckpt.consolidate import consolidate
from ckpt.envelope import seal
from ckpt.storage import PosixStorage, open_storage
from ckpt.types import AdapterExport, TensorRule

SCRIPT = Path(__file__).parents[2] / "examples" / "read_checkpoint.py"

pytestmark = [pytest.mark.e2e, pytest.mark.dist]


def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READ = reader()
WORLDS = (1, 2, 4)


def same_bits(found: np.ndarray, wanted: torch.Tensor) -> bool:
    """Whether an array has the dtype, the shape and the bits of a tensor (bfloat16 as float32)."""
    other = (wanted.float() if wanted.dtype == torch.bfloat16 else wanted).numpy()
    return (found.dtype, found.shape, found.tobytes()) == (
        other.dtype, other.shape, other.tobytes(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[int, Any]]]:
    """World size to the root it made and what each step held."""
    folder = tmp_path_factory.mktemp("reader")
    return {
        world: (folder / str(world), run_ranks(world, ranks_reader.make_roots, str(folder))[0])
        for world in WORLDS
    }


@pytest.fixture(params=WORLDS)
def root(request: pytest.FixtureRequest, roots: Any, tmp_path: Path) -> tuple[Path, dict[int, Any]]:
    made, held = roots[request.param]
    return shutil.copytree(made, tmp_path / "root"), held


def step_of(root: Path, name: str) -> Path:
    return root / "steps" / name


def check_step(root: Path, held: dict[int, Any], step: int, epoch: int) -> dict[str, Any]:
    """The reader finds this step, with every tensor bit for bit; its manifest."""
    manifest, tensors, state = READ.newest_step(root)
    assert (manifest["step"], manifest["epoch"]) == (step, epoch)
    assert tensors.keys() == held[step].keys()
    assert {"F32", "I64", "BF16"} <= {tensor["dtype"] for tensor in manifest["tensors"]}
    assert [n for n, tensor in held[step].items() if not same_bits(tensors[n], tensor)] == []
    assert len(state["ranks"]) == manifest["world_size"]
    assert state["shared"]["extra"]["policy_version"] == step + 1
    return dict(manifest)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_it_is_short_and_needs_numpy_alone() -> None:
    text = SCRIPT.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    used = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert used - sys.stdlib_module_names == {"numpy"}


def test_the_newest_step_bit_for_bit(root: Any) -> None:
    made, held = root
    manifest = check_step(made, held, 3, 2)
    if manifest["world_size"] > 1:
        pieces = {tensor["name"]: len(tensor["chunks"]) for tensor in manifest["tensors"]}
        # On 4 ranks the last holds nothing of 3 columns, and of 5 rows 2, 2 and 1 are three pieces.
        assert pieces["model.low"] == pieces["model.b"] == {2: 2, 4: 3}[manifest["world_size"]]
    # Step 2 of writer 1 is whole, but the second writer went on from step 1.
    assert step_of(made, "step-00000002.w0001").is_dir()
    chain = [path.name for path, _ in READ.lineage(made)]
    assert chain == [f"step-0000000{s}.w000{w}" for s, w in ((3, 2), (2, 2), (1, 1), (0, 1))]


@pytest.mark.parametrize("what", ["bit", "cut", "gone", "manifest", "swapped"])
def test_a_damaged_newest_step_is_left_behind(
    root: Any, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made, held = root
    newest = step_of(made, "step-00000003.w0002")
    shard = next(newest.glob("shard-*"))
    if what == "bit":
        flip(shard)
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "gone":
        shard.unlink()
    elif what == "manifest":
        flip(newest / "MANIFEST.json", 40)
    else:  # whole, sealed, and of another step
        shutil.rmtree(newest)
        shutil.copytree(step_of(made, "step-00000000.w0001"), newest)
    check_step(made, held, 2, 2)
    assert "step-00000003.w0002" in capsys.readouterr().err


def test_a_damaged_record_hides_what_is_behind_it(root: Any) -> None:
    made, held = root
    flip(made / "writers/0002.json", 20)
    check_step(made, held, 3, 2)
    assert [path.name[:13] for path, _ in READ.lineage(made)] == ["step-00000003", "step-00000002"]
    for step in (2, 3):
        shutil.rmtree(step_of(made, f"step-0000000{step}.w0002"))
    with pytest.raises(READ.Damaged, match="the newest, is damaged"):
        READ.newest_step(made)
    # Without the record nobody claims to be newer than writer 1.
    (made / "writers/0002.json").unlink()
    assert READ.newest_step(made)[0]["epoch"] == 1


def test_an_unfinished_step_and_foreign_names_are_passed_over(root: Any) -> None:
    made, held = root
    for name in (".tmp-step-00000009.w0002-abcd", "step-9.w2", "step-00000009.w0002", "step-x"):
        step_of(made, name).mkdir()
    (made / "writers/notes.txt").write_text("mine")
    check_step(made, held, 3, 2)


def test_the_newest_version_is_the_adapter(root: Any) -> None:
    made, held = root
    names = sorted(path.name for path in (made / "adapters").iterdir() if path.is_dir())
    assert len(names) == 5
    manifest, config, tensors = READ.newest_version(made, "run")
    assert (manifest["name"], manifest["step"]) == (names[-1], 3)
    wanted = load_file(made / "adapters" / names[-1] / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(same_bits(tensors[name], tensor) for name, tensor in wanted.items())
    assert config["peft_type"] == "LORA"
    scaled = (held[3]["model.b"] * 2).bfloat16().float()
    assert same_bits(tensors["base_model.model.lin.lora_B.weight"], scaled)
    flip(made / "adapters" / names[-1] / "adapter_model.safetensors")
    assert READ.newest_version(made, "run")[0]["name"] == names[-2]


def test_as_a_program_that_has_neither_torch_nor_our_packages(root: Any) -> None:
    made, _held = root
    blocked = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'ckpt', 'archon_lora', 'safetensors')))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(SCRIPT), str(made), "run"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines()[0].startswith("step 3: ")
    assert done.stdout.splitlines()[1].startswith("run-v")


def by_the_rules(manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A step's PEFT tensors in fp32, by the section "Export" of docs/format.md."""
    found = {}
    for rule in manifest["export"]["rules"]:
        value = tensors[f"model.{rule['source']}"].astype("<f4")
        value = value if rule["index"] is None else value[rule["index"]]
        value = value * np.float32(rule["scale"])
        if rule["pad_dim"] is not None:
            more = [(0, 0)] * value.ndim
            more[rule["pad_dim"]] = (0, rule["pad_to"] - value.shape[rule["pad_dim"]])
            value = np.pad(value, more)
        found[rule["key"]] = value
    return found


def several(experts: str, *, metrics: bool, others: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stacks of two experts whose rank 1 is padded to 2, beside another adapter; what is saved."""
    tensors = {
        "model.a": torch.randn(2, 1, 6), "model.b": torch.randn(2, 4, 1).bfloat16(),
        "model.q.a": torch.randn(2, 6), "model.q.b": torch.randn(6, 2),
    }  # fmt: skip
    tensors |= {"model.judge": torch.randn(3)} if others else {}
    rules = [
        TensorRule("q.a", "base_model.model.l.0.q_proj.lora_A.weight"),
        TensorRule("q.b", "base_model.model.l.0.q_proj.lora_B.weight", 2.0),
    ]
    for index, side in itertools.product(range(2), "AB"):
        key = f"base_model.model.l.0.experts.{index}.up_proj.lora_{side}.weight"
        scale, dim = (1.0, 0) if side == "A" else (0.1, 1)
        rules.append(TensorRule(side.lower(), key, scale, index=index, pad_dim=dim, pad_to=2))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]}
    export = AdapterExport(config, tuple(rules), ("judge",) if others else (), experts)
    return tensors, {"export": export, "metrics": {"reward": 0.5} if metrics else None}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("schema", "changes"),
    [
        (1, {"experts": "single", "metrics": False, "others": False}),
        (2, {"experts": "single", "metrics": True, "others": False}),
        (3, {"experts": "single", "metrics": True, "others": True}),
        (4, {"experts": "stacked", "metrics": False, "others": True}),
    ],
)
def test_every_schema_and_the_rules_of_an_export(
    tmp_path: Path, schema: int, changes: dict[str, Any], world: int
) -> None:
    tensors, more = several(**changes)
    root = tmp_path / "root"
    state = {"shared": {}, "ranks": []}
    write_step(open_storage(root), 3, tensors, world=world, state=state, **more)
    manifest, found, _state = READ.newest_step(root)
    assert manifest["schema"] == schema
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    # The stacked form is made of these very rules when a file is written (docs/moe.md).
    consolidate(root, 3, tmp_path / "out", dtype="float32", experts="single")
    wanted = load_file(tmp_path / "out/adapter_model.safetensors")
    mine = by_the_rules(manifest, found)
    assert mine.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same_bits(mine[name], tensor)] == []
    consolidate(root, 3, tmp_path / "half", dtype="bfloat16", experts="single")
    for name, tensor in load_file(tmp_path / "half/adapter_model.safetensors").items():
        bits = mine[name].view("<u4")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16  # to nearest, ties to even
        assert same_bits(rounded.view("<f4"), tensor), name


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    write_step(open_storage(tmp_path), 3, {"model.x": torch.ones(2)})
    path = step_of(tmp_path, "step-00000003.w0001") / "MANIFEST.json"
    path.write_bytes(seal("ckpt.step", 5, json.loads(path.read_bytes()) | {"new": 1}))
    with pytest.raises(READ.Damaged, match=r"no ckpt\.step is whole"):
        READ.newest_step(tmp_path)


def test_a_path_that_leads_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    with pytest.raises(READ.Damaged, match="leads outside"):
        READ.read_files(tmp_path / "step", {"files": [{"name": "../x", "size": 6}]})


def test_files_under_the_attempt_as_on_object_stores(tmp_path: Path) -> None:
    class WithoutRename(PosixStorage):
        has_rename = False  # which is what puts files under the attempt's name

    store = WithoutRename(tmp_path)
    tensors, _export = tiny_adapter()
    written = write_step(store, 4, tensors, world=2, state={"shared": {}, "ranks": []})
    assert all("/" in file.name for file in written.files)
    manifest, found, _state = READ.newest_step(tmp_path)
    assert manifest["step"] == 4
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
