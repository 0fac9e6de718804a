"""The page about a run: right coordinates, nothing made up, and no text that turns into HTML."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mantrans.cli import main
from mantrans.config import Config
from mantrans.report import svg as report_svg
from mantrans.report.page import TEMPLATES, Run, number, page, write_page
from mantrans.report.svg import Curve, Figure, Scale, short, tick_labels, ticks
from mantrans.training.logger import RunLogger
from mantrans.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
HOSTILE = "<img src=x onerror=\"alert('1')\">&</b></pre></script><script>'\x1b\ud800"


class Page(HTMLParser):
    """Elements, attributes and text of a page; a tag that is not closed in order is an error."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def make_run(folder: Path, *, losses: list[float], skipped: list[int] | None = None) -> Path:
    """A run of ten steps a record, with one validation at its end and nothing else."""
    with RunLogger(folder, tensorboard=False, quiet=True) as log:
        for i, loss in enumerate(losses, 1):
            counted = skipped[i - 1] if skipped else 0
            log.log(10 * i, loss=loss, learning_rate=1e-3, tokens=1000 * i, skipped=counted)
            log.log_timing(10 * i, tokens_per_second=5e3, share_of_peak=0.25)
        log.log(10 * len(losses), validation_loss=losses[-1] + 0.5)
    return folder


def add_report(folder: Path, **values: Any) -> None:
    samples = [{"prompt": "Once", "continuation": " upon a time"}]
    report = {"loss": 1.25, "perplexity": 3.49, "diversity": {"distinct_1": 0.375}}
    text = json.dumps({**report, "coherence": None, "samples": samples, **values})
    (folder / "report.json").write_text(text)


def add_norms(folder: Path, layers: dict[str, list[Any]]) -> None:
    """Gradient norms by layer at steps 10, 20, ... of a run."""
    with RunLogger(folder, 10**6, tensorboard=False, quiet=True) as log:
        for i in range(len(next(iter(layers.values())))):
            norms = {name: values[i] for name, values in layers.items()}
            log.log(10 * i + 10, grad_norm_by_layer=norms, grad_norm_by_kind={"mlp.up": 1.0})


def figure(*arguments: Any, **keywords: Any) -> str:
    return TEMPLATES.get_template("figure.html").module.figure(Figure(*arguments, **keywords))


def read(folder: Path) -> Page:
    return Page(write_page(folder).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------- axes and curves


def test_ticks_round() -> None:
    assert ticks(0, 150, 6) == [0, 50, 100, 150]
    assert ticks(1.2, 5.7, 5) == [2, 3, 4, 5]
    assert ticks(0, 24_000, 6) == [0, 5000, 10_000, 15_000, 20_000]
    assert ticks(-0.25, 0.25, 5) == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_count(low, span, most) -> None:
    """Ticks lie on the axis and are neither many nor few."""
    found = ticks(low, low + span, most)
    step = report_svg.round_step(low, low + span, most)
    tolerance = 1e-6 * step + 1e-15 * abs(low)
    assert all(low - tolerance <= t <= low + span + tolerance for t in found)
    assert most / 2.5 - 1.01 <= len(found) <= most + 1
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_axis_bounds() -> None:
    """An axis holds its values and ends at round numbers."""
    for values, ends in (([1.2, 5.7], (1, 6)), ([0, 12_345], (0, 15_000))):
        axis = Scale.around(values)
        assert (axis.low, axis.high) == ends
    for value in (0.0, 2.5, -3e-5, 1e30):
        axis = Scale.around([value, value])
        assert axis.low < value < axis.high


def test_labels_digits() -> None:
    """Labels have the digits that tell ticks apart."""
    assert tick_labels([0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert tick_labels([3.25, 3.3, 3.35]) == ["3.25", "3.30", "3.35"]
    assert tick_labels([0, 5000, 10_000]) == ["0", "5k", "10k"]
    assert tick_labels([0, 2e-5, 4e-5]) == ["0", "2e-5", "4e-5"]
    assert tick_labels([0, 2e6, 4e6]) == ["0", "2000k", "4000k"]
    assert [short(n) for n in (0, 7, 1920, 288_000, 999_600, 1_712_960)] == [
        "0", "7", "1.92k", "288k", "1M", "1.71M"
    ]  # fmt: skip


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e9))
@example(999999.9999999999, 4.0)
def test_log_axis_ticks(low, ratio) -> None:
    """A logarithmic axis is even in ratios and has readable ticks."""
    axis = Scale.around([low, low * ratio], log=True)
    places = [axis(value) for value, _ in axis.ticks]
    assert axis.log and axis.low <= low * (1 + 1e-6) and low * ratio <= axis.high * (1 + 1e-6)
    assert places == sorted(places) and places[0] == 0 and places[-1] == pytest.approx(100)
    assert 2 <= len(places) <= 7
    labels = [label for _, label in axis.ticks]
    if axis.high > 4 * axis.low:  # 1.5, 2, 20k, 1e-05, not 1234.567
        assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 7
    assert axis(low * ratio**0.5) == pytest.approx((axis(low) + axis(low * ratio)) / 2)


def test_log_axis_not_positive() -> None:
    """An axis with a value that is not positive stays linear."""
    for values in ([0.0, 10.0], [-1.0, 10.0], [5e-324, 10.0]):
        assert not Scale.around(values, log=True).log
    drawn = Page(figure("Loss", "", [Curve("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], log=True))
    assert drawn.all("path")[0]["d"] == "M0.000,100.000 50.000,50.000 100.000,0.000"


def test_point_place() -> None:
    """On axes from 0 to 200 and from 2 to 12, (50, 8) is a quarter to the right, 60% up."""
    points = [(0, 2.0), (50, 8.0), (200, 12.0)]
    drawn = Page(figure("Loss", "", [Curve("a", points), Curve("b", points[1:2], dots=True)]))
    (path,) = drawn.all("path")
    assert path["d"] == "M0.000,100.000 25.000,40.000 100.000,0.000"
    (dot,) = drawn.all("circle")
    assert (dot["cx"], dot["cy"]) == ("25.000%", "40.000%")
    (stretched,) = drawn.all("svg", preserveaspectratio="none")
    assert stretched["viewbox"] == "0 0 100 100"


def test_label_place() -> None:
    """Labels stand at their values."""
    drawn = figure("Loss", "", [Curve("a", [(0, 0.0), (200, 10.0)])], tokens_per_step=1000)
    left = re.findall(r'x="-8" y="([\d.]+)%" dy="[^"]*">([^<]+)<', drawn)
    assert left == [(f"{100 - 10 * v}.000", str(v)) for v in (0, 2, 4, 6, 8, 10)]
    below = re.findall(r'<text x="([\d.]+)%" y="100%" dy="[^"]*">([^<]+)<', drawn)
    steps = [(f"{at}.000", str(2 * at)) for at in (0, 25, 50, 75, 100)]
    tokens = [(at, f"{step}k" if step != "0" else "0") for at, step in steps]
    assert below == steps + tokens


def test_line_gap() -> None:
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, None), (6, 2.0), (7, 1.0), (8, None)]
    drawn = Page(figure("Loss", "", [Curve("a", points)]))
    (path,) = drawn.all("path")
    assert [part.count(",") for part in path["d"].split("M")[1:]] == [2, 2]
    (alone,) = drawn.all("circle")  # a line of one point would not be seen
    assert alone["cx"] == "50.000%"
    assert not figure("Loss", "", [Curve("a", [(1, None)])]).strip()


def test_finite_numbers() -> None:
    assert [number(n) for n in (0, 2.5, -3)] == [0.0, 2.5, -3.0]
    for other in (math.nan, -math.inf, 10**400, 1e300, "nan", "1", True, None, [1]):
        assert number(other) is None


def test_line_thinned() -> None:
    """A long line is thinned without losing a spike."""
    points = [(float(i), 1.0 + i % 2) for i in range(100_000)]
    points[54_321], points[77_777] = (54_321.0, 99.0), (77_777.0, -99.0)
    (kept,) = Curve("a", points).segments
    assert len(kept) <= 2000 and kept == sorted(kept)
    assert points[54_321] in kept and points[77_777] in kept


# ---------------------------------------------------------------------------------------- the page


def test_page_contents(tmp_path: Path) -> None:
    """The page says what is on record."""
    folder = make_run(tmp_path / "tiny", losses=[4.0, 3.0, 2.5])
    Config.from_dict({"training": {"max_steps": 40}}).save(folder / "config.yaml")
    marks = {"model": "m", "grammar": 3.25, "coherence": 2.5, "plot": 2, "scores": []}
    add_report(folder, run={"step": 30, "parameters": 1_712_960}, coherence=marks)
    found = read(folder)
    for words in (
        "tiny", "1.71M parameters", "4 blocks of width 256", "30 of 40 steps", "3k tokens",
        "best validation loss 3.0000 at step 30", "torch", "Learning rate", "highest 0.001",
        "Tokens per second", "median 5k", "products alone, median 0.25", "perplexity3.49",
        "distinct 10.375", "grammar3.25", "Once upon a time", "d_model: 256",
    ):  # fmt: skip
        assert words in found.text, words
    assert len(found.all("details")) == 1 and len(found.all("figure")) == 4
    (validation,) = found.all("circle")
    assert validation["cx"] == "100.000%"


def test_page_self_contained(tmp_path: Path) -> None:
    """The page needs nothing from elsewhere."""
    folder = make_run(tmp_path / "run", losses=[4.0, 3.0])
    add_report(folder)
    content = write_page(folder).read_text(encoding="utf-8")
    for reference in ("http://", "https://", "src=", "url(", "@import", "<script", "<link"):
        assert reference not in content
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)', content))
    assert "default-src 'none'" in content and "prefers-color-scheme: dark" in content


def test_page_hostile_text(tmp_path: Path) -> None:
    """In every place that a stranger can write to: the same elements as with harmless text."""

    def fill(folder: Path, words: str) -> Page:
        make_run(folder, losses=[4.0, 3.0], skipped=[0, 1])
        add_norms(folder, {words: [0.5, 0.25], "blocks.0": [1.0, 0.5]})
        model = {"n_blocks": words, "d_model": words, "dtype": words}
        values = {"model": model, "training": {"device": words, words: [words]}}
        (folder / "config.yaml").write_text(json.dumps(values))
        (folder / "versions.json").write_text(
            json.dumps(dict.fromkeys(("device", "torch", "git_commit"), words))
        )
        samples = [{"prompt": words, "continuation": words}]
        add_report(folder, samples=samples, loss=words, diversity={words: 1.0, "distinct_1": words})
        runs = [Run.load(folder), Run.load(folder)]
        return Page(page(runs[0], runs[1:]))

    name = HOSTILE.replace("/", "").replace("\ud800", "")
    harmless, hostile = fill(tmp_path / "harmless", "x"), fill(tmp_path / name, HOSTILE)
    assert hostile.elements == harmless.elements
    assert hostile.text.count("<img src=x onerror=\"alert('1')\">") > 8
    assert "\x1b" not in hostile.text and "\ud800" not in hostile.text


def test_page_wrong_types(tmp_path: Path) -> None:
    """Every value of the files that the page reads, replaced by something of another type."""
    for odd in (None, 1, True, "x", [1], {"a": {}}, -1.5):
        folder = make_run(tmp_path / "run", losses=[4.0, 3.0])
        for values in ({"model": odd, "training": odd}, {"model": dict.fromkeys(
            ("n_blocks", "d_model", "dtype"), odd), "training": {"max_steps": odd}}):  # fmt: skip
            (folder / "config.yaml").write_text(json.dumps(values))
            names = ("torch", "device", "git_commit", "python")
            (folder / "versions.json").write_text(json.dumps(dict.fromkeys(names, odd)))
            for run in (odd, dict.fromkeys(("parameters", "device", "dtype"), odd)):
                add_report(folder, run=run, samples=odd, diversity=odd, coherence=odd, loss=odd)
                assert "best validation loss 3.5000" in read(folder).text
                add_report(folder, samples=[{"prompt": odd, "continuation": odd}, odd])
                assert len(read(folder).all("blockquote")) == 1 + isinstance(odd, dict)


def test_page_missing_parts(tmp_path: Path) -> None:
    """What a run does not have is left out."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n{"step": 10, "lo')
    found = read(tmp_path)
    assert len(found.all("figure")) == 1 and len(found.all("circle")) == 1
    shown = found.text.rpartition("display: none")[2]  # behind the style sheet
    assert "5 steps" in shown
    for words in ("validation", "evaluation", "Samples", "Configuration", "tokens", "skipped"):
        assert words not in shown, words
    assert not found.all("table") and not found.all("details") and not found.all("ul")

    (tmp_path / "metrics.jsonl").write_text("")
    assert not read(tmp_path).all("figure")


def test_page_nan_and_skipped(tmp_path: Path) -> None:
    """A loss that was NaN leaves a gap, skipped steps a mark."""
    losses = [4.0, 3.0, math.nan, 2.5, 2.0]
    found = read(make_run(tmp_path, losses=losses, skipped=[0, 0, 10, 12, 12]))
    assert found.all("path")[0]["d"].count("M") == 2
    marks = [(m["x1"], m["x2"]) for m in found.all("line", **{"class": "mark"})]
    assert marks == [("40.000%", "60.000%"), ("60.000%", "80.000%")]
    assert "10 skipped after step 20 until 30" in found.text and "skipped steps" in found.text


def test_page_norms(tmp_path: Path) -> None:
    """A line for each layer, colored by its depth; a norm that is not finite is a gap."""
    folder = make_run(tmp_path / "run", losses=[4.0, 3.0, 2.0])
    names = ["token_embedding", *(f"blocks.{i}" for i in range(40)), "final_norm"]
    layers: dict[str, list[Any]] = {name: [4.0, 2.0, 1.0] for name in names}
    layers["blocks.7"] = [4.0, math.inf, 1.0]
    add_norms(folder, layers)
    found = read(folder)
    for title, n in (("Gradient-norm-by-layer", 42), ("Gradient-norm-by-kind-of-parameter", 1)):
        lines = [path for path in found.all("path") if (path.get("id") or "").startswith(title)]
        assert len(lines) == n
        for copy in lines:
            assert found.all("use", href=f"#{copy['id']}")
    lines = found.all("path")[-43:-1]
    assert lines[0]["class"] == "r0" and lines[21]["class"] == "r8" and lines[-1]["class"] == "r16"
    assert lines[0]["d"] == "M33.333,0.000 66.667,50.000 100.000,100.000"
    assert lines[8]["d"] == "", "blocks.7 has two points and a gap"
    assert "blocks.7: 1 at step 30" in found.text
    legend = found.all("li")
    assert len(legend) == 18, "two of the loss, and of 42 layers 16"
    assert "blocks.39: 1 at step 30" in found.text


@pytest.mark.parametrize("odd", [None, 1, "x", [1], {"a": {}}, {"a": None}, {"a": "nan"}])
def test_page_norms_wrong_types(tmp_path: Path, odd: Any) -> None:
    folder = make_run(tmp_path, losses=[4.0, 3.0])
    with RunLogger(folder, 10**6, tensorboard=False, quiet=True) as log:
        log.log(20, grad_norm_by_layer=odd, grad_norm_by_kind=odd)
    assert len(read(folder).all("figure")) == 4


def test_page_report_of_another_step(tmp_path: Path) -> None:
    """A report of another step is not this run's."""
    folder = make_run(tmp_path, losses=[4.0, 3.0])
    add_report(folder, run={"step": 10})
    assert "Final evaluation" not in read(folder).text
    add_report(folder, run={"step": 20})
    assert "Final evaluation" in read(folder).text


def test_page_other_runs(tmp_path: Path) -> None:
    """Other runs are drawn beside it."""
    one = make_run(tmp_path / "one", losses=[4.0, 3.0])
    other = make_run(tmp_path / "other", losses=[4.5, 2.0])
    output = tmp_path / "both.html"
    write_page(one, output, [other])
    found = Page(output.read_text(encoding="utf-8"))
    for row in ("one\nother", "best validation loss3.50002.5000", "at step2020",
                "last training loss3.00002.0000", "tokens2k2k"):  # fmt: skip
        assert row.replace("\n", "") in found.text.replace("\n", ""), row
    colors = [path["class"] for path in found.all("path")]
    assert colors[:2] == ["c0", "c1"] and not (one / "report.html").exists()
    assert [dot["class"] for dot in found.all("circle")] == ["c0", "c1"]

    namesake = make_run(tmp_path / "elsewhere" / "one", losses=[1.0])
    write_page(one, output, [namesake])
    assert str(namesake) in Page(output.read_text(encoding="utf-8")).text


def measured_run(folder: Path, bits: list[float], **changes: Any) -> Path:
    """A run with a config and validations; changes: fields of `data`, `training` or `model`."""
    config = Config.from_dict({"training": {"max_steps": 40, "experiment_name": folder.name}})
    values = config.to_dict()
    for name, value in changes.items():
        section = next(s for s in ("data", "training", "model") if name in values[s])
        values[section][name] = value
    make_run(folder, losses=[4.0, 3.0])
    Config.from_dict(values).save(folder / "config.yaml")
    with (folder / "metrics.jsonl").open("a") as file:
        for i, value in enumerate(bits, 1):
            file.write(json.dumps({"step": 10 * i, "bits_per_byte": value}) + "\n")
    return folder


def rows_of(content: str) -> dict[str, list[str]]:
    """The table of a comparison."""
    table = content[content.index('<table class="wide">') :].partition("</table>")[0]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.split("<tr>")[2:]]
    return {name: values for name, *values in rows}


@pytest.mark.promise("bits per byte")
def test_page_several_tokenizers(tmp_path: Path) -> None:
    """Runs of several tokenizers are compared by bits per byte."""
    one = measured_run(tmp_path / "one", [2.5, 1.5])
    own = {"dataset": "local", "path": "texts/mine.txt", "tokenizer": "mine"}
    other = measured_run(tmp_path / "other", [2.0, 1.25], batch_size=4, n_blocks=2, **own)
    content = write_page(one, tmp_path / "both.html", [other]).read_text(encoding="utf-8")
    assert "Bits per byte" in content and "which is not the same for all" in content
    assert "nats per token" not in content and "tokenizers differ" in content
    rows = rows_of(content)
    assert rows["best bits per byte"] == ["1.5000", "1.2500"]
    assert rows["dataset"] == ["builtin-stories", "local mine.txt"]
    assert rows["tokenizer"] == ["tinystories_bpe_4096", "mine"]
    assert [batch.split()[0] for batch in rows["batch"]] == ["16", "4"]
    assert rows["time"] == ["0:00:00 of training"] * 2  # 2,000 tokens at 5,000 a second
    assert rows["model.n_blocks"] == ["4", "2"] and rows["training.batch_size"] == ["16", "4"]
    assert "training.experiment_name" not in rows and "training.seed" not in rows
    assert "best validation loss" not in rows

    twin = measured_run(tmp_path / "twin", [2.5, 1.0], learning_rate=3e-4)
    content = write_page(one, tmp_path / "both.html", [twin]).read_text(encoding="utf-8")
    assert "Bits per byte" in content and "not the same for all" not in content
    assert "nats per token" in content and "tokenizers differ" not in content
    rows = rows_of(content)
    assert list(rows)[-1] == "training.learning_rate" and "best validation loss" in rows


def test_page_trained_on(tmp_path: Path) -> None:
    """It says what was trained on, and ends no line with a period."""
    own = {"dataset": "local", "path": "texts/mine.txt", "gradient_accumulation_steps": 3}
    found = read(measured_run(tmp_path / "run", [2.0], **own))
    for words in ("local mine.txt", "tinystories_bpe_4096", "48 sequences of 256 tokens a step"):
        assert words in found.text
    header = found.text[found.text.index("run") :].partition("Loss")[0]
    assert "·" not in header.partition("mantrans")[2].rpartition("}")[2]


@pytest.mark.parametrize("last", [1, 2, 7, 10, 226, 999, 1000, 12_345, 1_000_001])
@pytest.mark.parametrize("most", [3, 6])
def test_axis_steps_labels(last: int, most: int) -> None:
    """An axis of steps has a label at each end."""
    axis = Figure("Loss", "", [Curve("a", [(0, 1.0), (last, 2.0)])], most_ticks=most).x
    steps = [step for step, _ in axis.ticks]
    assert all(step == int(step) for step in steps)
    assert steps[0] == 0 and steps[-1] == last and axis.ticks[-1][1].startswith(str(last)[0])
    gaps = [b - a for a, b in pairwise(steps)]
    assert min(gaps) >= 0.6 * max(gaps[:-1] or gaps) and len(steps) <= most + 2


@pytest.mark.parametrize("step", [0, 1, 500])
@pytest.mark.parametrize("dots", [True, False])
def test_point_single(step: int, dots: bool) -> None:
    """A single point can be seen."""
    drawn = Page(figure("Loss", "", [Curve("a", [(step, 2.0)], dots=dots)]))
    (dot,) = drawn.all("circle")
    assert float(dot["r"] or 0) >= 3 and dot["cy"] == "50.000%"


# ---------------------------------------------------------------------- command line, end of a run


def test_command_mistakes(tmp_path: Path, capsys: Any) -> None:
    """Bad input ends in one line, with status 2."""
    run = make_run(tmp_path / "run", losses=[1.0])
    broken = make_run(tmp_path / "broken", losses=[1.0])
    (broken / "report.json").write_text('["not", "a report"]')
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (
            [tmp_path / "absent"],
            "absent: expected a folder that train.py wrote, got no such folder",
        ),
        ([tmp_path / "empty"], "got one without metrics.jsonl"),
        ([run / "metrics.jsonl"], "got no such folder"),
        ([broken], "report.json: expected the JSON object"),
        ([run, "--compare", tmp_path / "empty"], "got one without metrics.jsonl"),
        ([run, "--compare", *[run] * 5], "expected at most 4 runs, got 5"),
        ([run, "--output", tmp_path], "expected the name of an HTML file, got no regular file"),
        ([run, "--output", tmp_path / "no" / "page.html"], "cannot be written"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and words in said.err, said.err
        assert said.err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses=[2.0, 1.0])
    command = [sys.executable, "-m", "mantrans.report", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr
    assert "1.5000" in (run / "report.html").read_text(encoding="utf-8")
    done = subprocess.run([*command, "--compare", "absent"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1


def tiny(tmp_path: Path) -> Config:
    model = {"d_model": 16, "n_blocks": 1, "n_heads": 2, "max_seq_len": 16, "dtype": "float32"}
    training = {
        "experiment_name": "tiny", "device": "cpu", "batch_size": 2, "max_steps": 4,
        "log_every": 1, "eval_every": 2, "eval_batches": 1,
        "output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints"),
    }  # fmt: skip
    data = {"subset_size": 20, "val_subset_size": 4, "cache_dir": str(tmp_path / "tokens")}
    evaluation = {"max_generation_length": 14}
    return Config.from_dict(
        {"model": model, "training": training, "data": data, "evaluation": evaluation}
    )


def test_train_page(tmp_path: Path, capsys: Any) -> None:
    """A run ends with its page, and does not fail for want of one."""
    Trainer(tiny(tmp_path)).run()
    file = tmp_path / "runs" / "tiny" / "report.html"
    found = Page(file.read_text(encoding="utf-8"))
    assert "parameters" in found.text and "float32" in found.text and "4 steps" in found.text
    assert len(found.all("circle")) == 2 and len(found.all("blockquote")) == 3
    assert "warning" not in capsys.readouterr().err

    trainer = Trainer(tiny(tmp_path))
    file.mkdir()
    assert trainer.run() is not None
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert (
        len(warnings) == 1
        and "report.html: expected the name of an HTML file, got no regular file" in warnings[0]
    )
