"""The documents are complete: links lead somewhere, errors and public names are described."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from ckpt.storage.faultpoints import _ACTIONS as ACTIONS
from ckpt.storage.faultpoints import POINTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("**/*.md"), *ROOT.glob("docker/**/*.md")])
LINK = re.compile(r"!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text("utf-8"))


def links(path: Path) -> list[str]:
    """The links of a page that lead into this repository."""
    return [link for link in LINK.findall(prose(path)) if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """The names that a page's headings get, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(path)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    repeated = {f"{name}-{n}" for name, times in found.items() for n in range(1, times + 1)}
    return set(found) | repeated


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](b.md) [y](#a-b) [z](#c) [w](a.md#a-b)\n```\n[v](no.md)\n```\n")
    assert broken(page) == ["b.md", "#c"]


def test_pages_that_code_names_are_there() -> None:
    """Messages and docstrings send people to pages; a page that moved must be found here."""
    kinds = {".py", ".sh", ".toml", ".yaml", ".ini", ".mk", ""}
    found = {}
    for folder in (*(ROOT / name for name in ("ckpt", "archon_lora", "examples", "docker")), ROOT):
        files = folder.glob("*") if folder == ROOT else folder.rglob("*")
        for path in files:
            if path.is_file() and path.suffix in kinds and not path.name.startswith("."):
                text = path.read_text("utf-8")
                found |= dict.fromkeys(re.findall(r"docs/[\w/-]+\.md(?:#[\w-]+)?", text), path)
    assert len(found) > 5
    gone = {}
    for link, path in found.items():
        file, _, anchor = link.partition("#")
        there = (ROOT / file).exists() and (not anchor or anchor in anchors(ROOT / file))
        if not there:
            gone[link] = named(path)
    assert gone == {}


def test_decisions_are_all_in_their_index() -> None:
    listed = {link.partition("#")[0] for link in links(DOCS / "decisions" / "README.md")}
    assert {p.name for p in (DOCS / "decisions").glob("[0-9]*.md")} <= listed


def test_every_page_is_reached_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page))
        inside = [t for t in targets if t.suffix == ".md" and DOCS in t.parents]
        waiting += [target for target in inside if target.exists()]
    assert sorted(map(named, set(DOCS.glob("**/*.md")) - reached)) == []


def test_the_index_itself_names_every_page() -> None:
    """Decisions aside, which have an index of their own."""
    direct = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    pages = {*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")} - {DOCS / "README.md"}
    assert sorted(map(named, pages - direct)) == []


# -- errors ------------------------------------------------------------------------------------


def error_names() -> set[str]:
    """Every class in the code, imported or not, that derives from one of our two roots."""
    parents: dict[str, set[str]] = {}
    for package in ("ckpt", "archon_lora"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    parents.setdefault(node.name, set()).update(bases)
    found = {"CkptError", "ArchonLoraError"}
    while new := {name for name, bases in parents.items() if bases & found} - found:
        found |= new
    return found


def error_rows() -> dict[str, list[str]]:
    """The rows of the tables under "Errors" by the error's name: the other cells."""
    text = (DOCS / "failure-model.md").read_text("utf-8")
    section = text.partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_every_error_says_what_it_means_and_what_to_do() -> None:
    rows, names = error_rows(), error_names()
    assert len(names) > 40
    assert names - rows.keys() == set(), "not in docs/failure-model.md"
    assert rows.keys() - names == set(), "no such error"
    assert [name for name, cells in rows.items() if len(cells) != 2 or not all(cells)] == []


# -- faults ------------------------------------------------------------------------------------


def keys_of(path: Path, table: str) -> set[str]:
    """The keys of a dictionary that a module defines."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        if getattr(target, "id", None) == table:
            return {ast.literal_eval(key) for key in node.value.keys}
    raise LookupError(f"{path} has no {table}")


def test_every_fault_of_the_matrix_is_in_the_failure_model() -> None:
    text = (DOCS / "failure-model.md").read_text("utf-8")
    faults = ROOT / "tests" / "faults"
    section = text.partition("\n## How the cells work\n")[2]
    told = set(re.findall(r"`([^`\n]+)`", section))
    assert {name for name in told if re.match(POINT, name)} == POINTS
    assert f"=point[:nth]={'|'.join(ACTIONS)}`" in section
    kinds = keys_of(faults / "test_damaged_files.py", "DAMAGES")
    kinds |= keys_of(faults / "test_broken_store.py", "HOW")
    assert len(kinds) > 12
    assert kinds - told == set(), "not in docs/failure-model.md"
    files = {path.name for path in faults.glob("test_*.py")}
    assert files == {name for name in told if name.startswith("test_")}


POINT = r"(posix|object|commit|upload|job)\.[a-z_.]+$"


# -- the API page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_up_to_date(make_api: ModuleType) -> None:
    """That every public name has a docstring is part of it: without one no page is made."""
    assert make_api.page() == make_api.TARGET.read_text("utf-8"), "run: python docs/make_api.py"
    for package in make_api.PACKAGES:
        assert f"\n## {package}\n" in make_api.page()


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of ours that a page's Python blocks import."""
    found = set()
    for code in re.findall(
        r"^```python[^\n]*\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        try:
            tree = ast.parse(code)
        except SyntaxError:  # an excerpt, whose lines are indented
            tree = ast.parse("\n".join(line for line in code.splitlines() if line[:1] in "fi"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {(node.module, alias.name) for alias in node.names}
    return {(home, name) for home, name in found if home.split(".")[0] in ("ckpt", "archon_lora")}


def test_what_pages_import_stands_on_the_api_page() -> None:
    headings = set(HEADING.findall((DOCS / "api.md").read_text("utf-8")))
    found = {pair for path in PAGES for pair in imported(path)}
    assert {("ckpt.handoff", "Handover"), ("ckpt.client", "Client")} <= found
    missing = [f"{m}.{n}" for m, n in found if not {n, f"{m}.{n}"} & headings]
    assert [name for name in missing if name.rpartition(".")[2] not in error_names()] == []


def test_a_name_without_a_docstring_makes_no_page(make_api: ModuleType) -> None:
    def bare(a: int) -> None: ...

    with pytest.raises(LookupError, match="'bare' has no docstring"):
        list(make_api.entry("bare", bare))
    bare.__doc__ = "Told."
    assert "bare(a: int) -> None\n\n    Told." in "".join(make_api.entry("bare", bare))


EXAMPLES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for package in ("ckpt", "archon_lora")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(importlib.import_module(module))
    assert (done.failed, done.attempted > 0) == (0, True)
    text = (ROOT / module.replace(".", "/")).with_suffix(".py")
    text = text if text.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    assert "doctest: +SKIP" not in text.read_text("utf-8")


# -- policies ----------------------------------------------------------------------------------


def test_policies_are_policies() -> None:
    """Each JSON block of the how-to for S3 parses and grants what its heading says, no more."""
    text = (DOCS / "howto" / "s3.md").read_text("utf-8")
    policies = {
        part.partition("\n")[0]: json.loads(match[1])
        for part in text.split("\n### ")[1:]
        if (match := re.search(r"^```json\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
    }
    assert list(policies) == ["Trainer", "Sidecar", "Service", "Reader"]
    granted = {
        name: {
            (action, resource.removeprefix("arn:aws:s3:::bucket"))
            for statement in policy["Statement"]
            for action in statement["Action"]
            for resource in statement["Resource"]
        }
        for name, policy in policies.items()
    }
    for name, pairs in granted.items():
        assert {("s3:GetObject", "/prefix/*"), ("s3:ListBucket", "")} <= pairs, name
        assert all(r.startswith("/prefix/") for a, r in pairs if "Object" in a), name
    writable = {
        name: {r for a, r in pairs if a in ("s3:PutObject", "s3:DeleteObject")}
        for name, pairs in granted.items()
    }
    assert writable["Reader"] == set()
    assert writable["Sidecar"] == {"/prefix/leases/*", "/prefix/replicas/*"}
    assert writable["Trainer"] == {"/prefix/*"}
    assert not {"/prefix/steps/*", "/prefix/writers/*"} & writable["Service"]
