"""Parquet and hub sets: only the columns of text are read; what is not text is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mantrans.config import DataConfig
from mantrans.data import registry
from mantrans.data.dataset import prepare
from mantrans.data.text import ReadReport, read_files
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def written(file: Path, rows_in_a_group: int = 2, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), file, row_group_size=rows_in_a_group)
    return file


def texts(*files: Path, refuse: bool = False, field: str = "text") -> tuple[list[str], ReadReport]:
    report = ReadReport()
    pieces = [piece.text for piece in read_files(files, "eot", field, refuse, report)]
    return pieces, report


ODD_COLUMNS = {
    "map": pyarrow.array([[("k", 1)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "struct": pyarrow.array([{"text": b"x", "n": [1]}] * 3),
    "lists": pyarrow.array([[["text"]], [], None]),
    "decimal": pyarrow.array([1, 2, 3], pyarrow.decimal128(30, 4)),
    "times": pyarrow.array([1, 2, 3], pyarrow.time64("ns")),
    "bytes": pyarrow.array([b"\xff", b"", None]),
    "nothing": pyarrow.nulls(3),
    "text.more": pyarrow.array(["not", "this", "one"]),
}


@pytest.mark.promise("Parquet and lines")
@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_parquet_other_columns(tmp_path: Path, name: str) -> None:
    """Other columns do not matter."""
    file = written(tmp_path / "a.parquet", **{name: ODD_COLUMNS[name], "text": ["one", "two", "3"]})
    assert texts(file)[0] == ["one", "two", "3"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
)
def test_parquet_text_types(tmp_path: Path, kind: Any) -> None:
    column = pyarrow.array(["one", None, "one", " "]).cast(kind)
    found, report = texts(written(tmp_path / "a.parquet", text=column))
    assert found == ["one", "one"]
    assert (report.rows, report.broken, report.empty) == (4, 1, 1)


@pytest.mark.promise("Parquet and lines")
@pytest.mark.parametrize(
    ("column", "name"),
    [
        ([b"one", b"two"], "binary"),
        ([["one"], ["two"]], "list<"),
        ([1, 2], "int64"),
        ([1.5, None], "double"),
        ([{"text": "x"}], "struct<"),
        ([True], "bool"),
    ],
)
def test_parquet_column_not_text(tmp_path: Path, column: Any, name: str) -> None:
    """It is refused by its name."""
    file = written(tmp_path / "a.parquet", text=column)
    expected = rf"a\.parquet: expected text in column 'text', got {re.escape(name)}"
    for refuse in (False, True):
        with pytest.raises(DataError, match=expected):
            texts(file, refuse=refuse)


@pytest.mark.promise("Parquet and lines")
def test_parquet_empty_parts(tmp_path: Path) -> None:
    """Empty parts and parts without text pass."""
    empty = written(tmp_path / "a.parquet", text=pyarrow.array([], pyarrow.string()))
    nulls = written(tmp_path / "b.parquet", text=pyarrow.nulls(3))
    good = written(tmp_path / "c.parquet", text=["one"])
    found, report = texts(empty, nulls, good)
    assert found == ["one"]
    assert report.notes() == [
        "3 of 4 rows skipped; the first: column 'text' is null (b.parquet, row 1)"
    ]


@pytest.mark.promise("what is used is said")
def test_parquet_rows_without_text(tmp_path: Path) -> None:
    """Rows without text are counted or refused as set."""
    good_and_bad = pyarrow.array([b"one", None, b"", b"\xff\xfe", b"two"]).view(pyarrow.string())
    file = written(tmp_path / "a.parquet", text=good_and_bad)
    found, report = texts(file)
    assert found == ["one", "two"]
    assert report.notes() == [
        "2 of 5 rows skipped; the first: column 'text' is null (a.parquet, row 2)",
        "1 of 5 rows hold no text",
    ]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'text' is null; correct it"):
        texts(file, refuse=True)


@pytest.mark.promise("what is used is said")
def test_parquet_skipped_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the run that tokenizes and by those after it, which read the cache."""
    written(tmp_path / "a.parquet", text=["a story of a fox", None] * 25)
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    config = DataConfig(dataset="local", path=str(tmp_path / "a.parquet"))
    for quiet in (False, False, True):
        data = prepare(config, tokenizer, cache_dir=tmp_path / "cache", quiet=quiet)
        assert ("note: 25 of 50 rows skipped" in capsys.readouterr().err) != quiet
        assert data.documents == data.train.n_documents + data.validation.n_documents == 25


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: raw[:-20], lambda raw: raw[:4] + b"\xff" * 40 + raw[44:]],
)
def test_parquet_damaged(tmp_path: Path, damage: Any) -> None:
    """It ends in one line."""
    file = written(tmp_path / "a.parquet", text=[f"text {i}" for i in range(500)])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: expected a Parquet file, got") as error:
        texts(file)
    assert str(error.value).isprintable()


def test_hub_rows_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of local Parquet files."""
    datasets = pytest.importorskip("datasets")

    def splits(**columns: Any) -> registry.Splits:
        rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
        monkeypatch.setattr(datasets, "load_dataset", lambda repository: rows)
        return registry.find_source("tinystories").open(report)

    report = ReadReport()
    found = splits(text=["one", None, "  ", "two"], other=[{"a": 1}] * 4)
    assert [piece.text for piece in found.train] == ["one", "two"]
    assert (report.rows, report.broken, report.empty, found.documents) == (4, 1, 1, 4)
    with pytest.raises(DataError, match="expected text in column 'text', got int64"):
        list(splits(text=[1, 2]).train)
