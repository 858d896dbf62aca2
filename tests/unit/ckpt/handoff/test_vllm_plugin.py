"""The plug-in for vLLM: exact versions of configured roots, verified, and nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import fake_vllm
from support.published import damage, publish_one

from archon_lora.models import base_fingerprint
from ckpt.errors import ConfigError, StorageError
from ckpt.handoff.base_model import config_hash
from ckpt.handoff.registry import Registry
from ckpt.handoff.resolve import (
    Refused,
    ResolverSettings,
    VersionResolver,
    parse_request,
    parse_roots,
)
from ckpt.handoff.vllm_plugin import register, stable_id
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.types import BaseIdentity

NAME = "run7-v00000001"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish_one(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8, "dtype": "float32"}))
    return directory


@pytest.fixture
def server(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> fake_vllm.Server:
    return start(root, model, tmp_path, monkeypatch)


def start(
    root: str | Path, model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> fake_vllm.Server:
    registry = fake_vllm.install(monkeypatch)
    monkeypatch.setenv("CKPT_VLLM_ROOTS", f"run7={root}")
    monkeypatch.setenv("CKPT_VLLM_CACHE", str(tmp_path / "cache"))
    register()
    return fake_vllm.Server(registry, str(model))


def ask(server: fake_vllm.Server, *names: str) -> list[fake_vllm.LoRARequest | int]:
    async def all_of_them() -> list[fake_vllm.LoRARequest | int]:
        return await asyncio.gather(*(server.resolve(name) for name in names))

    return asyncio.run(all_of_them())


def test_an_exact_version_is_resolved_into_the_cache(
    server: fake_vllm.Server, tmp_path: Path
) -> None:
    (found,) = ask(server, NAME)
    assert isinstance(found, fake_vllm.LoRARequest)
    assert found.lora_name == NAME
    path = Path(found.lora_path)
    assert path == tmp_path / "cache" / NAME
    assert {CONFIG_NAME, WEIGHTS_NAME} <= {file.name for file in path.iterdir()}


@pytest.mark.s3
def test_an_exact_version_is_resolved_from_s3(
    s3, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url()
    name = publish_one(url, options=s3.storage_options)
    (found,) = ask(start(url, model, tmp_path, monkeypatch), name)
    assert isinstance(found, fake_vllm.LoRARequest)
    assert (Path(found.lora_path) / WEIGHTS_NAME).is_file()


def test_many_requests_at_once_pull_once(
    server: fake_vllm.Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_one(root, seed=1)
    pulls = []
    place = Registry.place
    monkeypatch.setattr(
        Registry, "place", lambda self, v, into: pulls.append(v.name) or place(self, v, into)
    )
    found = ask(server, *[NAME, "run7-v00000002"] * 4)
    assert all(isinstance(item, fake_vllm.LoRARequest) for item in found)
    assert sorted(pulls) == [NAME, "run7-v00000002"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("latest", "go on serving"),
        ("run7", "go on serving"),
        ("run7-latest", "go on serving"),
        ("run7:latest", "go on serving"),
        ("run7-v1", "write run7-v00000001"),
        ("run7-v0000001", "write run7-v00000001"),
        ("run7-v000000001", "not a version's name"),
        ("run7-v00000001\n", "not a version's name"),
        ("run7-v0000000\uff11", "not a version's name"),
        ("other-v00000001", "no root is configured"),
        ("../root/adapters/run7-v00000001", "not a version's name"),
        ("/etc/passwd", "not a version's name"),
        ("run7-v00000001/../../x", "not a version's name"),
        ("x" * 5000, "5000 characters"),
        ("", "not a version's name"),
    ],
)
def test_other_names_are_refused_with_the_reason_in_the_log(
    name: str, reason: str, server: fake_vllm.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ask(server, name) == [404]
    (record,) = [r for r in caplog.records if "refused" in r.getMessage()]
    text = record.getMessage()
    assert re.search(reason, text), text
    assert "\n" not in text
    assert len(text) < 600


def test_a_version_that_is_not_there_is_not_found(
    server: fake_vllm.Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, "run7-v00000099") == [404]
    assert "there is no such version" in caplog.text


def test_a_damaged_version_is_not_served(
    server: fake_vllm.Server, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(root, NAME)
    assert ask(server, NAME) == [404]
    assert "CRC32" in caplog.text or "SHA-256" in caplog.text
    assert not (tmp_path / "cache" / NAME).exists()


def test_a_root_that_fails_is_no_missing_version(
    server: fake_vllm.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_: object) -> None:
        raise StorageError("s3://bucket/run7: HTTP 503")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "get", down)
        assert ask(server, NAME) == [500]
    assert "cannot be fetched: s3://bucket/run7: HTTP 503" in caplog.text
    (found,) = ask(server, NAME)
    assert isinstance(found, fake_vllm.LoRARequest)


def test_an_adapter_of_another_base_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fits = base_fingerprint(model)["config_hash"]
    assert config_hash(model) == fits
    publish_one(tmp_path / "root", base=BaseIdentity("theirs", "0" * 64))
    publish_one(tmp_path / "root", base=BaseIdentity("ours, by another name", fits))
    server = start(tmp_path / "root", model, tmp_path, monkeypatch)
    wrong, right = ask(server, NAME, "run7-v00000002")
    assert wrong == 404
    assert isinstance(right, fake_vllm.LoRARequest)
    assert "was trained over 'theirs'" in caplog.text
    assert not (tmp_path / "cache" / NAME).exists()


def test_the_hash_of_a_served_model_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_one(tmp_path / "root", base=BaseIdentity("theirs", "a" * 64))
    monkeypatch.setenv("CKPT_VLLM_BASE_HASH", "b" * 64)
    server = start(tmp_path / "root", "Org/Model-7B", tmp_path, monkeypatch)
    assert ask(server, NAME) == [404]


def test_an_unknown_base_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (found,) = ask(start(root, "Org/Model-7B", tmp_path, monkeypatch), NAME)
    assert isinstance(found, fake_vllm.LoRARequest)
    assert "not compared with it; set CKPT_VLLM_BASE_HASH" in caplog.text


def test_a_pull_that_takes_too_long_goes_on_for_the_next_request(
    server: fake_vllm.Server,
    root: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    go = threading.Event()
    place = Registry.place
    monkeypatch.setattr(
        Registry, "place", lambda self, v, into: go.wait(30) and place(self, v, into)
    )
    monkeypatch.setenv("CKPT_VLLM_TIMEOUT", "0.05")
    monkeypatch.setenv("CKPT_VLLM_CACHE", str(tmp_path / "cache2"))
    register()

    async def twice() -> tuple[object, object]:
        first = await server.resolve(NAME)
        go.set()
        for _ in range(100):
            again = await server.resolve(NAME)
            if again != 500:
                return first, again
            await asyncio.sleep(0.02)
        return first, again

    first, second = asyncio.run(twice())
    assert first == 500
    assert isinstance(second, fake_vllm.LoRARequest)
    assert "no answer within 0.05 s" in caplog.text


def test_resolved_versions_are_never_deleted_however_full_the_cache(
    root: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for seed in (1, 2):
        publish_one(root, seed=seed)
    monkeypatch.setenv("CKPT_VLLM_CACHE_BYTES", "2500")
    server = start(root, model, tmp_path, monkeypatch)
    names = [f"run7-v{number:08d}" for number in (1, 2, 3)]
    assert [type(found) for name in names for found in ask(server, name)] == [
        fake_vllm.LoRARequest,
        fake_vllm.LoRARequest,
        int,
    ]
    assert "no room for run7-v00000003" in caplog.text
    assert all((tmp_path / "cache" / name).is_dir() for name in names[:2])


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = fake_vllm.install(monkeypatch)
    monkeypatch.delenv("CKPT_VLLM_ROOTS", raising=False)
    register()
    assert registry.resolvers == {}


def test_registering_again_and_in_workers_opens_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fake_vllm.install(monkeypatch)
    monkeypatch.setenv("CKPT_VLLM_ROOTS", f"run7={root}")
    monkeypatch.setenv("CKPT_VLLM_CACHE", str(tmp_path / "cache"))
    register()
    register()
    assert list(registry.resolvers) == ["ckpt"]
    assert not (tmp_path / "cache").exists()


def test_importing_the_plug_in_imports_no_vllm() -> None:
    code = (
        "import sys, ckpt.handoff.vllm_plugin as p\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'vllm'], 'vllm'\n"
        "p.register()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_entry_point_is_the_one_that_vllm_looks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    assert EntryPoint("ckpt", value, "vllm.general_plugins").load() is register


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CKPT_VLLM_ROOTS": "/root"}, "run=URL"),
        ({"CKPT_VLLM_ROOTS": "run7="}, "run=URL"),
        ({"CKPT_VLLM_ROOTS": "a=/x a=/y"}, "twice"),
        ({"CKPT_VLLM_ROOTS": "a/b=/x"}, "run name"),
        ({"CKPT_VLLM_ROOTS": "a=relative/path"}, "absolute"),
        ({"CKPT_VLLM_CACHE": ""}, "CKPT_VLLM_CACHE"),
        ({"CKPT_VLLM_CACHE": "relative"}, "absolute path"),
        ({"CKPT_VLLM_CACHE_BYTES": "much"}, "CKPT_VLLM_CACHE_BYTES"),
        ({"CKPT_VLLM_TIMEOUT": "never"}, "CKPT_VLLM_TIMEOUT"),
        ({"CKPT_VLLM_TIMEOUT": "0"}, "above 0"),
        ({"CKPT_VLLM_BASE_HASH": "abc"}, "64 hexadecimal"),
    ],
)
def test_a_wrong_setting_stops_the_server(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fake_vllm.install(monkeypatch)
    for key, value in {"CKPT_VLLM_ROOTS": "a=/x", "CKPT_VLLM_CACHE": "/c", **changes}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=message):
        register()
    assert registry.resolvers == {}


def test_roots_may_be_local_or_remote() -> None:
    text = " a=/data/a\n  b-2=s3://bucket/pre=fix "
    assert parse_roots(text) == {"a": "/data/a", "b-2": "s3://bucket/pre=fix"}


def test_ids_are_the_same_everywhere_and_positive() -> None:
    ids = {stable_id(f"run7-v{number:08d}") for number in range(1000)}
    assert len(ids) == 1000
    assert min(ids) > 0
    assert stable_id(NAME) == stable_id(NAME)


NASTY = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="./\\~%\0\n-_v0123456789run7latest\uff1a\uff0f\uff0e\uff11", max_size=140),
    st.builds(
        lambda a, b, c: a + b + c,
        st.sampled_from(["", "../", "/", "./", "~/", "run7/", "C:\\", "\\\\host\\", "%2e%2e/"]),
        st.sampled_from([NAME, "run7-v00000002", "run70-v00000001", "latest", "root", "cache"]),
        st.sampled_from(["", "/..", "/.", "\0", "\n", " ", "/" + CONFIG_NAME, "\u202e", "é"]),
    ),
    st.binary(max_size=60).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


@example(name=NAME)
@example(name="run70-v00000001")
@given(name=NASTY)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_from_a_request_leads_to_a_path(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.getbasetemp() / "hostile"
    root, cache = home / "root", home / "cache"
    if not root.exists():
        publish_one(root)
    resolver = VersionResolver(
        ResolverSettings(roots={"run7": str(root)}, cache=cache, cache_bytes=10**9)
    )
    try:
        path = resolver.resolve("base", name)
    except Refused:
        path = None
    finally:
        resolver.close()
    # Whatever is asked for: the one version there is, by its exact name, or nothing.
    assert (path is not None) == (name == NAME)
    assert path in {None, cache / NAME}
    left = {str(item.relative_to(home)) for item in home.rglob("*")}
    files = (CONFIG_NAME, WEIGHTS_NAME, "MANIFEST.json")
    mine = {"cache", "cache/.lock", f"cache/{NAME}", *(f"cache/{NAME}/{file}" for file in files)}
    assert {item for item in left if not item.startswith("root")} <= mine


@example(name=NAME)
@example(name="run70-v00000001")
@given(name=st.one_of(NASTY, st.integers(), st.none(), st.binary()))
@settings(max_examples=400, deadline=None)
def test_only_the_exact_form_is_parsed(name: object) -> None:
    try:
        run, number = parse_request(name, {"run7": "/x", "run7-v00000001": "/y"})
    except Refused:
        return
    assert name == f"{run}-v{number:08d}"
    assert run in {"run7", "run7-v00000001"}
