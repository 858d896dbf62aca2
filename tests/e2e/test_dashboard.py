"""The pages in a real browser: they render, stay fresh, and can be used by keyboard and phone.

Skipped where there is no Chromium; ``apt-get install -y chromium`` gives one on Debian, and
``CKPT_TEST_CHROMIUM`` names one elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.browser import VARIABLE, Browser, browsing, chromium
from support.serving import READ, serving, tokens
from support.shown_root import RUN, fill, publish
from support.tiny_run import Run

from ckpt import CheckpointManager, Retention
from ckpt.layout import step_name

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium() is None,
        reason=f"no Chromium: apt-get install -y chromium, or {VARIABLE}=/path/to/it",
    ),
]
SAVES = 48
LIVE = "document.getElementById('live').dataset.state === 'on'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(autouse=True)
def plain(browser: Browser) -> Iterator[None]:
    """A wide, light screen; afterwards nothing was complained about, or loaded from elsewhere."""
    browser.screen(1200, 800)
    browser.scheme("light")
    browser.complaints.clear()
    browser.requests.clear()
    yield
    assert browser.complaints == []
    hosts = {urlsplit(url).hostname for url in browser.requests}
    assert hosts <= {"127.0.0.1"}, "a page asked somebody else"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roots") / "run7"
    fill(path, saves=SAVES, layers=3)
    return path


@pytest.fixture(scope="module")
def address(filled: Path) -> Iterator[str]:
    with serving(filled) as client:
        yield str(client.base_url).rstrip("/")


PATHS = (
    "/",
    "/runs/run7",
    "/runs/run7/versions",
    f"/runs/run7/versions/{RUN}-v00000003",
    f"/runs/run7/steps/{step_name(SAVES - 1, 1)}",
    "/runs/other",
)


def ready(browser: Browser, path: str) -> None:
    if f"{RUN}-v" in path:
        browser.until("document.querySelectorAll('table.heat').length === 2")


def test_pages_render_light_and_dark_wide_and_on_a_phone(browser: Browser, address: str) -> None:
    seen = {}
    for path in PATHS:
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            for width, phone in ((1200, False), (360, True)):
                browser.screen(width, 740, phone=phone)
                browser.goto(address + path)
                ready(browser, path)
                assert browser.js("document.querySelector('h1').textContent.length > 0")
                wide = browser.js("document.documentElement.scrollWidth")
                assert wide <= width, f"{path} is {wide} wide on a screen of {width}"
                cut = browser.js(
                    "[...document.querySelectorAll('main *')].filter(e => "
                    "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')"
                    " && !e.closest('.sr') && !e.closest('svg')).map(e => e.className).join()"
                )
                assert cut == "", f"{path} at {width}: {cut}"
            seen[path, scheme] = browser.js("getComputedStyle(document.body).backgroundColor")
        if path == "/runs/other":
            # That it is not there is told by its status, which a browser notes.
            assert all("404" in text for text in browser.complaints)
            browser.complaints.clear()
    for path in PATHS:
        assert seen[path, "light"] == "rgb(245, 244, 240)"
        assert seen[path, "dark"] == "rgb(18, 20, 23)"


CONTRAST = """(selector) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const c = rgb.slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
  };
  const found = document.querySelector(selector);
  let behind = found, ground = [0, 0, 0, 0];
  while (behind && ground[3] === 0) {
    ground = parse(getComputedStyle(behind).backgroundColor);
    if (ground.length === 3) ground.push(1);
    behind = behind.parentElement;
  }
  const a = light(parse(getComputedStyle(found).color)), b = light(ground);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def contrast(browser: Browser, selector: str) -> float:
    """The contrast of an element's text with what is behind it, as WCAG counts it."""
    return browser.js(f"({CONTRAST})({selector!r})")


def test_text_can_be_read_in_both_schemes(browser: Browser, address: str) -> None:
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.goto(f"{address}/runs/run7")
        for selector in (
            "h1",
            ".url",
            ".tile h2",
            ".tile p",
            ".state.committed",
            ".state.damaged",
            ".state.flying",
            ".state.skipped",
            ".why",
            ".sum",
            ".tag",
            ".tabs a:not(.on)",
            "th a",
        ):
            assert contrast(browser, selector) >= 4.5, (scheme, selector)


def test_a_save_and_a_version_arrive_by_themselves(browser: Browser, tmp_path: Path) -> None:
    root = tmp_path / "live"
    run = Run()
    with CheckpointManager(root, run_name="r", retention=Retention(latest=2)) as manager:
        manager.save(0, run.state, publish=True).wait(30)
        manager.save(1, run.state).wait(30)
        with serving(root) as client:
            address = str(client.base_url).rstrip("/")
            browser.goto(f"{address}/runs/live")
            browser.until(LIVE)
            assert browser.js("document.querySelector('.big').textContent") == "1"
            browser.js("document.getElementById('go-step-00000001.w0001').focus()")
            browser.js("window.same = true")
            manager.save(2, run.state).wait(30)
            # Told by an event: the page looks by itself every ten seconds only.
            browser.until("document.querySelector('.big').textContent === '2'", seconds=8)
            assert browser.js("document.getElementById('say').textContent") == "Step 2 is there"
            # The page was not loaded anew, and the keyboard is where it was.
            assert browser.js("window.same") is True
            focused = browser.js("document.activeElement.id")
            assert focused == "go-step-00000001.w0001"
            # What it cost, and that the oldest one was pruned, is told a little later.
            browser.until("document.querySelector('#plot-stall .bars').children.length === 4")
            browser.until("document.body.textContent.includes('pruned')")
            browser.goto(f"{address}/runs/live/versions")
            browser.until(LIVE)
            manager.publish(run.state, step=2).wait(30)
            browser.until("document.body.textContent.includes('r-v00000002')", seconds=8)


def test_the_service_goes_away_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    root = tmp_path / "run7"
    storage = fill(root, saves=4, layers=1, versions=1)
    with serving(root) as client:
        port = client.base_url.port
        browser.goto(f"{str(client.base_url).rstrip('/')}/runs/run7")
        browser.until(LIVE)
        client.close()
    browser.until("document.getElementById('live').dataset.state === 'lost'")
    publish(storage, 2, 1)
    with serving(root, port=port):
        browser.until(LIVE)
        browser.until("document.body.textContent.includes('v2')")
    assert all("ERR_" in text for text in browser.complaints)  # while it was away
    browser.complaints.clear()


def test_everything_is_reached_by_keyboard(browser: Browser, address: str) -> None:
    browser.goto(f"{address}/runs/run7")
    browser.tab()
    assert browser.js("document.activeElement.className") == "skip"
    assert browser.js("document.activeElement.getBoundingClientRect().top >= 0")
    browser.enter()
    assert browser.js("document.activeElement.id") == "main"
    browser.goto(f"{address}/runs/run7")
    seen = []
    for _ in range(80):
        browser.tab()
        what = browser.js(
            "(() => { const a = document.activeElement; const r = a.getBoundingClientRect();"
            "return a === document.body ? null : [a.tagName, a.getAttribute('href') || "
            "a.getAttribute('aria-labelledby') || a.textContent, "
            "getComputedStyle(a).outlineStyle, Math.round(r.top + scrollY)]; })()"
        )
        if what is None:
            break
        seen.append(what)
    assert all(outline != "none" for _tag, _what, outline, _top in seen)
    links = [what for tag, what, *_ in seen if tag == "A"]
    assert links[:5] == ["#main", "/", "/", "/runs/run7", "/runs/run7"]
    assert "/runs/run7/versions" in links
    assert f"/runs/run7/steps/{step_name(SAVES - 1, 1)}" in links
    tops = [top for *_, top in seen[1:]]
    assert tops == sorted(tops), "the focus goes down the page"
    assert any(tag == "SUMMARY" for tag, *_ in seen)
    # A step opens, and its tensors unfold, without a pointer.
    browser.js(f"document.getElementById('go-{step_name(SAVES - 1, 1)}').focus()")
    browser.enter()
    browser.until("document.querySelector('h1').textContent.startsWith('Step')")
    browser.js("document.querySelector('.tensors summary').focus()")
    browser.enter()
    assert browser.js("document.querySelector('.tensors details').open")


def test_what_the_pointer_is_on_is_said_and_heat_maps_have_words(
    browser: Browser, address: str
) -> None:
    browser.goto(f"{address}/runs/run7")
    spot = browser.js(
        "(() => { const g = document.querySelector('#plot-stall g'); "
        "const r = g.querySelector('.hit').getBoundingClientRect();"
        "document.querySelector('#plot-stall').scrollIntoView();"
        "const s = g.querySelector('.hit').getBoundingClientRect();"
        "return [s.left + s.width / 2, s.top + s.height / 2]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
    browser.until("document.querySelector('#plot-stall [data-readout]').textContent !== ''")
    said = browser.js("document.querySelector('#plot-stall [data-readout]').textContent")
    assert said.startswith("step 0: ")
    assert "planning" in said
    path = f"/runs/run7/versions/{RUN}-v00000003"
    browser.goto(address + path)
    ready(browser, path)
    cell = browser.js("document.querySelector('table.heat td').textContent")
    assert float(cell) > 0
    heads = browser.js(
        "[...document.querySelectorAll('table.heat')].map(t => t.caption.textContent).join('|')"
    )
    assert "difference between" in heads


def test_signing_in_and_out_in_a_browser(browser: Browser, filled: Path, tmp_path: Path) -> None:
    with serving(filled, tokens=tokens(tmp_path)) as client:
        address = str(client.base_url).rstrip("/")
        browser.goto(f"{address}/runs/run7")
        browser.until("location.pathname === '/login' && document.getElementById('token') !== null")
        browser.until("document.activeElement.id === 'token'")
        browser.type("not-the-right-one")
        browser.enter()
        browser.until("document.querySelector('[role=alert]') !== null")
        browser.js("document.getElementById('token').focus()")
        browser.type(READ)
        browser.enter()
        browser.until("location.pathname === '/' && document.querySelector('.run') !== null")
        assert browser.js("document.cookie") == ""  # no script can read it
        browser.goto(f"{address}/runs/run7")
        browser.until(LIVE)
        browser.js("document.querySelector('form[action=\"/logout\"] button').click()")
        browser.until("location.pathname === '/login'")
        browser.goto(f"{address}/runs/run7")
        browser.until("location.pathname === '/login'")
    assert all("422" in text for text in browser.complaints), browser.complaints
    browser.complaints.clear()
