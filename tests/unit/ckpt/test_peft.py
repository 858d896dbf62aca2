"""PEFT directories: configuration rules, writing, reading, detection."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.steps import tiny_adapter

from ckpt.errors import (
    AlreadyExists,
    ConfigError,
    DamagedError,
    NonFiniteError,
    ObjectNotFound,
    StateError,
    StorageError,
)
from ckpt.peft import (
    CONFIG_NAME,
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_NAME,
    WeightsFile,
    is_lora_adapter_dir,
    local_directory,
    read_adapter,
    write_adapter_dir,
    write_adapter_files,
)
from ckpt.peft_config import check_export, config_bytes, rank_of, split_key
from ckpt.storage import exchange, open_storage
from ckpt.storage.base import Buffer
from ckpt.types import AdapterExport, TensorRule

A = "base_model.model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.q_proj.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
TENSORS = {B: torch.ones(3, 2), A: torch.full((2, 5), 0.5)}


def changed(**fields: object) -> AdapterExport:
    _tensors, export = tiny_adapter()
    return replace(export, peft_config={**export.peft_config, **fields})


class TestKeys:
    def test_a_key_comes_apart(self) -> None:
        assert split_key(A) == ("model.layers.0.q_proj", "A")
        assert split_key(B) == ("model.layers.0.q_proj", "B")

    @pytest.mark.parametrize(
        "key",
        [
            "model.layers.0.q_proj.lora_A.weight",
            "base_model.model.q_proj.lora_A.default.weight",
            "base_model.model.q_proj.lora_C.weight",
            "base_model.model.q_proj.lora_embedding_A.weight",
            "base_model.model.q_proj.lora_magnitude_vector",
            "base_model.model.lm_head.weight",
        ],
    )
    def test_other_keys_are_refused(self, key: str) -> None:
        with pytest.raises(ConfigError, match="not of the form"):
            split_key(key)

    def test_the_first_rank_pattern_that_matches_wins(self) -> None:
        config = {"r": 4, "rank_pattern": {"layers.0.q_proj": 8, "q_proj": 16, r"k\w+": 2}}
        assert rank_of(config, "model.layers.0.q_proj") == 8
        assert rank_of(config, "model.layers.1.q_proj") == 16
        assert rank_of(config, "model.layers.1.k_proj") == 2
        assert rank_of(config, "model.layers.1.my_q_proj") == 4


class TestCheckExport:
    def test_a_good_export_passes(self) -> None:
        check_export(tiny_adapter()[1])
        check_export(changed(target_modules="all-linear"))
        check_export(changed(target_modules=r".*\.(wq|wo)"))
        check_export(changed(rank_pattern={"wq": 4}, alpha_pattern={"wq": 1.5}))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": None}, "peft_type must be 'LORA', got None"),
            ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
            ({"r": 0}, "r must be an integer >= 1, got 0"),
            ({"r": True}, "r must be an integer >= 1, got True"),
            ({"r": None}, "r must be an integer >= 1, got None"),
            ({"rank_pattern": {"wq": 0}}, r"rank_pattern\['wq'\] must be an integer >= 1, got 0"),
            ({"rank_pattern": {"(": 2}}, "no regular expression"),
            ({"rank_pattern": [4]}, "must map patterns to numbers"),
            ({"lora_alpha": "abc"}, "lora_alpha must be a finite number > 0, got 'abc'"),
            ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number > 0"),
            ({"alpha_pattern": {"wq": -1}}, "must be a finite number > 0, got -1"),
            ({"target_modules": []}, "must be a non-empty list or a string"),
            ({"target_modules": None}, "must be a non-empty list or a string"),
            ({"target_modules": ["wq"]}, "does not cover 'model.layers.0.wo'"),
            ({"target_modules": ".*wq"}, "does not cover 'model.layers.0.wo'"),
            ({"target_modules": "("}, "is no regular expression"),
            ({"use_dora": True}, "use_dora is set"),
            ({"lora_bias": True}, "biases"),
            ({"bias": "all"}, "biases"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be"),
        ],
    )
    def test_configurations_that_loaders_refuse(
        self, fields: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            check_export(changed(**fields))

    def test_no_rules(self) -> None:
        with pytest.raises(ConfigError, match="would write an empty adapter"):
            check_export(replace(tiny_adapter()[1], rules=()))

    @pytest.mark.parametrize(
        ("lost", "name"), [(0, "lora_B but no lora_A"), (1, "lora_A but no lora_B")]
    )
    def test_half_a_pair(self, lost: int, name: str) -> None:
        export = tiny_adapter()[1]
        rules = tuple(rule for i, rule in enumerate(export.rules) if i != lost)
        with pytest.raises(ConfigError, match=f"module 'model.layers.0.wq' has {name}"):
            check_export(replace(export, rules=rules))

    def test_two_rules_for_a_key(self) -> None:
        export = tiny_adapter()[1]
        with pytest.raises(ConfigError, match="two export rules make the same PEFT key"):
            check_export(replace(export, rules=(*export.rules, export.rules[0])))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"scale": float("inf")}, "scale inf"),
            ({"scale": 0.0}, "scale 0.0"),
            ({"pad_dim": 0}, "pad_dim and pad_to together"),
            ({"pad_to": 8}, "pad_dim and pad_to together"),
        ],
    )
    def test_rules_that_cannot_work(self, fields: dict[str, object], message: str) -> None:
        export = tiny_adapter()[1]
        first: TensorRule = replace(export.rules[0], **fields)
        with pytest.raises(ConfigError, match=message):
            check_export(replace(export, rules=(first, *export.rules[1:])))


class TestConfigBytes:
    def test_equal_configurations_give_equal_bytes(self) -> None:
        one = config_bytes({"r": 2, "target_modules": {"b", "a"}, "exclude_modules": ("y", "x")})
        two = config_bytes({"exclude_modules": ["x", "y"], "target_modules": ["a", "b"], "r": 2})
        assert one == two
        assert json.loads(one) == {
            "r": 2,
            "target_modules": ["a", "b"],
            "exclude_modules": ["x", "y"],
        }

    @pytest.mark.parametrize("value", [float("nan"), object(), b"x"])
    def test_what_json_cannot_hold(self, value: object) -> None:
        with pytest.raises(ConfigError, match="is not JSON"):
            config_bytes({"lora_alpha": value})


class TestWrite:
    def test_exactly_two_files_sorted_and_marked(self, tmp_path: Path) -> None:
        written = write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            CONFIG_NAME,
            WEIGHTS_NAME,
        ]
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]
        data = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert list(header) == sorted(TENSORS)
        assert int.from_bytes(data[:8], "little") % 8 == 0
        assert {file.name: file.size for file in written.files} == {
            path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()
        }

    def test_what_is_there_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(AlreadyExists, match="out exists"):
            write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        assert list((tmp_path / "out").iterdir()) == []
        (tmp_path / "file").write_bytes(b"mine")
        with pytest.raises(AlreadyExists, match="is a file"):
            write_adapter_dir(tmp_path / "file", TENSORS, CONFIG, overwrite=True)
        assert (tmp_path / "file").read_bytes() == b"mine"

    @pytest.mark.parametrize("kernel_exchanges", [True, False])
    def test_overwrite_swaps_whole_directories(
        self, tmp_path: Path, kernel_exchanges: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not kernel_exchanges:
            monkeypatch.setattr(exchange, "_renameat2", lambda: None)
        out = tmp_path / "out"
        write_adapter_dir(out, TENSORS, CONFIG)
        old = (out / WEIGHTS_NAME).open("rb")  # a reader that has the old one open keeps it whole
        before = (out / WEIGHTS_NAME).read_bytes()
        new = {key: tensor * 2 for key, tensor in TENSORS.items()}
        write_adapter_dir(out, new, {**CONFIG, "lora_alpha": 4}, overwrite=True)
        config, tensors = read_adapter(out)
        assert config["lora_alpha"] == 4
        assert torch.equal(tensors[A], new[A])
        with old:
            assert old.read() == before
        assert list(tmp_path.iterdir()) == [out]

    def test_overwrite_never_replaces_what_is_no_adapter(self, tmp_path: Path) -> None:
        out = tmp_path / "home"
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        with pytest.raises(AlreadyExists, match=r"'thesis.tex' in it is no part of an adapter"):
            write_adapter_dir(out, TENSORS, CONFIG, overwrite=True)
        assert (out / "thesis.tex").read_text() == "x"

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_failing_stream_leaves_no_trace(self, tmp_path: Path, existing: bool) -> None:
        out = tmp_path / "out"
        if existing:
            write_adapter_dir(out, TENSORS, CONFIG)

        def stream():
            yield b"x" * 100
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            write_adapter_dir(out, WeightsFile(200, stream()), CONFIG, overwrite=True)
        assert list(tmp_path.iterdir()) == ([out] if existing else [])
        if existing:
            assert read_adapter(out)[0] == CONFIG

    def test_a_failed_exchange_names_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_args: object) -> int:
            exchange.ctypes.set_errno(errno.EACCES)
            return -1

        write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        monkeypatch.setattr(exchange, "_renameat2", lambda: refuse)
        with pytest.raises(OSError, match=r"cannot replace .*out: Permission denied"):
            write_adapter_dir(tmp_path / "out", TENSORS, CONFIG, overwrite=True)
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_without_the_kernel_a_failed_second_rename_is_undone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if target == tmp_path / "out" and not self.name.endswith(".aside"):
                raise PermissionError(errno.EPERM, "Operation not permitted")
            return real(self, target)

        write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        monkeypatch.setattr(exchange, "_renameat2", lambda: None)
        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match=r"cannot replace .*out: Operation not permitted"):
            write_adapter_dir(tmp_path / "out", TENSORS, {**CONFIG, "r": 3}, overwrite=True)
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]
        assert read_adapter(tmp_path / "out")[0] == CONFIG

    def test_only_plain_finite_tensors_are_written(self, tmp_path: Path) -> None:
        class Sharded(torch.Tensor):
            """Stands for any tensor whose memory is not the whole of it."""

        odd = torch.ones(2, 5).as_subclass(Sharded)
        with pytest.raises(StateError, match=r"lora_A.weight' is a Sharded; gather it"):
            write_adapter_dir(tmp_path / "out", {**TENSORS, A: odd}, CONFIG)
        bad = torch.full((3, 2), float("nan"))
        with pytest.raises(NonFiniteError, match=r"lora_B.weight' holds NaN or infinity"):
            write_adapter_dir(tmp_path / "out", {**TENSORS, B: bad}, CONFIG)
        assert list(tmp_path.iterdir()) == []

    def test_tensors_that_share_memory_are_written_apart(self, tmp_path: Path) -> None:
        whole = torch.arange(10.0).view(2, 5)
        write_adapter_dir(tmp_path / "out", {A: whole, B: whole.t()[:3]}, CONFIG)
        tensors = read_adapter(tmp_path / "out")[1]
        assert torch.equal(tensors[A], whole)
        assert torch.equal(tensors[B], whole.t()[:3])

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("/", "no name for a new directory"),
            ("memory://", "names a whole store"),
            ("memory://bucket/", "names a whole store"),
            ("file://elsewhere/x", "on another machine"),
        ],
    )
    def test_urls_that_name_no_new_directory(self, url: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            write_adapter_dir(url, TENSORS, CONFIG)


def test_local_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_directory("a/b") == tmp_path / "a" / "b"
    assert local_directory(tmp_path) == tmp_path
    assert local_directory("file:///data/run%207") == Path("/data/run 7")
    assert local_directory("file://localhost/data") == Path("/data")
    assert local_directory("~/x") == Path("/home/somebody/x")
    assert local_directory("s3://bucket/x") is None


def test_nobody_reads_the_chunks_any_more_once_a_write_has_failed() -> None:
    """Their memory belongs to the source, which may go away with the error still in hand."""

    class Full:
        has_rename = True

        def put_stream(self, path: str, chunks: Iterator[Buffer], size: int) -> None:
            next(chunks)
            raise StorageError("no space left")

    with pytest.raises(StorageError, match="no space left") as caught:
        write_adapter_files(Full(), "d", WeightsFile(4 << 20, [bytes(4 << 20)]), CONFIG)  # type: ignore[arg-type]  # all it needs
    assert caught.value is not None
    assert not [
        t.name for t in threading.enumerate() if t.name.startswith(("ckpt-sha256", "ckpt-crc"))
    ]


class TestRead:
    def test_directory_and_file_read_alike(self, tmp_path: Path) -> None:
        write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        for path in (tmp_path / "out", str(tmp_path / "out"), tmp_path / "out" / WEIGHTS_NAME):
            config, tensors = read_adapter(path)
            assert config == CONFIG
            assert tensors.keys() == TENSORS.keys()
            assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)

    def test_legacy_weights(self, tmp_path: Path) -> None:
        torch.save(TENSORS, tmp_path / LEGACY_WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        for path in (tmp_path, tmp_path / LEGACY_WEIGHTS_NAME):
            tensors = read_adapter(path)[1]
            assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)

    def test_safetensors_are_preferred(self, tmp_path: Path) -> None:
        write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        torch.save({A: torch.zeros(1)}, tmp_path / "out" / LEGACY_WEIGHTS_NAME)
        assert torch.equal(read_adapter(tmp_path / "out")[1][A], TENSORS[A])

    def test_a_legacy_file_runs_no_code(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self):
                return (Path.write_text, (tmp_path / "owned", "x"))

        torch.save({A: Attack()}, tmp_path / LEGACY_WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        with pytest.raises(DamagedError, match="not a plain dictionary of tensors"):
            read_adapter(tmp_path)
        assert not (tmp_path / "owned").exists()

    def test_a_refused_legacy_file_comes_without_advice_to_run_it(self, tmp_path: Path) -> None:
        class Stranger:
            def __reduce__(self):
                return (print, ("x",))

        torch.save({A: Stranger()}, tmp_path / LEGACY_WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        with pytest.raises(DamagedError, match="convert it to safetensors") as caught:
            read_adapter(tmp_path)
        assert "weights_only" not in str(caught.value)

    @pytest.mark.parametrize("content", [[torch.ones(1)], {A: 3}, {3: torch.ones(1)}])
    def test_a_legacy_file_with_other_content(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / LEGACY_WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        with pytest.raises(DamagedError, match="must hold a dictionary of names to tensors"):
            read_adapter(tmp_path)

    def test_the_adapter_name_is_taken_out_of_keys(self, tmp_path: Path) -> None:
        named = {key.replace(".weight", ".default.weight"): t for key, t in TENSORS.items()}
        save_file(named, tmp_path / WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        assert read_adapter(tmp_path)[1].keys() == TENSORS.keys()

    def test_several_adapters_in_one_file(self, tmp_path: Path) -> None:
        both = {A.replace(".weight", f".{name}.weight"): torch.ones(2, 5) for name in ("x", "y")}
        save_file(both, tmp_path / WEIGHTS_NAME)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
        with pytest.raises(StateError, match="holds several adapters"):
            read_adapter(tmp_path)

    def test_errors_give_the_full_path_and_what_was_expected(self, tmp_path: Path) -> None:
        missing = tmp_path / "gone"
        with pytest.raises(ObjectNotFound, match=f"no adapter at {missing}: expected a directory"):
            read_adapter(missing)
        empty = tmp_path / "empty"
        empty.mkdir()
        expected = f"no adapter weights in {empty}: expected {WEIGHTS_NAME} .*{LEGACY_WEIGHTS_NAME}"
        with pytest.raises(ObjectNotFound, match=expected):
            read_adapter(empty)
        save_file({A: torch.ones(2, 5)}, empty / WEIGHTS_NAME)
        with pytest.raises(ObjectNotFound, match=f"no {CONFIG_NAME} in {empty}"):
            read_adapter(empty)
        for text, problem in (("{", "is not JSON"), ("[]", "must hold a JSON object, got list")):
            (empty / CONFIG_NAME).write_text(text)
            with pytest.raises(DamagedError, match=f"{empty / CONFIG_NAME} {problem}"):
                read_adapter(empty)
        (empty / CONFIG_NAME).write_text(json.dumps(CONFIG))
        (empty / WEIGHTS_NAME).write_bytes(b"\xff" * 64)
        with pytest.raises(DamagedError, match=f"{empty / WEIGHTS_NAME} is not a safetensors file"):
            read_adapter(empty)


class TestDetect:
    def test_what_is_and_what_is_not_an_adapter(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert not is_lora_adapter_dir(out)
        write_adapter_dir(out, TENSORS, CONFIG)
        assert is_lora_adapter_dir(out)
        assert is_lora_adapter_dir(str(out))
        assert is_lora_adapter_dir(out / WEIGHTS_NAME)
        assert not is_lora_adapter_dir(out / CONFIG_NAME)
        (out / WEIGHTS_NAME).rename(out / LEGACY_WEIGHTS_NAME)
        assert is_lora_adapter_dir(out)
        (out / LEGACY_WEIGHTS_NAME).rename(out / "model.safetensors")
        assert not is_lora_adapter_dir(out)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "IA3"}'])
    def test_another_config_is_no_lora(self, tmp_path: Path, text: str) -> None:
        write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
        (tmp_path / "out" / CONFIG_NAME).write_text(text)
        assert not is_lora_adapter_dir(tmp_path / "out")

    def test_weights_without_config(self, tmp_path: Path) -> None:
        save_file({A: torch.ones(2, 5)}, tmp_path / WEIGHTS_NAME)
        assert not is_lora_adapter_dir(tmp_path)


def test_written_tensors_open_with_the_safetensors_library(tmp_path: Path) -> None:
    write_adapter_dir(tmp_path / "out", TENSORS, CONFIG)
    with safe_open(str(tmp_path / "out" / WEIGHTS_NAME), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)


def test_a_writer_that_fails_leaves_what_another_one_finished(tmp_path: Path) -> None:
    store = open_storage("memory://bucket")
    name = tmp_path.name

    def failing(meanwhile: bool) -> Iterator[Buffer]:
        if meanwhile:
            write_adapter_dir(f"memory://bucket/{name}", TENSORS, CONFIG)
        yield b"1234"
        raise OSError(errno.EIO, "the source is gone")

    for meanwhile in (False, True):
        with pytest.raises(OSError, match="the source is gone"):
            write_adapter_dir(f"memory://bucket/{name}", WeightsFile(8, failing(meanwhile)), CONFIG)
        left = {entry.name for entry in store.list(name)}
        assert left == ({CONFIG_NAME, WEIGHTS_NAME} if meanwhile else set())
    write_adapter_dir(tmp_path / "same", TENSORS, CONFIG)
    assert store.read(f"{name}/{WEIGHTS_NAME}") == (tmp_path / "same" / WEIGHTS_NAME).read_bytes()
