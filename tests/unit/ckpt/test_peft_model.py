"""Models that PEFT has wrapped: names, what is saved of several adapters, and the export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ckpt import CheckpointManager, ConfigError, PlanError, TrainState, export_of_peft
from ckpt.errors import NotExportable
from ckpt.manifest import StepManifest
from ckpt.peft_model import find_peft_model
from ckpt.types import AdapterExport, TensorRule

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.compat,
    # transformers renames the attribute and warns of its own use of it.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

HEAD = "base_model.model.model.layers.0.self_attn."


def llama() -> Any:
    """A random model of two small layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(config)


def lora(**settings: Any) -> Any:
    """PEFT's configuration, for attention."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    return peft.LoraConfig(task_type="CAUSAL_LM", **values)


def trained(model: Any) -> Any:
    """B is zero in a new adapter, which would hide a swap or a wrong scaling."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def published(root: Path, model: Any) -> Path:
    """One step and its version, in fp32."""
    with CheckpointManager(root, publish_dtype="float32") as manager:
        manager.save(0, TrainState(model), publish=True).wait()
    return next(path for path in (root / "adapters").iterdir() if path.is_dir())


def test_a_version_holds_what_save_pretrained_writes(tmp_path: Path) -> None:
    model = trained(peft.get_peft_model(llama(), lora()))
    ours = published(tmp_path / "run", model)
    model.save_pretrained(str(tmp_path / "peft"))
    expected = load_file(tmp_path / "peft/adapter_model.safetensors")
    found = load_file(ours / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    written = json.loads((ours / "adapter_config.json").read_text())
    assert written == config | {"target_modules": sorted(config["target_modules"])}


def test_patterns_and_rslora_are_folded_in_and_peft_computes_the_same(tmp_path: Path) -> None:
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    model = trained(peft.get_peft_model(llama(), lora(**settings))).eval()
    ours = published(tmp_path / "run", model)
    config = json.loads((ours / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    again = peft.PeftModel.from_pretrained(llama(), str(ours)).eval()
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    exact = export_of_peft(model, normalise=False)
    assert exact.peft_config["use_rslora"] is True
    assert {rule.scale for rule in exact.rules} == {1.0}


def two_adapters() -> Any:
    """A policy that trains beside a reference that does not."""
    model = peft.get_peft_model(llama(), lora(), adapter_name="policy")
    model.add_adapter("reference", lora(r=2))
    model.set_adapter("policy")
    return trained(model)


def test_every_adapter_is_saved_whichever_is_active(tmp_path: Path) -> None:
    model = two_adapters()
    names = set(TrainState(model).live().tensors)
    assert f"model.{HEAD}q_proj.lora_A.policy.weight" in names
    assert f"model.{HEAD}q_proj.lora_B.reference.weight" in names
    model.set_adapter("reference")
    assert set(TrainState(model).live().tensors) == names
    model.set_adapter("policy")
    ours = published(tmp_path / "run", model)
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["policy"])
    expected = load_file(tmp_path / "peft/policy/adapter_model.safetensors")
    found = load_file(ours / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    fresh = peft.get_peft_model(llama(), lora(), adapter_name="policy")
    fresh.add_adapter("reference", lora(r=2))
    fresh.set_adapter("reference")
    with CheckpointManager(tmp_path / "run") as manager:
        assert manager.restore(TrainState(fresh)) == 0
    saved = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_it_makes_no_difference_whether_the_optimizer_holds_the_frozen_base(
    tmp_path: Path,
) -> None:
    def run(*, everything: bool) -> tuple[Any, torch.optim.Optimizer]:
        model = peft.get_peft_model(llama(), lora())
        params = [p for p in model.parameters() if everything or p.requires_grad]
        return model, torch.optim.AdamW(params)

    for first, second in ((True, False), (False, True)):
        model, optimizer = run(everything=first)
        ids = torch.arange(6).view(1, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        root = tmp_path / str(first)
        with CheckpointManager(root) as manager:
            manager.save(0, TrainState(model, optimizer)).wait()
        again, live = run(everything=second)
        with CheckpointManager(root) as manager:
            assert manager.restore(TrainState(again, live)) == 0
        name = f"{HEAD}q_proj.lora_B.default.weight"
        moments = optimizer.state[model.get_parameter(name)]
        assert torch.equal(live.state[again.get_parameter(name)]["exp_avg"], moments["exp_avg"])


def test_a_named_adapter_is_exported_and_several_active_ones_are_refused() -> None:
    model = two_adapters()
    other = export_of_peft(model, "reference")
    assert other.peft_config["r"] == 2
    assert {rule.source.split(".")[-2] for rule in other.rules} == {"reference"}
    assert {name.split(".")[-2] for name in other.others} == {"policy"}
    with pytest.raises(ConfigError, match="no adapter 'draft'; it has policy, reference"):
        export_of_peft(model, "draft")
    model.base_model.set_adapter(["policy", "reference"])
    with pytest.raises(ConfigError, match="name the one to export"):
        export_of_peft(model)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_more_than_plain_lora_is_resumed_and_not_published(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = peft.get_peft_model(llama(), lora(**settings))
    with pytest.raises(NotExportable, match=named):
        export_of_peft(model)
    with CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(NotExportable, match=named):
            manager.save(0, TrainState(model), publish=True)
        manager.save(0, TrainState(trained(model))).wait()
        again = peft.get_peft_model(llama(), lora(**settings))
        assert manager.restore(TrainState(again)) == 0
    saved = dict(model.named_parameters())
    live = dict(again.named_parameters())
    assert all(torch.equal(live[n], saved[n]) for n in live if live[n].requires_grad)


def test_a_model_inside_a_bigger_one_keeps_pefts_keys() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = peft.get_peft_model(llama(), lora())

    model = WithHead()
    assert find_peft_model(model) is model.pretrained_model
    rule = export_of_peft(model).rules[0]
    assert rule.source == f"pretrained_model.{HEAD}q_proj.lora_A.default.weight"
    assert rule.key == f"{HEAD}q_proj.lora_A.weight"


def test_a_model_without_peft_is_none() -> None:
    assert find_peft_model(nn.Linear(2, 2)) is None
    with pytest.raises(ConfigError, match="neither is nor holds a PEFT model"):
        export_of_peft(nn.Linear(2, 2))


def test_other_adapters_are_in_the_manifest_and_read_back(tmp_path: Path) -> None:
    published(tmp_path / "run", two_adapters())
    path = next((tmp_path / "run").glob("steps/*/MANIFEST.json"))
    document = json.loads(path.read_bytes())
    assert document["schema"] == 3
    manifest = StepManifest.from_bytes(path.read_bytes(), "here")
    assert manifest.export is not None
    assert list(manifest.export.others) == document["other_adapters"]
    rule = manifest.export.rules[0]
    both = AdapterExport(manifest.export.peft_config, (rule,), (rule.source, rule.source))
    with pytest.raises(PlanError, match="other_adapters"):
        dataclasses.replace(manifest, export=both).to_bytes()


def test_an_exported_tensor_cannot_be_another_adapters_too() -> None:
    from ckpt.peft_config import check_export

    rules = tuple(TensorRule(f"x.{s}", f"base_model.model.x.lora_{s}.weight") for s in "AB")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"]}
    check_export(AdapterExport(config, rules, ("y",)))
    with pytest.raises(ConfigError, match="another adapter's"):
        check_export(AdapterExport(config, rules, ("x.A",)))
