"""Training and inference in one process."""

from __future__ import annotations

import math

import pytest
import torch
from support.engines import (
    batch_of,
    make_engine,
    masked_loss,
    masked_tokens,
    moved,
    train,
    weights_of,
)

from archon_lora.config import LoRAConfig
from archon_lora.engine import EngineLike, OptimizerConfig
from archon_lora.errors import EngineNotReady, LoRANotEnabled, NonFiniteGradient


def test_only_the_adapter_moves_and_the_loss_falls(engine_of) -> None:
    engine = engine_of()
    base = weights_of(engine, trainable=False)
    adapter = weights_of(engine, trainable=True)
    batch = batch_of()
    losses = [
        engine.train_batch(batch, masked_loss, loss_weight_fn=masked_tokens)["loss"]
        for _ in range(15)
    ]
    assert losses[-1] < losses[0] - 0.2
    assert base
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(not torch.equal(after[name], value) for name, value in adapter.items())
    held = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in engine.model.parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapter)


def test_full_fine_tuning_moves_every_weight(engine_of) -> None:
    engine = engine_of(lora=None)
    before = weights_of(engine)
    train(engine, 1)
    after = weights_of(engine)
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_give_the_same_gradient(engine_of, micro_batches: int) -> None:
    whole = engine_of()
    split = engine_of(micro_batches=micro_batches)
    for ours, theirs in zip(train(whole, 3), train(split, 3), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_gradients_add_up_over_calls(engine_of) -> None:
    engine = engine_of(optimizer=OptimizerConfig(lr=1e-2, grad_clip=None))
    engine.forward_backward(batch_of(seed=1), masked_loss)
    engine.forward_backward(batch_of(seed=1), masked_loss)
    twice = engine.optimizer_step()
    assert all(p.grad is None for p in engine.trainable_params())
    other = engine_of(optimizer=OptimizerConfig(lr=1e-2, grad_clip=None))
    other.forward_backward(batch_of(seed=1), masked_loss)
    assert twice == pytest.approx(2 * other.optimizer_step(), rel=1e-5)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_gradients_are_clipped_by_the_norm_that_is_set(engine_of, norm_type: float) -> None:
    options = OptimizerConfig(lr=1e-2, grad_clip=1e-3, norm_type=norm_type)
    engine = engine_of(optimizer=options)
    seen = []

    def look(*_: object) -> None:
        grads = torch.cat([p.grad.full_tensor().flatten() for p in engine.trainable_params()])
        seen.append(float(torch.linalg.vector_norm(grads, norm_type)))

    engine.optimizer.register_step_pre_hook(look)
    norm = train(engine, 1)[0]["grad_norm"]
    assert norm > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-2)]


def _broken_loss(logits: torch.Tensor, batch: object) -> torch.Tensor:
    return masked_loss(logits, batch) * math.nan


def test_a_bad_gradient_stops_the_run_and_changes_nothing(engine_of) -> None:
    engine = engine_of()
    before = weights_of(engine)
    with pytest.raises(NonFiniteGradient, match=r"norm is nan.*on_nonfinite='skip'"):
        engine.train_batch(batch_of(), _broken_loss)
    assert engine.lr_scheduler.last_epoch == 0
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_bad_gradient_can_be_skipped(engine_of, caplog) -> None:
    engine = engine_of(optimizer=OptimizerConfig(lr=1e-2, on_nonfinite="skip", warmup_steps=3))
    before = weights_of(engine)
    done = engine.train_batch(batch_of(), _broken_loss)
    assert math.isnan(done["grad_norm"])
    assert (done["updated"], engine.skipped_updates) == (0.0, 1)
    assert "update skipped" in caplog.text
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert engine.lr_scheduler.last_epoch == 0
    fresh = engine_of(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3))
    assert train(engine, 2) == train(fresh, 2)


def test_the_reference_is_the_frozen_base(engine_of) -> None:
    engine = moved(engine_of())
    bare = engine_of(lora=None, optimizer=None)
    batch = batch_of()
    base = bare.logprobs(batch)
    assert base.shape == (4, 7)
    assert torch.equal(engine.logprobs(batch, reference=True), base)
    assert not torch.allclose(engine.logprobs(batch), base)


def test_temperature_divides_the_logits(engine_of) -> None:
    cold, warm = engine_of(optimizer=None), engine_of(optimizer=None, temperature=2.0)
    batch = batch_of()
    wanted = torch.log_softmax(cold.forward(batch)[:, :-1] / 2.0, dim=-1)
    chosen = wanted.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(warm.logprobs(batch), chosen)


def test_a_reference_without_lora_names_the_setting(engine_of) -> None:
    engine = engine_of(lora=None)
    with pytest.raises(LoRANotEnabled, match="set use_lora=true"):
        engine.logprobs(batch_of(), reference=True)


def test_inference_has_no_dropout_and_leaves_training_as_it_was(engine_of) -> None:
    engine = moved(engine_of(lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.5)))
    batch = batch_of()
    assert engine.model.training
    first = engine.logprobs(batch)
    assert torch.equal(first, engine.logprobs(batch))
    assert engine.model.training
    losses = {engine.forward_backward(batch, masked_loss) for _ in range(3)}
    assert len(losses) == 3, "training has dropout"


def test_after_inference_parameters_are_the_shards_again(engine_of) -> None:
    engine = engine_of(lora=LoRAConfig(rank=4, alpha=8.0, target_modules=["lm_head", "q_proj"]))
    engine.logprobs(batch_of())
    before = {id(p) for p in engine.model.parameters() if p.requires_grad}
    assert {id(p) for g in engine.optimizer.param_groups for p in g["params"]} == before


# torch's tracer looks at the gradient of a non-leaf tensor, and at its own warning about that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": True}])
def test_recomputation_and_compilation_change_no_number(engine_of, options: dict) -> None:
    plain = train(engine_of(), 2)
    other = train(engine_of(compile_backend="eager", **options), 2)
    for ours, theirs in zip(plain, other, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_bf16_base_keeps_fp32_adapters_and_its_own_bytes(engine_of) -> None:
    engine = engine_of(dtype="bfloat16", activation_checkpointing=True)
    dtypes = {n: p.dtype for n, p in engine.model.named_parameters()}
    assert {d for n, d in dtypes.items() if "lora_" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "lora_" not in n} == {torch.bfloat16}
    base = weights_of(engine, trainable=False)
    first, *_, last = [
        engine.train_batch(batch_of(), masked_loss, loss_weight_fn=masked_tokens)["loss"]
        for _ in range(12)
    ]
    assert last < first
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    state = next(iter(engine.optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.float32


def test_engine_without_optimizer_says_so(engine_of) -> None:
    engine = engine_of(optimizer=None)
    with pytest.raises(EngineNotReady, match="optimizer=None"):
        engine.train_batch(batch_of(), masked_loss)
    assert engine.optimizer is None


def test_calls_out_of_order_are_refused(model_dir: str, engine_of) -> None:
    fresh = make_engine(model_dir, initialize=False)
    for call in (lambda: fresh.model, lambda: fresh.rank, lambda: fresh.optimizer_step()):
        with pytest.raises(EngineNotReady, match=r"call initialize\(\) first"):
            call()
    fresh.close()
    engine = engine_of()
    with pytest.raises(EngineNotReady, match="twice"):
        engine.initialize()


def test_a_failed_start_leaves_no_group_behind(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        make_engine(str(tmp_path))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"needs input_ids of shape \[rows, tokens\], got none"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"got shape \(3,\)"),
        (
            {"input_ids": torch.zeros(2, 3, dtype=torch.long), "x": torch.zeros(3)},
            r"must have 2 rows like input_ids; x is \(3,\)",
        ),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "0 rows cannot make 1 micro"),
    ],
)
def test_malformed_batches(engine_of, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of().train_batch(batch, masked_loss)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_weights_that_make_no_mean(engine_of, weight: float) -> None:
    with pytest.raises(ValueError, match="weights of a batch must be finite, >= 0 and not all"):
        engine_of().train_batch(batch_of(), masked_loss, loss_weight_fn=lambda _: weight)


def test_versions_are_counted_from_zero(engine_of) -> None:
    engine = engine_of()
    assert engine.get_version() == 0
    engine.set_version(7)
    assert engine.get_version() == 7
    for bad in (-1, True, "8"):
        with pytest.raises(ValueError, match="policy version must be an integer >= 0"):
            engine.set_version(bad)


def test_the_engine_is_engine_like(engine_of) -> None:
    assert isinstance(engine_of(), EngineLike)
