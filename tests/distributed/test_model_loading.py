"""Loading real directories into FSDP2 models, and what the sharded models compute."""

from math import prod

import pytest
import torch
from support import ranks_models
from support.model_dirs import read_weights, split, write_weights
from support.spawn import run_ranks

from archon_lora.models import load_pretrained
from archon_lora.models.tiny import write_tiny_qwen2

pytestmark = pytest.mark.dist

# 9 vocabulary rows and 23 feed-forward rows: uneven on 2 ranks and on 4.
UNEVEN = {"vocab": "abcdefgh", "hidden": 16, "heads": 4, "kv_heads": 2, "intermediate": 23}
# One key/value head of 2 rows: half of 4 ranks hold no row of k_proj and v_proj.
EMPTY = {"vocab": "abcdefgh", "hidden": 8, "heads": 4, "kv_heads": 1, "intermediate": 23}


def assert_loaded(results, weights, dtype):
    for result in results:
        assert result["weights"].keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(result["weights"][name], tensor.to(dtype)), name


@pytest.mark.parametrize("tie", [False, True])
def test_two_ranks_read_each_byte_once(tmp_path, tie):
    directory = write_tiny_qwen2(tmp_path, tie=tie, dtype=torch.bfloat16, **UNEVEN)
    weights = read_weights(directory)
    split(directory)
    total = sum(tensor.nbytes for tensor in weights.values())
    results = run_ranks(2, ranks_models.load, str(directory), (2,), torch.float32)
    assert_loaded(results, weights, torch.float32)

    # Both ranks together read every byte once, and neither much more than half of them.
    assert sum(result["read"] for result in results) == total
    assert max(result["read"] for result in results) < 0.55 * total
    for result in results:
        assert result["reported"] == result["read"] == 2 * sum(result["held"].values())
        assert len(result["blocks"]) == len(weights)
        for name, bounds, size in result["blocks"]:
            assert size == 2 * prod(stop - start for start, stop in bounds)
            assert bounds[0][1] - bounds[0][0] == result["rows"][name]
    # The two blocks of a tensor meet at a row and leave nothing out.
    for (name, first, _), (same, second, _) in zip(*(r["blocks"] for r in results), strict=True):
        assert name == same
        rows = weights[name].shape[0]
        assert (first[0][0], first[0][1], second[0][1]) == (0, second[0][0], rows)


@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["fsdp4", "hsdp2x2"])
def test_four_ranks_uneven_and_empty_shards(tmp_path, mesh):
    directory = write_tiny_qwen2(tmp_path, **EMPTY)
    weights = read_weights(directory)
    total = sum(tensor.nbytes for tensor in weights.values())
    results = run_ranks(4, ranks_models.load, str(directory), mesh, torch.bfloat16)
    assert_loaded(results, weights, torch.bfloat16)
    replicas = 4 // mesh[-1]
    assert sum(result["read"] for result in results) == replicas * total
    empty = [sum(held == 0 for held in result["held"].values()) for result in results]
    assert (max(empty) > 0) == (mesh == (4,))
    for result in results:
        # A rank that holds nothing of a tensor does not open it.
        assert len(result["blocks"]) == sum(held > 0 for held in result["held"].values())


def test_misfit_is_told_on_every_rank_before_anything_is_touched(tmp_path):
    directory = write_tiny_qwen2(tmp_path, **UNEVEN)
    weights = read_weights(directory)
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(16, 23)
    write_weights(directory, weights)
    first, second = run_ranks(2, ranks_models.load_broken, str(directory))
    assert first == second
    message, untouched = first
    assert untouched
    assert "missing: model.norm.weight" in message
    assert "wrong shape: model.layers.0.mlp.up_proj.weight is (16, 23)" in message


def test_sharded_model_computes_the_same(tmp_path):
    """Logits and gradients, plain and adapted, with recomputation and compilation."""
    directory = write_tiny_qwen2(tmp_path, **UNEVEN)
    cases = [
        {},
        {"lora": True},
        {"lora": True, "activation_checkpointing": True},
        {"lora": True, "compile": True, "compile_backend": "aot_eager"},
        {
            "lora": True,
            "activation_checkpointing": True,
            "compile": True,
            "compile_backend": "aot_eager",
            "reshard_after_forward": False,
        },
    ]
    ranks = run_ranks(2, ranks_models.train_step, str(directory), cases, timeout=240)
    for rank, results in enumerate(ranks):
        for case, result in zip(cases, results, strict=True):
            lora = case.get("lora", False)
            logits, grads = ranks_models.reference(str(directory), lora=lora)
            torch.testing.assert_close(result["logits"], logits, rtol=0, atol=1e-5)
            assert result["grads"].keys() == grads.keys()
            for name, grad in grads.items():
                assert grad.abs().max() > 0, name
                torch.testing.assert_close(result["grads"][name], grad, rtol=1e-4, atol=1e-6)
            # Nothing that prepares a model shows in a name.
            assert result["names"] == results[int(lora)]["names"]
            assert result["state"] == result["names"]
            if case.get("compile"):
                assert result["graphs"] > 0
            else:
                assert result["graphs"] == 0
                assert result["forwards"] == 1 + case.get("activation_checkpointing", False)
            if lora:
                assert set(grads) == {name for name in result["names"] if ".lora_" in name}
                # Split on the input dimension, but for the one that does not divide: 23 columns.
                odd = {f"layers.{i}.feed_forward.w2.lora_a.weight" for i in range(2)}
                assert result["empty"] == (odd if rank == 1 else set())


def test_tied_model_and_bf16_computation(tmp_path):
    directory = write_tiny_qwen2(tmp_path, tie=True, **UNEVEN)
    cases = [{}, {"lora": True, "param_dtype": torch.bfloat16}]
    for plain, low in run_ranks(2, ranks_models.train_step, str(directory), cases):
        logits, grads = ranks_models.reference(str(directory), lora=False)
        torch.testing.assert_close(plain["logits"], logits, rtol=0, atol=1e-5)
        # The embedding gets its gradient from both ends.
        name = "tok_embeddings.weight"
        torch.testing.assert_close(plain["grads"][name], grads[name], rtol=1e-4, atol=1e-6)
        assert "output.weight" not in plain["state"]

        logits, _ = ranks_models.reference(str(directory), lora=True)
        assert low["logits"].dtype == torch.bfloat16
        assert low["dtypes"] == {"torch.float32"}
        torch.testing.assert_close(low["logits"].float(), logits, rtol=0, atol=0.05)
        assert {str(grad.dtype) for grad in low["grads"].values()} == {"torch.float32"}


def test_plain_model_is_read_whole(tmp_path):
    directory = write_tiny_qwen2(tmp_path, **UNEVEN)
    total = sum(tensor.nbytes for tensor in read_weights(directory).values())
    with ranks_models.logged_reads() as log:
        load_pretrained(directory)
    assert log.total == total
