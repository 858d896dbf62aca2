"""The pages over HTTP: what they show, what they escape, who may see them."""

from __future__ import annotations

import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import torch
from support.ranks_busy import small_state
from support.serving import READ, as_, serving, tokens
from support.shown_root import HOSTILE, RUN, fill
from support.steps import write_step, write_writer

from ckpt import CheckpointManager
from ckpt.layout import METRICS, STEPS, segment_path, step_name, writer_path
from ckpt.service import Limits
from ckpt.service.auth import COOKIE
from ckpt.service.limits import Busy
from ckpt.service.listings import Listings
from ckpt.service.pages.heats import QUEUE, Heats
from ckpt.service.pages.timeline import TimelineReader
from ckpt.storage import open_storage

SAVES = 40


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roots") / "run7"
    fill(path, saves=SAVES, layers=2)
    return path


@pytest.fixture(scope="module")
def client(filled: Path):
    with serving(filled) as found:
        yield found


class Checked(HTMLParser):
    """Fails where a page would run or load what is not this service's own, or does not nest."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "rect", "path", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag != "img"
        assert "style" not in values
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "action", "data-load", "data-live", "data-href"):
            target = values.get(name)
            assert target is None or target.startswith(("/", "#", "?")), (tag, target)
            assert target is None or not target.startswith("//")
        if tag == "script":
            assert values.get("src") == "/static/live.js"
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(answer: httpx.Response, status: int = 200) -> str:
    assert answer.status_code == status, answer.text[:400]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    parser = Checked()
    parser.feed(answer.text)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return answer.text


def words(page: str) -> str:
    return " ".join(re.sub(r"<(title|[^>]*)>", " ", page).split())


def test_the_list_of_runs(client: httpx.Client) -> None:
    page = checked(client.get("/"))
    assert 'href="/runs/run7"' in page
    assert f"{RUN}-v00000003" in page


def test_the_timeline_shows_every_state(client: httpx.Client) -> None:
    page = checked(client.get("/runs/run7"))
    text = words(page)
    for word in ("committed 5", "in flight 1", "damaged 1", "failed 1", "skipped 1", "pruned"):
        assert word in text, word
    assert f"step {SAVES} in flight" in text
    assert "has 319 bytes, the manifest says 320" in text
    assert "pinned" in text
    assert "reward" in text
    for key in ("stall", "total", "rate", "lag"):
        assert f'id="plot-{key}"' in page
    assert "waiting for a slot" in text
    assert HOSTILE not in page
    assert "the disk is full &lt;img" in page


def test_pages_of_the_timeline_follow_each_other(filled: Path) -> None:
    storage = open_storage(filled)
    reader = TimelineReader(storage, Listings(storage, dict))
    seen, before = [], None
    while True:
        page = reader.page(before, 7)
        seen += [entry.step for entry in page.entries]
        before = page.before
        if before is None:
            break
    assert seen == list(range(SAVES, -1, -1))


def test_a_step_down_to_shards_and_placements(client: httpx.Client) -> None:
    name = step_name(SAVES - 1, 1)
    page = checked(client.get(f"/runs/run7/steps/{name}"))
    text = words(page)
    assert "shard-00003-of-00004.safetensors" in text
    assert "model.model.layers.0.mlp.down_proj.lora_a.weight" in text
    assert "4 pieces along dimension 0" in text
    assert "[3:4, 0:64]" in text
    assert "4 pieces along dimension 1" in text
    assert "rank 4, alpha 4" in text
    found = checked(client.get(f"/runs/run7/steps/{name}", params={"find": "Q_PROJ.lora_b"}))
    assert "8 of 112" in words(found)
    assert "k_proj.lora" not in found
    none = checked(client.get(f"/runs/run7/steps/{name}", params={"find": HOSTILE}))
    assert "No tensor has that in its name" in none
    second = checked(client.get(f"/runs/run7/steps/{name}", params={"page_number": "2"}))
    assert "page 2 of 2" in words(second)
    for odd in ("0", "99999999999999999999", "-1", "x", "²"):
        checked(client.get(f"/runs/run7/steps/{name}", params={"page_number": odd}))


def test_versions_and_who_serves_them(client: httpx.Client) -> None:
    page = checked(client.get("/runs/run7/versions"))
    text = words(page)
    assert "proven, newest" in text
    assert "proven, 1 behind" in text
    assert "silent" in text
    assert "not known" in text
    assert "answered as the trainer recorded" in text
    assert "passed over grpo-v00000001" in text
    assert "1 lease" in text
    assert "no answer &lt;img" in page
    assert text.count("1 replica") == 2  # a silent sidecar's word does not count


def test_a_version_and_its_heat_maps(client: httpx.Client) -> None:
    name = f"{RUN}-v00000003"
    page = checked(client.get(f"/runs/run7/versions/{name}"))
    assert "eval-box" in page
    assert f"norms?against={RUN}-v00000002" in page
    norms = checked(client.get(f"/runs/run7/versions/{name}/norms"))
    assert norms.count("<td class=") == 14
    assert 'class="h9"' in norms
    apart = checked(
        client.get(f"/runs/run7/versions/{name}/norms", params={"against": f"{RUN}-v00000001"})
    )
    assert apart != norms
    alone = client.get(f"/runs/run7/versions/{name}/norms", headers={"Sec-Fetch-Dest": "document"})
    assert "<!doctype html>" in checked(alone)
    refused = client.get(f"/runs/run7/versions/{name}/norms", params={"against": name})
    assert "does not differ from itself" in checked(refused, 422)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/runs/other", 404),
        ("/runs/run7/steps/step-00000099.w0001", 404),
        ("/runs/run7/steps/etc", 404),
        ("/runs/run7/steps/step-00000020.w0001", 409),
        (f"/runs/run7/versions/{RUN}-v00000099", 404),
        ("/runs/run7/versions/%3Cscript%3E", 404),
        (f"/runs/run7/versions/{RUN}-v00000001/norms?against=x", 404),
        ("/runs/run7?before=x", 422),
    ],
)
def test_what_is_not_there_is_a_page_too(client: httpx.Client, path: str, status: int) -> None:
    page = checked(client.get(path), status)
    assert "<script>" not in page


def test_only_our_own_files_are_static(client: httpx.Client) -> None:
    for name in ("style.css", "live.js", "icon.svg"):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(f"/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
    for name in ("../views.py", "%2e%2e/views.py", "..%2fviews.py", "/etc/passwd", ""):
        assert client.get(f"/static/{name}").status_code in (404, 405), name


def test_hints_that_are_damaged_or_hostile_change_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "run7"
    storage = fill(root, saves=6, layers=1, versions=1)
    for path in (root / METRICS).iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    storage.put(segment_path(1, "aaaa"), b"{}")
    (root / "replicas" / "sync-gpu-1.json").write_bytes(b"<script>")
    with serving(root) as client:
        page = checked(client.get("/runs/run7"))
        assert "Nothing tells what these saves cost" in page
        assert "gpu-1" not in checked(client.get("/runs/run7/versions"))


def test_an_empty_root_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = fill(tmp_path / "broken", saves=3, layers=1, versions=1)
    broken.put(writer_path(2), b"nothing")
    with serving(tmp_path / "empty", tmp_path / "broken") as client:
        page = checked(client.get("/"))
        assert "nothing saved yet" in page
        assert "that writer saved nothing" in page
        assert "No step has been saved here" in checked(client.get("/runs/empty"))
        assert "Nothing has been published" in checked(client.get("/runs/empty/versions"))
        assert "It does not verify" in checked(client.get("/runs/broken"), 409)


def test_steps_that_a_dead_trainer_left_in_flight_are_told_apart(tmp_path: Path) -> None:
    root = tmp_path / "run7"
    storage = fill(root, saves=4, layers=1, versions=1)
    (root / STEPS / ".tmp-00000005-beef0000").mkdir()
    with serving(root) as client:
        assert "in flight 2" in words(checked(client.get("/runs/run7")))
    write_writer(storage, 2, (3, 1))
    write_step(storage, 6, {"model.a": torch.ones(2)}, epoch=2)
    (root / STEPS / ".tmp-00000005-beef0000").rmdir()
    with serving(root) as client:  # a newer writer has begun
        assert "in flight" not in words(checked(client.get("/runs/run7")))


# ---- who may see them


def test_with_tokens_a_browser_is_asked_for_one(tmp_path: Path, filled: Path) -> None:
    with serving(filled, tokens=tokens(tmp_path)) as client:
        for path in ("/", "/runs/run7", f"/runs/run7/versions/{RUN}-v00000001/norms"):
            asked = client.get(path, headers={"Accept": "text/html"})
            assert (asked.status_code, asked.headers["location"]) == (303, "/login")
            assert client.get(path).status_code == 401
        form = checked(client.get("/login"))
        assert 'type="password"' in form
        wrong = client.post("/login", data={"token": "nobody-knows-this-one"})
        assert "That token is not known" in checked(wrong, 422)
        assert "set-cookie" not in wrong.headers
        right = client.post("/login", data={"token": READ})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"]
        assert cookie.startswith(f"{COOKIE}={READ};")
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        page = checked(client.get("/"))
        assert "Sign out" in page
        assert READ not in page
        assert client.get("/login").headers["location"] == "/"
        out = client.post("/logout")
        assert (out.status_code, out.headers["location"]) == (303, "/login")
        assert client.get("/", headers={"Accept": "text/html"}).status_code == 303
        assert checked(client.get("/", headers=as_(READ)))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_site_signs_nobody_in_or_out(
    tmp_path: Path, filled: Path, headers: dict[str, str]
) -> None:
    with serving(filled, tokens=tokens(tmp_path)) as client:
        assert client.post("/login", data={"token": READ}, headers=headers).status_code == 403
        client.post("/login", data={"token": READ})
        assert client.post("/logout", headers=headers).status_code == 403
        assert client.get("/").status_code == 200


def test_guessing_is_slow_and_odd_forms_are_refused(tmp_path: Path, filled: Path) -> None:
    with serving(filled, tokens=tokens(tmp_path)) as client:
        odd = [b"", b"token", b"\xff\xfe", b"a=1&" * 20, b"token=" + b"x" * 5000]
        for body in odd:
            assert client.post("/login", content=body).status_code in (422, 429)
        answers = [client.post("/login", data={"token": "x" * 20}).status_code for _ in range(15)]
        assert answers[-1] == 429
        assert client.get("/", headers=as_(READ)).status_code == 200


def test_pages_cost_what_any_request_costs(filled: Path) -> None:
    limits = Limits(per_second=1.0, burst=3)
    with serving(filled, limits=limits) as client:
        assert [client.get("/").status_code for _ in range(6)][-1] == 429


# ---- heat maps are made one at a time


def test_heat_maps_are_bounded_and_kept() -> None:
    heats = Heats()
    go, calls = threading.Event(), []

    def make(tick):
        calls.append(1)
        tick(0.5)
        go.wait(20)
        return "table"

    assert isinstance(heats.ask(("a",), make), float)
    for number in range(QUEUE - 1):
        heats.ask((str(number),), make)
    with pytest.raises(Busy):
        heats.ask(("one more",), make)
    go.set()
    while isinstance(heats.ask(("a",), make), float):
        threading.Event().wait(0.01)
    assert heats.ask(("a",), make) == "table"
    assert len(calls) <= QUEUE
    heats.close()


@pytest.mark.s3
def test_pages_of_a_root_on_an_object_store(s3, tmp_path: Path) -> None:
    url = s3.url("run7")
    state = small_state()
    with CheckpointManager(url, storage_options=s3.storage_options) as manager:
        for step in (0, 1):
            manager.save(step, state).wait(60)
    storage = open_storage(url, s3.storage_options)
    storage.put(f"{STEPS}/{step_name(2, 1)}/beef0000/shard-00000-of-00001.safetensors", b"x")
    with serving(f"run7={url}", options=s3.storage_options) as client:
        text = words(checked(client.get("/runs/run7")))
        assert "committed 2" in text
        assert "in flight 1" in text
        assert "Stall of the training step" in text
        checked(client.get(f"/runs/run7/steps/{step_name(1, 1)}"))
    write_writer(storage, 2, (1, 1))
    write_step(storage, 2, {"model.a": torch.ones(2)}, epoch=2)
    with serving(f"run7={url}", options=s3.storage_options) as client:
        text = words(checked(client.get("/runs/run7")))
        assert "unfinished 1" in text
        assert "in flight" not in text
