"""Norms of adapters and of their differences, against the dense matrices."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.shown_root import BASE, MODULES, RANK, RUN, adapter, export_of, publish

from ckpt.checksum import file_record
from ckpt.errors import CkptError, ConfigError, DamagedError
from ckpt.layout import ADAPTERS, new_attempt
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.publish import publish_version
from ckpt.service.pages.norms import adapter_distance, adapter_norms, place_of
from ckpt.source import MemorySource
from ckpt.storage import Storage, open_storage
from ckpt.versions import find_version


def quiet(_share: float) -> None: ...


def manifest(storage: Storage, name: str) -> VersionManifest:
    found = find_version(storage, name).manifest
    assert found is not None
    return found


def dense(layers: int, number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every module's update as it was published, in bfloat16."""
    tensors, modules = adapter(layers, 0.02 * (1 + number), seed)
    rounded = {name: tensor.bfloat16().double() for name, tensor in tensors.items()}
    return {m: rounded[f"{m}.lora_b.weight"] @ rounded[f"{m}.lora_a.weight"] for m in modules}


def test_norms_and_distances_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    names = [publish(storage, 1, 3), publish(storage, 4, 3, seed=7)]
    one, other = (manifest(storage, name) for name in names)
    first, second = dense(3, 1), dense(3, 4, seed=7)
    table = adapter_norms(storage, one, quiet)
    assert table.layers == (0, 1, 2)
    assert set(table.modules) == set(MODULES)
    assert table.modules[:4] == tuple(f"self_attn.{k}_proj" for k in "qkvo")
    for module, update in first.items():
        assert table.values[place_of(module)] == pytest.approx(float(update.norm()), rel=1e-9)
    whole = math.sqrt(sum(float(update.norm()) ** 2 for update in first.values()))
    assert table.total == pytest.approx(whole, rel=1e-9)
    assert table.largest == max(table.values.values())
    apart = adapter_distance(storage, one, other, quiet)
    for module, update in first.items():
        want = float((update - second[module]).norm())
        assert apart.values[place_of(module)] == pytest.approx(want, rel=1e-6)


def test_equal_versions_do_not_differ_and_small_changes_are_seen(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    same = [manifest(storage, publish(storage, 2, 1)) for _ in range(2)]
    assert adapter_distance(storage, *same, quiet).largest == 0.0
    tensors, modules = adapter(1, 0.06)
    tensors[f"{modules[0]}.lora_b.weight"][0, 0] *= 1 + 2**-6
    version = publish_version(
        storage,
        run=RUN,
        export=export_of(modules),
        source=MemorySource(tensors),
        step=None,
        policy_version=None,
        epoch=1,
        attempt=new_attempt(),
        base=BASE,
    )
    table = adapter_distance(storage, same[0], version, quiet)
    assert [key for key, value in table.values.items() if value > 0] == [place_of(modules[0])]


def test_experts_and_modules_outside_layers_have_their_places() -> None:
    assert place_of("model.layers.3.self_attn.q_proj") == ("self_attn.q_proj", 3)
    assert place_of("model.layers.3.mlp.experts.17.up_proj") == ("mlp.experts.*.up_proj", 3)
    assert place_of("lm_head") == ("lm_head", -1)


def with_config(storage: Storage, name: str, change: dict[str, Any]) -> VersionManifest:
    """The version with another configuration, as somebody who can compute checksums leaves it."""
    path = f"{ADAPTERS}/{name}/{CONFIG_NAME}"
    config = {**json.loads(storage.read(path)), **change}
    data = json.dumps(config).encode()
    storage.put(path, data)
    old = manifest_of(storage, name)
    files = tuple(
        file_record(CONFIG_NAME, [data]) if file.name == CONFIG_NAME else file for file in old.files
    )
    return replace(old, files=files)


def manifest_of(storage: Storage, name: str) -> VersionManifest:
    return VersionManifest.from_bytes(storage.read(f"{ADAPTERS}/{name}/MANIFEST.json"), name)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"alpha_pattern": {"(a+)+$": 3}}, ConfigError),
        ({"rank_pattern": {"q": 8}}, ConfigError),
        ({"r": 0}, DamagedError),
        ({"r": None}, DamagedError),
        ({"lora_alpha": "x"}, DamagedError),
        ({"lora_alpha": 1e400}, DamagedError),
    ],
)
def test_a_forged_configuration_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[CkptError]
) -> None:
    storage = open_storage(tmp_path)
    forged = with_config(storage, publish(storage, 1, 1), change)
    with pytest.raises(error):
        adapter_norms(storage, forged, quiet)


def test_bytes_that_do_not_verify_are_refused(tmp_path: Path) -> None:
    """Also far behind the header, in a block of their own."""
    storage = open_storage(tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_a.weight": torch.ones(RANK, 700_000),
        f"{module}.lora_b.weight": torch.ones(700_000, RANK),
    }
    whole = publish_version(
        storage,
        run=RUN,
        export=export_of([module]),
        source=MemorySource(tensors),
        step=None,
        policy_version=None,
        epoch=1,
        attempt=new_attempt(),
        base=BASE,
    )
    want = math.sqrt(RANK**2 * 700_000.0**2)
    assert adapter_norms(storage, whole, quiet).total == pytest.approx(want)
    path = f"{ADAPTERS}/{whole.name}/{WEIGHTS_NAME}"
    data = bytearray(storage.read(path))
    data[-3] ^= 4
    storage.put(path, bytes(data))
    with pytest.raises(DamagedError):
        adapter_norms(storage, whole, quiet)


@pytest.mark.parametrize(
    "header",
    [
        {"base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [2, 2]}},
        {
            "base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [5000, 1]},
            "base_model.model.x.lora_B.weight": {"dtype": "F32", "shape": [1, 5000]},
        },
        {
            "base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [2, 2]},
            "base_model.model.x.lora_B.weight": {"dtype": "F32", "shape": [2, 3]},
        },
        {
            "base_model.model.x.lora_A.weight": {"dtype": "I32", "shape": [2, 2]},
            "base_model.model.x.lora_B.weight": {"dtype": "I32", "shape": [2, 2]},
        },
        {"evil": {"dtype": "F32", "shape": [2, 2]}},
        {f"base_model.model.m{n}.lora_{s}.weight": {"dtype": "F32", "shape": [1, 1]}
         for n in range(70) for s in "AB"},
    ],
    ids=["half", "rank", "misfit", "integers", "key", "kinds"],
)  # fmt: skip
def test_forged_weights_are_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    """Nothing in a header makes the reader multiply what it has no memory for."""
    storage = open_storage(tmp_path)
    name = publish(storage, 1, 1)
    position = 0
    for entry in header.values():
        size = 4 * math.prod(entry["shape"])
        entry["data_offsets"] = [position, position + size]
        position += size
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(position)
    storage.put(f"{ADAPTERS}/{name}/{WEIGHTS_NAME}", data)
    old = manifest_of(storage, name)
    files = tuple(
        file_record(WEIGHTS_NAME, [data]) if file.name == WEIGHTS_NAME else file
        for file in old.files
    )
    with pytest.raises(CkptError):
        adapter_norms(storage, replace(old, files=files), quiet)


def test_the_work_can_be_given_up(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    one = manifest(storage, publish(storage, 1, 2))
    seen: list[float] = []

    def tick(share: float) -> None:
        seen.append(share)
        if share > 0.5:
            raise ConfigError("enough")

    with pytest.raises(ConfigError, match="enough"):
        adapter_norms(storage, one, tick)
    assert seen == sorted(seen)
    assert len(seen) < 2 * len(MODULES)
    assert RANK == 4
