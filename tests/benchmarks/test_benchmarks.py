"""The benchmarks' own logic, at tiny sizes: who is refused, what is recorded, what is reported.

No time is asserted anywhere: machines differ, and every machine has noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, machine, operations, peaks, report, steps
from benchmarks.harness import (
    Candidate,
    Measurement,
    Quantiles,
    Recorder,
    compete,
    load,
    newest,
    peak_on_cpu,
)
from benchmarks.operations import Implementation, implementations
from mantrans.data.stories import stories

NO_COMPILER = ("native", "PyTorch eager", "transformers")
CASE = steps.Case("tiny", 2, 16, 2, "float32", NO_COMPILER)
TINY = list(operations.model_cases(B=2, T=24, C=16, H=2, F=32, V=256, dtype="float32"))
ATTENTION = [case for case in TINY if case.operation.name == "attention"]
SLOW_PEAKS = peaks.Peaks(1e9, {"float32": 1e9})

pytestmark = pytest.mark.skipif(
    machine.device().type != "cpu", reason="written for a CPU; a GPU has `python -m benchmarks gpu`"
)


@pytest.fixture(scope="module", autouse=True)
def few_stories() -> Iterator[None]:
    """Enough for the batches of these tests; to encode all takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        some = stories()[:200]
        patch.setattr(baselines, "stories", lambda: some)
        yield
    baselines._all_stories.cache_clear()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real, if tiny, measurements of every stage but the compiler's."""
    folder = tmp_path_factory.mktemp("results")
    limits = peaks.measure(Recorder(folder, "peaks", quick=True), 0)
    assert not steps.measure(CASE, 0, limits, Recorder(folder, "steps", quick=True))
    recorder = Recorder(folder, "operations", quick=True)
    for case in ATTENTION:
        assert not operations.measure(case, 0, limits, recorder)
    recorder = Recorder(folder, "scaling", quick=True)
    for T in (16, 32):
        shape = {"B": 1, "T": T, "C": 64, "blocks": 1, "V": 4096}
        steps.measure_size("T", shape, "float32", ["native"], 0, recorder)
    return folder


def losses_of(name: str, case: steps.Case = CASE) -> list[float]:
    config = baselines.model_config(case.model, case.T)
    batches = baselines.Batches(case.B * case.micro_batches, case.T)
    return steps.run_in_common(name, case, config, batches)[1]


def only_case(folder: Path, stage: str):
    """The one case that a folder's rows hold: a line a candidate."""
    data = report.frame(load(folder), stage)
    assert len(data.drop_duplicates(report.CASE[:3])) == 1
    return data.set_index("provider")


def test_losses_gpt2() -> None:
    """Ours and the baselines agree over ten steps."""
    expected = losses_of(steps.JUDGE)
    assert expected[0] - expected[-1] > 0.02
    for name in NO_COMPILER:
        assert max(steps.loss_differences(losses_of(name), expected)) < 2e-5, name


def test_losses_llama() -> None:
    case = CASE._replace(model="Llama, tiny")
    expected = losses_of(steps.JUDGE, case)
    assert expected[-1] < expected[0]
    assert max(steps.loss_differences(losses_of("native", case), expected)) < 2e-5


def test_losses_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_agree_missing_or_broken(losses: list, expected: list) -> None:
    assert max(steps.loss_differences(losses, expected)) == math.inf


def test_step_candidate_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded, and not timed."""
    monkeypatch.setattr(steps, "TOLERANCE", {"float32": 0.0})
    case = CASE._replace(candidates=("native", steps.JUDGE))
    ours_failed = steps.measure(case, 0, SLOW_PEAKS, Recorder(tmp_path, "steps"))
    found = only_case(tmp_path, "steps")
    assert ours_failed and found.p50.notna().to_dict() == {steps.JUDGE: True, "native": False}
    assert "losses differ" in found.note["native"]


def test_step_candidate_slow_to_build(tmp_path: Path) -> None:
    """Nobody is built who would not be ready in time."""
    case = CASE._replace(candidates=("native", "torch.compile", steps.JUDGE))
    end = time.monotonic() + steps.BUILD_SECONDS["torch.compile"] - 1
    assert not steps.measure(case, 0, SLOW_PEAKS, Recorder(tmp_path, "steps"), end)
    found = only_case(tmp_path, "steps")
    assert set(found.index[found.p50.notna()]) == {"native", steps.JUDGE}
    assert "not built" in found.note["torch.compile"]


def test_step_only_named_baseline(tmp_path: Path) -> None:
    """Ours is measured beside those that are named."""
    names = ("native", "PyTorch eager", "torch.compile", "transformers")
    assert steps.wanted(names, ()) == names
    assert steps.wanted(names, ("transformers",)) == ("native", steps.JUDGE, "transformers")
    recorder = Recorder(tmp_path, "operations")
    operations.measure(ATTENTION[0], 0, SLOW_PEAKS, recorder, ("SDPA math",))
    assert set(only_case(tmp_path, "operations").index) == {"native", "SDPA math"}


def test_compete_without_candidates() -> None:
    """Nothing is timed."""
    assert compete([], 1) == {}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.title)
def test_operation_implementations_equal(case: operations.Case) -> None:
    """Every implementation gets the same operation."""
    names = set()
    for implementation in implementations(case):
        if implementation.name != "torch.compile":  # the same function as eager's
            operations.check(implementation, case)
            names.add(implementation.name)
    assert {"native", "reference"} < names


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.title)
def test_operation_implementation_wrong(case: operations.Case) -> None:
    """Its results differ, so it is refused."""
    right = next(i for i in implementations(case) if i.name == "native")

    def prepare(tensors):
        def wrong():
            results = right.prepare(tensors)()
            return {k: x * 1.01 if torch.is_tensor(x) else x for k, x in results.items()}

        return wrong

    with pytest.raises(ValueError, match="differs from native"):
        operations.check(Implementation("wrong", prepare), case)


def test_measurement_fields(results: Path) -> None:
    """Rows hold all that is needed to doubt them: device, versions, commit."""
    rows = load(results)
    assert {row.stage for row in rows} == {"peaks", "operations", "steps", "scaling"}
    for path in results.glob("*/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line).keys() == {f.name for f in dataclasses.fields(Measurement)}
    for row in rows:
        assert row.device and row.date and row.run and row.versions["torch"] == torch.__version__
        if row.p50 is not None:
            assert row.p20 <= row.p50 <= row.p80 and row.p20 >= 0 and row.rounds >= 1
        if row.metric == "time" and row.stage in ("operations", "steps"):
            assert row.fraction and row.tflops


def test_load_smoke_runs(results: Path) -> None:
    """They are no results."""
    assert newest(load(results)) == []
    assert len(newest(load(results), quick=True)) == len(load(results))


def test_load_two_runs(results: Path) -> None:
    """The newer one counts."""
    old = [row for row in load(results) if row.stage == "steps"]
    new = [dataclasses.replace(row, run="9999-01-01") for row in old[:1]]
    assert newest([*new, *old], quick=True) == new


def test_report_equals_rows(results: Path, tmp_path: Path) -> None:
    """The report says what the rows say."""
    pytest.importorskip("matplotlib")
    rows = newest(load(results), quick=True)
    page = tmp_path / "benchmarks.md"
    report.write(rows, page)
    text = page.read_text(encoding="utf-8")
    cases: dict[tuple, dict[str, Measurement]] = {}
    for row in rows:
        if row.metric == "time" and row.provider != "reference":
            cases.setdefault(row.case, {})[row.provider] = row
    for (_, stage, *_), case in cases.items():
        ours = case.pop("native")
        if stage == "steps":
            assert report.spread(ours) in text
            assert all(report.factor(row.p50 / ours.p50) in text for row in case.values())
        elif stage == "operations":
            assert report.factor(min(row.p50 for row in case.values()) / ours.p50) in text
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert pictures == {"operations", "steps"}
    for path in (tmp_path / "figures").glob("*.svg"):
        assert f"(figures/{path.name})" in text
    report.write(rows, page)
    assert page.read_text(encoding="utf-8") == text, "writing twice changes the page"


def test_report_prose_outside_marks(tmp_path: Path) -> None:
    """It is kept."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write([], page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert report.NOTHING in text and "old" not in text


def test_operations_table_slower() -> None:
    """Where we are slower, the table says so."""
    assert report.factor(0.8) == "**0.80×**"
    assert report.factor(1.25) == "1.25×"


def test_operations_table_notes(results: Path) -> None:
    """Rows that were not replayed, and all versions, are named."""
    row = next(r for r in load(results) if r.stage == "operations" and r.metric == "time")
    direct = dataclasses.replace(row, note="launched one by one", versions={"torch": "0.1"})
    assert report.spread(direct) == report.spread(row) + " †"
    assert f"torch 0.1 and {row.versions['torch']}" in report.provenance([row, direct])


def measured(p50: float | None, **changes: object) -> Measurement:
    """A row of a step that ours did, or whoever `changes` names."""
    shape = {"B": 2, "T": 8, "micro-batches": 1}
    row = Measurement(
        "steps", "training step tiny", "native", "step", shape, "float32", "time", "ms",
        p50, p50, p50, device="a device", date="2026-01-01", versions={},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def of_another(p50: float | None, **changes: object) -> Measurement:
    return measured(p50, provider="torch.compile", **changes)


def in_mib(row: Measurement) -> Measurement:
    return dataclasses.replace(row, metric="memory", unit="MiB")


def cells(table: str) -> list[list[str]]:
    """The lines of a table without its head."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_steps_table_slower_or_larger() -> None:
    """It is bold."""
    rows = [measured(2.0), in_mib(measured(30.0)), of_another(1.0), in_mib(of_another(20.0))]
    (line,) = cells(report.table_of_steps(report.frame(rows, "steps")))
    assert line[1:] == ["tiny, float32, B=2 T=8", "2.00 (2.00–2.00)", "8,000", "30",
                        "torch.compile **0.50×** (**20**)"]  # fmt: skip


def test_steps_table_not_timed() -> None:
    """It says why."""
    rows = [measured(2.0), in_mib(measured(30.0)), of_another(None, note="losses differ")]
    assert "torch.compile not timed: losses differ" in report.table_of_steps(
        report.frame(rows, "steps")
    )
    rows = [measured(None, note="losses differ"), of_another(1.0), in_mib(of_another(20.0))]
    (line,) = cells(report.table_of_steps(report.frame(rows, "steps")))
    assert line[2:] == [
        "not timed: losses differ",
        "",
        "",
        "torch.compile 1.00 (1.00–1.00) ms (20)",
    ]
    (line,) = cells(report.table_of_steps(report.frame(rows[1:], "steps")))
    assert line[2] == report.NOT_MEASURED


def test_operations_table_one_implementation() -> None:
    """Without another it is "not measured"."""
    changes = {"stage": "operations", "operation": "norm", "direction": "forward", "fraction": 0.5}
    alone = measured(2.0, **changes)
    (line,) = cells(report.table_of_operations(report.frame([alone], "operations")))
    assert line[1:5] == ["norm forward", "0 of 1", "50%", report.NOT_MEASURED]
    larger = {**changes, "shape": {"N": 4}}
    rows = [alone, measured(4.0, **larger), of_another(6.0, **larger), of_another(1.0, **changes)]
    (line,) = cells(report.table_of_operations(report.frame(rows, "operations")))
    assert line[2] == "2 of 2" and line[4].startswith("**0.50×**") and line[5].startswith("1.50×")


def test_operations_table_two_machines() -> None:
    """The same case on two machines is two lines; ours is compared on its own machine."""
    rows = [
        dataclasses.replace(row, device=device, p50=row.p50 * slower)
        for device, slower in (("a GPU", 1.0), ("two threads", 4.0))
        for row in (measured(2.0), of_another(3.0))
    ]
    lines = cells(report.table_of_steps(report.frame(rows, "steps")))
    assert [line[0] for line in lines] == ["a GPU", "two threads"]
    assert all("torch.compile 1.50×" in line[-1] for line in lines)


def test_scaling_table_exponent(results: Path) -> None:
    rows = [row for row in load(results) if row.stage == "scaling"]
    rows = [
        dataclasses.replace(row, p50=float(row.shape["T"]) ** 2) if row.metric == "time" else row
        for row in rows
    ]
    time, memory = steps.growth(rows)
    assert time.startswith("T 16 to 32, native: time ~ T^2.00, expected ")
    assert memory.startswith("T 16 to 32, native: memory ~ T^")
    assert list(steps.growth(rows[:2])) == [], "one size has no exponent"


def test_exponent() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert steps.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_quantiles() -> None:
    assert Quantiles.of(range(11)) == Quantiles(2, 5, 8, 11)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0, 1)


def test_interleave_order() -> None:
    """Each is sampled once a round, and no round begins with the one before's first."""
    order: list[str] = []
    candidates = [Candidate(n, [lambda n=n: order.append(n)], repeats=1) for n in "abc"]
    compete(candidates, 0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_peak_memory_cpu() -> None:
    """What was alive at once."""
    kept = torch.zeros(1 << 18)  # 1 MiB, before and after

    def step() -> None:
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1  # 4 MiB more
        del a
        (b + 1).sum()  # 4 MiB again, when a is gone

    assert peak_on_cpu([kept], step) / 2**20 == pytest.approx(9, abs=0.1)


def test_peak_memory_cpu_alone() -> None:
    """What an earlier measurement left allocated, or is freed during this one, does not count."""
    left: list[torch.Tensor] = []
    assert peak_on_cpu([], lambda: left.append(torch.empty(1000))) == 4000
    assert peak_on_cpu([], lambda: torch.empty(10)) == 40
    assert peak_on_cpu([], left.clear) == 0
