"""Files of torch.save: what is read, and that nothing that they name is run."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckpt.errors import DamagedError, ObjectNotFound, StateError
from ckpt.migrate.torch_file import TorchFile
from ckpt.migrate.torch_pickle import Record, StoredView


def read(path: Path) -> Any:
    """The whole value, tensors read."""
    file = TorchFile(path)
    try:
        return file.plain(file.value, "value")
    finally:
        file.close()


def test_plain_values_tensors_and_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    value = {
        "plain": [1, 2.5, None, True, "text", (1, 2)],
        "view": whole[1:3, ::2],
        "transposed": whole.t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "parameter": nn.Parameter(torch.zeros(2)),
        "ordered": OrderedDict(a=1),
        "numpy": np.arange(5, dtype=np.uint32),
    }
    torch.save(value, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found["plain"] == value["plain"]
    assert found["ordered"] == value["ordered"]
    assert np.array_equal(found["numpy"], value["numpy"])
    assert found["numpy"].dtype == np.uint32
    for name in ("view", "transposed", "half", "empty", "scalar", "parameter"):
        assert torch.equal(found[name], value[name]), name
        assert found[name].dtype == value[name].dtype


class Evil:
    """Would make a directory when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_name_that_is_not_listed_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Evil(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(StateError, match=r"names posix\.mkdir"):
        TorchFile(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [nn.Linear(2, 2), torch.optim.SGD, torch.nn.functional.relu])
def test_objects_and_functions_of_torch_are_refused_too(tmp_path: Path, value: Any) -> None:
    torch.save({"x": value}, tmp_path / "x.pt")
    with pytest.raises(StateError, match=r"names torch\.(nn|optim)"):
        TorchFile(tmp_path / "x.pt")


def test_what_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"no file .*none\.pt"):
        TorchFile(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(DamagedError, match=r"no file of torch\.save"):
        TorchFile(tmp_path / "text.pt")
    torch.save({"x": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DamagedError, match=r"as torch writes it since 1\.6"):
        TorchFile(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(DamagedError, match=r"0 data\.pkl"):
        TorchFile(tmp_path / "zip.pt")


def changed(path: Path, entry: str, data: bytes) -> Path:
    """The same archive with other bytes in one entry."""
    out = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(entry) else old.read(name))
    return out


def test_a_block_that_is_too_short_or_compressed_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(8)}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match="has 4 bytes, 32 belong there"):
        read(changed(tmp_path / "x.pt", "data/0", b"abcd"))
    with pytest.raises(DamagedError, match="larger than the 32 bytes"):
        read(changed(tmp_path / "x.pt", "data/0", b"a" * 33))
    with pytest.raises(DamagedError, match="byte order b'big'"):
        TorchFile(changed(tmp_path / "x.pt", "byteorder", b"big"))


def sharded(
    view: StoredView, shape: tuple[int, ...], placements: list[Any], mesh: dict[str, Any]
) -> Any:
    """A DTensor as a file describes it."""

    def record(kind: str, *args: Any, **fields: Any) -> Any:
        made = type(kind, (Record,), {"kind": kind})(*args)
        made.__setstate__(fields)
        return made

    places = tuple(record("Replicate") if p is None else record("Shard", dim=p) for p in placements)
    meta = record("TensorMeta", shape, (), torch.float32)
    layout = record("DeviceMesh", **mesh)
    spec = record("DTensorSpec", mesh=layout, placements=places, tensor_meta=meta)
    return record("DTensor", _local_tensor=view, _spec=spec)


def part(*shape: int) -> StoredView:
    return StoredView("0", torch.float32, 64, 0, shape, tuple(1 for _ in shape))


MESHES = {
    "2.8": lambda sizes, place: {"mesh": part(*sizes), "_coordinate_on_dim": place},
    "2.9": lambda sizes, place: {
        "_layout": _layout(_shape=sizes),
        "_coordinate_on_dim": place,
    },
}


def _layout(**fields: Any) -> Any:
    made = type("_MeshLayout", (Record,), {"kind": "_MeshLayout"})()
    made.__setstate__(fields)
    return made


@pytest.mark.parametrize("release", MESHES)
@pytest.mark.parametrize(
    ("placements", "place", "local", "offsets"),
    [
        ([None, 0], [1, 1], (2, 4), (3, 0)),  # HSDP: replicas of shards
        ([0, None], [0, 1], (3, 4), (0, 0)),
        ([0, 1], [1, 0], (2, 2), (3, 0)),
        ([0, 0], [0, 1], (1, 4), (2, 0)),  # 5 rows: 3 + 2, and of the 3: 2 + 1
    ],
)
def test_a_part_lies_where_its_placements_put_it(
    tmp_path: Path,
    release: str,
    placements: list[Any],
    place: list[int],
    local: tuple[int, ...],
    offsets: tuple[int, ...],
) -> None:
    torch.save({}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    mesh = MESHES[release]((2, 2), place)
    found = file.piece("w", sharded(part(*local), (5, 4), placements, mesh))
    assert (found.shape, found.offsets) == ((5, 4), offsets)
    with pytest.raises(DamagedError, match="its placement gives"):
        file.piece("w", sharded(part(1, 1), (5, 4), placements, mesh))
    with pytest.raises(StateError, match="whose layout is not known"):
        file.piece("w", sharded(part(*local), (5, 4), placements, {}))
    file.close()
