"""A tiny Qwen2 model directory with a character-level tokenizer, for demos and tests.

The directory is like one from a hub: transformers reads model and tokenizer from it. Nothing is
downloaded, and the same arguments write the same bytes.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from archon_lora.errors import ModelLoadError

from .hf_files import CONFIG, SINGLE
from .qwen2.config import Qwen2Config
from .qwen2.model import Qwen2Model
from .qwen2.state_dict_adapter import Qwen2StateDictAdapter

DEFAULT_VOCAB = string.digits + string.ascii_letters + " \n" + string.punctuation
"""Characters of the default tokenizer: printable ASCII and the newline."""

END = "<|endoftext|>"
"""Ends a text; also the padding token."""

MAX_POSITIONS = 1024
"""Longest sequence that the written configuration declares."""


def write_tiny_qwen2(
    directory: str | Path,
    *,
    vocab: str = DEFAULT_VOCAB,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    tie: bool = False,
    seed: int = 0,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    rope_theta: float = 10000.0,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Args:
        directory: made if absent; files of these names are overwritten.
        vocab: ASCII characters in the order of their ids; ``END`` follows them. The tokenizer has
            no unknown token, like Qwen2's: it leaves out characters that are not here.
        hidden: width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key/value heads.
        intermediate: feed-forward width.
        tie: the output head is the embedding.
        seed: of the weights.
        std: standard deviation of matrices and biases. The default is wider than usual (0.02), so
            that attention of an untrained model is not flat and a small adapter can move it.
        dtype: of the stored weights.
        rope_theta: base of the rotary frequencies.

    Returns:
        The directory.

    Raises:
        ModelLoadError: sizes that no Qwen2 model can have, or characters repeated or not ASCII.
    """
    if not vocab or len(set(vocab)) != len(vocab) or max(vocab) > "~":
        msg = f"vocab must be distinct ASCII characters, got {vocab!r}"
        raise ModelLoadError(msg)
    out = Path(directory)
    config = Qwen2Config(
        vocab_size=len(vocab) + 1,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=rope_theta,
        tie_word_embeddings=tie,
        max_position_embeddings=MAX_POSITIONS,
    )
    out.mkdir(parents=True, exist_ok=True)
    end = len(vocab)
    _write_json(
        out / CONFIG,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": end,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": std,
            "intermediate_size": intermediate,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": Qwen2Config.model_type,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "pad_token_id": end,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": rope_theta,
            "tie_word_embeddings": tie,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
    )
    _write_json(out / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    weights = Qwen2StateDictAdapter(config).to_hf(_random_weights(config, seed=seed, std=std))
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()},
        out / SINGLE,
        metadata={"format": "pt"},
    )
    _write_tokenizer(out, vocab)
    return out


def _random_weights(config: Qwen2Config, *, seed: int, std: float) -> dict[str, torch.Tensor]:
    """fp32 weights by Archon name; norms are near 1 and not exactly 1, as in a trained model."""
    with torch.device("meta"):
        model = Qwen2Model(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        is_norm = name.endswith("norm.weight")
        weights[name] = 1.0 + 0.1 * value if is_norm else std * value
    return weights


def _write_tokenizer(out: Path, vocab: str) -> None:
    """One token per character: Qwen2's byte-level pair encoding, without a single merge.

    The pipeline must be Qwen2's own (byte level), because transformers 5 builds it from the
    model's type and takes only vocabulary and merges from the file.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {_byte_level(character): index for index, character in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(out / "special_tokens_map.json", special)
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": MAX_POSITIONS,
            # Clean-up would eat spaces before punctuation, so that decoding is not exact.
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )


def _byte_level(character: str) -> str:
    """The letter that stands for an ASCII byte in byte-level vocabularies (GPT-2's table)."""
    return character if character > " " else chr(0x100 + ord(character))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with sorted keys and a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
