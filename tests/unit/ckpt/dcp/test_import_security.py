"""A foreign checkpoint is read without running what it names."""

from __future__ import annotations

import contextlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import stock
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ckpt.dcp.importing import import_checkpoint
from ckpt.dcp.stock import StockCheckpoint
from ckpt.dcp.stock_pickle import StockRecord, read_pickle
from ckpt.errors import CkptError, DamagedError, StateError
from ckpt.storage import open_storage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sd = stock.state_dict(*stock.model_and_optimizer())
    return stock.save({**sd, "note": "text"}, tmp_path / "stock")


def refuse(
    source: Path, marker: Path, match: str, error: type[CkptError] = StateError
) -> CkptError:
    root = source.parent / "root"
    with pytest.raises(error, match=match) as caught:
        import_checkpoint(str(source), str(root))
    assert not marker.exists()
    assert not list(root.rglob("MANIFEST.json"))
    return caught.value


def test_the_marker_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(stock.Touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_metadata_that_runs_a_command(source: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (source / ".metadata").write_bytes(pickle.dumps(stock.Touch(marker)))
    refuse(source, marker, r"names (posix|nt)\.mkdir.*nothing was imported or run")


@pytest.mark.parametrize("where", ["planner_data", "storage_meta", "storage_data", "version"])
def test_metadata_that_hides_it(source: Path, tmp_path: Path, where: str) -> None:
    marker = tmp_path / "ran"
    stock.change_metadata(source, lambda md: setattr(md, where, {"a": [stock.Touch(marker)]}))
    refuse(source, marker, r"names (posix|nt)\.mkdir")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("torch", "_C"),
        ("torch", "os"),
        ("torch.hub", "load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("collections", "OrderedDict"),
        ("no_such_module_anywhere", "x"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_names_that_are_refused(module: str, name: str, protocol: int) -> None:
    if protocol == 0:
        data = f"c{module}\n{name}\n.".encode()
    else:
        parts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
        data = b"\x80\x04" + b"".join(parts) + b"\x93."
    with pytest.raises(StateError, match=f"names {module}.{name},"):
        read_pickle(data, "x")


def test_what_a_pickle_does_to_a_stand_in_ends_with_the_read() -> None:
    # BUILD gives the named object attributes: the second half of the state (None, {...}).
    attack = b"ctorch\nSize\n(N(dS'poison'\nI1\nstb."
    assert read_pickle(attack, "x").poison == 1
    assert not hasattr(read_pickle(b"ctorch\nSize\n.", "x"), "poison")
    module = b"torch.distributed.checkpoint.metadata"
    with pytest.raises(DamagedError):
        read_pickle(b"c" + module + b"\nMetadata\n(N(dS'get'\nI0\nstb.", "x")
    found = read_pickle(pickle.dumps(Metadata({})), "x")
    assert isinstance(found, StockRecord)
    assert found.get("state_dict_metadata") == {}


def test_a_table_of_four_thousand_million_entries() -> None:
    data = b"\x80\x04Nr" + struct.pack("<I", 2**32 - 2) + b"."
    with pytest.raises(DamagedError, match="table of 4294967294 entries"):
        read_pickle(data, "x")


def test_an_entry_that_runs_a_command(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    sd = stock.state_dict(*stock.model_and_optimizer())
    source = stock.save({**sd, "evil": stock.Touch(marker)}, tmp_path / "stock")
    error = refuse(source, marker, r"'evil' holds a (posix|nt)\.mkdir, .*--skip evil")
    assert "weights_only" not in str(error)
    assert "\n" not in str(error)


def test_a_tensor_that_runs_a_command(source: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = source / "evil.distcp"
    torch.save(stock.Touch(marker), evil)

    def point(metadata: Any) -> None:
        info = metadata.storage_data[MetadataIndex("model.0.weight", torch.Size([0, 0]))]
        info.relative_path, info.offset, info.length = "evil.distcp", 0, evil.stat().st_size

    stock.change_metadata(source, point)
    refuse(source, marker, r"'model\.0\.weight' holds a (posix|nt)\.mkdir")


def set_path(path: str) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = path

    return change


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "", "a\x00b"])
def test_paths_that_leave_the_directory(source: Path, tmp_path: Path, path: str) -> None:
    stock.change_metadata(source, set_path(path))
    refuse(source, tmp_path / "ran", "the file", DamagedError)


def test_a_link_that_leaves_the_directory(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.distcp"
    (source / "__0_0.distcp").rename(outside)
    (source / "__0_0.distcp").symlink_to(outside)
    with pytest.raises(CkptError):
        import_checkpoint(str(source), str(tmp_path / "root"))


def damage_chunks(metadata: Any) -> None:
    metadata.state_dict_metadata["model.0.weight"].chunks[0].sizes = torch.Size([3, 3])


def damage_shape(metadata: Any) -> None:
    metadata.state_dict_metadata["model.0.weight"].size = torch.Size([2**40, 3])


def damage_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["model.0.weight"].properties.dtype = torch.float16


def damage_place(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.offset = 10**9


def lose_items(metadata: Any) -> None:
    metadata.storage_data.clear()


def negative(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length = -5


@pytest.mark.parametrize(
    "change", [damage_chunks, damage_shape, damage_dtype, damage_place, lose_items, negative]
)
def test_metadata_that_lies(source: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    stock.change_metadata(source, change)
    with pytest.raises(CkptError):
        import_checkpoint(str(source), str(tmp_path / "root"))
    assert not list((tmp_path / "root").rglob("MANIFEST.json"))


def test_extensions_are_refused(source: Path, tmp_path: Path) -> None:
    def compress(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["zstd"]

    stock.change_metadata(source, compress)
    refuse(source, tmp_path / "ran", "through a stream extension")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_clear_error(data: bytes) -> None:
    with contextlib.suppress(DamagedError, StateError):
        read_pickle(data, "x")


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_gives_a_clear_error_or_none(
    source: Path, position: int, value: int
) -> None:
    path = source / ".metadata"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[position % len(bad)] = value
    path.write_bytes(bad)
    with contextlib.suppress(CkptError):
        StockCheckpoint(open_storage(source))
    path.write_bytes(good)
