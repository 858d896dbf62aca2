"""Consolidation: the same bytes from any sharding, bounded reads, nothing wrong let through."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from support.steps import pieces, tiny_adapter, write_step
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt import consolidate as consolidate_module
from ckpt.adapter_plan import AdapterPlans, plan_adapter
from ckpt.catalog import find_step
from ckpt.consolidate import consolidate, export_tensors, stream_adapter
from ckpt.dtypes import dtype_code
from ckpt.errors import (
    AlreadyExists,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    NonFiniteError,
    StateError,
)
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ckpt.source import MemorySource, StepSource
from ckpt.storage import open_storage
from ckpt.types import BLOCK_BYTES, AdapterExport, Chunk, TensorRecord, TensorRule

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class PiecesSource:
    """Tensors in memory, one 'file' for every piece; remembers how much was asked for at once."""

    def __init__(self, parts: Mapping[str, list[tuple[tuple[int, ...], torch.Tensor]]]) -> None:
        self.files: dict[str, bytes] = {}
        self.largest_read = 0
        records = {}
        for name, chunks in parts.items():
            found = []
            for index, (offsets, piece) in enumerate(chunks):
                file = f"{name}#{index}"
                data = piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                self.files[file] = b"head" + data
                found.append(Chunk(offsets, tuple(piece.shape), file, 4, 4 + len(data)))
            shape = tuple(
                max(offsets[d] + piece.shape[d] for offsets, piece in chunks)
                for d in range(chunks[0][1].dim())
            )
            records[name] = TensorRecord(name, dtype_code(piece.dtype), shape, tuple(found))
        self.records = records

    def read(self, file: str, start: int, end: int) -> bytes:
        self.largest_read = max(self.largest_read, end - start)
        return self.files[file][start:end]


def whole(tensors: Mapping[str, torch.Tensor]) -> PiecesSource:
    return PiecesSource({name: [((0,) * t.dim(), t)] for name, t in tensors.items()})


def result(export: AdapterExport, source: Any, dtype: str = "bfloat16") -> bytes:
    plan = plan_adapter(export, source.records, dtype)
    data = b"".join(stream_adapter(plan, source))
    assert len(data) == plan.size
    return data


def expected(
    export: AdapterExport, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bytes:
    """The file as the safetensors library writes it, from whole tensors in plain torch."""
    out = {}
    for rule in export.rules:
        value = tensors[f"model.{rule.source}"].float()
        if rule.index is not None:
            value = value[rule.index]
        value = value * rule.scale
        if rule.pad_dim is not None:
            shape = list(value.shape)
            shape[rule.pad_dim] = rule.pad_to - shape[rule.pad_dim]
            value = torch.cat([value, torch.zeros(shape)], dim=rule.pad_dim)
        out[rule.key] = value.to(dtype)
    return save(out, metadata={"format": "pt"})


def expert_adapter(experts: int = 3) -> tuple[dict[str, torch.Tensor], AdapterExport]:
    """Grouped experts with 3-d factors: one PEFT tensor for every expert."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "model.experts.lora_a.weight": torch.randn(experts, 4, 6, generator=generator),
        "model.experts.lora_b.weight": torch.randn(experts, 8, 4, generator=generator),
    }
    rules = tuple(
        TensorRule(
            f"experts.lora_{side}.weight",
            f"base_model.model.model.experts.{index}.up.lora_{side.upper()}.weight",
            scale=0.3 if side == "b" else 1.0,
            pad_dim=0 if side == "a" else 1,
            pad_to=8,
            index=index,
        )
        for index in range(experts)
        for side in "ab"
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up"]}
    return tensors, AdapterExport(config, rules)


class TestBytes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_file_is_the_safetensors_library_s(self, dtype: str) -> None:
        tensors, export = tiny_adapter(scale=1.7)
        assert result(export, whole(tensors), dtype) == expected(export, tensors, DTYPES[dtype])

    @pytest.mark.parametrize("source_dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_stored_dtypes(self, source_dtype: torch.dtype) -> None:
        tensors, export = tiny_adapter(optimizer=False)
        stored = {name: tensor.to(source_dtype) for name, tensor in tensors.items()}
        assert result(export, whole(stored)) == expected(export, stored, torch.bfloat16)

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_any_number_of_ranks_gives_the_same_bytes(
        self, tmp_path: Path, world: int, dim: int
    ) -> None:
        tensors, export = tiny_adapter(rank=4, scale=1.3)
        write_step(open_storage(tmp_path / "root"), 7, tensors, world=world, dim=dim, export=export)
        done = consolidate(tmp_path / "root", 7, tmp_path / "out", dtype="bfloat16")
        data = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
        assert data == expected(export, tensors, torch.bfloat16)
        assert done.step == 7
        assert len(done.written.sha256) == 64
        assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes()) == export.peft_config

    @pytest.mark.parametrize("dim", [0, 1, 2])
    @pytest.mark.parametrize("world", [1, 3])
    def test_experts_are_sliced_and_padded(self, world: int, dim: int) -> None:
        tensors, export = expert_adapter()
        source = PiecesSource(
            {
                name: [(offsets, piece) for _rank, offsets, piece in pieces(tensor, world, dim)]
                for name, tensor in tensors.items()
            }
        )
        assert result(export, source) == expected(export, tensors, torch.bfloat16)

    def test_gathered_tensors_give_the_bytes_of_the_checkpoint(self, tmp_path: Path) -> None:
        tensors, export = tiny_adapter()
        write_step(open_storage(tmp_path / "root"), 1, tensors, world=2, export=export)
        consolidate(tmp_path / "root", None, tmp_path / "a")
        full = {
            name.removeprefix("model."): tensor.t().contiguous().t()  # not contiguous
            for name, tensor in tensors.items()
            if name.startswith("model.")
        }
        export_tensors(full, export, tmp_path / "b")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_grid_of_chunks_and_any_piece_size(self, data: st.DataObject) -> None:
        tensors, export = tiny_adapter(("layers.0.wq",), rank=5, optimizer=False)
        parts = {}
        for name, tensor in tensors.items():
            cuts = [
                [0, *sorted(data.draw(st.sets(st.integers(1, extent - 1), max_size=3))), extent]
                for extent in tensor.shape
            ]
            parts[name] = data.draw(
                st.permutations(
                    [
                        ((r0, c0), tensor[r0:r1, c0:c1])
                        for r0, r1 in zip(cuts[0], cuts[0][1:], strict=False)
                        for c0, c1 in zip(cuts[1], cuts[1][1:], strict=False)
                    ]
                )
            )
        with pytest.MonkeyPatch.context() as patch:
            piece = data.draw(st.sampled_from([1, 100, 1 << 20]))
            patch.setattr(consolidate_module, "PIECE_BYTES", piece)
            got = result(export, PiecesSource(parts))
        assert got == expected(export, tensors, torch.bfloat16)


class TestMemory:
    def test_a_large_tensor_goes_through_in_blocks_of_rows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors, export = tiny_adapter(optimizer=False)
        big = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1))
        tensors["model.layers.0.wq.lora_b.weight"] = big
        monkeypatch.setattr(consolidate_module, "PIECE_BYTES", 4096)
        source = whole(tensors)
        plan = plan_adapter(export, source.records, "float32")
        sizes = [len(piece) for piece in stream_adapter(plan, source)]
        assert source.largest_read <= 4096
        assert max(sizes[1:]) <= 4096
        assert sum(sizes) == plan.size
        assert result(export, source, "float32") == expected(export, tensors, torch.float32)

    def test_yielded_buffers_may_be_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors, export = tiny_adapter()
        monkeypatch.setattr(consolidate_module, "PIECE_BYTES", 64)
        plan = plan_adapter(export, (source := whole(tensors)).records)
        kept = list(stream_adapter(plan, source))
        assert b"".join(kept) == expected(export, tensors, torch.bfloat16)


class TestStepSource:
    def big_step(self, tmp_path: Path) -> tuple[StepSource, torch.Tensor, Any]:
        tensors, export = tiny_adapter(optimizer=False)
        big = torch.arange(3 * BLOCK_BYTES // 4, dtype=torch.float32).view(-1, 4)
        tensors["model.layers.0.wq.lora_b.weight"] = big
        storage = open_storage(tmp_path)
        manifest = write_step(storage, 1, tensors, export=export)
        return StepSource(storage, "steps/step-00000001.w0001", manifest), big, manifest

    def test_ranges_across_blocks(self, tmp_path: Path) -> None:
        source, big, _manifest = self.big_step(tmp_path)
        chunk = source.records["model.layers.0.wq.lora_b.weight"].chunks[0]
        raw = big.view(-1).view(torch.uint8)
        for start, end in [
            (0, 1),
            (BLOCK_BYTES - 200, BLOCK_BYTES + 999),
            (5, 2 * BLOCK_BYTES + 7),
        ]:
            got = source.read(chunk.file, chunk.start + start, chunk.start + end)
            assert bytes(got) == raw[start:end].numpy().tobytes()
        assert bytes(source.read(chunk.file, 5, 5)) == b""

    def test_the_cache_is_bounded_and_read_again_blocks_are_verified_again(
        self, tmp_path: Path
    ) -> None:
        _source, _big, manifest = self.big_step(tmp_path)
        storage = open_storage(tmp_path)
        path = tmp_path / "steps/step-00000001.w0001"
        source = StepSource(storage, "steps/step-00000001.w0001", manifest, cache_bytes=BLOCK_BYTES)
        file = "shard-00000-of-00001.safetensors"
        source.read(file, 0, 3 * BLOCK_BYTES)
        assert len(source._blocks) == 1
        damaged = bytearray((path / file).read_bytes())
        damaged[10] ^= 1
        (path / file).write_bytes(damaged)
        with pytest.raises(DamagedError, match=f"{file}: bytes 0 to {BLOCK_BYTES} are damaged"):
            source.read(file, 0, 8)

    def test_unknown_files_and_ranges(self, tmp_path: Path) -> None:
        source, _big, _manifest = self.big_step(tmp_path)
        with pytest.raises(DamagedError, match="is no file of the manifest"):
            source.read("other.safetensors", 0, 1)
        with pytest.raises(DamagedError, match="lie outside"):
            source.read("shard-00000-of-00001.safetensors", 0, 1 << 40)


class TestRefusals:
    def test_unknown_source(self) -> None:
        tensors, export = tiny_adapter()
        del tensors["model.layers.0.wo.lora_a.weight"]
        with pytest.raises(StateError, match=r"wo\.lora_A.*'layers\.0\.wo\.lora_a\.weight', which"):
            plan_adapter(export, whole(tensors).records)

    def test_a_trained_tensor_without_a_rule(self) -> None:
        tensors, export = tiny_adapter()
        tensors["model.layers.1.wq.lora_a.weight"] = torch.ones(4, 12)
        with pytest.raises(StateError, match=r"'layers\.1\.wq\.lora_a\.weight' is trained but no"):
            plan_adapter(export, whole(tensors).records)

    def test_counters_and_masks_need_no_rule(self) -> None:
        tensors, export = tiny_adapter()
        before = result(export, whole(tensors))
        tensors["model.layers.0.wq.seen"] = torch.tensor([3])
        tensors["model.layers.0.wq.mask"] = torch.tensor([True])
        assert result(export, whole(tensors)) == before

    def test_an_expert_without_a_rule(self) -> None:
        tensors, export = expert_adapter()
        rules = tuple(rule for rule in export.rules if rule.index != 1)
        with pytest.raises(StateError, match=r"slice 1 of 'experts\.lora_a\.weight' has no"):
            plan_adapter(replace(export, rules=rules), whole(tensors).records)

    def test_a_rank_that_lies(self) -> None:
        tensors, export = tiny_adapter(rank=4)
        lying = replace(export, peft_config={**export.peft_config, "r": 8})
        with pytest.raises(StateError, match=r"has rank 4, but its configuration says 8"):
            plan_adapter(lying, whole(tensors).records)
        patterned = replace(export, peft_config={**lying.peft_config, "rank_pattern": {"w.": 4}})
        plan_adapter(patterned, whole(tensors).records)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"index": 0}, "shape .*; want a matrix"),
            ({"pad_dim": 5, "pad_to": 9}, "pads dimension 5 to 9"),
            ({"pad_dim": 0, "pad_to": 2}, "pads dimension 0 to 2"),
        ],
    )
    def test_rules_that_do_not_fit_the_tensor(self, change: dict[str, int], message: str) -> None:
        tensors, export = tiny_adapter()
        rules = (replace(export.rules[0], **change), *export.rules[1:])
        with pytest.raises(StateError, match=message):
            plan_adapter(replace(export, rules=rules), whole(tensors).records)

    def test_an_expert_that_is_not_there(self) -> None:
        tensors, export = expert_adapter()
        rules = (replace(export.rules[0], index=3), *export.rules[1:])
        with pytest.raises(StateError, match=r"takes slice 3 of dimension 0 of"):
            plan_adapter(replace(export, rules=rules), whole(tensors).records)

    def test_integers_are_no_weights(self) -> None:
        tensors, export = tiny_adapter()
        name = "model.layers.0.wq.lora_a.weight"
        tensors[name] = tensors[name].to(torch.int32)
        with pytest.raises(StateError, match="has dtype I32; an adapter tensor must be floating"):
            plan_adapter(export, whole(tensors).records)

    def test_dtype(self) -> None:
        tensors, export = tiny_adapter()
        with pytest.raises(ConfigError, match="one of bfloat16, float16, float32, got 'int8'"):
            plan_adapter(export, whole(tensors).records, "int8")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda chunks: chunks[:1],
                "wq.lora_a.weight': the chunks leave a gap",
            ),
            (lambda chunks: (*chunks, chunks[0]), "the chunks overlap"),
            (lambda chunks: (replace(chunks[0], end=50), chunks[1]), r"\[4, 50\).* want 96 bytes"),
            (lambda chunks: (replace(chunks[0], start=-1), chunks[1]), "want 96 bytes"),
            (lambda chunks: (replace(chunks[0], offsets=(3, 0)), chunks[1]), "leaves the shape"),
        ],
    )
    def test_chunks_that_do_not_tile(self, change: Any, message: str) -> None:
        tensors, export = tiny_adapter()
        source = PiecesSource(
            {name: [(o, p) for _r, o, p in pieces(t, 2, 0)] for name, t in tensors.items()}
        )
        name = "model.layers.0.wq.lora_a.weight"
        record = source.records[name]
        records = {**source.records, name: replace(record, chunks=change(record.chunks))}
        with pytest.raises(DamagedError, match=message):
            plan_adapter(export, records)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_not_finite_is_named(self, value: float, dtype: str) -> None:
        tensors, export = tiny_adapter()
        tensors["model.layers.0.wo.lora_b.weight"][3, 1] = value
        source = whole(tensors)
        with pytest.raises(NonFiniteError) as caught:
            result(export, source, dtype)
        message = str(caught.value)
        assert "base_model.model.model.layers.0.wo.lora_B.weight" in message
        assert "'layers.0.wo.lora_b.weight'" in message
        assert "1 NaN or infinite" in message

    def test_a_value_that_float16_cannot_hold(self) -> None:
        tensors, export = tiny_adapter()
        tensors["model.layers.0.wo.lora_b.weight"][3, 1] = 40000.0  # doubled by the rule's scale
        with pytest.raises(NonFiniteError, match=r"does not fit torch\.float16: .*65504"):
            result(export, whole(tensors), "float16")
        result(export, whole(tensors), "bfloat16")

    def test_optimizer_tensors_are_not_looked_at(self) -> None:
        tensors, export = tiny_adapter()
        tensors["optim.layers.0.wo.lora_b.weight.exp_avg"][:] = float("nan")
        result(export, whole(tensors))

    def test_short_reads(self) -> None:
        tensors, export = tiny_adapter()
        source = whole(tensors)
        source.files = {name: data[:-1] for name, data in source.files.items()}
        with pytest.raises(DamagedError, match=r"gave 191 bytes for \[4, 196\), want 192"):
            result(export, source)

    def test_a_dtensor_s_shard_is_never_taken_for_the_whole(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = init_device_mesh("cpu", (2,))
            sharded = distribute_tensor(torch.ones(4, 12), mesh, [Shard(0)])
            with pytest.raises(StateError, match="is a DTensor; gather it"):
                MemorySource({"layers.0.wq.lora_a.weight": sharded})
        finally:
            dist.destroy_process_group()


class TestConsolidate:
    def root(self, tmp_path: Path) -> tuple[Path, AdapterExport]:
        tensors, export = tiny_adapter()
        storage = open_storage(tmp_path / "root")
        for step in (1, 2):
            write_step(storage, step, tensors, world=2, export=export)
            tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        return tmp_path / "root", export

    def test_the_newest_step_by_default(self, tmp_path: Path) -> None:
        root, _export = self.root(tmp_path)
        assert consolidate(root, None, tmp_path / "new").step == 2
        assert consolidate(str(root), 1, f"file://{tmp_path}/old").step == 1
        key = "base_model.model.model.layers.0.wq.lora_A.weight"
        old, new = (load_file(tmp_path / name / WEIGHTS_NAME)[key] for name in ("old", "new"))
        assert torch.allclose(new.float(), old.float() + 1, atol=0.02)

    def test_a_flipped_bit_is_an_error_and_nothing_is_left(self, tmp_path: Path) -> None:
        root, _export = self.root(tmp_path)
        storage = open_storage(root)
        entry = find_step(storage, 2)
        shard = root / entry.path / "shard-00001-of-00002.safetensors"
        data = bytearray(shard.read_bytes())
        data[-3] ^= 0x10
        shard.write_bytes(data)
        with pytest.raises(DamagedError, match="shard-00001-of-00002"):
            consolidate(root, 2, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]

    def test_not_finite_leaves_nothing(self, tmp_path: Path) -> None:
        tensors, export = tiny_adapter()
        tensors["model.layers.0.wq.lora_b.weight"][0, 0] = float("nan")
        write_step(open_storage(tmp_path / "root"), 1, tensors, export=export)
        with pytest.raises(NonFiniteError):
            consolidate(tmp_path / "root", 1, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]

    def test_an_existing_output_is_kept_unless_told(self, tmp_path: Path) -> None:
        root, _export = self.root(tmp_path)
        consolidate(root, 1, tmp_path / "out")
        before = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
        with pytest.raises(AlreadyExists, match="out exists"):
            consolidate(root, 2, tmp_path / "out")
        assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == before
        consolidate(root, 2, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() != before

    def test_a_step_without_an_adapter(self, tmp_path: Path) -> None:
        tensors, _export = tiny_adapter()
        write_step(open_storage(tmp_path / "root"), 1, tensors)
        with pytest.raises(NoCheckpoint, match="has no adapter export"):
            consolidate(tmp_path / "root", 1, tmp_path / "out")
        with pytest.raises(NoCheckpoint, match="no step 4"):
            consolidate(tmp_path / "root", 4, tmp_path / "out")

    def test_between_stores_that_cannot_rename(self, tmp_path: Path) -> None:
        tensors, export = tiny_adapter()
        remote = f"memory://{tmp_path.name}"
        write_step(open_storage(f"{remote}/root"), 3, tensors, world=2, export=export)
        consolidate(f"{remote}/root", None, tmp_path / "out")
        consolidate(f"{remote}/root", 3, f"{remote}/out")
        with pytest.raises(AlreadyExists):
            consolidate(f"{remote}/root", 3, f"{remote}/out")
        consolidate(f"{remote}/root", 3, f"{remote}/out", overwrite=True)
        store = open_storage(f"{remote}/out")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            assert store.read(name) == (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == expected(
            export, tensors, torch.bfloat16
        )
        assert [entry.name for entry in store.list("")] == [CONFIG_NAME, WEIGHTS_NAME]

    @pytest.mark.s3
    def test_local_to_s3_and_back(self, tmp_path: Path, s3: Any) -> None:
        root, export = self.root(tmp_path)
        out, options = s3.url("export"), s3.storage_options
        consolidate(root, 2, out, out_storage_options=options)
        consolidate(root, 2, tmp_path / "out")
        store = open_storage(out, options)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            assert store.read(name) == (tmp_path / "out" / name).read_bytes()
        far = s3.url("root")
        tensors, export = tiny_adapter(seed=3)
        write_step(open_storage(far, options), 9, tensors, world=4, export=export)
        consolidate(far, None, tmp_path / "back", storage_options=options, dtype="float32")
        assert read_adapter(tmp_path / "back")[0] == export.peft_config
        data = (tmp_path / "back" / WEIGHTS_NAME).read_bytes()
        assert data == expected(export, tensors, torch.float32)

    @pytest.mark.s3
    def test_a_failed_export_to_s3_leaves_nothing(self, s3: Any, tmp_path: Path) -> None:
        tensors, export = tiny_adapter()
        tensors["model.layers.0.wq.lora_b.weight"][0, 0] = float("nan")
        write_step(open_storage(tmp_path / "root"), 1, tensors, export=export)
        out = s3.url("export")
        with pytest.raises(NonFiniteError):
            consolidate(tmp_path / "root", 1, out, out_storage_options=s3.storage_options)
        assert open_storage(out, s3.storage_options).list("") == []


class WritableSource(PiecesSource):
    """The same in memory that may be written to, as an arena slot's is."""

    def read(self, file: str, start: int, end: int) -> memoryview:
        self.files[file] = bytearray(self.files[file])
        return memoryview(self.files[file])[start:end]


class TestWithoutACopy:
    @pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("wanted", DTYPES)
    def test_memory_of_the_source_gives_the_same_bytes(self, stored, wanted: str) -> None:
        tensors, export = tiny_adapter()
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
        parts = {name: [((0,) * t.dim(), t)] for name, t in tensors.items()}
        found = result(export, WritableSource(parts), wanted)
        assert found == result(export, PiecesSource(parts), wanted)
        assert found == expected(export, tensors, DTYPES[wanted])

    def test_bytes_that_stay_as_they_are_are_not_copied(self) -> None:
        tensors, export = tiny_adapter(optimizer=False)
        export = replace(export, rules=tuple(replace(r, scale=1.0) for r in export.rules))
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        source = MemorySource({n.removeprefix("model."): t for n, t in tensors.items()})
        plan = plan_adapter(export, source.records, "bfloat16")
        _header, *chunks = stream_adapter(plan, source)
        for chunk, planned in zip(chunks, plan.tensors, strict=True):
            (stored,) = planned.record.chunks
            origin = source.read(stored.file, stored.start, stored.end)
            before = bytes(origin[:1])
            chunk[0] ^= 1
            assert bytes(origin[:1]) != before

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bytes_that_stay_as_they_are_are_checked_all_the_same(self, value: float) -> None:
        tensors, export = tiny_adapter(optimizer=False)
        export = replace(export, rules=tuple(replace(r, scale=1.0) for r in export.rules))
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        next(iter(tensors.values())).view(-1)[-1] = value
        source = MemorySource({n.removeprefix("model."): t for n, t in tensors.items()})
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            result(export, source)


class TestPlansAreRemembered:
    def test_until_anything_they_follow_from_changes(self) -> None:
        tensors, export = tiny_adapter()
        records = dict(whole(tensors).records)
        plans = AdapterPlans()
        first = plans.plan(export, records, "bfloat16")
        assert first == plan_adapter(export, records, "bfloat16")
        again = replace(export, peft_config=dict(export.peft_config))
        assert plans.plan(again, dict(records), "bfloat16") is first
        assert plans.plan(export, records, "float32").dtype == "float32"
        rules = tuple(replace(rule, scale=rule.scale * 2) for rule in export.rules)
        scaled = plans.plan(replace(export, rules=rules), records, "float32")
        assert {tensor.rule for tensor in scaled.tensors} == set(rules)
        moved = {
            name: replace(
                record,
                chunks=tuple(
                    replace(chunk, file="elsewhere", start=chunk.start + 64, end=chunk.end + 64)
                    for chunk in record.chunks
                ),
            )
            for name, record in records.items()
        }
        plans.plan(export, records, "bfloat16")
        found = plans.plan(export, moved, "bfloat16")
        assert {c.file for t in found.tensors for c in t.record.chunks} == {"elsewhere"}

    def test_a_configuration_that_is_changed_in_place_is_checked_again(self) -> None:
        tensors, export = tiny_adapter()
        records = whole(tensors).records
        config = dict(export.peft_config)
        changing = replace(export, peft_config=config)
        plans = AdapterPlans()
        plans.plan(changing, records, "bfloat16")
        config["r"] += 1
        with pytest.raises(StateError, match="configuration says"):
            plans.plan(changing, records, "bfloat16")
