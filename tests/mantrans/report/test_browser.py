"""The page about a run in a headless Chromium, on a desktop and on a phone.

Screenshots are kept in pytest's folder of the run, for somebody to look at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from mantrans.config import Config
from mantrans.report.page import write_page
from mantrans.training.logger import RunLogger
from tests.support.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]
DESKTOP, PHONE = (1280, 900), (390, 844)
LAYERS = ["token_embedding", *(f"blocks.{i}" for i in range(24)), "final_norm"]
KINDS = ["norm_1", "attention.qkv", "attention.projection", "norm_2", "mlp.up", "mlp.down"]


def recorded(folder: Path, speed: float) -> Path:
    """A run of 200 logged steps, with everything that a page can show."""
    Config.from_dict({"training": {"max_steps": 2000}}).save(_made(folder) / "config.yaml")
    with RunLogger(folder, tensorboard=False, quiet=True) as log:
        for i in range(1, 201):
            wave = 1 + 0.1 * math.sin(i)
            layers = {n: wave * (1 + k / 5) / (1 + i / 50) for k, n in enumerate(LAYERS)}
            layers["blocks.7"] = math.inf if i == 90 else layers["blocks.7"]
            log.log(
                10 * i, loss=2 + 6 * math.exp(-i * speed) * wave, learning_rate=1e-3 * wave,
                grad_norm=math.hypot(*layers.values()), grad_norm_by_layer=layers,
                grad_norm_by_kind={n: wave / (k + 1) for k, n in enumerate(KINDS)},
                tokens=10_000 * i, skipped=i // 90,
            )  # fmt: skip
            log.log_timing(10 * i, tokens_per_second=9e4 * wave, share_of_peak=0.4 * wave)
            if i % 20 == 0:
                loss = 2.2 + 6 * math.exp(-i * speed)
                log.log(10 * i, validation_loss=loss, bits_per_byte=loss / 2)
    sample = {"prompt": "Once upon a time", "continuation": " there was a" + "x" * 300}
    report = {"loss": 2.2, "perplexity": 9.0, "samples": [sample], "diversity": {"distinct_1": 0.5}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module", params=["alone", "compared"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [recorded(folder / "a-run", 0.02), recorded(folder / ("a-long-name-" * 5), 0.03)]
    others = runs[1:] if request.param == "compared" else []
    return write_page(runs[0], folder / "page.html", others)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """Nothing complains, and nothing but the page is loaded."""
    yield chromium
    chromium.run("1")  # so that what was said before is noted
    said, loaded = chromium.complaints[:], set(chromium.requests)
    chromium.complaints.clear()
    chromium.requests.clear()
    assert not said
    assert loaded <= {page.as_uri(), "about:blank"}


@pytest.mark.parametrize(
    ("size", "phone", "dark"),
    [(DESKTOP, False, False), (DESKTOP, False, True), (PHONE, True, False), (PHONE, True, True)],
    ids=["desktop", "desktop, dark", "phone", "phone, dark"],
)
def test_curves_visible(
    browser: Browser, page: Path, size: tuple[int, int], phone: bool, dark: bool, tmp_path: Path
) -> None:
    """Every line is drawn within its plot, in a color that is not the paper's; nothing is wider
    than the window, and no label leaves it."""
    browser.open(page, *size, phone=phone, dark=dark)
    wide = browser.run("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= size[0] and wide[1] == size[0], "wider than the window"
    lines = browser.run("""[...document.querySelectorAll('.plot path')].map(path => {
        const a = path.getBoundingClientRect(), p = path.closest('.plot').getBoundingClientRect();
        const style = getComputedStyle(path);
        return {id: path.id, color: style.stroke, within: a.left > p.left - 2
            && a.right < p.right + 2 && a.top > p.top - 2 && a.bottom < p.bottom + 2,
            drawn: a.width > p.width / 2 && parseFloat(style.strokeWidth) > 1}})""")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert len(lines) > 30
    for line in lines:
        assert line["within"] and line["drawn"] and line["color"] not in (paper, "none"), line
    outside = browser.run("""[...document.querySelectorAll('text, li, td, h1')].filter(x => {
        const a = x.getBoundingClientRect();
        return !x.closest('.wide') && a.width && (a.left < 0 || a.right > innerWidth)})
        .map(x => x.textContent)""")
    assert outside == []
    browser.screenshot(tmp_path / "page.png", whole=True)
    print(f"screenshots: {tmp_path}")


def opacities(browser: Browser, title: str) -> dict[str, float]:
    """{what a curve's tooltip says: its opacity} of a figure."""
    return browser.run(f"""Object.fromEntries([...[...document.querySelectorAll('figure')]
        .find(f => f.querySelector('figcaption').textContent.startsWith({json.dumps(title)}))
        .querySelectorAll('.curve')].map(c => [c.querySelector('title').textContent,
            parseFloat(getComputedStyle(c).opacity)]))""")


def bright(browser: Browser, title: str) -> list[str]:
    found = opacities(browser, title)
    return [name.partition(":")[0] for name, opacity in found.items() if opacity == 1]


@pytest.mark.parametrize("phone", [False, True], ids=["mouse", "finger"])
def test_legend_brings_out_its_curve(browser: Browser, page: Path, phone: bool) -> None:
    browser.open(page, *(PHONE if phone else DESKTOP), phone=phone)
    point, title = browser.tap if phone else browser.hover, "Gradient norm by kind"
    entries = ".many figure:nth-of-type(2) li"
    assert bright(browser, title) == KINDS
    for i, kind in enumerate(KINDS):
        point(*browser.center(f"{entries}:nth-child({i + 1})"))
        browser.wait(f"document.querySelectorAll('{entries}:is(:hover, :focus)').length", kind)
        assert bright(browser, title) == [kind]
    assert len(bright(browser, "Gradient norm by layer")) == len(LAYERS), "other figures stay"


def test_legend_by_keys(browser: Browser, page: Path) -> None:
    browser.open(page, *DESKTOP)
    browser.run("document.querySelector('.many figure:nth-of-type(2) li').focus()")
    browser.press("Tab")
    assert bright(browser, "Gradient norm by kind") == [KINDS[1]]


def test_curve_under_the_mouse(browser: Browser, page: Path) -> None:
    """Near a line it stands out, and its tooltip has its name and its last value."""
    browser.open(page, *DESKTOP)
    browser.center(".many figure:nth-of-type(2) .plot")
    place = browser.run("""(() => {
        const path = document.querySelector('.many figure:nth-of-type(2) .j3 path');
        const p = path.getPointAtLength(path.getTotalLength() / 3).matrixTransform(
            path.getScreenCTM());
        return [p.x, p.y]})()""")
    browser.hover(place[0], place[1] + 3)
    browser.wait("document.querySelector('.curve:hover') !== null", "no curve under the mouse")
    assert bright(browser, "Gradient norm by kind") == [KINDS[3]]
    said = next(iter(n for n, o in opacities(browser, "Gradient norm by kind").items() if o == 1))
    assert said == f"{KINDS[3]}: {(1 + 0.1 * math.sin(200)) / 4:.4g} at step 2,000"
