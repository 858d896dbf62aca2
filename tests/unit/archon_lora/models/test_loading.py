import copy
import json

import pytest
import torch
from support.model_dirs import edit_config, read_weights, split, write_index, write_weights

from archon_lora import LoRAConfig, apply_lora, get_adapter_state_dict
from archon_lora.errors import ModelLoadError
from archon_lora.models import (
    base_fingerprint,
    get_model_spec,
    load_hf_weights,
    load_pretrained,
    weights_fingerprint,
)
from archon_lora.models.hf_files import HFWeights
from archon_lora.models.qwen2 import Qwen2Config, Qwen2Model, Qwen2StateDictAdapter
from archon_lora.models.tiny import write_tiny_qwen2

SMALL = {"vocab": "abcdefgh", "hidden": 16, "heads": 4, "kv_heads": 2, "intermediate": 24}


@pytest.fixture
def directory(tmp_path):
    return write_tiny_qwen2(tmp_path / "model", **SMALL)


def fresh(directory, fill=3.25):
    """A model of the directory's shape whose parameters all have one value."""
    config = Qwen2Config.from_hf(directory)
    model = Qwen2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    return model, Qwen2StateDictAdapter(config)


def assert_equals_file(model, adapter, weights):
    loaded = adapter.to_hf(model.state_dict())
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_single_and_indexed(directory, parts):
    weights = read_weights(directory)
    if parts > 1:
        split(directory, parts)
    model, adapter = fresh(directory)
    report = load_hf_weights(model, adapter, directory)
    assert_equals_file(model, adapter, weights)
    assert report.tensors == len(weights)
    assert report.bytes_read == sum(t.nbytes for t in weights.values())


def test_tied(tmp_path):
    directory = write_tiny_qwen2(tmp_path, tie=True, **SMALL)
    weights = read_weights(directory)
    assert "lm_head.weight" not in weights
    model, adapter = fresh(directory)
    load_hf_weights(model, adapter, directory)
    assert_equals_file(model, adapter, weights)


def test_tied_head_stored_as_well(tmp_path):
    directory = write_tiny_qwen2(tmp_path, tie=True, **SMALL)
    weights = read_weights(directory)
    head = weights["model.embed_tokens.weight"].clone()
    write_weights(directory, weights | {"lm_head.weight": head})
    model, adapter = fresh(directory)
    load_hf_weights(model, adapter, directory)
    assert_equals_file(model, adapter, weights)

    head[-1, -1] += 1
    write_weights(directory, weights | {"lm_head.weight": head})
    model, adapter = fresh(directory)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelLoadError, match=r"lm_head.weight differs .* tie_word_embeddings"):
        load_hf_weights(model, adapter, directory)
    assert_untouched(model, before)


def assert_untouched(model, before):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtype_conversion(tmp_path, stored, wanted):
    directory = write_tiny_qwen2(tmp_path, dtype=stored, **SMALL)
    model, adapter = load_pretrained(directory, dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert_equals_file(model, adapter, read_weights(directory))


def test_every_problem_is_listed_before_anything_is_touched(directory):
    weights = read_weights(directory)
    del weights["model.norm.weight"]
    del weights["model.layers.1.self_attn.k_proj.bias"]
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(16, 24)
    weights["score.weight"] = torch.zeros(2, 16)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)
    write_weights(directory, weights)
    model, adapter = fresh(directory)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelLoadError) as caught:
        load_hf_weights(model, adapter, directory)
    first, *problems = (line.strip() for line in str(caught.value).splitlines())
    assert first == f"{directory} does not fit the model:"
    assert sorted(problems) == [
        "missing: model.layers.1.self_attn.k_proj.bias "
        "(for layers.1.attention.wk.bias, shape (8,))",
        "missing: model.norm.weight (for norm.weight, shape (16,))",
        "unexpected: model.layers.2.mlp.up_proj.weight",
        "unexpected: score.weight",
        "wrong shape: model.layers.0.mlp.up_proj.weight is (16, 24), the model wants (24, 16)",
    ]
    assert_untouched(model, before)


def test_old_rotary_buffers_are_known_harmless(directory):
    weights = read_weights(directory)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    write_weights(directory, weights | old)
    model, adapter = fresh(directory)
    load_hf_weights(model, adapter, directory)
    assert_equals_file(model, adapter, weights)


def test_adapters_are_left_alone(directory):
    model, adapter = fresh(directory)
    apply_lora(model, LoRAConfig(rank=2), name_map=adapter.module_to_hf)
    before = get_adapter_state_dict(model, full=True)
    load_hf_weights(model, adapter, directory)
    after = get_adapter_state_dict(model)
    assert len(before) == 2 * 7 * 2
    assert all(torch.equal(before[name], after[name]) for name in before)
    base = {n: t for n, t in model.state_dict().items() if n not in before}
    loaded = adapter.to_hf(base)
    assert all(torch.equal(loaded[n], t) for n, t in read_weights(directory).items())


def test_meta_model_is_refused_with_the_remedy(directory):
    with torch.device("meta"):
        model = Qwen2Model(Qwen2Config.from_hf(directory))
    with pytest.raises(ModelLoadError, match=r"meta device .*to_empty"):
        load_hf_weights(model, Qwen2StateDictAdapter(model.config), directory)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..", 3]
)
def test_index_cannot_name_files_elsewhere(directory, file):
    write_weights(directory.parent, {"t": torch.zeros(1)})
    (directory.parent / "model.safetensors").rename(directory.parent / "x.safetensors")
    split(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(directory, index | {"t": file})
    with pytest.raises(ModelLoadError, match=r"t lies in .*, which is not a file name"):
        HFWeights(directory)


def test_index_must_agree_with_the_files(directory):
    split(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    moved = index | {"model.norm.weight": first if index["model.norm.weight"] == second else second}
    write_index(directory, moved)
    with pytest.raises(ModelLoadError) as caught:
        HFWeights(directory)
    assert "lacks model.norm.weight, which model.safetensors.index.json lists" in str(caught.value)
    assert "has model.norm.weight, which model.safetensors.index.json does not list" in str(
        caught.value
    )
    (directory / second).unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {second}, named by"):
        HFWeights(directory)
    write_index(directory, {})
    with pytest.raises(ModelLoadError, match="has no weight_map"):
        HFWeights(directory)


def test_links_of_a_hub_cache_are_followed(directory):
    """A hub cache's snapshot holds links to blobs outside the snapshot."""
    weights = read_weights(directory)
    blob = directory.parent / "blob"
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(blob)
    model, adapter = load_pretrained(directory)
    assert_equals_file(model, adapter, weights)


def test_directories_without_safetensors(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has neither model\.safetensors nor model"):
        load_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"only \.bin weights, which are pickles .*convert"):
        load_pretrained(directory)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="is a PEFT adapter; give the directory of its base"):
        load_pretrained(directory)
    with pytest.raises(ModelLoadError, match="is not a directory"):
        HFWeights(directory / "absent")


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_damaged_file_is_named(directory, damage):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "header": b"\xff" * 16 + data[16:], "empty": b""}[damage])
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors"):
        load_pretrained(directory)


def test_quantised_tensors_are_refused(directory):
    weights = read_weights(directory)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    write_weights(directory, weights)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has dtype I8; want one of F64"):
        load_pretrained(directory)


def test_reader_reads_only_the_block(directory):
    weights = read_weights(directory)
    name = "model.layers.0.mlp.up_proj.weight"
    with HFWeights(directory) as reader:
        assert reader.bytes_read == 0
        block = reader.read(name, (slice(3, 7), slice(2, 4)))
        assert torch.equal(block, weights[name][3:7, 2:4])
        assert reader.bytes_read == 4 * 2 * 4


def test_fingerprint(directory, tmp_path):
    first = base_fingerprint(directory)
    assert first["name"] == str(directory)
    assert base_fingerprint(directory, name="org/m")["name"] == "org/m"
    digest = first["config_hash"]
    assert len(digest) == 64
    edit_config(
        directory, transformers_version="9.9", torch_dtype="bfloat16", use_cache=False, dtype="x"
    )
    assert base_fingerprint(directory)["config_hash"] == digest
    raw = json.loads((directory / "config.json").read_text())
    reordered = dict(reversed(raw.items())) | {"rope_scaling": None}
    (directory / "config.json").write_text(json.dumps(reordered))
    assert base_fingerprint(directory)["config_hash"] == digest
    edit_config(directory, rope_theta=7.0)
    assert base_fingerprint(directory)["config_hash"] != digest


def test_fingerprint_of_weights(directory, tmp_path):
    digest = weights_fingerprint(directory)
    assert len(digest) == 64
    other = write_tiny_qwen2(tmp_path / "other", **SMALL, seed=1)
    assert base_fingerprint(other)["config_hash"] == base_fingerprint(directory)["config_hash"]
    assert weights_fingerprint(other) != digest
    weights = read_weights(directory)
    write_weights(directory, {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})
    assert weights_fingerprint(directory) == digest
    split(directory)
    assert weights_fingerprint(directory) == digest
    with HFWeights(directory) as reader:
        most = max(reader.shapes, key=lambda name: len(reader.shapes[name]))
    weights[most] = -weights[most]
    write_weights(tmp_path / "other", weights)
    assert weights_fingerprint(tmp_path / "other") != digest


def test_registry(directory):
    spec = get_model_spec("qwen2")
    assert spec.config_cls.from_hf(directory) == Qwen2Config.from_hf(directory)
    assert spec.model_cls is Qwen2Model
    assert spec.state_dict_adapter_cls is Qwen2StateDictAdapter
    edit_config(directory, model_type="mamba")
    with pytest.raises(ModelLoadError, match=r"model_type 'mamba' is not .*: .*qwen2"):
        load_pretrained(directory)
