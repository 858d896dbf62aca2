"""Stock DCP checkpoints become steps, and steps stock DCP checkpoints, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support import stock
from support.steps import tiny_adapter, write_step
from torch.distributed.checkpoint.state_dict import set_state_dict

from ckpt import CheckpointManager, TrainState
from ckpt.catalog import check_step, find_step
from ckpt.dcp import Reader, Writer
from ckpt.dcp.exporting import export_checkpoint
from ckpt.dcp.importing import import_checkpoint
from ckpt.dcp.mapping import Choices
from ckpt.dcp.nested import nest
from ckpt.errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    PublishError,
    StateError,
    StorageError,
)
from ckpt.layout import MANIFEST, STATE
from ckpt.peft import write_adapter_dir
from ckpt.peft_import import import_adapter
from ckpt.state import decode_state
from ckpt.storage import open_storage
from ckpt.storage.posix import PosixStorage
from ckpt.versions import read_version

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def document(root: Path | str, step: int | None = None) -> Any:
    entry = find_step(open_storage(root), step)
    return decode_state(open_storage(root).read(f"{entry.path}/{STATE}"))


def tensors(root: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    entry = find_step(open_storage(root), step)
    found: dict[str, torch.Tensor] = {}
    for file in (root / entry.path).glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_training(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether two runs go on alike, to the last bit."""
    for model, optimizer in (a, b):
        torch.manual_seed(3)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    pairs = zip(a[0].parameters(), b[0].parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("flat", [False, True], ids=["groups by number", "groups by name"])
def test_import_then_resume(tmp_path: Path, flat: bool) -> None:
    trained = stock.model_and_optimizer()
    sd = stock.state_dict(*trained, flat=flat)
    schedule = torch.optim.lr_scheduler.StepLR(trained[1], 5)
    source = stock.save(
        {**sd, "lr_scheduler": schedule.state_dict(), "train": {"step": torch.tensor(7)}},
        tmp_path / "stock",
    )
    root = tmp_path / "root"
    result = import_checkpoint(str(source), str(root), step=7)
    assert result.manifest.step == 7
    entry = find_step(open_storage(root))
    assert entry.state == "committed"
    assert list(check_step(open_storage(root), entry)) == []

    fresh = stock.model_and_optimizer(seed=9, steps=0)
    live_schedule = torch.optim.lr_scheduler.StepLR(fresh[1], 5)
    live_schedule.last_epoch = 99
    state = TrainState(*fresh, live_schedule)
    with CheckpointManager(root) as manager:
        assert manager.restore(state) == 7
        assert [g["lr"] for g in fresh[1].param_groups] == [0.01, 0.02]
        assert [g["weight_decay"] for g in fresh[1].param_groups] == [0.01, 0.3]
        assert live_schedule.last_epoch == 0
        assert state.extra == {"train": {"step": torch.tensor(7)}}
        assert same_training(trained, fresh)
        manager.save(8, state)  # and goes on saving to the root
    assert find_step(open_storage(root)).step == 8


def test_export_then_stock_load(tmp_path: Path) -> None:
    trained = stock.model_and_optimizer()
    with CheckpointManager(tmp_path / "root") as manager:
        manager.save(4, TrainState(*trained, extra={"policy_version": 3}))
    out = tmp_path / "out"
    result = export_checkpoint(str(tmp_path / "root"), str(out))
    assert result.entry.step == 4
    fresh = stock.model_and_optimizer(seed=9, steps=1)
    sd = stock.state_dict(*fresh) | {"extra": {"policy_version": 0}}
    dcp.load(sd, storage_reader=dcp.FileSystemReader(out))
    set_state_dict(*fresh, model_state_dict=sd["model"], optim_state_dict=sd["optim"])
    assert sd["extra"] == {"policy_version": 3}
    assert same_training(trained, fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "root"]


def test_export_then_import_is_the_step_itself(tmp_path: Path) -> None:
    trained = stock.model_and_optimizer()
    schedule = torch.optim.lr_scheduler.MultiStepLR(trained[1], [3, 3, 9])
    extra = {"policy_version": 3, "odd": {1: (2.5, {})}, "empty": {}}
    with CheckpointManager(tmp_path / "root") as manager:
        manager.save(4, TrainState(*trained, schedule, extra=extra))
    export_checkpoint(str(tmp_path / "root"), str(tmp_path / "out"))
    imported = import_checkpoint(str(tmp_path / "out"), str(tmp_path / "again"), step=4)
    assert imported.manifest.policy_version == 3
    before, after = (tensors(tmp_path / name) for name in ("root", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = document(tmp_path / "root"), document(tmp_path / "again")
    assert first["shared"]["scheduler"]["milestones"] == Counter({3: 2, 9: 1})
    for section in ("scheduler", "extra"):
        assert first["shared"][section] == second["shared"][section]
    for part in ("kind", "groups", "values"):
        assert first["shared"]["optimizer"][part] == second["shared"]["optimizer"][part]
    assert str(first["ranks"]) == str(second["ranks"])


def test_a_writers_checkpoint_becomes_stock(tmp_path: Path) -> None:
    sd = {
        "model": {"w": torch.randn(3, 4), "h": torch.ones(2, dtype=torch.bfloat16)},
        "groups": [{"lr": 0.1, "params": ["w"]}, {"lr": 0.2, "params": []}],
        "none": torch.empty(0, 2),
        "n": 3,
    }
    dcp.save(sd, storage_writer=Writer(tmp_path / "ours"))
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "stock"))
    stock.save(sd, tmp_path / "direct")
    ours, direct = (
        dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("stock", "direct")
    )
    assert ours.planner_data == direct.planner_data
    assert ours.state_dict_metadata.keys() == direct.state_dict_metadata.keys()
    live = {
        "model": {"w": torch.zeros(3, 4), "h": torch.zeros(2, dtype=torch.bfloat16)},
        "groups": [{"lr": 0.0, "params": []}, {"lr": 0.0, "params": []}],
        "none": torch.empty(0, 2),
        "n": 0,
    }
    dcp.load(live, checkpoint_id=tmp_path / "stock")
    assert torch.equal(live["model"]["w"], sd["model"]["w"])
    assert torch.equal(live["model"]["h"], sd["model"]["h"])
    assert (live["groups"], live["n"]) == (sd["groups"], 3)


def test_a_sharded_step_is_put_together(tmp_path: Path) -> None:
    values, _export = tiny_adapter()
    state = {
        "shared": {
            "optimizer": {
                "kind": "AdamW",
                "groups": [{"lr": 0.1, "params": [n[6:] for n in values if n[:6] == "model."]}],
                "values": {},
                "tensors": {n[6:]: ["exp_avg", "step"] for n in values if n[:6] == "model."},
            },
            "scheduler": None,
            "extra": {},
        },
        "ranks": [],
    }
    write_step(open_storage(tmp_path / "root"), 1, values, world=3, dim=1, state=state)
    export_checkpoint(str(tmp_path / "root"), str(tmp_path / "out"))
    name = "layers.0.wq.lora_b.weight"
    live = {
        "model": {name: torch.zeros(10, 4)},
        "optim": {"state": {name: {"exp_avg": torch.zeros(10, 4)}}},
    }
    dcp.load(live, checkpoint_id=tmp_path / "out")
    assert torch.equal(live["model"][name], values[f"model.{name}"])
    assert torch.equal(live["optim"]["state"][name]["exp_avg"], values[f"optim.{name}.exp_avg"])


def test_the_same_import_gives_the_same_bytes(tmp_path: Path) -> None:
    source = stock.save(stock.state_dict(*stock.model_and_optimizer()), tmp_path / "stock")
    files = []
    for name in ("a", "b"):
        result = import_checkpoint(str(source), str(tmp_path / name))
        files.append([(f.name, f.size, f.crc32) for f in result.manifest.files])
    assert files[0] == files[1]


def test_import_into_another_store(tmp_path: Path) -> None:
    source = stock.save(stock.state_dict(*stock.model_and_optimizer()), tmp_path / "stock")
    url = f"memory://{tmp_path}/root"
    import_checkpoint(str(source), url)
    live = {"model": {"0.weight": torch.zeros(4, 3)}}
    dcp.load(live, storage_reader=Reader(url))
    assert torch.equal(live["model"]["0.weight"], stock.model_and_optimizer()[0][0].weight)


class TestNames:
    @pytest.fixture
    def sd(self) -> dict[str, Any]:
        return stock.state_dict(*stock.model_and_optimizer())

    def take(self, tmp_path: Path, sd: dict[str, Any], **choices: Any) -> tuple[set[str], Any]:
        source = tmp_path / "stock"
        if not source.exists():
            stock.save(sd, source)
        result = import_checkpoint(str(source), str(tmp_path / "root"), choices=Choices(**choices))
        return {t.name for t in result.manifest.tensors}, document(tmp_path / "root")["shared"]

    def refuse(
        self, tmp_path: Path, sd: dict[str, Any], match: str, error: type[CkptError], **choices: Any
    ) -> None:
        with pytest.raises(error, match=match):
            self.take(tmp_path, sd, **choices)
        assert not (tmp_path / "root").exists()

    def test_other_prefixes(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        names, shared = self.take(
            tmp_path,
            {"app": {"net": sd["model"]}, "opt": sd["optim"]},
            model="app.net",
            optim="opt",
        )
        assert {"model.0.weight", "optim.0.weight.exp_avg"} <= names
        assert shared["optimizer"]["kind"] == "AdamW"

    def test_the_model_at_the_top(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        names, shared = self.take(
            tmp_path, {**sd["model"], "optimizer": sd["optim"], "n": 1}, model=""
        )
        assert {n for n in names if n.startswith("model.")} == {
            f"model.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")
        }
        assert shared["extra"] == {"n": 1}

    def test_wrappers_are_taken_off(self, tmp_path: Path) -> None:
        names, _shared = self.take(
            tmp_path, {"model": {"_orig_mod.a._checkpoint_wrapped_module.w": torch.ones(2)}}
        )
        assert names == {"model.a.w"}

    def test_two_that_become_one(self, tmp_path: Path) -> None:
        sd = {"model": {"_orig_mod.w": torch.ones(2), "w": torch.ones(2)}}
        self.refuse(tmp_path, sd, r"would both be 'model\.w'", StateError)

    def test_no_model(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        self.refuse(tmp_path, {"net": sd["model"]}, "first parts .* are: net.*--model", StateError)

    def test_a_big_tensor_elsewhere(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        sd = {**sd, "ema": {"w": torch.zeros(200, 200)}}
        self.refuse(tmp_path, sd, r"tensor 'ema\.w'.*--skip ema\.w", StateError)
        names, shared = self.take(tmp_path, sd, skip=("ema",))
        assert not any("ema" in name for name in names)
        assert shared["extra"] == {}

    def test_skip_that_matches_nothing(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        self.refuse(tmp_path, sd, "--skip emo: nothing", ConfigError, skip=("emo",))

    def test_optim_that_matches_nothing(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        self.refuse(tmp_path, sd, "--optim other", ConfigError, optim="other")

    def test_an_optimizer_by_number(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        _model, optimizer = stock.model_and_optimizer()
        sd = {"model": sd["model"], "optim": optimizer.state_dict()}
        self.refuse(tmp_path, sd, r"goes by number.*get_optimizer_state_dict", StateError)

    def test_an_optimizer_that_is_not_named(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        sd = stock.state_dict(model, optimizer)
        self.refuse(tmp_path, sd, "--optimizer AdamW", StateError)
        names, shared = self.take(tmp_path, sd, optimizer="SGD")
        assert "optim.weight.momentum_buffer" in names
        assert shared["optimizer"]["kind"] == "SGD"

    def test_state_without_a_group(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        sd["optim"]["param_groups"][0]["params"].remove("0.bias")
        self.refuse(tmp_path, sd, r"no parameter group names 0\.bias", StateError)

    def test_something_else_in_the_optimizer(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        sd["optim"]["loss_scale"] = 3.0
        self.refuse(tmp_path, sd, r"'optim\.loss_scale' is neither", StateError)

    def test_an_entry_of_the_model(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        sd["model"]["_extra_state"] = b"x"
        self.refuse(tmp_path, sd, r"--skip model\._extra_state", StateError)

    def test_a_false_trainer_state(self, tmp_path: Path, sd: dict[str, Any]) -> None:
        sd = {**sd, "trainer_state": 3}
        self.refuse(tmp_path, sd, "--skip", StateError)


def test_a_root_with_steps_is_left_alone(tmp_path: Path) -> None:
    source = stock.save(stock.state_dict(*stock.model_and_optimizer()), tmp_path / "stock")
    import_checkpoint(str(source), str(tmp_path / "root"))
    with pytest.raises(ConfigError, match="holds steps already"):
        import_checkpoint(str(source), str(tmp_path / "root"), step=1)


def test_a_failed_import_leaves_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stock.save(stock.state_dict(*stock.model_and_optimizer()), tmp_path / "stock")
    steps = tmp_path / "root" / "steps"
    shard = source / "__0_0.distcp"
    good = shard.read_bytes()
    shard.write_bytes(good[:-3000])
    with pytest.raises(CkptError):
        import_checkpoint(str(source), str(tmp_path / "root"))
    assert list(steps.rglob("*")) == []

    shard.write_bytes(good)
    put = PosixStorage.put

    def full(self: PosixStorage, path: str, data: Any) -> None:
        if path.endswith(MANIFEST):  # the shard and the state are written by then
            raise StorageError("no space")
        put(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStorage, "put", full)
        with pytest.raises(StorageError, match="no space"):
            import_checkpoint(str(source), str(tmp_path / "root"))
    assert list(steps.rglob("*")) == []
    import_checkpoint(str(source), str(tmp_path / "root"))


def test_nothing_to_import(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match=r"no \.metadata in it"):
        import_checkpoint(str(tmp_path), str(tmp_path / "root"))


class TestExportRefuses:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        with CheckpointManager(tmp_path / "root") as manager:
            manager.save(0, TrainState(*stock.model_and_optimizer()))
        return tmp_path / "root"

    def test_a_place_that_is_taken(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(AlreadyExists):
            export_checkpoint(str(root), str(tmp_path / "out"))

    def test_a_url(self, root: Path) -> None:
        with pytest.raises(ConfigError, match="local directories"):
            export_checkpoint(str(root), "memory://x/out")

    def test_damage(self, root: Path, tmp_path: Path) -> None:
        shard = next(root.rglob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DamagedError):
            export_checkpoint(str(root), str(tmp_path / "out"))
        assert [p.name for p in tmp_path.iterdir()] == ["root"]

    def test_a_full_disk(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: PosixStorage, source: str, target: str) -> None:
            raise StorageError("no space")

        monkeypatch.setattr(PosixStorage, "rename_dir", full)
        with pytest.raises(StorageError):
            export_checkpoint(str(root), str(tmp_path / "out"))
        assert [p.name for p in tmp_path.iterdir()] == ["root"]

    def test_a_state_of_neither_kind(self, tmp_path: Path) -> None:
        write_step(open_storage(tmp_path / "root"), 1, tiny_adapter()[0])
        with pytest.raises(StateError, match="neither"):
            export_checkpoint(str(tmp_path / "root"), str(tmp_path / "out"))


class TestAdapter:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "adapter"
        write_adapter_dir(path, self.weights(), self.config())
        return path

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return {
            f"base_model.model.layers.0.q_proj.lora_{side}.weight": torch.randn(shape).to(dtype)
            for side, shape in (("A", (4, 6)), ("B", (8, 4)))
        }

    def config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "bias": "none",
        }

    def test_becomes_the_next_version(self, directory: Path, tmp_path: Path) -> None:
        root = str(tmp_path / "root")
        for number in (1, 2):
            manifest = import_adapter(str(directory), root, run="base")
            assert manifest.name == f"base-v{number:08d}"
        assert read_version(open_storage(root), manifest.name) == manifest
        stored = load_file(tmp_path / "root/adapters" / manifest.name / "adapter_model.safetensors")
        assert stored.keys() == self.weights().keys()
        assert all(torch.equal(stored[key], value) for key, value in self.weights().items())

    def test_does_not_disturb_a_trainer(self, directory: Path, tmp_path: Path) -> None:
        state = TrainState(*stock.model_and_optimizer())
        with CheckpointManager(tmp_path / "root") as manager:
            manager.save(0, state).wait()
            import_adapter(str(directory), str(tmp_path / "root"), run="run")
            manager.save(1, state).wait()
        assert find_step(open_storage(tmp_path / "root")).step == 1

    def test_casts_when_asked(self, directory: Path, tmp_path: Path) -> None:
        manifest = import_adapter(str(directory), str(tmp_path / "r"), run="x", dtype="bfloat16")
        assert manifest.dtype == "bfloat16"

    def test_several_dtypes(self, tmp_path: Path) -> None:
        weights = self.weights()
        key = next(iter(weights))
        weights[key] = weights[key].to(torch.bfloat16)
        write_adapter_dir(tmp_path / "mixed", weights, self.config())
        with pytest.raises(ConfigError, match=r"bfloat16, float32; name a --dtype"):
            import_adapter(str(tmp_path / "mixed"), str(tmp_path / "r"), run="x")

    def test_a_rank_that_the_config_does_not_give(self, tmp_path: Path) -> None:
        write_adapter_dir(tmp_path / "bad", self.weights(), self.config() | {"r": 5})
        with pytest.raises(PublishError, match="rank 4, but its configuration says 5"):
            import_adapter(str(tmp_path / "bad"), str(tmp_path / "r"), run="x")

    def test_a_url(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="this machine"):
            import_adapter("memory://x", str(tmp_path / "r"), run="x")


def test_paths_that_contradict_each_other() -> None:
    with pytest.raises(DamagedError, match="below a value"):
        nest({"a": 1, "a.b": 2}, {"a.b": ("a", "b")})
    with pytest.raises(DamagedError, match="two entries"):
        nest({"x": 1, "y": 2}, {"x": ("a",), "y": ("a",)})
    with pytest.raises(DamagedError, match="some are missing"):
        nest({"x": 1}, {"x": ("a", 3)})
