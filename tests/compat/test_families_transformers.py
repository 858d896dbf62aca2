"""Every family against transformers on files that transformers wrote, bare and adapted."""

import json
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import ranks_models
from support.engines import make_engine, moved
from support.families import (
    CASES,
    PATTERNS,
    TARGETS,
    VOCAB,
    composite_gemma3,
    fused_experts,
    write_family,
)
from support.parity import (
    ALL,
    assert_close,
    assert_same_logits,
    load_theirs,
    random_peft_adapter,
)
from support.spawn import run_ranks

from archon_lora import (
    LoRAConfig,
    apply_lora,
    get_adapter_state_dict,
    iter_merged_weights,
    peft_export,
)
from archon_lora.engine import load_lora_adapter, save_lora_adapter
from archon_lora.models import get_model_spec, load_pretrained
from archon_lora.peft import load_adapter_tensors
from ckpt.lint import BaseModel, lint_adapter

pytestmark = [
    pytest.mark.compat,
    # PEFT 0.21 asks for a property that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It looks for the patterns of stacked experts, which it writes itself, among modules alone.
    pytest.mark.filterwarnings(r"ignore:The following \w+ keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def directory(case, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"), case)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB, (3, 19), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mask():
    """The first row is padded on the left, the second on the right, the third not at all."""
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[0, :6] = 0
    mask[1, 11:] = 0
    return mask


def test_logits_names_and_gradients(directory, tokens, mask):
    ours, adapter = load_pretrained(directory)
    theirs = load_theirs(directory)
    assert_same_logits(ours, theirs, tokens, mask)

    torch.nn.functional.cross_entropy(ours(tokens).flatten(0, 1), tokens.flatten()).backward()
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    named = dict(theirs.named_parameters())
    weights = fused_experts(adapter.to_hf(ours.state_dict()))
    grads = {name: p.grad for name, p in ours.named_parameters()}
    grads = fused_experts(adapter.to_hf(grads))
    assert weights.keys() == grads.keys() == named.keys()
    for name, parameter in named.items():
        assert torch.equal(weights[name], parameter)
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_goes_from_peft_to_ours(case, directory, tokens, mask, tmp_path):
    targets = TARGETS.get(case, ALL)
    random_peft_adapter(load_theirs(directory), targets=targets, out=tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(load_theirs(directory), tmp_path / "theirs").eval()
    ours, adapter = load_pretrained(directory)
    with torch.no_grad():
        bare = ours(tokens)
    config = LoRAConfig(rank=4, alpha=12, target_modules=targets, **PATTERNS.get(case, {}))
    apply_lora(ours, config, name_map=adapter.module_to_hf)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    # PEFT writes experts stacked, as transformers 5 has them.
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    load_adapter_tensors(ours, stored, written)
    with torch.no_grad():
        assert (ours(tokens) - bare).abs().max() > 0.01  # the adapter does something
    assert_same_logits(ours, theirs, tokens, mask)


def test_what_the_engine_saves_is_read_by_peft_and_found_faultless(
    case, directory, tokens, tmp_path
):
    lora = LoRAConfig(rank=8, alpha=16, target_modules=TARGETS.get(case, "all-linear"))
    with make_engine(str(directory), lora=lora) as engine:
        moved(engine)
        save_lora_adapter(engine, tmp_path / "adapter")
        with torch.no_grad():
            ours = engine.model.eval()(tokens)
    bare = load_theirs(directory)
    with torch.no_grad():
        assert (bare(tokens).logits - ours).abs().max() > 0.01
        theirs = PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
        assert_close(ours, theirs(tokens).logits)
    base = BaseModel.from_config(json.loads((directory / "config.json").read_text()))
    assert base.linears is not None  # names and shapes are judged
    assert lint_adapter(tmp_path / "adapter", base=base) == []


@pytest.mark.dist
def test_two_ranks_compute_the_same(tmp_path):
    """Logits and adapter gradients of every case under FSDP2, recomputed in backward."""
    directories = [str(write_family(tmp_path / case, case)) for case in CASES]
    targets = [list(TARGETS.get(case, ALL)) for case in CASES]
    ranks = run_ranks(2, ranks_models.train_families, directories, targets, timeout=240)
    for index, directory in enumerate(directories):
        lora = ranks_models.adapter_on(targets[index])
        logits, grads = ranks_models.reference(directory, lora=lora)
        for results in ranks:
            torch.testing.assert_close(results[index]["logits"], logits, rtol=0, atol=1e-5)
            assert results[index]["grads"].keys() == grads.keys()
            for name, grad in grads.items():
                assert grad.abs().max() > 0, name
                torch.testing.assert_close(
                    results[index]["grads"][name], grad, rtol=1e-4, atol=1e-6
                )


def test_a_router_is_adapted_if_asked_and_read_by_peft(tokens, tmp_path):
    directory = write_family(tmp_path / "model", "qwen3-moe")
    lora = LoRAConfig(rank=8, alpha=16, target_modules=["gate", "q_proj"])
    with make_engine(str(directory), lora=lora) as engine:
        moved(engine)
        save_lora_adapter(engine, tmp_path / "adapter")
        routers = [n for n, _ in engine.model.named_parameters() if "router.gate.lora_" in n]
        assert len(routers) == 4
        with torch.no_grad():
            ours = engine.model.eval()(tokens)
    theirs = PeftModel.from_pretrained(load_theirs(directory), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(ours, theirs(tokens).logits)


@pytest.mark.parametrize("form", ["single", "stacked"])
def test_experts_in_either_form_are_read_and_merged_by_peft_and_read_back(form, tokens, tmp_path):
    directory = write_family(tmp_path / "model", "qwen3-moe")
    lora = LoRAConfig(rank=4, alpha=6)
    with make_engine(str(directory), lora=lora) as engine:
        moved(engine)
        save_lora_adapter(engine, tmp_path / "adapter", experts=form)
        with torch.no_grad():
            ours = engine.model.eval()(tokens)
        merged = fused_experts(
            engine.state_dict_adapter.to_hf(dict(iter_merged_weights(engine.model)))
        )
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any(".experts.base_layer." in key for key in keys) == (form == "stacked")
    theirs = PeftModel.from_pretrained(load_theirs(directory), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(ours, theirs(tokens).logits)
    whole = dict(theirs.merge_and_unload().named_parameters())
    assert sum(".experts." in name for name in merged) == 4
    for name, value in merged.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    with make_engine(str(directory), lora=lora) as engine:
        load_lora_adapter(engine, tmp_path / "adapter")
        with torch.no_grad():
            assert_close(engine.model.eval()(tokens), ours)
    base = BaseModel.from_config(json.loads((directory / "config.json").read_text()))
    engines = {finding.engine for finding in lint_adapter(tmp_path / "adapter", base=base)}
    assert engines == (set() if form == "single" else {"vllm", "sglang"})


@pytest.mark.dist
def test_experts_are_trained_and_saved_whole_by_two_ranks(tmp_path):
    """Without LoRA: transformers reads what two ranks saved, and computes the same."""
    directory = write_family(tmp_path / "model", "qwen3-moe")
    results = run_ranks(2, ranks_models.save_trained, str(directory), str(tmp_path / "saved"))
    theirs = load_theirs(tmp_path / "saved")
    tokens = ranks_models.tokens_for(VOCAB)
    with torch.no_grad():
        logits = theirs(tokens).logits
        before = load_theirs(directory)(tokens).logits
    assert (logits - before).abs().max() > 0.01
    for ours in results:
        assert_close(ours, logits)


def test_an_adapter_for_the_language_model_of_a_composite_is_read_by_peft(tokens, tmp_path):
    """Gemma 3 with images: the same text model, under ``model.language_model.``."""
    theirs = composite_gemma3()
    spec = get_model_spec("gemma3_text")
    config = spec.config_cls.from_hf(theirs.config.text_config.to_dict())
    adapter = spec.state_dict_adapter_cls(config, composite=True)
    ours = spec.model_cls(config).eval()
    text = {n: t for n, t in theirs.state_dict().items() if ".language_model." in n}
    ours.load_state_dict(adapter.from_hf({**text, "lm_head.weight": theirs.lm_head.weight}))
    assert adapter.to_hf(ours.state_dict()).keys() == text.keys()

    lora = LoRAConfig(rank=4, alpha=8)
    apply_lora(ours, lora, name_map=adapter.module_to_hf)
    with torch.no_grad():
        for index, (name, factor) in enumerate(get_adapter_state_dict(ours).items()):
            if "lora_b" in name:
                torch.manual_seed(index)
                factor.copy_(0.1 * torch.randn(factor.shape))
    saved = adapter.to_hf(get_adapter_state_dict(ours))
    assert all(n.startswith("base_model.model.model.language_model.layers.") for n in saved)
    save_file(saved, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    written = adapter.create_peft_adapter_config(lora, "base")
    # Written out: the vision part has a q_proj too.
    assert written["target_modules"] == sorted(ours.lora.matched.values())
    assert peft_export(ours)["peft_config"]["target_modules"] == written["target_modules"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with torch.no_grad():
        bare = theirs(tokens).logits
        adapted = PeftModel.from_pretrained(theirs, tmp_path).eval()(tokens).logits
        assert (adapted - bare).abs().max() > 0.01
        assert_close(ours(tokens), adapted)
