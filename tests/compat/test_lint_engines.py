"""What ``ckpt lint`` says of vLLM and SGLang is what real servers do; skipped without them.

The environment is that of ``support.real_engines``. Adapters that end a server are tried only where
a test may start one (``CKPT_TEST_SGLANG_START``), since each costs a start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.lint_more_rows import MORE
from support.lint_rows import HIDDEN, INNER, ROWS, VOCAB, Adapter, Row
from support.real_engines import MODEL, PROMPT, Server, server_of

from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import Engine, EngineError
from ckpt.handoff.probe import distance
from ckpt.lint import Effect

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.compat, pytest.mark.slow, pytest.mark.timeout(1800)]

EVERY_ROW = {name: row for name, row in {**ROWS, **MORE}.items() if row.base and not row.doubtful}

# What these were trained to compute is not A and B alone, so there is nothing to compare with:
# whether they are taken is.
NOT_COMPARED = {
    *("bias", "dora", "kasa", "lora-bias", "modules-to-save", "pissa", "qalora"),
    *("fused-qkv", "saved-embedding", "stranger"),
}
# Said to be computed wrongly, which they are or would be; the row at hand is refused.
REFUSED_AS_WELL = {
    "vllm": {"alpha-is-nan", "nan", "no-a", "other-sizes"},
    "sglang": {"alpha-is-nan", "bias", "nan", "two-adapters"},
}
# A matter of how the server of this test is started.
OF_THE_START = {"vllm": set(), "sglang": {"head-factors", "rank-17"}}
# Fatal or not, by the module; of the first two the rows at hand are on q_proj, and refused.
NOT_ALWAYS_FATAL = {"other-sizes", "three-dimensions", "lora-bias", "no-a"}


class Base:
    """The served model in fp32, and what it says with a row's adapter added by hand."""

    def __init__(self) -> None:
        self.path = os.environ[MODEL]
        config = transformers.AutoConfig.from_pretrained(self.path)
        sizes = (config.hidden_size, config.intermediate_size, config.vocab_size)
        assert sizes == (HIDDEN, INNER, VOCAB), "serve what `make engines` makes"
        self.alone = self.logprobs({})

    def logprobs(self, deltas: dict[str, torch.Tensor]) -> list[float]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.bfloat16
        ).float()
        with torch.no_grad():
            for name, delta in deltas.items():
                with contextlib.suppress(AttributeError):  # a module that is not there
                    model.get_submodule(name).weight += delta
            rows = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)
        return [float(rows[at, token]) for at, token in enumerate(PROMPT[1:])]


def does(engine: Engine, base: Base, made: Adapter, name: str, path: Path) -> str:
    """``refused``, ``dies``, ``right`` or ``wrong``."""
    try:
        engine.load(name, str(path))
        found = engine.logprobs(PROMPT, name)
    except EngineError:
        return "refused" if alive(engine) else "dies"
    if not alive(engine):
        return "dies"
    want = base.logprobs(made.deltas)
    return "right" if distance(found, want) < 0.3 * distance(base.alone, want) + 0.02 else "wrong"


def alive(engine: Engine) -> bool:
    try:
        engine.logprobs(PROMPT, None)
    except EngineError:
        return False
    return True


def fits(kind: str, name: str, said: Effect | None, done: str) -> bool:
    """Whether what was done is what was said."""
    if said is Effect.REFUSED:
        return done == "refused"
    if said is Effect.DIES:
        return done == "dies" or name in NOT_ALWAYS_FATAL
    if said is Effect.WRONG:
        louder = done == "refused" and name in REFUSED_AS_WELL[kind]
        return done == "wrong" or louder or (name in NOT_COMPARED and done == "right")
    return done == "right" or (name in NOT_COMPARED and done == "wrong")


def chosen(kind: str, *, fatal: bool) -> Iterator[tuple[str, Row]]:
    for name, row in EVERY_ROW.items():
        dies = getattr(row, kind) is Effect.DIES
        if dies is fatal and name not in OF_THE_START[kind]:
            yield name, row


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield from server_of(request.param)


def test_what_is_said_is_what_is_done(server: Server, tmp_path: Path) -> None:
    base, wrong = Base(), []
    rows = dict(chosen(server.kind, fatal=False))
    rows["nan"] = rows.pop("nan")  # last: on vLLM it spoils the next answers, too
    with contextlib.closing(open_engine(f"{server.kind}+{server.url}")) as engine:
        for name, row in rows.items():
            made = row.build()
            served = f"{tmp_path.name}-{name}"
            done = does(engine, base, made, served, made.write(tmp_path / name / made.name))
            said = getattr(row, server.kind)
            if not fits(server.kind, name, said, done):
                wrong.append(f"{name}: said {said}, done {done}")
            with contextlib.suppress(EngineError):
                engine.unload(served)
    assert not wrong, "\n".join(wrong)
    assert len(rows) > 60
    assert server.kind == "sglang" or not dict(chosen(server.kind, fatal=True))


@pytest.mark.parametrize("server", ["sglang"], indirect=True)  # nothing known ends vLLM
def test_what_is_said_to_end_a_server_does(server: Server, tmp_path: Path) -> None:
    rows = dict(chosen(server.kind, fatal=True))
    if server._command is None:
        pytest.skip(f"set CKPT_TEST_{server.kind.upper()}_START: the server will die")
    base, wrong = Base(), []
    with contextlib.closing(open_engine(f"{server.kind}+{server.url}")) as engine:
        for name, row in rows.items():
            made = row.build()
            done = does(engine, base, made, name, made.write(tmp_path / name / made.name))
            if not fits(server.kind, name, Effect.DIES, done):
                wrong.append(f"{name}: {done}")
            server.kill()
            server.start()
            server.ready()
    assert not wrong, "\n".join(wrong)
