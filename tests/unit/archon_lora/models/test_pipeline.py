"""Stages of a decoder, one after another in one process: the same numbers, names and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model_dirs import read_weights, write_weights
from torch import nn

from archon_lora import LoRAConfig, TargetError, apply_lora, peft_export
from archon_lora.adapter import applied_lora, get_adapter_params
from archon_lora.errors import ModelLoadError, ParallelConfigError
from archon_lora.models import load_hf_weights, load_pretrained
from archon_lora.models.decoder import Decoder
from archon_lora.models.pipeline import split_decoder, stage_layers, stage_of
from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.peft import adapter_values
from archon_lora.stages import mark_stages
from ckpt import TrainState

SIZES = {"hidden": 16, "layers": 5, "heads": 2, "kv_heads": 1, "intermediate": 24}
LORA = LoRAConfig(
    rank=2,
    alpha=4.0,
    target_modules=["q_proj", "down_proj"],
    exclude_modules=r"model\.layers\.[01]\..*",
    rank_pattern={r"model\.layers\.4\.self_attn\.q_proj": 3},
)
"""Nothing on the first two layers, and the widest adapter on the last one."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_qwen2(tmp_path / "model", **SIZES)


def _adapted(directory: Path, lora: LoRAConfig | None = LORA) -> tuple[Decoder, object]:
    model, names = load_pretrained(directory)
    assert isinstance(model, Decoder)
    if lora is not None:
        apply_lora(model, lora, name_map=names.module_to_hf)
        for number, parameter in enumerate(get_adapter_params(model).values()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model, names


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(5, 2, [3, 2]), (4, 4, [1] * 4), (7, 3, [3, 2, 2]), (2, 1, [2])]
)
def test_layers_are_dealt_out_in_order(layers: int, stages: int, sizes: list[int]) -> None:
    cut = stage_layers(layers, stages)
    assert [len(part) for part in cut] == sizes
    assert [layer for part in cut for layer in part] == list(range(layers))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ParallelConfigError, match="5 layers cannot be cut into 6"):
        stage_layers(5, 6)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stages", [2, 5])
def test_stages_compute_what_the_whole_does(tmp_path: Path, tie: bool, stages: int) -> None:
    directory = write_tiny_qwen2(tmp_path, **SIZES, tie=tie)
    model, _ = _adapted(directory)
    parts = split_decoder(model, stages, range(stages))
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    wanted = model(ids, attention_mask=mask)
    h = ids
    for part in parts:
        h = part(h, attention_mask=mask)
    assert torch.equal(h, wanted)
    # The same objects, under the same names, each of those that train in one place.
    whole = dict(model.named_parameters())
    named = [(n, p) for part in parts for n, p in part.named_parameters() if p.requires_grad]
    assert {n: id(p) for n, p in named} == {n: id(p) for n, p in whole.items() if p.requires_grad}
    assert len(named) == len(get_adapter_params(model))
    assert {n for part in parts for n, _ in part.named_parameters()} == set(whole)


def test_a_stage_says_whether_gradients_pass_its_ends(directory: Path) -> None:
    parts = split_decoder(_adapted(directory)[0], 5, range(5))
    ends = [(stage_of(p).takes_gradient, stage_of(p).gives_gradient) for p in parts]
    # The adapters begin in layer 2.
    assert ends == [(False, False), (False, False), (False, True), (True, True), (True, True)]


@pytest.mark.parametrize("normalise", [False, True])
def test_every_stage_exports_the_whole_adapter(directory: Path, normalise: bool) -> None:
    model, _ = _adapted(directory)
    wanted = peft_export(model, normalise=normalise)
    parts = split_decoder(model, 5, range(5))
    assert [len(get_adapter_params(part)) for part in parts] == [0, 0, 4, 4, 4]
    for part in parts:
        assert peft_export(part, normalise=normalise) == wanted
        assert TrainState([part]).export() is not None
    assert wanted["peft_config"]["r"] == (3 if normalise else 2)


def test_a_stage_takes_its_own_part_of_an_adapter(directory: Path) -> None:
    model, _ = _adapted(directory)
    export = peft_export(model)
    part = split_decoder(model, 5, [3])[0]
    own = get_adapter_params(part)
    mine = {r["key"]: own[r["source"]] for r in export["rules"] if r["source"] in own}
    config = {**export["peft_config"], "r": 2, "lora_alpha": 4}
    plan = adapter_values(part, {key: p.detach() + 1 for key, p in mine.items()}, config)
    assert {id(parameter) for parameter, _ in plan} == {id(p) for p in own.values()}
    assert len(applied_lora(part).matched) == 2


def test_a_stage_reads_its_own_weights_and_checks_the_rest(directory: Path) -> None:
    model, names = _adapted(directory, lora=None)
    wanted = model.state_dict()
    total = 0
    for index in range(3):
        with torch.device("meta"):
            fresh = type(model)(model.config)
        (part,) = split_decoder(fresh, 3, [index])
        part.to_empty(device="cpu")
        total += load_hf_weights(part, names, directory).bytes_read
        assert all(torch.equal(value, wanted[name]) for name, value in part.state_dict().items())
    assert total == sum(value.numel() * 4 for value in wanted.values())
    stored = read_weights(directory)
    gone = stored.pop("model.layers.4.mlp.up_proj.weight")
    write_weights(directory, {**stored, "model.layers.9.mlp.up_proj.weight": gone})
    (part,) = split_decoder(fresh, 3, [0])
    part.to_empty(device="cpu")
    with pytest.raises(ModelLoadError) as caught:
        load_hf_weights(part, names, directory)
    assert "missing: model.layers.4.mlp.up_proj.weight" in str(caught.value)
    assert "unexpected: model.layers.9.mlp.up_proj.weight" in str(caught.value)


def test_a_tied_head_that_trains_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_qwen2(tmp_path, **SIZES, tie=True)
    model, _ = _adapted(directory, lora=None)
    with pytest.raises(ParallelConfigError, match="adapt other modules only, which freezes it"):
        split_decoder(model, 2, [0])


def test_a_stage_that_is_split_elsewhere_can_be_marked(directory: Path) -> None:
    # As a trainer does that copies the whole model and deletes what a stage does not have.
    model, _ = _adapted(directory)
    wanted = peft_export(model)
    (part,) = split_decoder(model, 2, [0])
    part.lora = model.lora
    with pytest.raises(Exception, match="no longer hold their adapters"):
        adapter_values(part, {}, wanted["peft_config"])
    mark_stages(model, [part])
    assert peft_export(part) == wanted


def test_a_target_that_is_nowhere_is_still_an_error(directory: Path) -> None:
    with pytest.raises(TargetError, match="nosuch"):
        _adapted(directory, LoRAConfig(rank=2, alpha=2, target_modules=["q_proj", "nosuch"]))


def test_what_is_no_stage_is_told_so(directory: Path) -> None:
    with pytest.raises(TypeError, match="no pipeline stage"):
        stage_of(_adapted(directory)[0])
