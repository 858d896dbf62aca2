"""Keys, export rules and loading of PEFT adapters, without PEFT."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archon_lora import (
    AdapterMismatch,
    LoRAConfig,
    LoRAConfigError,
    LoRANotEnabled,
    NoAdapterError,
    UnmappedName,
    apply_lora,
    get_adapter_params,
    get_adapter_state_dict,
    load_adapter_tensors,
    peft_export,
)
from archon_lora.peft import parse_peft_key, peft_key


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.up_proj = nn.Linear(6, 8, bias=False)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.up_proj(self.q_proj(x))))


PATTERNED = LoRAConfig(
    rank=4, alpha=6, rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 10}, use_rslora=True
)


def adapted(config: LoRAConfig = PATTERNED, *, seed: int | None = 1) -> Net:
    torch.manual_seed(0)
    net = Net()
    apply_lora(net, config)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in get_adapter_params(net).values():
                parameter.normal_()
    return net


def written(net: Net, *, normalise: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter as its export rules say it, by an independent reading of them."""
    export = peft_export(net, normalise=normalise)
    values = get_adapter_state_dict(net)
    tensors = {}
    for rule in export["rules"]:
        value = values[rule["source"]].float() * rule["scale"]
        assert rule["index"] is None
        if rule["pad_dim"] is not None:
            whole = list(value.shape)
            whole[rule["pad_dim"]] = rule["pad_to"]
            padded = torch.zeros(whole)
            padded[tuple(slice(0, n) for n in value.shape)] = value
            value = padded
        tensors[rule["key"]] = value.clone()
    return tensors, export["peft_config"]


def test_keys_both_ways() -> None:
    name = "model.layers.0.self_attn.q_proj"
    for factor in ("A", "B"):
        key = peft_key(name, factor)
        assert key == f"base_model.model.{name}.lora_{factor}.weight"
        assert parse_peft_key(key) == (name, factor)
        assert parse_peft_key(f"base_model.model.{name}.lora_{factor}.default.weight") == (
            name,
            factor,
        )


def test_keys_of_embeddings_both_ways() -> None:
    for factor in ("A", "B"):
        key = peft_key("model.embed_tokens", factor, embedding=True)
        assert key == f"base_model.model.model.embed_tokens.lora_embedding_{factor}"
        assert parse_peft_key(key) == ("model.embed_tokens", factor)
        assert parse_peft_key(f"{key}.default") == ("model.embed_tokens", factor)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.q_proj.lora_A.weight",
        "base_model.model.q_proj.weight",
        "base_model.model.q_proj.lora_C.weight",
        "base_model.model.q_proj.lora_A.bias",
        "base_model.model.q_proj.lora_A.other.weight",
        "base_model.model.embed.lora_embedding_A.weight",
        "base_model.model.embed.lora_embedding_C",
        "base_model.model.q_proj.lora_magnitude_vector",
        "base_model.model.lora_A.weight",
        "",
    ],
)
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(
        UnmappedName, match=r"is not the key of a LoRA factor; keys read base_model"
    ):
        parse_peft_key(key)


def test_the_normalised_form_is_plain_lora_of_one_rank() -> None:
    export = peft_export(adapted(), base_model_name="org/base")
    config = export["peft_config"]
    assert json.loads(json.dumps(export)) == export
    assert config["r"] == config["lora_alpha"] == 4
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "org/base"
    assert config["init_lora_weights"] is True
    assert config["peft_version"]
    assert export["rules"] == [
        {
            "source": "q_proj.lora_a.weight",
            "key": "base_model.model.q_proj.lora_A.weight",
            "scale": 1.0,
            "pad_dim": None,
            "pad_to": None,
            "index": None,
        },
        {
            "source": "q_proj.lora_b.weight",
            "key": "base_model.model.q_proj.lora_B.weight",
            "scale": 10 / math.sqrt(4),
            "pad_dim": None,
            "pad_to": None,
            "index": None,
        },
        {
            "source": "up_proj.lora_a.weight",
            "key": "base_model.model.up_proj.lora_A.weight",
            "scale": 1.0,
            "pad_dim": 0,
            "pad_to": 4,
            "index": None,
        },
        {
            "source": "up_proj.lora_b.weight",
            "key": "base_model.model.up_proj.lora_B.weight",
            "scale": 6 / math.sqrt(2),
            "pad_dim": 1,
            "pad_to": 4,
            "index": None,
        },
    ]


def test_the_training_form_keeps_patterns_and_values() -> None:
    export = peft_export(adapted(), normalise=False)
    config = export["peft_config"]
    assert config["use_rslora"] is True
    assert config["rank_pattern"] == {"up_proj": 2}
    assert config["alpha_pattern"] == {"q_proj": 10}
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert all(r["scale"] == 1.0 and r["pad_dim"] is None for r in export["rules"])


def test_target_names_stay_exact_when_a_suffix_would_take_more() -> None:
    net = nn.Sequential(Net(), Net())
    apply_lora(net, LoRAConfig(target_modules=["0.q_proj", "up_proj"]))
    targets = peft_export(net)["peft_config"]["target_modules"]
    assert targets == ["0.q_proj", "0.up_proj", "1.up_proj"]


def test_the_delta_of_the_file_is_that_of_the_model() -> None:
    net = adapted()
    tensors, config = written(net)
    scale = config["lora_alpha"] / config["r"]
    for name, layer in (("q_proj", net.q_proj), ("up_proj", net.up_proj)):
        a, b = tensors[peft_key(name, "A")], tensors[peft_key(name, "B")]
        assert a.shape[0] == b.shape[1] == 4
        torch.testing.assert_close(
            scale * b @ a, layer.scaling * layer.lora_b.weight @ layer.lora_a.weight
        )


@pytest.mark.parametrize("normalise", [True, False])
def test_a_file_loads_back(normalise: bool) -> None:
    net = adapted()
    tensors, config = written(net, normalise=normalise)
    fresh = adapted(seed=None)
    load_adapter_tensors(fresh, tensors, config)
    for name, value in get_adapter_state_dict(net).items():
        loaded = get_adapter_state_dict(fresh)[name]
        if normalise:
            torch.testing.assert_close(loaded, value, rtol=2e-7, atol=1e-9)
        else:
            assert torch.equal(loaded, value)
    x = torch.randn(3, 6)
    torch.testing.assert_close(fresh(x), net(x))


def test_scalings_that_are_powers_of_two_load_back_to_the_bit() -> None:
    config = LoRAConfig(rank=4, alpha=8)
    net = adapted(config)
    tensors, peft = written(net)
    fresh = adapted(config, seed=None)
    load_adapter_tensors(fresh, tensors, peft)
    for name, value in get_adapter_state_dict(net).items():
        assert torch.equal(get_adapter_state_dict(fresh)[name], value)


def test_a_file_with_another_alpha_computes_the_same() -> None:
    theirs = adapted(LoRAConfig(rank=4, alpha=12))
    tensors, peft = written(theirs, normalise=False)
    ours = adapted(LoRAConfig(rank=4, alpha=2), seed=None)
    load_adapter_tensors(
        ours, {k.replace("_A.w", "_A.default.w"): v for k, v in tensors.items()}, peft
    )
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.equal(ours.q_proj.lora_b.weight, theirs.q_proj.lora_b.weight)


def test_values_are_cast_to_the_parameters_dtype() -> None:
    net = adapted(LoRAConfig(rank=4, alpha=4))
    tensors, peft = written(net)
    fresh = adapted(LoRAConfig(rank=4, alpha=4, adapter_dtype=torch.bfloat16), seed=None)
    load_adapter_tensors(fresh, tensors, peft)
    assert torch.equal(fresh.q_proj.lora_a.weight, net.q_proj.lora_a.weight.bfloat16())


A = "base_model.model.q_proj.lora_A.weight"
B = "base_model.model.up_proj.lora_B.weight"


def _edit(key: str, change) -> Any:
    def edit(tensors: dict, config: dict) -> None:
        tensors[key] = change(tensors[key])

    return edit


def _fill(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[0, 0] = value
        return tensor

    return change


def _pad_not_zero(tensor: Tensor) -> Tensor:
    tensor[0, 3] = 1e-8
    return tensor


DAMAGE = {
    "missing": (lambda t, c: t.pop(A), rf"1 missing: {A}; check target_modules"),
    "unexpected": (
        lambda t, c: t.update({"base_model.model.k_proj.lora_A.weight": torch.zeros(4, 6)}),
        r"which has 2 adapted modules: 1 unexpected: base_model\.model\.k_proj",
    ),
    "foreign key": (lambda t, c: t.update({"x": torch.zeros(1)}), "1 unexpected: x"),
    "renamed": (
        lambda t, c: t.update({"base_model.model.qproj.lora_A.weight": t.pop(A)}),
        rf"1 missing: {A}; 1 unexpected: base_model\.model\.qproj",
    ),
    "twice": (
        lambda t, c: t.update({A.replace("_A.", "_A.default."): t[A]}),
        "1 given twice: ",
    ),
    "rows": (
        _edit(A, lambda t: t[:, :5]),
        rf"{A}: the file has \(4, 5\), r=4 and the model want \(4, 6\)",
    ),
    "one dimension": (_edit(A, lambda t: t.flatten()), r"the file has \(24,\)"),
    "transposed": (_edit(B, lambda t: t.T), r"the file has \(4, 8\), r=4 .* want \(8, 4\)"),
    "rank lies": (
        lambda t, c: c.update(r=2),
        r"4 of the wrong shape: .* the file has \(4, 6\), r=2 and the model want \(2, 6\)",
    ),
    "nan": (_edit(A, _fill(math.nan)), rf"{A} holds values that are not finite"),
    "inf": (_edit(B, _fill(math.inf)), rf"{B} holds values that are not finite"),
    "integers": (_edit(A, lambda t: t.int()), r"must hold floating-point values, got torch\.int32"),
    "padding": (
        _edit(B, _pad_not_zero),
        r"rank 4, the model 2, and the surplus is not zero padding; set rank",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_named_before_anything_changes(case: str) -> None:
    damage, message = DAMAGE[case]
    tensors, config = written(adapted())
    damage(tensors, config)
    live = adapted(seed=5)
    before = get_adapter_state_dict(live, full=True)
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter_tensors(live, tensors, config)
    for name, value in get_adapter_state_dict(live).items():
        assert torch.equal(value, before[name])


def test_a_lower_rank_is_refused() -> None:
    tensors, config = written(adapted(LoRAConfig(rank=2)))
    with pytest.raises(AdapterMismatch, match="the file has rank 2, the model 4; set rank"):
        load_adapter_tensors(adapted(LoRAConfig(rank=4)), tensors, config)


def test_long_lists_are_cut() -> None:
    tensors, config = written(adapted())
    tensors.update({f"x{i}": torch.zeros(1) for i in range(11)})
    with pytest.raises(AdapterMismatch, match=r"11 unexpected: x0, .*x7 and 3 more"):
        load_adapter_tensors(adapted(), tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_alpha": "abc"}, "lora_alpha must be a finite number > 0, got 'abc'"),
        ({"lora_alpha": None}, "lora_alpha must be given"),
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"peft_type": "VERA"}, "peft_type must be 'LORA', got 'VERA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"new_thing": 3}, "unknown PEFT field 'new_thing'=3"),
    ],
)
def test_configs_that_cannot_be_are_refused_before_anything_changes(
    change: dict, message: str
) -> None:
    tensors, config = written(adapted())
    live = adapted(seed=5)
    before = get_adapter_state_dict(live, full=True)
    with pytest.raises(LoRAConfigError, match=message):
        load_adapter_tensors(live, tensors, {**config, **change})
    for name, value in get_adapter_state_dict(live).items():
        assert torch.equal(value, before[name])


def test_how_a_file_was_initialised_does_not_matter_once_trained() -> None:
    tensors, config = written(adapted())
    for value in (False, "gaussian", "eva", "orthogonal"):
        load_adapter_tensors(adapted(), tensors, {**config, "init_lora_weights": value})


def test_models_without_lora_or_with_lost_modules() -> None:
    tensors, config = written(adapted())
    with pytest.raises(LoRANotEnabled, match="this model has no LoRA"):
        load_adapter_tensors(Net(), tensors, config)
    with pytest.raises(LoRANotEnabled, match="this model has no LoRA"):
        peft_export(Net())
    net = adapted()
    net.q_proj = nn.Linear(6, 6)
    with pytest.raises(NoAdapterError, match=r"no longer hold their adapters: q_proj"):
        peft_export(net)


class Reader:
    """Gives parts of tensors and remembers which were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        self.asked.append(key)
        return self.tensors[key][index]


def test_a_reader_of_slices_serves_as_well() -> None:
    net = adapted()
    tensors, config = written(net)
    reader = Reader(tensors)
    fresh = adapted(seed=None)
    load_adapter_tensors(fresh, reader, config)
    x = torch.randn(3, 6)
    torch.testing.assert_close(fresh(x), net(x))
    assert set(reader.asked) == set(tensors)
    del tensors[A]
    reader = Reader(tensors)
    with pytest.raises(AdapterMismatch, match="1 missing"):
        load_adapter_tensors(fresh, reader, config)
    assert reader.asked == [], "names are checked before a byte is read"
