"""What a stand-in engine answers: a distribution over tokens that adapters change.

Two kinds. The hashed one needs no model: its logits are drawn from the prompt's hash, and an
adapter's bytes draw what is added to them. The other is a real Qwen2 from a model directory, with
the adapter merged in fp32. Both take adapters as the engine takes them: see ``matched``.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VOCAB = 97
EFFECT = 0.7
"""Standard deviation of what an adapter adds to a hashed logit."""

_VLLM_KEY = re.compile(r"(base_model\.model\.)?model\.layers\.\d+\.")
_SGLANG_KEY = re.compile(r".*layers\.\d+\.")


@dataclass
class Adapter:
    """An adapter as an engine holds it in memory: config and raw tensors by key."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(repr=False)

    @classmethod
    def read(cls, directory: str | Path) -> Adapter:
        """Raises FileNotFoundError as an engine would."""
        config = json.loads((Path(directory) / "adapter_config.json").read_bytes())
        data = (Path(directory) / "adapter_model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = {
            key: (item["dtype"], tuple(item["shape"]), data[8 + length + start : 8 + length + end])
            for key, item in header.items()
            for start, end in [item["data_offsets"]]
        }
        return cls(config, tensors)

    def matched(self, kind: str) -> Adapter:
        """Without the tensors that the engine passes over in silence."""
        pattern = _VLLM_KEY if kind == "vllm" else _SGLANG_KEY
        kept = {key: value for key, value in self.tensors.items() if pattern.match(key)}
        return Adapter(self.config, kept)

    def half(self) -> Adapter:
        """The first half of the tensors: a load that was not finished."""
        keys = sorted(self.tensors)[: len(self.tensors) // 2]
        return Adapter(self.config, {key: self.tensors[key] for key in keys})

    @property
    def ends_sglang(self) -> bool:
        """Whether SGLang would end when it first used it: a rank that lies, or a half pair."""
        rank = self.config["r"]
        for key, (_, shape, _) in self.tensors.items():
            pair = key.replace("lora_A", "lora_?").replace("lora_B", "lora_?")
            both = all(pair.replace("?", side) in self.tensors for side in "AB")
            if not both or shape[0 if "lora_A" in key else 1] != rank:
                return True
        return False

    @cached_property
    def digest(self) -> bytes | None:
        """Of what changes an answer; None if nothing does."""
        if not any(any(raw) for key, (_, _, raw) in self.tensors.items() if "lora_B" in key):
            return None
        parts = hashlib.sha256(repr(self.config.get("lora_alpha")).encode())
        for key in sorted(self.tensors):
            parts.update(key.encode() + self.tensors[key][2])
        return parts.digest()


class Brain(Protocol):
    def logprobs(self, ids: list[int], adapter: Adapter | None) -> np.ndarray:
        """Log-probabilities of the token after each prefix, ``[len(ids), vocabulary]``."""
        ...


class HashBrain:
    """Needs no model."""

    def logprobs(self, ids: list[int], adapter: Adapter | None) -> np.ndarray:
        digest = None if adapter is None else adapter.digest
        rows = []
        for end in range(1, len(ids) + 1):
            prefix = repr(ids[:end]).encode()
            logits = _draw(prefix)
            if digest is not None:
                logits = logits + EFFECT * _draw(prefix + digest)
            rows.append(_log_softmax(logits))
        return np.stack(rows)


class ModelBrain:
    """A real Qwen2 in a HuggingFace directory."""

    def __init__(self, directory: str | Path) -> None:
        import torch
        from safetensors.torch import load_file

        from archon_lora.models import load_pretrained

        torch.set_num_threads(1)
        self._lock = threading.Lock()
        self._model, self._map = load_pretrained(directory)
        stored = load_file(Path(directory) / "model.safetensors")
        self._base = {key: value.float() for key, value in stored.items()}
        self._merged: tuple[Adapter | None, dict[str, Any]] = (None, self._archon(self._base))

    def logprobs(self, ids: list[int], adapter: Adapter | None) -> np.ndarray:
        import torch

        # functional_call puts the weights into the one module: requests take turns.
        with self._lock, torch.no_grad():
            if self._merged[0] is not adapter:
                self._merged = (adapter, self._archon(self._with(adapter)))
            logits = torch.func.functional_call(
                self._model, self._merged[1], (torch.tensor([ids]),)
            )
        return torch.log_softmax(logits[0].float(), -1).numpy()

    def _archon(self, weights: dict[str, Any]) -> dict[str, Any]:
        return self._map.from_hf(weights)

    def _with(self, adapter: Adapter | None) -> dict[str, Any]:
        import torch

        if adapter is None:
            return self._base
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        tensors = {
            key.removeprefix("base_model.model."): torch.frombuffer(
                bytearray(raw), dtype=dtypes[dtype]
            )
            .reshape(shape)
            .float()
            for key, (dtype, shape, raw) in adapter.tensors.items()
        }
        merged = dict(self._base)
        scale = adapter.config["lora_alpha"] / adapter.config["r"]
        for key, a in tensors.items():
            b = tensors.get(key.replace("lora_A", "lora_B"))
            name = key.replace(".lora_A.weight", ".weight")
            if "lora_A" in key and b is not None:
                merged[name] = merged[name] + scale * (b @ a)
        return merged


def make_brain(model: str | None) -> Brain:
    return HashBrain() if model is None else ModelBrain(model)


def prompt_logprobs(
    brain: Brain, ids: list[int], directory: str | Path | None, kind: str
) -> list[float]:
    """What a stand-in of that kind answers for a prompt, under an adapter or the base."""
    adapter = None if directory is None else Adapter.read(directory).matched(kind)
    rows = brain.logprobs(ids, adapter)
    return [float(rows[i][token]) for i, token in enumerate(ids[1:])]


def _draw(seed: bytes) -> np.ndarray:
    number = int.from_bytes(hashlib.sha256(seed).digest()[:8], "big")
    return np.random.default_rng(number).standard_normal(VOCAB)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
