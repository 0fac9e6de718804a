"""The benchmarks' own logic, at tiny sizes: who is refused, what is recorded, what is reported.

No time is asserted anywhere: machines differ, and so do moods of one machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, kernels, machine, operations, report, scaling, steps, tables
from benchmarks import models as benchmark_models
from benchmarks.comparison import comparisons
from benchmarks.providers import Provider, providers
from benchmarks.records import Quantiles, Recorder, Row, load, newest
from benchmarks.timing import Contender, compete, peak_on_cpu

NO_COMPILER = ("native", "PyTorch eager", "transformers")
CASE = steps.Case("tiny", 2, 16, 2, "float32", NO_COMPILER)

pytestmark = pytest.mark.skipif(
    machine.device().type != "cpu", reason="written for a CPU; a GPU has benchmarks/gpu_suite.sh"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real, if tiny, measurements of every stage but the compiler's."""
    folder = tmp_path_factory.mktemp("results")
    limits = ceilings.measure(Recorder(folder, "ceilings", quick=True), 0)
    assert not steps.measure(CASE, 0, limits, Recorder(folder, "steps", quick=True))
    recorder = Recorder(folder, "kernels", quick=True)
    attention = operations.attention(1, 16, 2, 8, "float32")
    for direction in attention.cost:
        assert not kernels.measure(attention, direction, 0, limits, recorder)
    recorder = Recorder(folder, "scaling", quick=True)
    for T in (16, 32):
        shape = {"B": 1, "T": T, "C": 64, "blocks": 1, "V": 4096}
        scaling.measure("T", shape, "float32", ["native"], 0, recorder)
    return folder


def losses_of(name: str, case: steps.Case = CASE) -> list[float]:
    config = benchmark_models.model_config(case.model, case.T)
    batches = benchmark_models.Batches(case.B * case.micro_batches, case.T)
    return steps.run_in_common(name, case, config, batches)[1]


def test_losses_of_ours_and_the_rivals_agree_over_ten_steps() -> None:
    expected = losses_of(steps.JUDGE)
    assert expected[0] - expected[-1] > 0.02
    for name in NO_COMPILER:
        assert max(steps.loss_differences(losses_of(name), expected)) < 2e-5, name


def test_a_wrong_gradient_is_seen_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is worth something: a model whose GELU has no gradient is not timed."""
    from mantrans.kernels import native

    right = native.bias_gelu_backward
    monkeypatch.setattr(native, "bias_gelu_backward", lambda *args: 0 * right(*args))
    expected = losses_of(steps.JUDGE)
    differences = steps.loss_differences(losses_of("native"), expected)
    assert steps.distance(differences, expected) > 5 * steps.TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([1.0] * 9, [1.0] * 10), ([math.nan] * 10, [1.0] * 10), ([1.0] * 10, [])],
)
def test_missing_or_broken_losses_never_agree(losses: list, expected: list) -> None:
    assert max(steps.loss_differences(losses, expected)) == math.inf


def test_who_disagrees_is_recorded_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TOLERANCE", {"float32": 0.0})
    case = dataclasses.replace(CASE, providers=("native", steps.JUDGE))
    limits = ceilings.Ceilings(1e9, {"float32": 1e9})
    ours_failed = steps.measure(case, 0, limits, Recorder(tmp_path, "steps"))
    (found,) = comparisons(load(tmp_path), "steps")
    assert ours_failed and list(found.time) == [steps.JUDGE]
    assert "losses differ" in (found.failures["native"].note or "")


def test_nobody_is_built_who_would_not_be_ready_in_time(tmp_path: Path) -> None:
    case = dataclasses.replace(CASE, providers=("native", "torch.compile", steps.JUDGE))
    limits = ceilings.Ceilings(1e9, {"float32": 1e9})
    end = time.monotonic() + steps.BUILD_SECONDS["torch.compile"] - 1
    assert not steps.measure(case, 0, limits, Recorder(tmp_path, "steps"), end)
    (found,) = comparisons(load(tmp_path), "steps")
    assert set(found.time) == {"native", steps.JUDGE}
    assert "not built" in (found.failures["torch.compile"].note or "")


def test_only_the_providers_that_are_wanted(tmp_path: Path) -> None:
    names = ("native", "PyTorch eager", "transformers")
    assert steps._wanted(names, ()) == names
    assert steps._wanted(names, ("native",)) == ("native", steps.JUDGE)
    attention = operations.attention(1, 16, 2, 8, "float32")
    limits = ceilings.Ceilings(1e9, {"float32": 1e9})
    wanted = ("native", "SDPA math")
    kernels.measure(attention, "forward", 0, limits, Recorder(tmp_path, "kernels"), wanted)
    (found,) = comparisons(load(tmp_path), "kernels")
    assert set(found.time) == set(wanted)


def test_where_nobody_competes_nothing_is_timed() -> None:
    assert compete([], 1) == {}


@pytest.mark.parametrize(
    ("operation", "direction"),
    [
        pytest.param(case, direction, id=f"{case.name}-{direction}")
        for case in kernels.model_shapes(B=2, T=24, C=16, H=2, F=32, V=256, dtype="float32")
        for direction in case.cost
    ],
)
def test_every_operation_is_the_same_for_everybody(
    operation: operations.Operation, direction: str
) -> None:
    names = []
    for provider in providers(operation, direction):
        if provider.name != "torch.compile":  # the same function as eager's
            kernels._check(provider, operation, direction)
            names.append(provider.name)
    assert {"native", "reference"} < set(names)


def test_a_wrong_provider_is_refused(tmp_path: Path) -> None:
    operation = operations.bias_gelu(8, 16, "float32")
    wrong = Provider("wrong", lambda t: lambda: (torch.relu(t["h"] + t["bias"]),))
    with pytest.raises(ValueError, match="differs from native"):
        kernels._check(wrong, operation, "forward")


def test_rows_hold_all_that_is_needed_to_doubt_them(results: Path) -> None:
    rows = load(results)
    assert {row.stage for row in rows} == {"ceilings", "kernels", "steps", "scaling"}
    for path in results.glob("*/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line).keys() == {f.name for f in dataclasses.fields(Row)}
    for row in rows:
        assert row.device and row.date and row.run and row.versions["torch"] == torch.__version__
        if row.p50 is not None:
            assert row.p20 <= row.p50 <= row.p80 and row.p20 >= 0 and row.rounds >= 1
        if row.metric == "time" and row.stage in ("kernels", "steps"):
            assert row.fraction and row.tflops


def test_smoke_runs_are_no_results(results: Path) -> None:
    assert newest(load(results)) == []
    assert len(newest(load(results), quick=True)) == len(load(results))


def test_of_two_runs_the_newer_counts(results: Path) -> None:
    old = [row for row in load(results) if row.stage == "steps"]
    new = [dataclasses.replace(row, run="9999-01-01") for row in old[:1]]
    assert newest([*new, *old], quick=True) == new


def test_the_report_says_what_the_rows_say(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = newest(load(results), quick=True)
    page = tmp_path / "benchmarks.md"
    report.write(rows, page)
    text = page.read_text(encoding="utf-8")
    for row in rows:
        if row.stage in ("steps", "kernels") and row.metric == "time":
            assert tables.spread(row) in text, row
    pictures = {path.stem.split("-")[0] for path in (tmp_path / "figures").glob("*.svg")}
    assert pictures == {"roofline", "steps", "scaling"}
    for path in (tmp_path / "figures").glob("*.svg"):
        assert f"(figures/{path.name})" in text
    report.write(rows, page)
    assert page.read_text(encoding="utf-8") == text, "writing twice changes the page"


def test_prose_outside_the_marks_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write([], page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert report.NOTHING in text and "old" not in text


def test_where_we_are_slower_the_table_says_so() -> None:
    assert tables.factor(0.8) == "**0.80×**"
    assert tables.factor(1.25) == "1.25×"


def test_rows_that_were_not_replayed_and_all_versions_are_named(results: Path) -> None:
    row = next(r for r in load(results) if r.stage == "kernels" and r.metric == "time")
    direct = dataclasses.replace(row, note="launched one by one", versions={"torch": "0.1"})
    assert tables.spread(direct) == tables.spread(row) + " †"
    assert f"torch 0.1 and {row.versions['torch']}" in tables.provenance([row, direct])


def test_exponents() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_quantiles_are_samples() -> None:
    assert Quantiles.of(range(11)) == Quantiles(2, 5, 8, 11)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0, 1)


def test_contenders_take_turns() -> None:
    """Each is sampled once a round, and no round begins with the one before's first."""
    order: list[str] = []
    contenders = [Contender(n, [lambda n=n: order.append(n)], repeats=1) for n in "abc"]
    compete(contenders, 0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_peak_on_a_cpu_is_what_was_alive_at_once() -> None:
    kept = torch.zeros(1 << 18)  # 1 MiB, before and after

    def step() -> None:
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1  # 4 MiB more
        del a
        (b + 1).sum()  # 4 MiB again, when a is gone

    assert peak_on_cpu([kept], step) / 2**20 == pytest.approx(9, abs=0.1)
