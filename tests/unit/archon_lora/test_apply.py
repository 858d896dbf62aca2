"""apply_lora(): what it puts where, what it refuses, and that compile and AC see no difference."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import archon_lora
from archon_lora import (
    AppliedLoRA,
    LoRAConfig,
    LoRAConfigError,
    LoRALinear,
    LoRANotEnabled,
    NoAdapterError,
    TargetError,
    adapters_disabled,
    apply_lora,
    errors,
    get_adapter_params,
    get_adapter_state_dict,
    initialise_adapters,
    iter_merged_weights,
    peft_export,
)
from archon_lora.adapter import applied_lora


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(8, 8, bias=False)
        self.w1 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w1(torch.relu(self.wq(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.output = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


HF = {
    "output": "lm_head",
    "tok_embeddings": "model.embed_tokens",
    **{f"layers.{i}.wq": f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)},
    **{f"layers.{i}.w1": f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)},
}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 10]])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def filled(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in get_adapter_params(model).values():
            parameter.normal_()


@pytest.mark.parametrize("name_map", [HF, HF.get], ids=["mapping", "function"])
def test_targets_are_hf_names(name_map: object, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.INFO, "archon_lora"):
        record = apply_lora(
            model,
            LoRAConfig(rank=2, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*": 3}),
            name_map=name_map,
        )
    assert dict(record.matched) == {
        "layers.0.wq": "model.layers.0.self_attn.q_proj",
        "layers.1.wq": "model.layers.1.self_attn.q_proj",
    }
    assert model.lora is record
    assert isinstance(record, AppliedLoRA)
    assert model.layers[0].wq.rank == 2
    assert model.layers[1].wq.rank == 3
    assert model.layers[1].wq.fqn == "layers.1.wq"
    assert type(model.layers[0].w1) is nn.Linear
    assert "model.layers.1.self_attn.q_proj" in caplog.text
    assert "LoRA on 2 modules" in caplog.text
    with pytest.raises(TargetError, match="'wq' is for no module"):
        apply_lora(net(), LoRAConfig(target_modules=["wq"]), name_map=name_map)


def test_all_linear_leaves_the_head_out_by_either_name() -> None:
    for name_map in (None, HF):
        model = net()
        record = apply_lora(model, LoRAConfig(), name_map=name_map)
        assert list(record.matched) == ["layers.0.wq", "layers.0.w1", "layers.1.wq", "layers.1.w1"]


def test_the_head_that_the_model_names_is_left_out() -> None:
    class Named(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1].w1

    record = apply_lora(Named(), LoRAConfig())
    assert "output" in record.matched
    assert "layers.1.w1" not in record.matched


def test_only_adapters_train_and_the_first_output_is_the_base() -> None:
    model = net()
    before = model(TOKENS)
    weights = dict(model.named_parameters())
    apply_lora(model, LoRAConfig(rank=2))
    assert torch.equal(model(TOKENS), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(get_adapter_params(model))
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in weights.items()), "a base parameter moved or was copied"


def test_the_kl_reference_is_the_base_to_the_bit_after_training() -> None:
    model = net()
    before = model(TOKENS).detach()
    apply_lora(model, LoRAConfig(rank=2))
    optimizer = torch.optim.AdamW(get_adapter_params(model).values(), lr=0.1)
    for _ in range(3):
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(TOKENS), before)
    with adapters_disabled(model):
        assert torch.equal(model(TOKENS), before)


def test_meta_then_to_empty_gives_the_same_bits_and_leaves_the_base() -> None:
    direct = net()
    apply_lora(direct, LoRAConfig(rank=2, seed=7))
    with torch.device("meta"):
        late = Net()
    apply_lora(late, LoRAConfig(rank=2, seed=7))
    assert all(p.is_meta for p in late.parameters())
    with pytest.raises(NoAdapterError, match="on the meta device; call to_empty"):
        initialise_adapters(late)
    late.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in late.named_parameters():
            if "lora_" not in name:
                parameter.fill_(2.0)
    initialise_adapters(late)
    for name, value in get_adapter_state_dict(direct).items():
        assert torch.equal(value, get_adapter_state_dict(late)[name])
    assert all(bool((p == 2).all()) for n, p in late.named_parameters() if "lora_" not in n)
    assert {n for n, p in late.named_parameters() if p.requires_grad} == set(
        get_adapter_params(late)
    )


def test_initialise_needs_adapters_that_can_be_reset() -> None:
    with pytest.raises(NoAdapterError, match="has no adapters"):
        initialise_adapters(net())

    class Fixed(nn.Module):
        def adapter_params(self) -> list[str]:
            return []

    model = nn.Sequential(LoRALinear(2, 2, rank=1, alpha=1), Fixed())
    filled(model)
    with pytest.raises(NoAdapterError, match=r"Fixed '1' .* no reset_adapter"):
        initialise_adapters(model)
    assert torch.count_nonzero(model[0].lora_b.weight) > 0, "nothing may be reset on an error"


def test_refusals_change_nothing() -> None:
    model = net()
    apply_lora(model, LoRAConfig(rank=2, target_modules=["wq"]))
    with pytest.raises(TargetError, match=r"has an adapter already \('layers\.0\.wq'\)"):
        apply_lora(model, LoRAConfig())
    with pytest.raises(LoRAConfigError, match="config must be a LoRAConfig, got dict"):
        apply_lora(net(), {"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="the model itself is a linear layer"):
        apply_lora(nn.Linear(2, 2), LoRAConfig())
    owner = net()
    owner.lora = "mine"
    with pytest.raises(TargetError, match="attribute 'lora' of its own"):
        apply_lora(owner, LoRAConfig())
    fresh = net()
    for targets, message in (
        (["wq", "layers.0"], r"'layers\.0' is a .*Layer; only nn\.Linear and nn\.Embedding can"),
        (["wq", "gone"], "'gone' is for no module"),
    ):
        with pytest.raises(TargetError, match=message):
            apply_lora(fresh, LoRAConfig(target_modules=targets))
    assert not any(isinstance(m, LoRALinear) for m in fresh.modules())
    assert all(p.requires_grad for p in fresh.parameters())
    assert not hasattr(fresh, "lora")
    with pytest.raises(TargetError, match=r"'layers\.0\.wq' and 'layers\.1\.wq' the HF name 'x'"):
        apply_lora(fresh, LoRAConfig(), name_map={"layers.0.wq": "x", "layers.1.wq": "x"})


def test_tied_and_shared_targets_are_refused_with_the_reason() -> None:
    tied = net()
    tied.output.weight = tied.tok_embeddings.weight
    with pytest.raises(TargetError, match=r"output\.weight is tied .*tok_embeddings\.weight"):
        apply_lora(tied, LoRAConfig(target_modules=["output"]))
    apply_lora(tied, LoRAConfig())  # the head is no target here
    shared = net()
    shared.layers[1].wq = shared.layers[0].wq
    with pytest.raises(TargetError, match=r"used in several places \(layers\.0\.wq, layers\.1\.wq"):
        apply_lora(shared, LoRAConfig())


def test_layers_whose_weight_is_read_past_their_forward_are_refused() -> None:
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 8))
    for target in ("self_attn.out_proj", "linear1"):
        with pytest.raises(TargetError, match=r"reads its weight without calling it"):
            apply_lora(encoder, LoRAConfig(target_modules=[target]))
    with pytest.raises(TargetError, match="lies in a MultiheadAttention"):
        apply_lora(encoder, LoRAConfig())
    record = apply_lora(encoder, LoRAConfig(exclude_modules=["out_proj", "linear1", "linear2"]))
    assert list(record.matched) == ["1"]


def test_ddp_is_refused_and_unwrapped_afterwards(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with pytest.raises(TargetError, match="before DistributedDataParallel"):
            apply_lora(nn.parallel.DistributedDataParallel(net()), LoRAConfig())
        model = net()
        apply_lora(model, LoRAConfig(rank=2))
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert list(get_adapter_params(wrapped)) == list(get_adapter_params(model))
        assert peft_export(wrapped) == peft_export(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_exports_itself() -> None:
    model = net()
    apply_lora(model, LoRAConfig(rank=2), name_map=HF)
    twin = copy.deepcopy(model)
    assert twin.adapter_export() == model.adapter_export() == peft_export(model)
    assert twin.adapter_export.args[0] is twin
    assert twin.lora == model.lora
    named = net()
    apply_lora(named, LoRAConfig(rank=2), name_map=HF, base_model_name="org/base")
    assert named.adapter_export() == peft_export(named, base_model_name="org/base")
    with pytest.raises(LoRANotEnabled, match="this model has no LoRA: call apply_lora"):
        applied_lora(net())


def test_merged_weights_one_by_one() -> None:
    model = net()
    apply_lora(model, LoRAConfig(rank=2, alpha=2, target_modules=["wq", "w1"]))
    filled(model)
    merged = dict(iter_merged_weights(model))
    assert list(merged) == [f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("wq", "w1")]
    bare = net()
    bare.load_state_dict(
        {n: merged.get(n, v) for n, v in model.state_dict().items() if "lora_" not in n}
    )
    torch.testing.assert_close(bare(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, saved = net(), net()
    for model in (plain, saved):
        apply_lora(model, LoRAConfig(rank=2, seed=1, target_modules=["wq", "w1"]))
        torch.manual_seed(4)
        filled(model)
    plain(TOKENS).square().mean().backward()
    x = saved.tok_embeddings(TOKENS)
    for layer in saved.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    saved.output(x).square().mean().backward()
    for name, parameter in get_adapter_params(plain).items():
        assert torch.equal(parameter.grad, get_adapter_params(saved)[name].grad)


def test_compiled_model_toggles_between_two_graphs() -> None:
    torch._dynamo.reset()
    model = net()
    apply_lora(model, LoRAConfig(rank=2, rank_pattern={r"layers\.1\..*": 3}))
    filled(model)
    expected = model(TOKENS)
    with adapters_disabled(model):
        base = model(TOKENS)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(TOKENS), expected)
        with adapters_disabled(compiled):
            torch.testing.assert_close(compiled(TOKENS), base)
    assert len(graphs) == 2
    # State dicts of compiled models carry a prefix; ours never do.
    assert any("_orig_mod" in name for name in compiled.state_dict())
    assert list(get_adapter_state_dict(compiled)) == list(get_adapter_params(model))
    assert [r["source"] for r in peft_export(compiled)["rules"]] == list(get_adapter_params(model))


def test_every_name_is_importable_from_the_package() -> None:
    for name in archon_lora.__all__:
        assert getattr(archon_lora, name).__module__.startswith("archon_lora.")
        assert name in dir(archon_lora)
    with pytest.raises(AttributeError, match="no attribute 'gone'"):
        _ = archon_lora.gone


def test_every_error_is_in_the_tree_and_exported() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.ArchonLoraError):
            assert name in archon_lora.__all__
            assert name in (errors.__doc__ or "")
