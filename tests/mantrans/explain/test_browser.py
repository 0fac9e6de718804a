"""The page in a headless Chromium, as a person uses it: by mouse, by keys and by finger.

Screenshots are kept in pytest's folder of the run, for somebody to look at.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mantrans.cli import main
from tests.support.browser import CHROMIUM, Browser
from tests.support.explained import page_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a tiny model, made by the command in an empty folder."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["explain", "--output", str(folder)]) == 0
    (found,) = folder.glob("*.html")
    return found


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    return page_data(page)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """On a desktop; a test may open the page otherwise. Nothing complains, nothing is loaded."""
    chromium.open(page, *DESKTOP)
    yield chromium
    chromium.run("1")  # so that what was said before is noted
    said, loaded = chromium.complaints[:], set(chromium.requests)
    chromium.complaints.clear()
    assert not said
    assert loaded <= {page.as_uri(), "about:blank"}


def text(browser: Browser, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")


def number(value: float, digits: int = 3) -> str:
    """As the page writes it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        shown = f"{mantissa}e{int(exponent)}"
    else:
        shown = f"{float(f'{value:.{digits}g}'):.15g}"
    return shown.replace("-", "−")


def moment_of(data: dict[str, Any], layer: str, phase: str) -> int:
    return next(
        i for i, m in enumerate(data["moments"])
        if m["phase"] == phase and m["box"] is not None
        and data["boxes"][m["box"]]["layer"] == layer
    )  # fmt: skip


def go(browser: Browser, address: str) -> None:
    browser.run(f"location.hash = '{address}'")
    phase = address.partition("/")[2]
    title = f"document.querySelector('#box .phase').textContent.startsWith('{phase.title()}')"
    browser.wait(title, address)


@pytest.mark.parametrize(
    ("size", "phone", "dark"),
    [(DESKTOP, False, False), (DESKTOP, False, True), (PHONE, True, False), (PHONE, True, True)],
    ids=["desktop", "desktop, dark", "phone", "phone, dark"],
)
def test_all_moments_by_keys(
    browser: Browser, page: Path, data: dict[str, Any], size: tuple[int, int], phone: bool,
    dark: bool, tmp_path: Path,
) -> None:  # fmt: skip
    """The arrow key moves through forward, backward and update; what is alive is told."""
    browser.open(page, *size, phone=phone, dark=dark)
    browser.screenshot(tmp_path / "top.png")
    titles = []
    for i, moment in enumerate(data["moments"]):
        if i:
            browser.press("ArrowRight")
        titles.append(text(browser, "#box h2"))
        alive = f"{moment['activations']:,} numbers of activations, {moment['gradients']:,} of grad"
        assert alive in text(browser, "#time"), i
        assert browser.run("document.querySelectorAll('#map [aria-current]').length") == 1
        wide = browser.run("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= size[0] and wide[1] == size[0], f"moment {i}: wider than the window"
        if moment["box"] is not None:
            box = data["boxes"][moment["box"]]
            for name in moment["functions"]:
                source = data["functions"][name]["source"]
                assert source.splitlines()[0] in text(browser, "#box"), i
            pairs = [p for part in ("inputs", "outputs") for p in box[part]]
            for pair in pairs:
                array = data["arrays"][pair["value"]]
                shown = f"{number(array['least'])} to {number(array['most'])}"
                assert shown in text(browser, "#box"), (i, pair["name"])
            errors = [p["error"] for p in pairs if p["error"]]
            errors += [data["parameters"][name]["error"] for name in box["parameters"]]
            for error in errors:
                assert number(error["absolute"], 2) in text(browser, "#box"), i
        if i % 7 == 0:
            browser.screenshot(tmp_path / f"moment {i}.png")
    assert all(titles) and len(titles) == 2 * len(data["boxes"]) + 1
    assert titles[: len(data["boxes"])] == titles[-2 : len(data["boxes"]) - 1 : -1]
    browser.press("ArrowRight")
    assert text(browser, "#box h2") == titles[-1], "the last moment is the last"
    browser.press("Home")
    assert text(browser, "#box h2") == titles[0]
    browser.press("End")
    browser.press("ArrowLeft")
    assert text(browser, "#box h2") == titles[-2]
    print(f"screenshots: {tmp_path}")


def cells(data: dict[str, Any], index: int) -> np.ndarray:
    array = data["arrays"][index]
    values = np.frombuffer(base64.b64decode(array["data"]), "<f4")
    return values.reshape(array["planes"], -1, len(array["columns"] or range(array["shape"][-1])))


def heat_maps(browser: Browser) -> list[dict[str, Any]]:
    """Every heat map of the box in hand, in order, with its place on the screen."""
    return browser.run("""[...document.querySelectorAll('#box figure canvas')].map((c, i) => ({
        i, rows: c.height, columns: c.width, label: c.getAttribute('aria-label'),
        head: [...c.closest('figure').querySelectorAll('canvas')].indexOf(c)}))""")


def at_cell(browser: Browser, i: int, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell of heat map i, scrolled into view."""
    area = browser.run(f"""(() => {{
        const c = document.querySelectorAll('#box figure canvas')[{i}];
        c.scrollIntoView({{block: 'center', behavior: 'instant'}});
        const a = c.getBoundingClientRect();
        return [a.left + a.width * {column + 0.5} / c.width,
                a.top + a.height * {row + 0.5} / c.height];
    }})()""")
    return area[0], area[1]


def told(browser: Browser, i: int) -> str:
    """What the line below heat map i says of a cell."""
    line = f"""document.querySelectorAll('#box figure canvas')[{i}]
        .closest('figure').querySelector('.read').textContent"""
    return browser.wait(f"{line}.includes(': ') && {line}", "no cell")


@pytest.mark.parametrize("phone", [False, True], ids=["mouse", "finger"])
def test_cells_of_heat_maps(
    browser: Browser, page: Path, data: dict[str, Any], phone: bool
) -> None:
    """Every cell tells what it is, and its value."""
    browser.open(page, *(PHONE if phone else DESKTOP), phone=phone)
    go(browser, "blocks.1.attention.qkv/backward")
    box = next(b for b in data["boxes"] if b["layer"] == "blocks.1.attention.qkv")
    pair = box["inputs"][0]
    point = browser.tap if phone else browser.hover
    (i,) = (m["i"] for m in heat_maps(browser) if m["label"].startswith(f"{pair['name']},"))
    values = cells(data, pair["value"])
    for row, column in ((0, 0), (3, 5), (values.shape[1] - 1, values.shape[2] - 1)):
        point(*at_cell(browser, i, row, column))
        said = told(browser, i)
        assert data["tokens"][row]["text"].strip() in said and f"channel {column + 1}:" in said
        assert said.endswith(number(float(values[0, row, column]), 5)), said


def test_heat_map_by_keys(browser: Browser, data: dict[str, Any]) -> None:
    go(browser, "blocks.0.norm_2/backward")
    box = next(b for b in data["boxes"] if b["layer"] == "blocks.0.norm_2")
    values = cells(data, box["inputs"][0]["value"])
    browser.run("document.querySelector('#box figure canvas').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        browser.press(key)
    assert told(browser, 0).endswith(number(float(values[0, 1, 2]), 5))
    assert "norm_2" in browser.run("location.hash"), "keys in a heat map do not move the step"


def test_focus_stays_by_keys(browser: Browser) -> None:
    """A choice redraws the box; the next key goes on from there."""
    go(browser, "blocks.0.mlp.down/backward")
    button = "#difference [aria-label='The next element']"
    browser.run(f'document.querySelector("{button}").focus()')
    seen = []
    for _ in range(3):
        browser.press("Enter")
        seen.append(text(browser, "#difference .controls .mono"))
        assert browser.run(f'document.activeElement == document.querySelector("{button}")')
    assert len(set(seen)) == 3


def test_heads_of_attention(browser: Browser, data: dict[str, Any]) -> None:
    """p and ds of every head, and the table of the query in hand."""
    go(browser, "blocks.0.attention/backward")
    box = next(b for b in data["boxes"] if b["layer"] == "blocks.0.attention")
    pairs = {p["name"]: p for p in box["inside"]}
    p, ds = (cells(data, pairs[n][key]) for n, key in (("p", "value"), ("scores", "gradient")))
    dp = cells(data, pairs["p"]["gradient"])
    query, head = len(data["tokens"]) - 2, 1
    section = "#box section[aria-label='Inside attention']"
    browser.run(f'document.querySelectorAll("{section} .tokens button")[{query}].click()')
    browser.run(f'document.querySelectorAll("{section} .controls button")[{head}].click()')
    rows = browser.run(f"""[...document.querySelectorAll("{section} tbody tr")].map(
        row => [...row.children].map(cell => cell.textContent))""")
    assert len(rows) == query + 1, "the keys before the query, and its own"
    delta = float((p[head, query].astype(float) * dp[head, query]).sum())
    for key, row in enumerate(rows):
        expected = [p[head, query, key], dp[head, query, key], dp[head, query, key] - delta,
                    ds[head, query, key]]  # fmt: skip
        found = [float(x.replace("−", "-")) for x in row[1:] if x]
        np.testing.assert_allclose(found, expected, 6e-3, 1e-12)


def test_finite_difference_by_click(browser: Browser, data: dict[str, Any]) -> None:
    """A weight is chosen in its heat map; its losses and slopes are told, for each of them."""
    layer = "blocks.0.mlp.down"
    go(browser, f"{layer}/backward")
    name = f"{layer}.weight"
    parameter = data["parameters"][name]
    array = data["arrays"][parameter["gradient"]]
    element = parameter["elements"][17]
    rows, columns = (
        kept or list(range(size))
        for kept, size in zip((array["rows"], array["columns"]), array["shape"], strict=True)
    )
    label = "d down.weight,"
    (i,) = (m["i"] for m in heat_maps(browser) if m["label"].startswith(label))
    browser.click(*at_cell(browser, i, rows.index(element[0]), columns.index(element[1])))
    assert f"[{element[0]}, {element[1]}]" in text(browser, "#difference")
    differences = parameter["differences"]

    def check(k: int) -> None:
        shown = text(browser, "#difference")
        for key in ("above", "below"):
            assert f"{differences[key][k]:.12f}" in shown, k
        for value in (differences["slopes"][k], parameter["gradients"][k]):
            mantissa, exponent = f"{value:.9e}".split("e")
            assert f"{mantissa}e".replace("-", "−") in shown and exponent, k
        assert number(differences["slopes"][k] - parameter["gradients"][k], 2) in shown

    check(17)
    n = len(parameter["elements"])
    for k in range(18, 18 + n):
        browser.run(
            "document.querySelector(\"#difference [aria-label='The next element']\").click()"
        )
        check(k % n)


def test_tokens_and_their_losses(browser: Browser, data: dict[str, Any]) -> None:
    losses = data["losses"][:-1]
    for t in (1, len(losses)):
        x, y = browser.center(f"#tokens button:nth-child({t + 1})")
        browser.hover(x, y)
        said = text(browser, "#token-read")
        loss = losses[t - 1]
        share = 100 * loss / sum(losses)
        for value, digits in ((loss, 3), (float(np.exp(-loss)), 3), (share, 2)):
            assert number(value, digits) in said
    browser.click(*browser.center("#tokens button:nth-child(3)"))
    assert "backward" in browser.run("location.hash")


def test_questions_at_a_glance(browser: Browser, data: dict[str, Any]) -> None:
    """Losses after other updates, the weights that moved most, and the layers' gradients."""
    shown = text(browser, "#questions")
    for variant in data["variants"]:
        assert variant["name"] in shown
        assert number(variant["loss"], 4) in shown and number(variant["length"]) in shown
    moved = sorted(
        ((p["norms"]["change"] / p["norms"]["value"], name)
         for name, p in data["parameters"].items() if p["norms"]["value"]), reverse=True,
    )  # fmt: skip
    for share, name in moved[:6]:
        assert f"{name}{number(100 * share, 2)}%" in shown
    for group in ("embedding", "blocks.0", "blocks.1", "final_norm", "output"):
        names = {n for b in data["boxes"] if b["group"] == group for n in b["parameters"]}
        norm = sum(data["parameters"][n]["norms"]["gradient"] ** 2 for n in names) ** 0.5
        assert f"{group}: {number(norm)}" in shown


def test_update_of_one_weight(browser: Browser, data: dict[str, Any]) -> None:
    browser.press("End")
    shown = text(browser, "#box")
    assert number(data["about"]["grad_norm"]) in shown and number(data["about"]["clip"]) in shown
    name = browser.run("document.querySelector('#box select').value")
    parameter = data["parameters"][name]
    update = parameter["update"]
    i = parameter["elements"].index(json.loads(text(browser, "#box .controls .mono")))
    for value in (
        parameter["gradients"][i], parameter["gradients"][i] * data["about"]["clip"],
        *(update[key][i] for key in ("m", "v", "m_hat", "v_hat")), parameter["before"][i],
        parameter["after"][i], parameter["after"][i] - parameter["before"][i],
    ):  # fmt: skip
        assert number(value, 6) in shown


def test_slider_by_mouse(browser: Browser, data: dict[str, Any]) -> None:
    x, y = browser.center("#time input[type=range]")
    browser.click(x, y)
    at = int(browser.run("document.querySelector('#time input').value"))
    assert abs(at - len(data["moments"]) / 2) <= 2
    assert text(browser, "#box h2")


@pytest.mark.parametrize(
    "address",
    ["attention/backward", "layer_norm/forward", "linear/backward", "embedding/backward",
                "bias_gelu/backward", "cross_entropy/backward", "adamw"],
)  # fmt: skip
def test_addresses_of_the_docs(
    browser: Browser, page: Path, data: dict[str, Any], address: str
) -> None:
    browser.open(page, *DESKTOP, address=address)
    operation, _, phase = address.partition("/")
    assert text(browser, "#box .phase").lower().startswith(phase or "update")
    assert data["words"][operation][phase or "backward"]["why"] in text(browser, "#box")


def test_controls_names_and_focus(browser: Browser) -> None:
    """Every control has a name and takes focus."""
    for address in ("blocks.0.attention/backward", "embedding/backward"):
        go(browser, address)
        unnamed = browser.run("""[...document.querySelectorAll('button, select, input, a, canvas')]
            .filter(x => !(x.textContent.trim() || x.getAttribute('aria-label')))
            .map(x => x.outerHTML.slice(0, 100))""")
        assert unnamed == []
    seen = set()
    browser.run("document.body.focus()")
    for _ in range(40):
        browser.press("Tab")
        seen.add(browser.run("document.activeElement.tagName"))
    assert {"BUTTON"} <= seen
