"""Handing weights to rollout targets, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import batch_of, moved, train, weights_of

from archon_lora.apply import apply_lora
from archon_lora.config import LoRAConfig
from archon_lora.errors import ArchonLoraError
from archon_lora.models import load_pretrained
from archon_lora.peft import load_adapter_tensors
from ckpt import CheckpointManager
from ckpt.peft import read_adapter

RSLORA = LoRAConfig(rank=4, alpha=6.0, use_rslora=True, rank_pattern={"q_proj": 2})


class Sink:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def load_adapter(self, version, peft_config, tensors) -> None:
        self.calls.append((version, dict(peft_config), dict(tensors)))


class FullSink:
    def __init__(self, take: int | None = None) -> None:
        self.take = take
        self.got: dict[str, torch.Tensor] = {}
        self.version: int | None = None

    def load_weights(self, version, tensors) -> None:
        self.version = version
        for name, tensor in tensors:
            self.got[name] = tensor
            if len(self.got) == self.take:
                msg = "the target is full"
                raise OSError(msg)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_sink_computes_what_the_trainer_does(engine_of, model_dir, normalise: bool) -> None:
    engine = moved(engine_of(lora=RSLORA))
    sink = Sink()
    engine.sinks.append(sink)
    assert engine.update_weights(4, normalise=normalise) is None
    [(version, config, tensors)] = sink.calls
    assert (version, engine.get_version()) == (4, 4)
    assert config["use_rslora"] is not normalise
    model, names = load_pretrained(model_dir)
    apply_lora(model, RSLORA, name_map=names.module_to_hf)
    load_adapter_tensors(model, tensors, config)
    with torch.no_grad():
        logits = model(batch_of()["input_ids"])
    torch.testing.assert_close(logits, engine.forward(batch_of()))
    if not normalise:
        assert all(
            torch.equal(dict(model.named_parameters())[n], v)
            for n, v in weights_of(engine, trainable=True).items()
        )


def test_a_manager_publishes_the_version(engine_of, tmp_path: Path) -> None:
    engine = moved(engine_of())
    with CheckpointManager(tmp_path, run_name="r") as manager:
        engine.manager = manager
        version = engine.update_weights(1).published.result(timeout=60)
    assert (version.name, version.policy_version) == ("r-v00000001", 1)
    config, tensors = read_adapter(tmp_path / "adapters" / version.name)
    assert config["r"] == config["lora_alpha"] == 4
    assert len(tensors) == len(weights_of(engine, trainable=True))


def test_versions_only_grow(engine_of) -> None:
    engine = engine_of()
    engine.update_weights(2)
    engine.update_weights(2)
    with pytest.raises(ValueError, match="version 1 is below the engine's 2"):
        engine.update_weights(1)


def test_a_failing_sink_leaves_the_version_as_it_was(engine_of) -> None:
    engine = engine_of()

    class Broken(Sink):
        def load_adapter(self, version, peft_config, tensors) -> None:
            msg = "target is gone"
            raise ConnectionError(msg)

    engine.sinks += [Sink(), Broken()]
    with pytest.raises(ConnectionError, match="target is gone"):
        engine.update_weights(1)
    assert engine.get_version() == 0


def test_without_lora_the_whole_model_is_handed_over(engine_of, model_dir) -> None:
    engine = engine_of(lora=None)
    train(engine, 1)
    sinks = [FullSink(), FullSink()]
    engine.sinks += sinks
    engine.update_weights(1)
    for sink in sinks:
        assert sink.version == 1
        model, names = load_pretrained(model_dir)
        model.load_state_dict(names.from_hf(sink.got))
        with torch.no_grad():
            torch.testing.assert_close(
                model(batch_of()["input_ids"]), engine.forward(batch_of()), rtol=0, atol=1e-6
            )
    engine.sinks[:] = [FullSink(take=2)]
    with pytest.raises(OSError, match="the target is full"):
        engine.update_weights(2)
    assert engine.get_version() == 1


@pytest.mark.parametrize(("lora", "sink"), [(RSLORA, FullSink()), (None, Sink())])
def test_a_sink_of_the_wrong_kind_is_named(engine_of, lora, sink) -> None:
    engine = engine_of(lora=lora)
    engine.sinks.append(sink)
    with pytest.raises(ArchonLoraError, match=f"{type(sink).__name__} cannot take these weights"):
        engine.update_weights(1)
