"""Adapters on experts in PEFT's stacked form: the same update, from the same rules."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ckpt import CheckpointManager, TrainState
from ckpt.cli_commands import app
from ckpt.consolidate import consolidate, export_tensors
from ckpt.errors import ConfigError, DamagedError
from ckpt.expert_form import file_key
from ckpt.lint import lint_adapter
from ckpt.manifest import StepManifest
from ckpt.takeover import warm_start
from ckpt.types import AdapterExport, TensorRule

E, D, F, R = 3, 6, 4, 2
SIZES = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
BLOCK = "model.layers.0.mlp.experts"
PREFIX = "base_model.model."


def experts(**changes: object) -> tuple[dict[str, torch.Tensor], AdapterExport]:
    """Stacks as a model holds them, and their rules expert by expert; one rank is padded."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    rules = []
    for name, (out, width) in {"o_proj": (D, D), **SIZES}.items():
        rank = 1 if name == "up_proj" else R
        count = () if name == "o_proj" else (E,)
        for side, shape in (("A", (*count, rank, width)), ("B", (*count, out, rank))):
            source = f"{name}_{side}"
            tensors[source] = torch.randn(shape, generator=generator)
            pad = {"pad_dim": 0 if side == "A" else 1, "pad_to": R} if rank < R else {}
            scale = 2.0 if side == "B" else 1.0
            if name == "o_proj":
                key = f"{PREFIX}model.layers.0.self_attn.o_proj.lora_{side}.weight"
                rules.append(TensorRule(source, key, scale, **pad))
                continue
            for index in range(E):
                key = f"{PREFIX}{BLOCK}.{index}.{name}.lora_{side}.weight"
                rules.append(TensorRule(source, key, scale, index=index, **pad))
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": R,
        "target_modules": ["down_proj", "gate_proj", "o_proj", "up_proj"],
        "base_model_name_or_path": "base",
        **changes,
    }
    return tensors, AdapterExport(config, tuple(rules))


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    """What a file adds to each expert's projections, by PEFT's formulas for either form."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]

    def pair(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")

    a, b = pair("model.layers.0.self_attn.o_proj")
    found = {"o_proj": scaling * b @ a}
    if f"{PREFIX}{BLOCK}.lora_A.weight" not in tensors:
        for name, index in itertools.product(SIZES, range(E)):
            a, b = pair(f"{BLOCK}.{index}.{name}")
            found[f"{index}.{name}"] = scaling * b @ a
        return found
    for module, rows in ((f"{BLOCK}.base_layer", 2 * F), (BLOCK, D)):
        a, b = pair(module)
        assert a.shape[0] == b.shape[1] == E * config["r"]
        stack = torch.einsum("ore,eri->eoi", b.view(rows, -1, E), a.view(E, -1, a.shape[1]))
        for index, delta in enumerate(scaling * stack):
            if rows == D:
                found[f"{index}.down_proj"] = delta
            else:
                found[f"{index}.gate_proj"], found[f"{index}.up_proj"] = delta[:F], delta[F:]
    return found


@pytest.mark.parametrize("piece", [4 * 1024 * 1024, 4 * 3 * 4 * E])
def test_both_forms_add_the_same(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("ckpt.consolidate.PIECE_BYTES", piece)
    tensors, export = experts()
    export_tensors(tensors, export, tmp_path / "single", dtype="float32")
    stacked = replace(export, experts="stacked")
    export_tensors(tensors, stacked, tmp_path / "stacked", dtype="float32")
    single, other = deltas(tmp_path / "single"), deltas(tmp_path / "stacked")
    assert single.keys() == other.keys()
    assert len(single) == 1 + 3 * E
    for name, delta in single.items():
        assert delta.abs().max() > 0.1
        torch.testing.assert_close(other[name], delta, rtol=1e-5, atol=1e-5, msg=name)
    config = json.loads((tmp_path / "stacked" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2 * R, 2 * R)
    assert config["target_modules"] == ["o_proj"]
    assert config["target_parameters"] == [f"{BLOCK}.down_proj", f"{BLOCK}.gate_up_proj"]


def test_lint_knows_both_forms(tmp_path):
    tensors, export = experts()
    export_tensors(tensors, export, tmp_path / "single")
    assert lint_adapter(tmp_path / "single") == []
    export_tensors(tensors, replace(export, experts="stacked"), tmp_path / "stacked")
    codes = {finding.code for finding in lint_adapter(tmp_path / "stacked")}
    assert codes == {"moe-fused-experts", "target-parameters"}

    config = tmp_path / "stacked" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"r": {2 * R}', f'"r": {2 * R + 1}'))
    findings = {f.code: f for f in lint_adapter(tmp_path / "stacked")}
    assert "no multiple of 5" in findings["tensor-rank"].message


def without(export: AdapterExport, text: str) -> AdapterExport:
    return replace(export, rules=tuple(rule for rule in export.rules if text not in rule.key))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda e: e, {"rank_pattern": {"o_proj": R}}, "peft_config has rank_pattern"),
        (lambda e: e, {"alpha_pattern": {"o_proj": 4}}, "peft_config has alpha_pattern"),
        (lambda e: e, {"use_rslora": True}, "peft_config has use_rslora=True"),
        (lambda e: without(e, ".experts."), {}, "has no experts"),
        (lambda e: without(e, "up_proj"), {}, "adapters on down_proj, gate_proj; the stacked"),
    ],
)
def test_what_cannot_be_stacked_is_refused(tmp_path, change, settings, message):
    tensors, export = experts(**settings)
    kept = change(export)
    sources = {rule.source for rule in kept.rules}
    tensors = {name: tensor for name, tensor in tensors.items() if name in sources}
    with pytest.raises(ConfigError, match=message):
        export_tensors(tensors, replace(kept, experts="stacked"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_key_of_a_rule_in_the_file():
    _, export = experts()
    key = f"{PREFIX}{BLOCK}.2.up_proj.lora_B.weight"
    assert file_key(export, key) == key
    stacked = replace(export, experts="stacked")
    assert file_key(stacked, key) == f"{PREFIX}{BLOCK}.base_layer.lora_B.weight"
    assert file_key(stacked, key.replace("up_", "down_")) == f"{PREFIX}{BLOCK}.lora_B.weight"
    other = f"{PREFIX}model.layers.0.self_attn.o_proj.lora_A.weight"
    assert file_key(stacked, other) == other


class Experts(torch.nn.Module):
    """A model whose export says in which form experts are published."""

    def __init__(self, form: str) -> None:
        super().__init__()
        tensors, self.export = experts()
        self.form = form
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def adapter_export(self) -> dict[str, object]:
        rules = [
            {name: getattr(rule, name) for name in TensorRule.__dataclass_fields__}
            for rule in self.export.rules
        ]
        config = dict(self.export.peft_config)
        return {"peft_config": config, "rules": rules, "experts": self.form}


def test_a_trainers_choice_is_published_recorded_and_can_be_changed(tmp_path):
    model = Experts("stacked")
    root = tmp_path / "run"
    with CheckpointManager(str(root)) as manager:
        manager.save(0, TrainState(model), publish=True).wait()
    version = root / "adapters" / "run-v00000001"
    consolidate(root, 0, tmp_path / "chosen")
    weights = "adapter_model.safetensors"
    assert (version / weights).read_bytes() == (tmp_path / "chosen" / weights).read_bytes()
    assert f"{PREFIX}{BLOCK}.lora_A.weight" in load_file(version / weights)

    out = str(tmp_path / "single")
    result = CliRunner().invoke(app, ["export", str(root), out, "--experts", "single"])
    assert result.exit_code == 0, result.output
    assert f"{PREFIX}{BLOCK}.1.up_proj.lora_A.weight" in load_file(tmp_path / "single" / weights)
    both = ["--version", version.name, "--experts", "single"]
    result = CliRunner().invoke(app, ["export", str(root), str(tmp_path / "x"), *both])
    assert result.exit_code == 2
    assert "leave --experts out" in result.output

    manifest = next(root.glob("steps/*/MANIFEST.json"))
    assert json.loads(manifest.read_text())["schema"] == 4
    read = StepManifest.from_bytes(manifest.read_bytes(), "m")
    assert read.export is not None
    assert read.export.experts == "stacked"
    for wrong in (replace(read, export=None), read):
        data = wrong.to_bytes()
        if wrong.export is None:
            assert json.loads(data)["schema"] == 1
            continue
        with pytest.raises(DamagedError):
            StepManifest.from_bytes(data.replace(b'"stacked"', b'"piled up"'), "m")


def test_a_warm_start_from_stacks_is_refused_with_the_way_out(tmp_path):
    tensors, export = experts()
    export_tensors(tensors, replace(export, experts="stacked"), tmp_path / "stacked")
    with pytest.raises(
        ConfigError, match=r"its experts are stacked; export them .*--experts single"
    ):
        warm_start(TrainState(Experts("single")), tmp_path / "stacked", any_base=True)


def test_an_unknown_form_is_refused(tmp_path):
    with (
        pytest.raises(ConfigError, match="must be one of single, stacked, got 'piled up'"),
        CheckpointManager(str(tmp_path / "run")) as manager,
    ):
        manager.save(0, TrainState(Experts("piled up"))).wait()
