"""Warm start: a PEFT directory's values in a live state, or an error that names what is wrong."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_run import EXPORT, Run, Tiny

import ckpt
import ckpt.takeover
from ckpt import (
    AdapterExport,
    BaseIdentity,
    BaseMismatch,
    CheckpointManager,
    ConfigError,
    DamagedError,
    NonFiniteError,
    ObjectNotFound,
    PlanError,
    StateError,
    TensorRule,
    TrainState,
    UnrestoredRoot,
)
from ckpt.storage import open_storage

A, B = (f"base_model.model.lin.lora_{side}.weight" for side in "AB")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def delta(model):
    """What the live adapter adds to the base weight; the export's factor of B is its scaling."""
    return 2.0 * model.b.detach().double() @ model.a.detach().double()


def write(directory, tensors, **config):
    """A bare PEFT directory."""
    directory.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / WEIGHTS)
    whole = {**EXPORT.peft_config, "base_model_name_or_path": "models/tiny", **config}
    (directory / CONFIG).write_text(json.dumps(whole))
    return directory


def tensors(rank=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, 6, generator=generator),
        B: torch.randn(5, rank, generator=generator),
    }


def state_of(model, base="somewhere/tiny"):
    return TrainState(model, export=EXPORT, base=BaseIdentity(base, "a" * 64))


@pytest.fixture(params=["posix", "memory"])
def root(request, tmp_path):
    if request.param == "posix":
        yield str(tmp_path / "root")
        return
    url = f"memory://{tmp_path.name}-{random.SystemRandom().getrandbits(64)}"
    yield url
    for part in ("adapters", "writers"):
        open_storage(url).delete_tree(part)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_version_comes_back(root, dtype):
    run = Run()
    run.train(2)
    with CheckpointManager(root, publish_dtype=dtype) as manager:
        version = manager.publish(run.state).published.result(20)
    fresh = Tiny(seed=8)
    steps = fresh.steps.clone()
    with CheckpointManager(f"{root}-next") as manager:
        taken = manager.warm_start(state_of(fresh), f"{root}/adapters/{version.name}")
    cast = torch.float32 if dtype == "float32" else torch.bfloat16
    assert torch.equal(fresh.a, run.model.a.to(cast).float())
    assert torch.equal(fresh.b, (run.model.b * 2).to(cast).float() / 2)
    assert torch.equal(fresh.steps, steps)
    assert (taken.version, taken.verified) == (version.name, True)
    assert taken.dtypes == ("F32" if dtype == "float32" else "BF16",)


def test_the_function_is_kept_whatever_form_the_adapter_has(tmp_path):
    """Scaling in the configuration or in B, padded or not: the live model computes the same."""
    plain = tensors()
    padded = {A: torch.zeros(5, 6), B: torch.zeros(5, 5)}
    padded[A][:3], padded[B][:, :3] = plain[A], plain[B]
    named = {k.replace(".weight", ".default.weight"): v for k, v in plain.items()}
    half = {key: value.half() for key, value in plain.items()}
    forms = {
        "folded": (plain, {}, 1.0),
        "training": (plain, {"lora_alpha": 6}, 2.0),
        "training rslora": (plain, {"lora_alpha": 2 * 3**0.5, "use_rslora": True}, 2.0),
        "padded": (padded, {"r": 5, "lora_alpha": 5}, 1.0),
        "patterns": (
            padded,
            {"r": 64, "rank_pattern": {"lin": 5}, "alpha_pattern": {"lin": 10}, "lora_alpha": 1},
            2.0,
        ),
        "named": (named, {}, 1.0),
        "half": (half, {}, 1.0),
    }
    for name, (given, config, scaling) in forms.items():
        model = Tiny()
        write(tmp_path / name, given, **config)
        taken = ckpt.warm_start(state_of(model), tmp_path / name)
        assert not taken.verified, name
        values = list(given.values())
        want = scaling * values[1].double() @ values[0].double()
        assert torch.allclose(delta(model), want, rtol=1e-12, atol=0), name
    assert torch.equal(model.a, half[A].float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e5m2"])
def test_the_live_dtype_is_the_live_ones(tmp_path, dtype):
    kind = getattr(torch, dtype)
    given = {key: value.to(kind).float() for key, value in tensors().items()}
    write(tmp_path / "x", given)
    model = Tiny()
    model.a = torch.nn.Parameter(model.a.detach().to(kind))
    model.b = torch.nn.Parameter(model.b.detach().to(kind))
    ckpt.warm_start(state_of(model), tmp_path / "x")
    assert torch.equal(model.a.float(), given[A])
    assert torch.equal(model.b.float(), given[B] / 2)


def test_a_scaling_that_cannot_be_undone_exactly_costs_one_rounding(tmp_path):
    given = tensors()
    write(tmp_path / "x", given, lora_alpha=7.3)
    model = Tiny()
    ckpt.warm_start(state_of(model), tmp_path / "x", rescale=True)
    exact = given[B].double() * (7.3 / 3) / 2
    assert torch.equal(model.a, given[A])
    assert torch.equal(model.b, exact.float())


REFUSED = {
    "missing": (lambda t: t.pop(B), {}, StateError, rf"the directory lacks {B}"),
    "extra": (
        lambda t: t.update({A.replace("lin", "out"): torch.ones(3, 6)}),
        {},
        StateError,
        r"the live state lacks base_model\.model\.out\.lora_A\.weight",
    ),
    "no factor": (
        lambda t: t.update({"base_model.model.lin.bias": torch.ones(3)}),
        {},
        StateError,
        r"the live state lacks base_model\.model\.lin\.bias",
    ),
    "shape": (
        lambda t: t.update({A: torch.ones(3, 7)}),
        {},
        StateError,
        rf"{A} has shape \[3, 7\].*want \[3, 6\]",
    ),
    "rank of the config": (
        lambda t: None,
        {"r": 4, "lora_alpha": 4},
        StateError,
        rf"{A} has shape \[3, 6\], but rank 4",
    ),
    "lower rank": (
        lambda t: t.update(tensors(rank=2)),
        {"r": 2, "lora_alpha": 2},
        StateError,
        rf"{A} has rank 2, the live adapter 3; build it with rank 2",
    ),
    "higher rank": (
        lambda t: t.update(tensors(rank=4)),
        {"r": 4, "lora_alpha": 4},
        StateError,
        "not zero padding",
    ),
    "alpha": (
        lambda t: None,
        {"lora_alpha": 12},
        StateError,
        rf"{A} is scaled by 4 \(alpha / r\), the live adapter by 2;.*rescale=True",
    ),
    "nan": (
        lambda t: t[B].__setitem__((4, 2), float("nan")),
        {},
        NonFiniteError,
        f"{B} holds NaN or infinity",
    ),
    "overflow": (
        lambda t: t.update({A: torch.full((3, 6), 1e200, dtype=torch.float64)}),
        {},
        NonFiniteError,
        r"values that do not fit torch\.float32, the dtype of a",
    ),
    "integers": (
        lambda t: t.update({A: torch.ones(3, 6, dtype=torch.int32)}),
        {},
        StateError,
        rf"{A} has dtype I32",
    ),
    "base": (
        lambda t: None,
        {"base_model_name_or_path": "models/other"},
        BaseMismatch,
        r"over base model 'models/other', the live base is 'somewhere/tiny'",
    ),
    "dora": (lambda t: None, {"use_dora": True}, ConfigError, "use_dora"),
    "bias": (lambda t: None, {"bias": "all"}, ConfigError, "biases"),
    "pissa": (lambda t: None, {"init_lora_weights": "pissa"}, ConfigError, "init_lora_weights"),
    "unknown": (lambda t: None, {"use_newlora": True}, ConfigError, "use_newlora=True"),
    "not LoRA": (lambda t: None, {"peft_type": "IA3"}, ConfigError, "must be 'LORA', got 'IA3'"),
    "alpha is text": (lambda t: None, {"lora_alpha": "3"}, ConfigError, "lora_alpha"),
    "modules": (lambda t: None, {"modules_to_save": 5}, ConfigError, "modules_to_save=5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_touched(tmp_path, case):
    change, config, kind, message = REFUSED[case]
    given = tensors()
    change(given)
    write(tmp_path / "x", given, **config)
    run = Run()
    run.state.base = BaseIdentity("somewhere/tiny", "a" * 64)
    before = run.digest()
    with CheckpointManager(tmp_path / "root") as manager:
        with pytest.raises(kind, match=message):
            manager.warm_start(run.state, tmp_path / "x")
        assert run.digest() == before
        # Nobody waits for this one, and the manager goes on.
        write(tmp_path / "x", tensors())
        manager.warm_start(run.state, tmp_path / "x")
    assert torch.equal(run.model.a, tensors()[A])


def test_a_base_can_be_excused_or_is_compared_by_its_hash(tmp_path):
    write(tmp_path / "x", tensors(), base_model_name_or_path="models/other")
    ckpt.warm_start(state_of(Tiny()), tmp_path / "x", any_base=True)
    write(tmp_path / "x", tensors(), base_model_name_or_path=None)
    (note,) = ckpt.warm_start(state_of(Tiny()), tmp_path / "x").notes
    assert "names no base model" in note
    run = Run()
    run.state.base = BaseIdentity("somewhere/tiny", "b" * 64)
    with CheckpointManager(tmp_path / "run") as manager:
        name = manager.publish(run.state).published.result(20).name
    with pytest.raises(BaseMismatch, match=r"somewhere/tiny \(config bbbbbbbbbbbb\)"):
        ckpt.warm_start(state_of(Tiny()), tmp_path / "run" / "adapters" / name)


def test_a_directory_that_is_none_says_what_is_there(tmp_path):
    fresh = state_of(Tiny())
    with pytest.raises(ObjectNotFound, match=r"no adapter_config\.json in .*it holds nothing"):
        ckpt.warm_start(fresh, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    write(tmp_path / "x", tensors())
    (tmp_path / "x" / WEIGHTS).rename(tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(ObjectNotFound, match=r"only the legacy adapter_model\.bin"):
        ckpt.warm_start(fresh, tmp_path / "x")
    (tmp_path / "x" / "adapter_model.bin").rename(tmp_path / "x" / "y")
    with pytest.raises(ObjectNotFound, match=r"but it holds adapter_config\.json, y"):
        ckpt.warm_start(fresh, tmp_path / "x")
    with CheckpointManager(tmp_path / "run") as manager:
        manager.publish(Run().state).published.result(20)
    with pytest.raises(ObjectNotFound, match="root of a run; its versions are directories"):
        ckpt.warm_start(fresh, tmp_path / "run")


@pytest.mark.parametrize("change", ["config", "header", "tensor", "cut", "grown", "manifest"])
def test_a_damaged_version_is_refused(tmp_path, change):
    with CheckpointManager(tmp_path) as manager:
        name = manager.publish(Run().state).published.result(20).name
    directory = tmp_path / "adapters" / name
    path = directory / {"config": CONFIG, "manifest": "MANIFEST.json"}.get(change, WEIGHTS)
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[:-4]
    elif change == "grown":
        data += b"\0"
    else:
        data[{"header": 12, "tensor": -3}.get(change, len(data) // 2)] ^= 1
    path.write_bytes(data)
    model = Tiny(seed=8)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DamagedError, match=name):
        ckpt.warm_start(state_of(model), directory)
    assert all(map(torch.equal, before, model.parameters()))


def test_damage_behind_the_first_block_is_found(tmp_path):
    """The header lies in the first 8 MiB, so nothing but the reading of values can see this."""
    run = Run()
    run.model.b = torch.nn.Parameter(torch.ones(1024 * 1024, 3))
    state = TrainState(run.model, export=EXPORT)
    with CheckpointManager(tmp_path, publish_dtype="float32") as manager:
        name = manager.publish(state).published.result(20).name
    ckpt.warm_start(state, tmp_path / "adapters" / name)
    with (tmp_path / "adapters" / name / WEIGHTS).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    with pytest.raises(DamagedError, match="CRC32"):
        ckpt.warm_start(state, tmp_path / "adapters" / name)


@pytest.mark.parametrize("change", ["empty", "config", "header", "cut", "long header"])
def test_a_damaged_bare_directory_is_refused(tmp_path, change):
    write(tmp_path / "x", tensors())
    path = tmp_path / "x" / (CONFIG if change == "config" else WEIGHTS)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "config": b"[1, 2]",
            "header": data[:30] + b"\xff" + data[31:],
            "cut": data[:-1],
            "long header": (1 << 40).to_bytes(8, "little") + data[8:],
        }[change]
    )
    with pytest.raises(DamagedError, match=path.name):
        ckpt.warm_start(state_of(Tiny()), tmp_path / "x")


def test_a_directory_that_is_replaced_meanwhile_is_not_mixed(tmp_path, monkeypatch):
    """The same shapes, so that header and configuration say nothing."""
    write(tmp_path / "x", tensors(seed=1))
    write(tmp_path / "y", tensors(seed=2))
    read = ckpt.takeover.adapter_values

    def replaced(*args, **more):
        (tmp_path / "y" / WEIGHTS).replace(tmp_path / "x" / WEIGHTS)
        return read(*args, **more)

    model = Tiny(seed=8)
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(ckpt.takeover, "adapter_values", replaced)
    with pytest.raises(PlanError, match="was replaced while it was read"):
        ckpt.warm_start(state_of(model), tmp_path / "x")
    assert all(map(torch.equal, before, model.parameters()))


def test_keys_may_be_renamed(tmp_path):
    given = {key.replace("lin", "encoder.lin"): value for key, value in tensors().items()}
    write(tmp_path / "x", given)
    model = Tiny()
    ckpt.warm_start(state_of(model), tmp_path / "x", keymap=lambda k: k.replace("encoder.", ""))
    assert torch.equal(model.a, tensors()[A])
    there = {key: key.replace("encoder.", "") for key in given}
    model = Tiny()
    ckpt.warm_start(state_of(model), tmp_path / "x", keymap=there)
    assert torch.equal(model.a, tensors()[A])
    with pytest.raises(ConfigError, match=r"keymap makes 'x' of .* and of"):
        ckpt.warm_start(state_of(model), tmp_path / "x", keymap=lambda _key: "x")
    with pytest.raises(ConfigError, match=r"keymap failed for .*ZeroDivisionError"):
        ckpt.warm_start(state_of(model), tmp_path / "x", keymap=lambda _key: 1 / 0)


def test_experts_and_what_no_rule_covers(tmp_path):
    """Slices of one live tensor come from PEFT tensors of their own."""
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2, 3, 6))
    model.b = torch.nn.Parameter(torch.zeros(2, 5, 3))
    keys = [[k.replace("lin", f"experts.{e}.lin") for k in (A, B)] for e in range(2)]
    rules = [
        TensorRule(source, key, index=e)
        for e, pair in enumerate(keys)
        for source, key in zip("ab", pair, strict=True)
    ]
    export = AdapterExport(EXPORT.peft_config, tuple(rules))
    given = {}
    for e, pair in enumerate(keys):
        given |= dict(zip(pair, tensors(seed=e).values(), strict=True))
    write(tmp_path / "x", given)
    ckpt.warm_start(TrainState(model), tmp_path / "x", export=export)
    for e, pair in enumerate(keys):
        assert torch.equal(model.a[e], given[pair[0]])
        assert torch.equal(model.b[e], given[pair[1]])
    model.head = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(StateError, match="no export rule covers head"):
        ckpt.warm_start(TrainState(model), tmp_path / "x", export=export)
    few = AdapterExport(EXPORT.peft_config, tuple(rules[:2]))
    with pytest.raises(StateError, match=r"no export rule covers a\[1\], b\[1\], head"):
        ckpt.warm_start(TrainState(model), tmp_path / "x", export=few)
    with pytest.raises(ConfigError, match="says nowhere how"):
        ckpt.warm_start(TrainState(model), tmp_path / "x")


def test_it_begins_a_run_and_does_not_continue_one(tmp_path):
    write(tmp_path / "x", tensors())
    run = Run()
    with CheckpointManager(tmp_path / "root") as manager:
        assert manager.restore(run.state) is None
        manager.warm_start(run.state, tmp_path / "x")
        assert not run.optimizer.state
        run.step()
        manager.save(0, run.state).wait(20)
        want = run.digest()
    again = Run(seed=3)
    with CheckpointManager(tmp_path / "root") as manager:
        assert manager.restore(again.state) == 0
    assert again.digest() == want
    with CheckpointManager(tmp_path / "root") as manager:
        manager.warm_start(again.state, tmp_path / "x")
        with pytest.raises(UnrestoredRoot):
            manager.save(1, again.state)


def test_only_what_is_needed_is_read_and_no_directory_is_written(tmp_path):
    directory = write(tmp_path / "x", tensors())
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    ckpt.warm_start(state_of(Tiny()), f"file://{directory}")
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert load_file(directory / WEIGHTS).keys() == {A, B}
