"""Our LoRA against PEFT's on the same numbers: matching, forward, gradients, training, files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from archon_lora import (
    LoRAConfig,
    TargetError,
    apply_lora,
    get_adapter_params,
    get_adapter_state_dict,
    load_adapter_tensors,
    peft_export,
)
from archon_lora.peft_config import IGNORED, PEFT_VERSION, READ, REFUSED
from archon_lora.targets import selects
from benchmarks.activations import kept_bytes

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

pytestmark = [
    pytest.mark.compat,
    # PEFT 0.21 reads an attribute that transformers 5.24 has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.k_proj = nn.Linear(16, 16)
        self.o_proj = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.sigmoid(self.q_proj(x)) * self.k_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.up_proj = nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Net(nn.Module):
    """Root-level layers too, and a name (``proj``) that ends other names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "up_proj"]},
    "rslora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj", "proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 1, "q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"k_proj": 3, r"layers\.[02]\.down_proj": 20},
    },
    "patterns and rslora": {
        "target_modules": r"layers\.\d\.(up|down)_proj",
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {r"layers\.0\..*": 5},
        "use_rslora": True,
    },
    "exclusions": {
        "target_modules": r".*_proj",
        "exclude_modules": ["layers.1.self_attn.q_proj", "down_proj"],
    },
}


def theirs(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    return peft.get_peft_model(net(dtype), config)


def ours(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Net:
    model = net(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    apply_lora(model, LoRAConfig(rank=4, alpha=8, adapter_dtype=wide, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in get_adapter_params(model).values():
            parameter.normal_(std=0.3)
    return model


def factors(peft_model: Any) -> dict[str, nn.Parameter]:
    """PEFT's parameters under our names."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            found[short.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = parameter
    return found


def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[Net, Any]:
    """The two implementations with the same numbers."""
    mine, other = ours(OPTIONS[name], dtype), theirs(OPTIONS[name], dtype)
    values = get_adapter_state_dict(mine)
    assert factors(other).keys() == values.keys(), "they adapt different modules"
    with torch.no_grad():
        for key, parameter in factors(other).items():
            assert parameter.shape == values[key].shape, key
            assert parameter.dtype == values[key].dtype, key
            parameter.copy_(values[key])
    return mine, other


# -- matching ---------------------------------------------------------------------------------

SELECTORS = [
    ["q_proj"],
    ["proj"],
    ["layers.0.self_attn.q_proj"],
    ["self_attn.q_proj", "lm_head"],
    ["attn.q_proj"],
    ["0"],
    r".*q_proj",
    r"q_proj",
    r"proj",
    r"layers\.[02]\..*",
    r"layers\.(?!1).*proj",
    r".*\.self_attn\..*",
    r"(?i).*Q_PROJ",
    r"layers.1|lm_head",
]
EXCLUDED = [None, ["k_proj"], ["layers.1"], r".*\.1\..*", r"proj", ["proj", "q_proj"]]


@pytest.mark.parametrize("excluded", EXCLUDED, ids=str)
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_every_name_is_selected_as_peft_selects_it(selector: Any, excluded: Any) -> None:
    config = peft.LoraConfig(target_modules=selector, exclude_modules=excluded)
    names = [name for name, _ in net().named_modules() if name]
    for name in names:
        found = tuners_utils.check_target_module_exists(config, name)
        wanted = bool(found) and not isinstance(found, tuners_utils._ExcludedModule)
        mine = selects(selector, name) and not (excluded and selects(excluded, name))
        assert mine == wanted, name


NAME = st.lists(st.sampled_from(["a", "b", "ab", "0", "q_proj"]), min_size=1, max_size=4).map(
    ".".join
)


@settings(deadline=None)
@given(name=NAME, targets=st.lists(NAME, min_size=1, max_size=3))
def test_lists_of_names_select_as_in_peft(name: str, targets: list[str]) -> None:
    config = peft.LoraConfig(target_modules=targets)
    assert selects(targets, name) == bool(tuners_utils.check_target_module_exists(config, name))


@settings(deadline=None)
@given(
    name=NAME,
    ranks=st.dictionaries(
        NAME | st.sampled_from(["a|b", ".*a", "(a|q_proj)", "a$", "^a", r"\d\.a"]),
        st.integers(1, 9),
        max_size=3,
    ),
)
def test_patterns_are_for_the_names_that_peft_says(name: str, ranks: dict[str, int]) -> None:
    key = peft.utils.other.get_pattern_key(ranks.keys(), name)
    config = LoRAConfig(rank=16, rank_pattern=ranks, alpha_pattern=ranks)
    assert config.rank_for(name) == ranks.get(key, 16)
    assert config.alpha_for(name) == ranks.get(key, config.alpha)


def adapted_by_peft(model: nn.Module, **options: Any) -> set[str]:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix)
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS.values(),
        {"target_modules": ["proj"]},
        {"target_modules": ["lm_head", "layers.2.up_proj"]},
        {"target_modules": r"proj|.*o_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": r"lm_head|.*\.1\..*"},
    ],
    ids=str,
)
def test_the_same_modules_are_adapted(options: dict[str, Any]) -> None:
    mine = apply_lora(net(), LoRAConfig(rank=2, **options))
    chosen = {k: v for k, v in options.items() if k in ("target_modules", "exclude_modules")}
    assert set(mine.matched.values()) == adapted_by_peft(net(), **chosen)


def test_all_linear_on_a_transformers_model_is_the_same() -> None:
    mine = apply_lora(tiny_qwen2(), LoRAConfig(rank=2))
    expected = adapted_by_peft(tiny_qwen2(), target_modules="all-linear")
    assert set(mine.matched.values()) == expected
    assert "lm_head" not in expected


def test_where_peft_takes_what_matches_we_name_what_does_not() -> None:
    targets = ["q_proj", "v_proj"]
    assert adapted_by_peft(net(), target_modules=targets)
    with pytest.raises(TargetError, match="target_modules entry 'v_proj' is for no module"):
        apply_lora(net(), LoRAConfig(target_modules=targets))


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "outputs", "gradients"),
    [
        (torch.float32, {"rtol": 1e-6, "atol": 1e-6}, {"rtol": 1e-5, "atol": 1e-6}),
        # Where rounding hides nothing. We scale before B and PEFT after it.
        (torch.float64, {"rtol": 1e-13, "atol": 1e-14}, {"rtol": 1e-12, "atol": 1e-14}),
    ],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("name", list(OPTIONS))
def test_forward_and_gradients_are_equal(
    name: str, dtype: torch.dtype, outputs: dict[str, float], gradients: dict[str, float]
) -> None:
    mine, other = twins(name, dtype)
    x = torch.randn(5, 16, dtype=dtype)
    left, right = mine(x), other(x)
    torch.testing.assert_close(left, right, **outputs)
    assert not torch.allclose(left, net(dtype)(x), atol=1e-3), "the adapter has no effect"
    left.square().mean().backward()
    right.square().mean().backward()
    expected = factors(other)
    for key, parameter in get_adapter_params(mine).items():
        assert torch.count_nonzero(parameter.grad)
        torch.testing.assert_close(parameter.grad, expected[key].grad, **gradients)


@pytest.mark.parametrize("name", ["plain", "patterns and rslora"])
def test_fp32_adapters_over_a_bf16_base_are_equal_to_the_bit(name: str) -> None:
    mine, other = twins(name, torch.bfloat16)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    left, right = mine(x), other(x)
    assert left.dtype == torch.bfloat16
    assert torch.equal(left, right)
    left.float().square().mean().backward()
    right.float().square().mean().backward()
    for key, parameter in get_adapter_params(mine).items():
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, factors(other)[key].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_adamw_steps_stay_together(dtype: torch.dtype) -> None:
    mine, other = twins("patterns", dtype)
    pairs = [(mine, list(get_adapter_params(mine).values()))]
    pairs.append((other, [factors(other)[key] for key in get_adapter_params(mine)]))
    losses: list[list[float]] = []
    for model, parameters in pairs:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        torch.manual_seed(2)
        losses.append([])
        for _ in range(5):
            loss = (model(torch.randn(8, 16, dtype=dtype)).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for key, parameter in get_adapter_params(mine).items():
        torch.testing.assert_close(parameter, factors(other)[key], rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same_mask() -> None:
    options = {"target_modules": ["q_proj", "up_proj"]}
    mine = net()
    apply_lora(mine, LoRAConfig(rank=4, alpha=8, dropout=0.4, **options))
    other = peft.get_peft_model(
        net(), peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, **options)
    )
    with torch.no_grad():
        for key, parameter in get_adapter_params(mine).items():
            parameter.normal_()
            factors(other)[key].copy_(parameter)
    x = torch.randn(5, 16)
    outputs = []
    for model in (mine, other):
        torch.manual_seed(3)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs[0], mine.eval()(x))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_have_pefts_distribution(init: str) -> None:
    wide = nn.Sequential(nn.Linear(4000, 8))
    record = apply_lora(wide, LoRAConfig(rank=8, init=init, target_modules=["0"]))
    assert record.matched
    other = peft.get_peft_model(
        nn.Sequential(nn.Linear(4000, 8)),
        peft.LoraConfig(
            r=8,
            target_modules=["0"],
            init_lora_weights=True if init == "kaiming" else "gaussian",
        ),
    )
    left, right = wide[0].lora_a.weight, factors(other)["0.lora_a.weight"]
    torch.testing.assert_close(left.std(), right.std(), rtol=0.03, atol=0)
    if init == "kaiming":
        torch.testing.assert_close(left.abs().max(), right.abs().max(), rtol=1e-3, atol=0)
    assert torch.count_nonzero(wide[0].lora_b.weight) == 0


# -- configurations ---------------------------------------------------------------------------


def test_every_field_of_pefts_config_is_read_ignored_or_refused() -> None:
    known = READ | IGNORED | REFUSED.keys()
    written = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    assert written.keys() <= known
    assert peft.__version__ == PEFT_VERSION, "the stamped release is the one tested against"


@pytest.mark.parametrize("name", list(OPTIONS))
def test_config_round_trip_through_peft(name: str) -> None:
    config = LoRAConfig(rank=4, alpha=8, dropout=0.25, init="gaussian", **OPTIONS[name])
    through = peft.LoraConfig(**config.to_peft(base_model_name="base"))
    back = LoRAConfig.from_peft(through.to_dict())
    # PEFT keeps lists of targets as sets, so their order is gone.
    for field in ("rank", "alpha", "dropout", "init", "use_rslora"):
        assert getattr(back, field) == getattr(config, field)
    assert back.rank_pattern == config.rank_pattern
    assert back.alpha_pattern == config.alpha_pattern
    for field in ("target_modules", "exclude_modules"):
        left, right = getattr(back, field), getattr(config, field)
        assert (left == right) if isinstance(right, str) else (set(left) == set(right))
    assert LoRAConfig.from_peft(json.loads(json.dumps(config.to_peft()))).rank == 4


# -- files ------------------------------------------------------------------------------------


def tiny_qwen2() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    ).eval()


FILE = LoRAConfig(
    rank=4,
    alpha=6,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"v_proj": 2},
    alpha_pattern={r".*layers\.1\.self_attn\.q_proj": 3},
    use_rslora=True,
)
TOKENS = torch.tensor([[1, 5, 9, 30], [0, 2, 2, 7]])


def adapted_qwen2(config: LoRAConfig = FILE, *, fill: bool = True) -> Any:
    model = tiny_qwen2()
    apply_lora(model, config)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in get_adapter_params(model).values() if fill else ():
            parameter.normal_(std=0.2)
    return model


def save(model: Any, folder: Any, *, normalise: bool) -> dict[str, Any]:
    """Write the adapter as its export rules say."""
    export = peft_export(model, normalise=normalise)
    values = get_adapter_state_dict(model)
    tensors = {}
    for rule in export["rules"]:
        value = values[rule["source"]] * rule["scale"]
        if rule["pad_dim"] is not None:
            more = list(value.shape)
            more[rule["pad_dim"]] = rule["pad_to"] - more[rule["pad_dim"]]
            value = torch.cat([value, value.new_zeros(more)], rule["pad_dim"])
        tensors[rule["key"]] = value.contiguous()
    safetensors_torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(export["peft_config"]))
    return export["peft_config"]


@pytest.mark.parametrize("normalise", [True, False])
def test_peft_loads_our_export_and_computes_the_same(tmp_path: Any, normalise: bool) -> None:
    mine = adapted_qwen2()
    save(mine, tmp_path, normalise=normalise)
    base = tiny_qwen2()
    before = base(TOKENS).logits.detach()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    adapted = {n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(adapted) == len(mine.lora.matched)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, mine(TOKENS).logits, rtol=1e-5, atol=1e-5)
        assert float((mine(TOKENS).logits - before).abs().max()) > 1e-2


@pytest.mark.parametrize("normalise", [True, False])
def test_our_export_loads_back_into_our_model(tmp_path: Any, normalise: bool) -> None:
    mine = adapted_qwen2()
    config = save(mine, tmp_path, normalise=normalise)
    fresh = adapted_qwen2(fill=False)
    load_adapter_tensors(
        fresh, safetensors_torch.load_file(tmp_path / "adapter_model.safetensors"), config
    )
    with torch.no_grad():
        torch.testing.assert_close(fresh(TOKENS).logits, mine(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_saved_loads_into_ours_and_back_to_the_byte(tmp_path: Any) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(tiny_qwen2(), config)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in factors(other).values():
            parameter.normal_(std=0.2)
    other.eval()
    other.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = safetensors_torch.load_file(tmp_path / "adapter_model.safetensors")
    mine = adapted_qwen2(LoRAConfig.from_peft(read), fill=False)
    load_adapter_tensors(mine, tensors, read)
    with torch.no_grad():
        torch.testing.assert_close(mine(TOKENS).logits, other(TOKENS).logits, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    again.mkdir()
    save(mine, again, normalise=False)
    saved = safetensors_torch.load_file(again / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_take_no_more_memory_than_with_peft(dtype: torch.dtype) -> None:
    ours, theirs = net(dtype), net(dtype)
    apply_lora(ours, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules="all-linear"))
    x = torch.randn(6, 16, dtype=dtype)
    mine = kept_bytes(ours, lambda: ours(x))
    assert 0 < mine <= kept_bytes(wrapped, lambda: wrapped(x))
