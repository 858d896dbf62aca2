"""Published versions: whole or absent, under numbers that are never used twice."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.publishers import publish, publish_and_die, publish_many
from support.steps import tiny_adapter, write_writer
from support.warm_start import start

from ckpt.checksum import sha256_hex
from ckpt.envelope import unseal
from ckpt.errors import (
    AlreadyExists,
    CommitUnknown,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    NonFiniteError,
    PublishError,
    StorageError,
    Superseded,
)
from ckpt.layout import MANIFEST
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, is_lora_adapter_dir, read_adapter
from ckpt.publish import list_versions, publish_version, read_version
from ckpt.source import MemorySource
from ckpt.storage import Storage, open_storage
from ckpt.storage.faultpoints import POSIX_POINTS
from ckpt.types import BaseIdentity
from ckpt.versions import delete_version, export_version, find_version

THREE = [MANIFEST, CONFIG_NAME, WEIGHTS_NAME]


@pytest.fixture(params=["posix", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A store that renames, and one that cannot."""
    return open_storage(tmp_path if request.param == "posix" else f"memory://{tmp_path.name}")


class Failing:
    """A store of which one operation on one path fails, before or after it took effect."""

    def __init__(
        self, inner: Storage, operation: str, path: str, error: Exception, *, after: bool = False
    ) -> None:
        self._inner = inner
        self._plan = (operation, path, error, after)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        operation, path, error, after = self._plan
        if not re.fullmatch(operation, name):
            return value

        def call(where: str, *args: Any) -> Any:
            if not re.search(path, where):
                return value(where, *args)
            if after:
                value(where, *args)
            raise error

        return call


def release(
    storage: Any, run: str = "run7", *, epoch: int = 1, nan: bool = False, **fields: Any
) -> VersionManifest:
    tensors, export = tiny_adapter(optimizer=False)
    full = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if nan:
        full["layers.0.wq.lora_b.weight"][1, 1] = float("nan")
    arguments: dict[str, Any] = {
        "run": run,
        "export": export,
        "source": MemorySource(full),
        "step": 40,
        "policy_version": 12,
        "epoch": epoch,
        "attempt": "attempt0",
        "base": BaseIdentity("tiny", "ab" * 32),
        **fields,
    }
    return publish_version(storage, **arguments)


def names(storage: Storage, path: str) -> list[str]:
    return [entry.name for entry in storage.list(path)]


class TestPublish:
    def test_a_version_is_a_plain_peft_directory_with_a_manifest(self, storage: Storage) -> None:
        manifest = release(storage, probe={"prompt": [1, 2], "logprobs": [-0.5]})
        assert manifest.name == "run7-v00000001"
        assert names(storage, "adapters") == ["run7-v00000001", "run7-v00000001.claim.json"]
        assert sorted(names(storage, "adapters/run7-v00000001")) == sorted(THREE)
        weights = storage.read(f"adapters/run7-v00000001/{WEIGHTS_NAME}")
        assert manifest.adapter_sha256 == sha256_hex([weights])
        config = json.loads(storage.read(f"adapters/run7-v00000001/{CONFIG_NAME}"))
        assert config == tiny_adapter()[1].peft_config
        assert (manifest.number, manifest.step, manifest.policy_version) == (1, 40, 12)
        assert (manifest.dtype, manifest.epoch, manifest.attempt) == ("bfloat16", 1, "attempt0")
        assert manifest.base == BaseIdentity("tiny", "ab" * 32)
        assert read_version(storage, manifest.name) == manifest

    def test_it_reads_as_an_adapter(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path)
        manifest = release(storage, dtype="float32")
        directory = tmp_path / "adapters" / manifest.name
        assert is_lora_adapter_dir(directory)
        tensors = read_adapter(directory)[1]
        source, export = tiny_adapter(optimizer=False)
        for rule in export.rules:
            assert torch.equal(tensors[rule.key], source[f"model.{rule.source}"] * rule.scale)

    def test_numbers_only_grow(self, storage: Storage) -> None:
        for number in (1, 2, 3):
            assert release(storage).number == number
        delete_version(storage, "run7-v00000003")
        delete_version(storage, "run7-v00000001")
        assert release(storage).number == 4
        assert [entry.number for entry in list_versions(storage) if entry.state == "committed"] == [
            2,
            4,
        ]

    def test_runs_count_apart(self, storage: Storage) -> None:
        assert release(storage, "a").name == "a-v00000001"
        assert release(storage, "a-v2").name == "a-v2-v00000001"
        assert release(storage, "a").name == "a-v00000002"
        assert [entry.name for entry in list_versions(storage, "a")] == [
            "a-v00000001",
            "a-v00000002",
        ]
        assert len(list_versions(storage)) == 3

    def test_a_dead_writer_s_number_is_skipped_for_ever(self, storage: Storage) -> None:
        storage.put_new("adapters/run7-v00000005.claim.json", b"whoever that was")
        assert release(storage).number == 6
        assert find_version(storage, "run7-v00000005").state == "claimed"
        with pytest.raises(NoCheckpoint, match="was claimed but never committed"):
            read_version(storage, "run7-v00000005")

    @pytest.mark.parametrize("unclear", [2, 3])
    def test_claims_of_unknown_fate_cost_numbers_but_not_for_ever(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch, unclear: int
    ) -> None:
        asked: list[str] = []
        put_new = storage.put_new

        def no_answer(path: str, data: Any) -> None:
            asked.append(path)
            if len(asked) <= unclear:
                raise CommitUnknown("no answer")
            put_new(path, data)

        monkeypatch.setattr(storage, "put_new", no_answer)
        if unclear == 2:
            assert release(storage).number == 3
        else:
            with pytest.raises(PublishError, match="stayed open 3 times: no answer"):
                release(storage)
            assert len(asked) == 3

    def test_a_directory_without_its_claim_counts_as_taken(self, storage: Storage) -> None:
        release(storage)
        storage.delete("adapters/run7-v00000001.claim.json")
        assert release(storage).number == 2

    def test_claims_say_whose_they_are(self, storage: Storage) -> None:
        release(storage)
        path = "adapters/run7-v00000001.claim.json"
        claim = unseal(storage.read(path), "ckpt.claim", 1, path)
        assert (claim["name"], claim["attempt"], claim["epoch"]) == (
            "run7-v00000001",
            "attempt0",
            1,
        )

    @pytest.mark.parametrize("run", ["", "../x", "a/b", "-a", "a b", "x" * 101, "é"])
    def test_run_names_are_checked(self, storage: Storage, run: str) -> None:
        with pytest.raises(ConfigError, match="run name must be"):
            release(storage, run)
        assert storage.list("") == []

    def test_a_run_that_used_up_its_numbers(self, storage: Storage) -> None:
        storage.put_new("adapters/run7-v99999999.claim.json", b"the last one")
        with pytest.raises(PublishError, match="has used up its 99999999 version numbers"):
            release(storage)

    def test_an_export_that_cannot_work_takes_no_number(self, storage: Storage) -> None:
        _tensors, export = tiny_adapter()
        with pytest.raises(PublishError, match="the next version of 'run7' was not published"):
            release(storage, source=MemorySource({}), export=export)
        assert storage.list("adapters") == []


FAILURES: list[tuple[str, str]] = [
    ("put(_stream)?", WEIGHTS_NAME),
    ("put", CONFIG_NAME),
    ("list", "writers"),
]


class Watched:
    """A store that lists what it was asked for, and that lets a claim wait."""

    def __init__(self, inner: Storage, *, claim_after: threading.Event | None = None) -> None:
        self._inner = inner
        self._claim_after = claim_after
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(where: str, *args: Any) -> Any:
            self.calls.append((name, where))
            if name == "put_new" and "claim" in where and self._claim_after is not None:
                assert self._claim_after.wait(30), "nothing was read while the number was claimed"
            return value(where, *args)

        return call


class TestTheNextNumber:
    def test_is_claimed_without_a_look_after_the_last_one(self, storage: Storage) -> None:
        first = release(storage)
        watched = Watched(storage)
        assert release(watched, after=first.number).number == 2
        assert watched.calls[0] == ("put_new", "adapters/run7-v00000002.claim.json")
        assert watched.calls.count(("list", "adapters")) == 1  # nobody is above: asked afterwards

    def test_is_above_what_others_have_taken_meanwhile(self, storage: Storage) -> None:
        for _ in range(3):
            release(storage)
        assert release(storage, after=1).number == 4

    def test_is_above_what_others_have_taken_and_deleted_meanwhile(self, storage: Storage) -> None:
        for _ in range(3):
            release(storage)
        for number in (1, 2):
            assert delete_version(storage, f"run7-v{number:08}") is None
        assert release(storage, after=1).number == 4
        taken = [name for name in names(storage, "adapters") if name.endswith(".claim.json")]
        assert "run7-v00000002.claim.json" not in taken

    def test_is_claimed_while_an_object_store_collects_the_bytes(self, tmp_path: Path) -> None:
        tensors, _ = tiny_adapter(optimizer=False)
        read = threading.Event()

        class Source(MemorySource):
            def read(self, file: str, start: int, end: int) -> Any:
                read.set()
                return super().read(file, start, end)

        source = Source({name.removeprefix("model."): t for name, t in tensors.items()})
        storage = open_storage(f"memory://{tmp_path.name}")
        watched = Watched(storage, claim_after=read)
        assert release(watched, source=source).number == 1
        read_version(storage, "run7-v00000001")

    @pytest.mark.s3
    def test_takes_six_requests_on_s3(self, s3: Any) -> None:
        """Three carry the version; three make its number its own and its writer the newest."""
        storage = open_storage(s3.url("requests"), s3.storage_options)
        release(storage)  # probes the store, too
        watched, before = Watched(storage), storage.traffic.requests
        release(watched, after=1)
        assert storage.traffic.requests - before == 6
        order = [where.rpartition("/")[2] for _, where in watched.calls]
        assert order[:2] == ["run7-v00000002.claim.json", "adapters"]
        assert order[2] == WEIGHTS_NAME
        assert sorted(order[3:5]) == [CONFIG_NAME, "writers"]
        assert order[5:] == [MANIFEST]


class TestFailure:
    def check_gone(self, storage: Storage, error: PublishError, cause: type[Exception]) -> None:
        assert "version run7-v00000001 was not published in " in str(error)
        assert isinstance(error.__cause__, cause)
        assert names(storage, "adapters") == ["run7-v00000001.claim.json"]
        assert [entry.state for entry in list_versions(storage)] == ["claimed"]
        assert release(storage).number == 2

    def test_not_finite(self, storage: Storage) -> None:
        with pytest.raises(PublishError, match=r"layers\.0\.wq\.lora_B\.weight") as caught:
            release(storage, nan=True)
        self.check_gone(storage, caught.value, NonFiniteError)

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize(("operation", "path"), FAILURES)
    def test_the_store_fails(
        self, storage: Storage, operation: str, path: str, after: bool
    ) -> None:
        failing = Failing(storage, operation, path, StorageError("no space left"), after=after)
        with pytest.raises(PublishError, match="no space left") as caught:
            release(failing)
        self.check_gone(storage, caught.value, StorageError)

    def test_the_commit_fails(self, storage: Storage) -> None:
        operation, path = ("rename_dir", "tmp") if storage.has_rename else ("put_new", MANIFEST)
        failing = Failing(storage, operation, path, StorageError("gone"))
        with pytest.raises(PublishError, match="gone") as caught:
            release(failing)
        self.check_gone(storage, caught.value, StorageError)

    def test_errors_that_are_not_ours_are_wrapped_too(self, storage: Storage) -> None:
        failing = Failing(storage, "put", CONFIG_NAME, RuntimeError())
        with pytest.raises(PublishError, match="RuntimeError") as caught:
            release(failing)
        self.check_gone(storage, caught.value, RuntimeError)

    def test_a_failed_clean_up_is_logged_and_hides_nothing(
        self, storage: Storage, caplog: pytest.LogCaptureFixture
    ) -> None:
        failing = Failing(storage, "put", CONFIG_NAME, StorageError("first"))
        worse = Failing(failing, "delete_tree", "run7", StorageError("second"))
        with pytest.raises(PublishError, match="first"):
            release(worse)
        assert "cannot remove what is left of version run7-v00000001: second" in caplog.text
        assert all(entry.state != "committed" for entry in list_versions(storage))
        assert release(storage).number == 2

    def test_an_open_commit_is_left_alone(self, tmp_path: Path) -> None:
        storage = open_storage(f"memory://{tmp_path.name}")
        error = CommitUnknown("the answer was lost")
        failing = Failing(storage, "put_new", MANIFEST, error, after=True)
        with pytest.raises(PublishError, match="the answer was lost") as caught:
            release(failing)
        assert caught.value.__cause__ is error
        assert read_version(storage, "run7-v00000001").step == 40

    def test_an_unclear_claim_is_skipped(self, storage: Storage) -> None:
        unclear = CommitUnknown("who knows")
        failing = Failing(storage, "put_new", "v00000001", unclear, after=True)
        assert release(failing).number == 2

    def test_a_writer_that_was_superseded_may_not_publish(self, storage: Storage) -> None:
        write_writer(storage, 1)
        write_writer(storage, 2)
        with pytest.raises(PublishError, match="writer 2 has taken over") as caught:
            release(storage, epoch=1)
        self.check_superseded(storage, caught.value)

    def check_superseded(self, storage: Storage, error: PublishError) -> None:
        assert isinstance(error.__cause__, Superseded)
        assert names(storage, "adapters") == ["run7-v00000001.claim.json"]
        assert release(storage, epoch=2).number == 2


class TestRead:
    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, MANIFEST])
    def test_every_bit_counts(self, storage: Storage, name: str) -> None:
        path = f"adapters/{release(storage).name}/{name}"
        good = storage.read(path)
        for position in range(0, len(good), 41):
            data = bytearray(good)
            data[position] ^= 4
            storage.put(path, bytes(data))
            with pytest.raises(DamagedError, match=name):
                read_version(storage, "run7-v00000001")
        storage.put(path, good)
        read_version(storage, "run7-v00000001")

    def test_a_truncated_or_missing_file(self, storage: Storage) -> None:
        path = f"adapters/{release(storage).name}/{WEIGHTS_NAME}"
        storage.put(path, storage.read(path)[:-1])
        with pytest.raises(DamagedError, match=r"has \d+ bytes, the manifest says"):
            read_version(storage, "run7-v00000001")
        storage.delete(path)
        with pytest.raises(DamagedError, match="is missing"):
            read_version(storage, "run7-v00000001")
        (entry,) = list_versions(storage)
        assert entry.state == "damaged"

    def test_another_version_s_content_under_this_name(self, storage: Storage) -> None:
        release(storage)
        release(storage)
        for name in THREE:
            data = storage.read(f"adapters/run7-v00000001/{name}")
            storage.put(f"adapters/run7-v00000002/{name}", data)
        with pytest.raises(DamagedError, match="is that of version run7-v00000001"):
            read_version(storage, "run7-v00000002")

    @pytest.mark.parametrize("name", ["extra.safetensors", "old.bin", "x.pt"])
    def test_files_that_an_engine_would_load_as_well(self, storage: Storage, name: str) -> None:
        release(storage)
        storage.put(f"adapters/run7-v00000001/{name}", b"x")
        with pytest.raises(DamagedError, match=f"{re.escape(name)} is foreign"):
            read_version(storage, "run7-v00000001")

    def test_a_manifest_that_names_other_files(self, storage: Storage) -> None:
        manifest = release(storage)
        path = f"adapters/{manifest.name}/{MANIFEST}"
        fields = {name: getattr(manifest, name) for name in manifest.__slots__}
        fewer = VersionManifest(**{**fields, "files": manifest.files[:1]})
        storage.put(path, fewer.to_bytes())
        with pytest.raises(DamagedError, match="lists "):
            read_version(storage, manifest.name)

    def test_weights_with_another_sha256(self, storage: Storage) -> None:
        manifest = release(storage)
        fields = {name: getattr(manifest, name) for name in manifest.__slots__}
        other = VersionManifest(**{**fields, "adapter_sha256": "0" * 64})
        storage.put(f"adapters/{manifest.name}/{MANIFEST}", other.to_bytes())
        with pytest.raises(DamagedError, match=f"has SHA-256 {manifest.adapter_sha256}, want 0000"):
            read_version(storage, manifest.name)

    def test_a_directory_that_lost_its_manifest(self, storage: Storage) -> None:
        manifest = release(storage)
        storage.delete(f"adapters/{manifest.name}/{MANIFEST}")
        (entry,) = list_versions(storage)
        if storage.has_rename:  # it appeared with its manifest, so the manifest was lost
            assert (entry.state, entry.manifest) == ("damaged", None)
            with pytest.raises(DamagedError, match=f"has no {MANIFEST}"):
                read_version(storage, manifest.name)
        else:  # its writer may be at work
            assert entry.state == "claimed"

    @pytest.mark.parametrize("name", ["run7-v00000009", "run7", "latest", "run7-v9"])
    def test_names_that_are_not_there(self, storage: Storage, name: str) -> None:
        release(storage)
        with pytest.raises(NoCheckpoint, match=f"no version '{name}'"):
            read_version(storage, name)

    @pytest.mark.parametrize("name", ["../run7-v00000001", "/etc", "", "a/b"])
    def test_names_that_could_leave_the_root(self, storage: Storage, name: str) -> None:
        with pytest.raises(ConfigError, match="version name must be"):
            read_version(storage, name)


class TestDelete:
    def test_a_deleted_version_is_gone(self, storage: Storage) -> None:
        release(storage)
        release(storage)
        delete_version(storage, "run7-v00000001")
        assert names(storage, "adapters") == ["run7-v00000002", "run7-v00000002.claim.json"]
        with pytest.raises(NoCheckpoint):
            find_version(storage, "run7-v00000001")

    def test_the_highest_claim_stays(self, storage: Storage) -> None:
        release(storage)
        delete_version(storage, "run7-v00000001")
        assert names(storage, "adapters") == ["run7-v00000001.claim.json"]
        assert release(storage).number == 2
        delete_version(storage, "run7-v00000001")  # now only a claim
        assert names(storage, "adapters") == ["run7-v00000002", "run7-v00000002.claim.json"]

    def test_what_is_not_there(self, storage: Storage) -> None:
        with pytest.raises(NoCheckpoint):
            delete_version(storage, "run7-v00000001")


class TestExport:
    def test_a_copy_has_the_same_bytes_and_no_manifest(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        manifest = release(storage)
        copied, written = export_version(storage, manifest.name, tmp_path / "out")
        assert copied == manifest
        assert written.sha256 == manifest.adapter_sha256
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(THREE[1:])
        for name in THREE[1:]:
            original = storage.read(f"adapters/{manifest.name}/{name}")
            assert (tmp_path / "out" / name).read_bytes() == original
        assert load_file(tmp_path / "out" / WEIGHTS_NAME)
        with pytest.raises(AlreadyExists):
            export_version(storage, manifest.name, tmp_path / "out")

    def test_a_damaged_version_is_not_copied(self, storage: Storage, tmp_path: Path) -> None:
        path = f"adapters/{release(storage).name}/{WEIGHTS_NAME}"
        storage.put(path, storage.read(path)[:-1] + b"\x7f")
        with pytest.raises(DamagedError):
            export_version(storage, "run7-v00000001", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
class TestKill:
    """A publisher killed at any moment leaves a whole version or none, and no name twice."""

    @pytest.mark.parametrize("point", POSIX_POINTS)
    def test_posix(self, tmp_path: Path, point: str) -> None:
        self.kill_at_every_pass(point, lambda nth: str(tmp_path / str(nth)), None)

    @pytest.mark.s3
    @pytest.mark.parametrize("point", ["object.put.before", "object.put.after"])
    def test_s3_put(self, s3: Any, point: str) -> None:
        urls = [s3.url(f"kill-{nth}") for nth in range(5)]
        self.kill_at_every_pass(point, lambda nth: urls[nth], s3.storage_options)

    @pytest.mark.s3
    @pytest.mark.parametrize("point", ["object.put_new.before", "object.put_new.after"])
    def test_s3_put_new(self, s3: Any, point: str) -> None:
        urls = [s3.url(f"kill-{nth}") for nth in range(5)]
        self.kill_at_every_pass(point, lambda nth: urls[nth], s3.storage_options)

    def kill_at_every_pass(self, point: str, url_of: Any, options: dict[str, Any] | None) -> None:
        kills = 0
        for nth in range(1, 5):
            url = url_of(nth)
            child = start(publish_and_die, url, "run7", f"{point}:{nth}=kill", options)
            child.join(120)
            assert child.exitcode in (0, -signal.SIGKILL)
            if child.exitcode == 0:
                break  # the publisher passes that point less often
            kills += 1
            self.check(open_storage(url, options))
        assert kills

    def check(self, storage: Storage) -> None:
        taken = list_versions(storage)
        for entry in taken:
            assert entry.state in ("committed", "claimed")
            if entry.state == "committed":
                read_version(storage, entry.name)
        after = release(storage)
        assert after.number == len(taken) + 1
        read_version(storage, after.name)


class TestRace:
    def check(self, storage: Storage, groups: list[list[str]]) -> None:
        published = [name for group in groups for name in group]
        assert len(set(published)) == len(published) == 12
        for group in groups:
            assert group == sorted(group)
        committed = [entry for entry in list_versions(storage) if entry.state == "committed"]
        assert sorted(published) == [entry.name for entry in committed]
        for name in published:
            read_version(storage, name)

    @pytest.mark.slow
    def test_processes_never_get_the_same_number(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        go, results = context.Event(), context.Queue()
        workers = [
            start(publish_many, str(tmp_path), "run7", 4, go, results, slot=number, daemon=True)
            for number in range(3)
        ]
        go.set()
        try:
            groups = [results.get(timeout=120) for _ in workers]
        finally:
            for worker in workers:
                worker.join(10)
                worker.kill()
        self.check(open_storage(tmp_path), groups)

    def race_threads(self, url: str, options: dict[str, Any] | None) -> None:
        def work(_index: int) -> list[str]:
            return [publish(url, "run7", seed, options) for seed in range(3)]

        with ThreadPoolExecutor(4) as pool:
            groups = list(pool.map(work, range(4)))
        self.check(open_storage(url, options), groups)

    def test_threads_never_get_the_same_number(
        self, tmp_path: Path, frequent_switches: None
    ) -> None:
        self.race_threads(str(tmp_path), None)

    @pytest.mark.s3
    def test_on_s3(self, s3: Any) -> None:
        self.race_threads(s3.url("race"), s3.storage_options)


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads change places as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.s3
def test_publish_on_s3(s3: Any) -> None:
    storage = open_storage(s3.url("publish"), s3.storage_options)
    manifest = release(storage)
    assert sorted(names(storage, f"adapters/{manifest.name}")) == sorted(THREE)
    assert read_version(storage, manifest.name) == manifest
    with pytest.raises(PublishError):
        release(storage, nan=True)
    assert [entry.state for entry in list_versions(storage)] == ["committed", "claimed"]
    assert names(storage, "adapters/run7-v00000002") == []
