"""``ckpt export --layout``: the exact paths that others look at, and the names they take."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from support.publishers import publish
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner

from ckpt import export_layouts
from ckpt.cli_commands import app
from ckpt.errors import AlreadyExists, ConfigError
from ckpt.export_layouts import Layout, check_served_name, default_name, place, write_placed
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, WrittenAdapter
from ckpt.storage import open_storage

VERSION = "run7-v00000001"
FILES = [CONFIG_NAME, WEIGHTS_NAME]


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture
def root(tmp_path):
    """A run of two steps and one version."""
    root = tmp_path / "run7"
    tensors, made = tiny_adapter()
    for step in (90, 120):
        write_step(open_storage(root), step, tensors, export=made)
    assert publish(str(root), "run7") == VERSION
    return root


def tree(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def keys(s3, url: str) -> list[str]:
    """Every key below a URL as another client sees them."""
    prefix = url.partition("://")[2].partition("/")[2]
    with contextlib.closing(s3.client()) as client:
        found = client.list_objects_v2(Bucket=s3.bucket, Prefix=prefix).get("Contents", [])
    return [item["Key"].removeprefix(prefix) for item in found]


class TestPaths:
    @pytest.mark.s3
    @pytest.mark.parametrize(
        ("layout", "use"),
        [
            ("ray", {"dynamic_lora_loading_path": "{out}", "model": f"<base>:{VERSION}"}),
            ("lorax", {"adapter_source": "s3", "adapter_id": f"{{bucket_path}}/{VERSION}"}),
        ],
    )
    def test_versions_on_s3(self, root, s3, layout, use):
        out = s3.url("adapters")
        result = export(root, out, "--layout", layout, "--version", VERSION, "--json")
        assert result.exit_code == 0, result.stderr
        assert keys(s3, out) == [f"/{VERSION}/{name}" for name in FILES]
        shown = json.loads(result.stdout)
        assert shown["out"] == f"{out}/{VERSION}"
        filled = {"out": out, "bucket_path": out.removeprefix("s3://")}
        assert shown["use"] == {key: text.format(**filled) for key, text in use.items()}
        store = open_storage(f"{out}/{VERSION}", s3.storage_options)
        for name in FILES:
            assert store.read(name) == (root / "adapters" / VERSION / name).read_bytes()

    @pytest.mark.s3
    def test_a_plain_directory_on_s3_is_at_the_url_itself(self, root, s3):
        out = s3.url("plain")
        assert export(root, f"{out}/mine/", "--version", VERSION).exit_code == 0
        assert keys(s3, out) == [f"/mine/{name}" for name in FILES]

    @pytest.mark.parametrize("layout", ["ray", "lorax", "nim"])
    def test_the_newest_step_is_named_after_run_and_step(self, root, tmp_path, layout):
        out = tmp_path / "served"
        result = export(root, out, "--layout", layout)
        assert result.exit_code == 0, result.stderr
        assert tree(out) == [f"run7-step-00000120/{name}" for name in FILES]
        assert export(root, out, "--layout", layout, "--step", 90).exit_code == 0
        assert tree(out)[:2] == [f"run7-step-00000090/{name}" for name in FILES]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run7", "served"]

    def test_nim_says_what_to_set(self, root, tmp_path):
        out = tmp_path / "loras"
        shown = json.loads(
            export(root, out, "--layout", "nim", "--version", VERSION, "--json").stdout
        )
        assert shown["use"] == {"NIM_PEFT_SOURCE": str(out), "model": VERSION}
        assert tree(out) == [f"{VERSION}/{name}" for name in FILES]

    def test_a_name_of_one_s_own(self, root, tmp_path):
        result = export(root, tmp_path / "out", "--layout", "ray", "--name", "customer-a")
        assert result.exit_code == 0
        assert tree(tmp_path / "out") == [f"customer-a/{name}" for name in FILES]
        assert "<base>:customer-a" in result.stdout


class TestNames:
    @pytest.mark.parametrize("name", ["run7-v00000012", "customer-a", "a", "x-step-00000120"])
    def test_names_that_work(self, name):
        assert check_served_name(name) == name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("latest", "stands for another adapter tomorrow"),
            ("run7-latest", "stands for another adapter tomorrow"),
            ("PROD", "stands for another adapter tomorrow"),
            ("v1", "a number of 1 digits; pad it to 8"),
            ("run-120", "a number of 3 digits"),
            ("a:b", "must be 1 to 100 letters"),
            ("a/b", "must be 1 to 100 letters"),
            ("../x", "must be 1 to 100 letters"),
            (".hidden", "must be 1 to 100 letters"),
            ("", "must be 1 to 100 letters"),
            ("x" * 101, "must be 1 to 100 letters"),
        ],
    )
    def test_names_that_do_not(self, name, message):
        with pytest.raises(ConfigError, match=message):
            check_served_name(name)

    def test_default_names(self):
        assert default_name("s3://bucket/run7/", 3) == "run7-step-00000003"
        with pytest.raises(ConfigError, match=r"no name can be made of s3://bucket/a\.b"):
            default_name("s3://bucket/a.b", 3)

    def test_what_goes_with_what(self, root, tmp_path):
        out = tmp_path / "out"
        assert "leave --overwrite out" in export(root, out, "--layout", "ray", "--overwrite").stderr
        assert "goes with --layout" in export(root, out, "--name", "x").stderr
        assert export(root, out, "--layout", "ray", "--name", "latest").exit_code == 2
        assert export(root, out, "--layout", "ray", "--format", "dcp").exit_code == 2
        assert export(root, out, "--layout", "tgi").exit_code == 2
        assert not out.exists()


class TestNothingIsReplacedOrConfused:
    @pytest.mark.parametrize("layout", ["ray", "lorax", "nim"])
    def test_a_name_that_is_taken(self, root, tmp_path, layout):
        out = tmp_path / "out"
        arguments = (root, out, "--layout", layout, "--name", "customer-a")
        assert export(*arguments, "--step", 90).exit_code == 0
        before = (out / "customer-a" / WEIGHTS_NAME).read_bytes()
        again = export(*arguments)
        assert again.exit_code == 2
        assert "exists already" in again.stderr
        assert "--name" in again.stderr
        assert "overwrite" not in again.stderr  # which is refused with a layout
        assert (out / "customer-a" / WEIGHTS_NAME).read_bytes() == before

    @pytest.mark.parametrize(("there", "name"), [("ab", "a"), ("a", "ab"), ("a.json", "a")])
    def test_lorax_lists_by_prefix(self, tmp_path, there, name):
        for root in (str(tmp_path / "out"), f"memory://{tmp_path.name}"):
            open_storage(root).put(f"{there}/x" if "." not in there else there, b"x")
            with pytest.raises(AlreadyExists, match="begin alike, and LoRAX would read"):
                place(Layout.lorax, root, name)
            assert place(Layout.lorax, root, "b").url == f"{root}/b"
            assert place(Layout.ray, root, name).url == f"{root}/{name}"

    def test_lorax_is_not_pointed_at_the_versions_of_a_run(self, root):
        # Beside each version lies its claim, whose name begins with the version's.
        with pytest.raises(AlreadyExists, match=r"'run7-v00000001\.claim\.json'"):
            place(Layout.lorax, str(root / "adapters"), VERSION)

    def test_nim_is_local(self):
        with pytest.raises(ConfigError, match="a directory on the server's machine"):
            place(Layout.nim, "s3://bucket/x", "a")

    def test_a_watched_directory_never_has_anything_unfinished(self, tmp_path, monkeypatch):
        out = tmp_path / "loras"
        out.mkdir()
        where = place(Layout.nim, str(out), "customer-a")
        seen = []

        def write(target: str) -> WrittenAdapter:
            Path(target).mkdir()
            for name in FILES:
                seen.append([path.name for path in out.iterdir()])
                (Path(target) / name).write_bytes(b"x")
            return WrittenAdapter((), "")

        write_placed(where, write)
        assert seen == [[], []]
        assert tree(tmp_path) == [f"loras/customer-a/{name}" for name in FILES]

    def test_a_failed_write_leaves_nothing(self, root, tmp_path, monkeypatch):
        def fail(*_args, **_more):
            raise AlreadyExists("no")

        monkeypatch.setattr("ckpt.storage.posix.PosixStorage.rename_dir", fail)
        out = tmp_path / "loras"
        assert export(root, out, "--layout", "nim").exit_code == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run7"]


def test_every_layout_is_in_the_guide():
    guide = (Path(__file__).parents[3] / "docs" / "portable-adapters.md").read_text("utf-8")
    for layout in export_layouts.Layout:
        assert f"--layout {layout.value}" in guide
