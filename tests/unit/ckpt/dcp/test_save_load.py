"""Plain DCP calls over this package's storage, on one process: what comes back, what is refused."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.steps import tiny_adapter, write_step
from torch.distributed.checkpoint.api import CheckpointException

from ckpt import CheckpointManager, TrainState
from ckpt.catalog import check_step, find_step, list_steps
from ckpt.dcp import Reader, Writer, converted
from ckpt.errors import (
    CkptError,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    PlanError,
    StateError,
    StepExists,
    StorageError,
)
from ckpt.layout import MANIFEST, STATE, STEPS
from ckpt.storage import open_storage
from ckpt.storage.posix import PosixStorage

pytestmark = [
    # DCP says with a warning that there is one process, and on every failed read of metadata.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

STEP = f"{STEPS}/step-00000000.w0001"


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "model": {
            "w": torch.randn(6, 5, generator=generator),
            "t": torch.randn(4, 6, generator=generator).t(),  # not contiguous
            "h": torch.randn(7, generator=generator).to(torch.bfloat16),
            "count": torch.tensor(3),
            "none": torch.empty(0, 3),
        },
        "optim": {"lr": 0.1 + 0.2, "betas": (0.9, float("nan")), "groups": [{"a": 1}, {"a": None}]},
        "names": ["ü", "b"],
        "array": np.arange(3, dtype=np.int16),
        "ordered": collections.OrderedDict(z=1, a=b"\x00\xff"),
        "flag": True,
    }


def blank(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [blank(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert np.array_equal(a, b, equal_nan=True)
    else:
        assert a == b


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.fixture(params=["posix", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "posix":
        return str(tmp_path / "id")
    return f"memory://{tmp_path}/id"


def test_round_trip(url: str) -> None:
    dcp.save(state(), storage_writer=Writer(url))
    live = blank(state())
    dcp.load(live, storage_reader=Reader(url))
    assert_same(live, state())


def test_it_is_a_step_that_every_tool_reads(url: str) -> None:
    dcp.save(state(), storage_writer=Writer(url))
    storage = open_storage(url)
    (entry,) = list_steps(storage)
    assert entry.state == "committed"
    assert list(check_step(storage, entry)) == []
    assert entry.manifest is not None
    assert {t.name for t in entry.manifest.tensors} == {f"model.{k}" for k in state()["model"]}


def test_no_pickle_lies_in_it(tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=Writer(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(b"\x80\x02" in path.read_bytes() for path in files if path.suffix == ".json")


def test_async_save(url: str) -> None:
    sd = state()
    future = dcp.async_save(sd, storage_writer=Writer(url))
    sd["model"]["w"].zero_()  # the copy was taken
    future.result()
    live = {"model": {"w": torch.zeros(6, 5)}}
    dcp.load(live, storage_reader=Reader(url))
    assert torch.equal(live["model"]["w"], state()["model"]["w"])


def test_a_committed_id_is_never_overwritten(url: str) -> None:
    dcp.save({"w": torch.ones(3)}, storage_writer=Writer(url))
    with pytest.raises(StepExists, match=r"never overwritten.*another checkpoint_id"), converted():
        dcp.save({"w": torch.zeros(3)}, storage_writer=Writer(url))
    live = {"w": torch.zeros(3)}
    dcp.load(live, storage_reader=Reader(url))
    assert torch.equal(live["w"], torch.ones(3))


def test_two_writers_at_once_one_wins(url: str) -> None:
    first, second = Writer(url), Writer(url)

    class Interrupted(dcp.DefaultSavePlanner):
        """Lets the second writer commit while the first one is between its plan and its data."""

        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            dcp.save({"w": torch.full((3,), 2.0)}, storage_writer=second)
            return super().finish_plan(new_plan)

    with pytest.raises(StepExists), converted():
        dcp.save({"w": torch.ones(3)}, storage_writer=first, planner=Interrupted())
    live = {"w": torch.zeros(3)}
    dcp.load(live, storage_reader=Reader(url))
    assert torch.equal(live["w"], torch.full((3,), 2.0))
    (entry,) = list_steps(open_storage(url))
    assert list(check_step(open_storage(url), entry)) == []


def test_checkpoint_id_keeps_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "ckpt.dcp.target.open_storage",
        lambda url, options: seen.append((url, options)) or PosixStorage(tmp_path / url[5:]),
    )
    options = {"endpoint_url": "http://localhost:1"}
    writer = Writer("s3://a", storage_options=options)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, checkpoint_id="s3://b")
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, checkpoint_id="s3://c")
    reader = Reader("s3://a", storage_options=options)
    dcp.load({"w": torch.ones(2)}, storage_reader=reader, checkpoint_id="s3://c")
    assert seen == [(f"s3://{name}", options) for name in "bcc"]


def test_credentials_are_not_shown() -> None:
    for thing in (Writer("s3://key:secret@bucket/x"), Reader("s3://key:secret@bucket/x")):
        assert thing.checkpoint_id == "s3://bucket/x"


def test_a_value_that_cannot_be_stored_is_named(url: str) -> None:
    with pytest.raises(StateError, match=r"entry 'sched\.fn'.*pathlib"), converted():
        dcp.save({"w": torch.ones(2), "sched": {"fn": Path("x")}}, storage_writer=Writer(url))
    with pytest.raises(NoCheckpoint), converted():
        dcp.load({"w": torch.ones(2)}, storage_reader=Reader(url))


def test_a_dtype_that_cannot_be_stored_is_named(url: str) -> None:
    with pytest.raises(StateError, match=r"^rank 0: net\.z cannot.*complex128"), converted():
        dcp.save({"net": {"z": torch.ones(2, dtype=torch.complex128)}}, storage_writer=Writer(url))


def test_a_sparse_tensor_is_named(url: str) -> None:
    sparse = torch.ones(2, 2).to_sparse()

    class Sparse(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            return sparse

    with pytest.raises(StateError, match=r"net\.s cannot be saved.*sparse"), converted():
        dcp.save({"net": {"s": torch.ones(2, 2)}}, storage_writer=Writer(url), planner=Sparse())


def test_a_planner_with_its_own_entries(url: str) -> None:
    """A planner that transforms objects hands over bytes, which are read as data, not as code."""

    class Doubling(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return super().transform_object(
                write_item, object * 2 if isinstance(object, int) else object
            )

    dcp.save({"n": 21}, storage_writer=Writer(url), planner=Doubling())
    live = {"n": 0}
    dcp.load(live, storage_reader=Reader(url))
    assert live == {"n": 42}
    with pytest.raises(StateError, match=r"entry 'path' .* cannot be saved"), converted():
        dcp.save({"path": Path("x")}, storage_writer=Writer(url + "2"), planner=Doubling())


def test_cached_plans_are_refused(tmp_path: Path) -> None:
    class Caching(dcp.DefaultSavePlanner):
        """Under a name of its own: DCP's cache belongs to the process and goes by class name."""

    def save(name: str) -> None:
        dcp.save(
            {"w": torch.ones(2)},
            storage_writer=Writer(tmp_path / name),
            planner=Caching(enable_plan_caching=True),
        )

    save("first")
    with pytest.raises(ConfigError, match="caches plans"), converted():
        save("second")


@pytest.mark.parametrize(
    ("lost", "message"), [("b", "of b must cover it exactly"), ("n", "'n' was planned but no")]
)
def test_what_no_rank_wrote_is_not_committed(
    url: str, monkeypatch: pytest.MonkeyPatch, lost: str, message: str
) -> None:
    whole = Writer.write_data

    def lose(self: Writer, plan: Any, planner: Any) -> Any:
        items = [item for item in plan.items if item.index.fqn != lost]
        return whole(self, dcp.SavePlan(items, plan.storage_data, plan.planner_data), planner)

    monkeypatch.setattr(Writer, "write_data", lose)
    with pytest.raises(PlanError, match=message), converted():
        dcp.save({"a": torch.ones(2), "b": torch.ones(2), "n": 1}, storage_writer=Writer(url))
    assert not list_steps(open_storage(url))


def test_collectives_are_needed(url: str) -> None:
    writer = Writer(url)
    with pytest.raises(ConfigError, match="use_collectives=False"):
        writer.set_up_storage_writer(True, rank=0, use_collectives=False)


def test_a_failed_write_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path)
    put = PosixStorage.put

    def full(self: PosixStorage, path: str, data: Any) -> None:
        if path.endswith(STATE):
            raise StorageError("no space left")
        put(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStorage, "put", full)
        with pytest.raises(StorageError, match="no space left"), converted():
            dcp.save(state(), storage_writer=writer)
    assert list((tmp_path / STEPS).iterdir()) == []
    dcp.save(state(), storage_writer=writer)
    (entry,) = list_steps(open_storage(tmp_path))
    assert entry.state == "committed"


def test_the_remains_of_a_killed_save_go_with_the_next(tmp_path: Path) -> None:
    remains = tmp_path / STEPS / ".tmp-00000000-deadbeef"
    remains.mkdir(parents=True)
    (remains / "shard").write_bytes(b"x")
    foreign = tmp_path / STEPS / "notes"
    foreign.mkdir()
    dcp.save(state(), storage_writer=Writer(tmp_path))
    assert not remains.exists()
    assert foreign.exists()


def test_a_trainers_root_is_left_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, TrainState(model)).wait()
    with pytest.raises(StepExists), converted():
        dcp.save(state(), storage_writer=Writer(tmp_path))
    other = tmp_path / "other"
    with CheckpointManager(other) as manager:  # claims its epoch, commits nothing
        with pytest.raises(StateError):
            manager.save(0, TrainState(torch.nn.Linear(2, 2).requires_grad_(False)))
        writers = other / "writers"
        writers.mkdir(parents=True)
        writers.joinpath("0001.json").write_bytes((tmp_path / "writers/0001.json").read_bytes())
        with pytest.raises(ConfigError, match="root of a trainer's run"), converted():
            dcp.save(state(), storage_writer=Writer(other))


def test_a_manager_says_what_such_a_checkpoint_is(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    dcp.save({"model": dict(model.state_dict())}, storage_writer=Writer(tmp_path))
    with CheckpointManager(tmp_path) as manager, pytest.raises(StateError, match=r"dcp\.load"):
        manager.restore(TrainState(model))


def test_reads_a_trainers_step(tmp_path: Path) -> None:
    tensors, _export = tiny_adapter()
    storage = open_storage(tmp_path)
    write_step(storage, 3, tensors, world=2)
    write_step(storage, 7, {k: v + 1 for k, v in tensors.items()}, world=2)
    live = {name: torch.zeros_like(value) for name, value in tensors.items()}
    dcp.load(live, storage_reader=Reader(tmp_path))
    assert_same(live, {name: value + 1 for name, value in tensors.items()})
    dcp.load(live, storage_reader=Reader(tmp_path, step=3))
    assert_same(live, tensors)


class TestDamage:
    """No live value changes unless every byte that is needed verified."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        dcp.save(state(), storage_writer=Writer(tmp_path))
        return tmp_path / STEP

    def refuse(self, root: Path, error: type[CkptError] = DamagedError) -> None:
        live = blank(state())
        with pytest.raises(error), converted():
            dcp.load(live, storage_reader=Reader(root))
        assert_same(live, blank(state()))

    def test_every_region_of_the_shard(self, saved: Path) -> None:
        shard = next(saved.glob("shard-*"))
        size = shard.stat().st_size
        for position in (0, 9, 200, size // 2, size - 1):
            flip(shard, position)
            self.refuse(saved.parents[1])
            flip(shard, position)

    def test_state(self, saved: Path) -> None:
        flip(saved / STATE, 60)
        self.refuse(saved.parents[1])

    def test_manifest(self, saved: Path) -> None:
        flip(saved / MANIFEST, 60)
        self.refuse(saved.parents[1], NoCheckpoint)

    def test_truncated_shard(self, saved: Path) -> None:
        shard = next(saved.glob("shard-*"))
        shard.write_bytes(shard.read_bytes()[:-1])
        self.refuse(saved.parents[1], NoCheckpoint)


def test_other_shapes_and_names_are_refused(url: str) -> None:
    dcp.save({"w": torch.ones(2, 3), "b": torch.ones(2)}, storage_writer=Writer(url))
    with pytest.raises(CkptError, match=r"Size mismatch.*w"), converted():
        dcp.load({"w": torch.ones(3, 2)}, storage_reader=Reader(url))
    with pytest.raises(CkptError, match="Missing key in checkpoint state_dict: v"), converted():
        dcp.load({"v": torch.ones(3, 2)}, storage_reader=Reader(url))


def test_another_dtype_is_refused_unless_asked_for(url: str) -> None:
    dcp.save({"w": torch.full((3,), 1.5), "v": torch.ones(2)}, storage_writer=Writer(url))
    live = {"w": torch.zeros(3, dtype=torch.bfloat16), "v": torch.zeros(2)}
    message = r"w is torch\.float32, the live tensor torch\.bfloat16; nothing.*cast=True"
    with pytest.raises(StateError, match=message), converted():
        dcp.load(live, storage_reader=Reader(url))
    assert not live["w"].any()
    assert not live["v"].any()
    dcp.load(live, storage_reader=Reader(url, cast=True))
    assert torch.equal(live["w"], torch.full((3,), 1.5, dtype=torch.bfloat16))


def test_nothing_there(url: str) -> None:
    with pytest.raises(NoCheckpoint, match="no steps in"), converted():
        dcp.load({"w": torch.ones(1)}, storage_reader=Reader(url))
    with pytest.raises(NoCheckpoint):
        Reader(url).read_metadata()


def test_converted_names_the_rank_and_other_classes() -> None:
    failure = CheckpointException("write", {1: (KeyError("x"), None), 0: (OSError("y"), None)})
    with pytest.raises(CkptError, match="rank 0: OSError: y") as caught, converted():
        raise failure
    assert caught.value.__notes__ == ["rank 1 failed too: KeyError: 'x'"]
    assert not issubclass(CheckpointException, Exception)


def test_a_writer_travels_to_another_process(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    copy = pickle.loads(pickle.dumps(writer))
    dcp.save({"w": torch.ones(2)}, storage_writer=copy, checkpoint_id=tmp_path / "b")
    assert find_step(open_storage(tmp_path / "b")).state == "committed"


@pytest.mark.parametrize(
    ("text", "known"), [("x/y", True), ("s3://b/x", True), ("memory://x", True), ("zz://x", False)]
)
def test_known_ids(text: str, known: bool) -> None:
    assert Writer.validate_checkpoint_id(text) is known
    assert Reader.validate_checkpoint_id(Path(text) if "://" not in text else text) is known


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(ConfigError):
        Writer("")
