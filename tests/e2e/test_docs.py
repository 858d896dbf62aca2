"""Every code block of the documents runs as it is printed, or stands in a list with the reason.

What running means for each kind of block, and which commands are held to their parser alone, is
told in :mod:`support.documents`; what a page's blocks find, in :mod:`support.scenes`.
"""

from __future__ import annotations

import random
import re
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.documents import CHECKED, COMMANDS, matches
from support.documents import run_document as run
from support.pages import ROOT, Scene, Stage, blocks_of, named
from support.scenes import SCENES

PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md")]
    if any(block.kind != "text" for block in blocks_of(path))
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

ENGINE = "a real engine, which `make engines` installs and starts with tests/engines/start-*.sh"
CONTAINERS = "needs a container engine; tests/unit/test_docker.py holds the files to the code"

NOT_RUN: dict[tuple[str, str], str] = {
    ("docs/dashboard.md", "apt-get install -y chromium          # Debian; or CKPT_TEST_CHROMIUM="
     "/path/to/chromium"): "installs a system's package, and runs tests that run by themselves",
    ("docs/engine.md", "import torch"): "run twice by tests/unit/archon_lora/engine/test_guide.py",
    ("docs/engines.md", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora \\"):
        ENGINE,
    ("docs/engines.md", "tests/engines/install.sh /srv/engines"): ENGINE,
    ("docs/engines.md", "CKPT_TEST_VLLM_PYTHON=/srv/engines/vllm/bin/python pytest "
     "tests/compat/test_vllm_plugin.py"): ENGINE,
    ("docs/howto/sglang.md", "python -m sglang.launch_server --model-path MODEL --enable-lora "
     "--max-lora-rank 16 \\"): ENGINE,
    ("docs/howto/vllm.md", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora \\"):
        ENGINE,
    ("docs/sync.md", "pip install .    # in a checkout of this project"): ENGINE,
    ("docs/sync.md", "CKPT_TEST_VLLM_PYTHON=venv-vllm/bin/python CKPT_TEST_ENGINE_MODEL=DIR pytest "
     "tests/compat/test_vllm_plugin.py"): ENGINE,
    ("docker/README.md", "python3 -c 'import secrets; print(\"admin\", secrets.token_urlsafe(32), "
     "\"me\")' > docker/tokens"): CONTAINERS,
    ("docker/README.md", "docker compose -f docker/compose.yaml up --build --detach"): CONTAINERS,
    ("docker/README.md", "docker compose -f docker/compose.yaml --profile engine up --build"):
        CONTAINERS,
    ("docker/README.md", "docker build -f docker/Dockerfile --target trainer -t archon-lora ."):
        CONTAINERS,
    ("docker/README.md", "buildah bud -f docker/Dockerfile --target trainer -t "
     "localhost/archon-lora:latest ."): CONTAINERS,
}  # fmt: skip
"""Blocks by page and first line, and why they are not run."""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Stage:
    """A folder of a document's own; what it draws and imports is taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    # What examples draw must not depend on, or change, what other tests draw.
    drawn, before = random.getstate(), set(sys.modules)
    with torch.random.fork_rng(), warnings.catch_warnings(), ExitStack() as running:
        torch.manual_seed(0)
        yield Stage(tmp_path, monkeypatch, running, request.getfixturevalue)
    random.setstate(drawn)
    for module in set(sys.modules) - before:
        if module.partition(".")[0] == "areal":
            del sys.modules[module]


def left_out(page: str) -> frozenset[str]:
    return frozenset(first for name, first in NOT_RUN if name == page)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_blocks_run_as_printed(path: Path, stage: Stage) -> None:
    page = named(path)
    run(path, stage, SCENES.get(page, Scene()), left_out(page))


def test_lists_name_blocks_that_there_are() -> None:
    """Each one block: a list with something stale in it would hide a new block."""
    firsts = {named(path): [block.first for block in blocks_of(path)] for path in PAGES}
    assert [key for key in NOT_RUN if firsts.get(key[0], []).count(key[1]) != 1] == []
    assert SCENES.keys() <= firsts.keys()
    prepared = [(page, first) for page, scene in SCENES.items() for first in scene.before]
    assert [key for key in prepared if firsts[key[0]].count(key[1]) != 1] == []
    assert all(NOT_RUN.values())
    assert {words.split()[0] for words in CHECKED} <= COMMANDS.keys()


def test_text_is_no_code() -> None:
    """A block that is called text is not run; the API page's are docstrings."""
    code = re.compile(
        r"^(\$ |(ckpt|archon-lora|pip|python3?|torchrun|import|from|export) )", re.MULTILINE
    )
    found = {
        (named(path), block.line)
        for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md")]
        for block in blocks_of(path)
        if block.kind == "text" and code.search(block.text) and path.name != "api.md"
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```ruby\nputs 1\n```\n", "'ruby' is not run"),
        ("```sh\nkubectl get pods\n```\n", "kubectl is not run"),
        ("```\nckpt ls nowhere\n```\n", "ended with 3"),
        ("```sh\nckpt ls . --no-such-option\n```\n", "ended with 2"),
        ("```console\n$ ckpt --version  # exits 0\nanother 9.9\n```\n", "said"),
        ("```sh\nexport CKPT_NO_SUCH_VARIABLE=1\n```\n", "nothing reads CKPT"),
        ("```sh\npip install 'archon-lora[none]'\n```\n", "no extra"),
        ("```sh\npip install archon_lora_tools\n```\n", "not understood"),
        ("```sh\nmake tea\n```\n", "no target tea"),
        ("```sh\npython -m benchmarks --only nothing\n```\n", "ended with 2"),
        ("```sh\ntorchrun --nproc-per-node 2 examples/peft_loop.py --none\n```\n", "ended with 2"),
        ("```toml\n[prune]\nkeep = 3\n```\n", "keep"),
        ("```python of examples/peft_loop.py\nno = such(line)\n```\n", "has no line"),
        ("```python\nassert 1 == 2\n```\n", "assert 1 == 2"),
    ],
)
def test_a_block_that_is_wrong_is_found(
    tmp_path: Path, stage: Stage, text: str, complaint: str
) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(AssertionError) as caught:
        run(path, stage, Scene(), frozenset())
    entry = caught.traceback[-1]
    assert complaint in f"{caught.value} {entry.statement if entry.path == path else text}"


def test_a_listed_block_is_left_out(tmp_path: Path, stage: Stage) -> None:
    path = tmp_path / "page.md"
    path.write_text("```sh\nkubectl get pods\n```\n```python\nx = 1\n```\n")
    run(path, stage, Scene(), frozenset({"kubectl get pods"}))
    assert stage.names["x"] == 1


def test_outputs_are_compared() -> None:
    assert matches("a ... c\n", "a b\n c")
    assert not matches("a ... c\n", "a b d")
    assert matches("step 3  1.2 kB  a79b…  kept\n", "step 40 17 MB ffff kept", shaped=True)
    assert not matches("step 3  kept\n", "step 40  gone", shaped=True)
