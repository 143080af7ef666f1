"""In a real browser: nothing comes from elsewhere, nothing is complained about, all is reached by keyboard, and all fits."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openwork.cli.serve import listen
from tests.web.conftest import hostile_run, id_of, key_of, over, small, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run"]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v / 255 <= .03928 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(linear);
                       return .2126 * r + .7152 * g + .0722 * b };
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                        if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg") || !e.checkVisibility() || e.closest(".unseen")) continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const a = light(parse(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
  }
  return poor }"""
FOCUS = """() => { const e = document.activeElement, s = getComputedStyle(e);
  const name = e.getAttribute("href") || e.id || e.type || "";
  return [e.tagName, name, s.outlineStyle, e.getBoundingClientRect().height > 0] }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium to open pages with: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page over three runs, one of them hostile, one damaged, and their folder."""
    import uvicorn

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENWORK_CACHE", str(folder / "cache"))
        first = small()
        first["recipe"].update(model="resnet20", data="cifar10")
        write_run(folder / "runs" / "good", first, trials=15, log="step 1\n" * 40)
        hostile = hostile_run()
        write_run(folder / "runs" / "hostile", hostile, trials=4, log="<script>alert(1)</script>\x1b[31m")
        write_run(folder / "runs" / "broken", None)
        (folder / "runs" / "broken" / "results.json").write_text("{")
        app = over(folder / "runs")
    app.state.index.refresh()
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", folder / "runs"
        server.should_exit = True
        thread.join(timeout=30)


class Visit:
    """A page of the browser that keeps what it asked for and what was complained about."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page, self.origin = self.context.new_page(), origin
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))

    def open(self, address: str) -> Any:
        answer = self.page.goto(self.origin + address, wait_until="load")
        assert answer.status == 200, address
        return self.page

    def close(self) -> None:
        self.context.close()
        assert self.said == []
        assert self.asked
        assert [url for url in self.asked if not url.startswith((self.origin + "/", "data:image/png;base64,"))] == []


def addresses(folder: Path) -> list[str]:
    good, hostile, broken = (id_of(folder / name) for name in ("good", "hostile", "broken"))
    trials = os.listdir(folder / "hostile" / "trials")
    return [
        "/", f"/runs/{good}", f"/runs/{good}/trials", f"/runs/{good}/trials/{key_of('rigl@0.05', 1)}",
        f"/runs/{hostile}", f"/runs/{hostile}/trials", f"/runs/{hostile}/trials/{trials[0]}", f"/runs/{broken}",
        f"/compare?run={good}&run={hostile}",
        "/?q=nothing&since=x", "/?status=complete",
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1100, "light")])
def test_every_page_fits_reads_well_and_stays_here(browser: Any, site: tuple[str, Path], width: int, scheme: str) -> None:
    origin, folder = site
    visit = Visit(browser, origin, viewport={"width": width, "height": 740}, color_scheme=scheme)
    for address in addresses(folder):
        page = visit.open(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        assert page.evaluate(CONTRAST) == [], address
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert ground == ("rgb(22, 24, 27)" if scheme == "dark" else "rgb(255, 254, 250)")
        page.evaluate("document.querySelectorAll('img').forEach(image => { image.loading = 'eager' })")
        page.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => null)))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
        assert broken == 0, address
        small_targets = page.evaluate(
            "[...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility())"
            ".filter(e => e.getBoundingClientRect().height < 16).length"
        )
        assert small_targets == 0
    visit.close()


def focus_on(page: Any, wanted: str, most: int = 80) -> list[str]:
    """Press Tab until the element that `wanted` selects has the focus; every stop on the way must be seen."""
    stops = []
    for _ in range(most):
        page.keyboard.press("Tab")
        tag, name, outline, there = page.evaluate(FOCUS)
        stops.append(f"{tag} {name}")
        assert outline != "none", stops
        assert there, stops
        if page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
            return stops
    raise AssertionError(f"{wanted} is not reached by Tab: {stops}")


def test_everything_is_reached_by_keyboard(browser: Any, site: tuple[str, Path]) -> None:
    origin, folder = site
    run, key = id_of(folder / "good"), key_of("rigl@0.05", 2)
    visit = Visit(browser, origin, viewport={"width": 1100, "height": 800})
    page = visit.open("/")
    stops = focus_on(page, "a.skip")
    assert len(stops) == 1
    assert page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")  # the skip link shows itself
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    stops = focus_on(page, f"input[value='{run}']")
    assert [stop.split(" ")[1] for stop in stops[:3]] == ["q", "sort", "submit"]
    page.keyboard.press("Space")
    focus_on(page, f"a[href='/runs/{run}']")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/runs/{run}")
    assert page.inner_text("h1") == "resnet20 on cifar10"
    focus_on(page, f"a[href='/runs/{run}/trials/{key}']", 150)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/trials/{key}")
    assert page.inner_text("h1") == "rigl@0.05, seed 2"
    focus_on(page, "summary")
    page.keyboard.press("Enter")
    assert page.is_visible("details pre")
    page.go_back()
    page.go_back()
    focus_on(page, "#q")
    page.keyboard.type("resnet20")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=resnet20*")
    assert page.locator(".runs li").count() == 1
    focus_on(page, f"input[value='{run}']")
    page.keyboard.press("Space")
    focus_on(page, "form[action='/compare'] button")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/compare?run={run}")
    assert page.inner_text("h1") == "Side by side"
    visit.close()


def test_pages_work_without_scripts_and_carry_none(browser: Any, site: tuple[str, Path]) -> None:
    origin, folder = site
    visit = Visit(browser, origin, java_script_enabled=False)
    for address in addresses(folder):
        page = visit.open(address)
        assert page.locator("script").count() == 0
        assert page.locator("h1").count() == 1
    visit.close()


def test_order_and_structure(browser: Any, site: tuple[str, Path]) -> None:
    origin, folder = site
    visit = Visit(browser, origin)
    for address in addresses(folder):
        page = visit.open(address)
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels)), address
        assert page.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])").count() == 0
        assert page.evaluate("document.documentElement.lang") == "en"
        regions = page.evaluate(
            "[...document.querySelectorAll('[role=region], section')].filter(e => !document.getElementById("
            "e.getAttribute('aria-labelledby'))).length"
        )
        assert regions == 0
    visit.close()
