"""Reads the text column of a Parquet file, whatever the other columns are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mantrans.errors import DataError, single_line

_ROWS = 1024  # read at once


def column_of(
    file: Path, column: str, count: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, str | None, str]]:
    """(number from 1, text, "") of each row, or (number, None, what is wrong with it).

    count: called with the bytes of the file that the rows read so far stand for.
    DataError if this is no Parquet file, or has no such column of text.
    """
    number = 0
    with _opened(file) as table:
        _require_text(file, table.schema_arrow, column)
        share = file.stat().st_size / max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
            for scalar in batch.column(column):
                number += 1
                yield number, *_text_of(scalar, column)
            count(int(number * share) - int((number - len(batch)) * share))


def columns(file: Path) -> list[str]:
    """The names of its columns. DataError if this is no Parquet file."""
    with _opened(file) as table:
        return list(table.schema_arrow.names)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """pyarrow's view of the file; in one line what it finds wrong there."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{file}: .parquet needs the package pyarrow (pip install pyarrow); "
            ".txt and .jsonl need none"
        ) from None
    try:
        with ParquetFile(file, pre_buffer=False) as table:
            yield table
    except DataError:
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file}: expected a Parquet file, got {single_line(reason)}") from None


def _require_text(file: Path, schema: Any, column: str) -> None:
    if schema.names.count(column) != 1:
        raise DataError(
            f"{file}: expected one column {column!r}, got {single_line(', '.join(schema.names))}; "
            "set data.text_field"
        )
    found = schema.field(column).type
    if not _is_text(found):
        raise DataError(
            f"{file}: expected text in column {column!r}, got {single_line(str(found))}; "
            "convert it, or set data.text_field"
        )


def _is_text(kind: Any) -> bool:
    """Whether a column of this type holds text; one without a value has no type but null."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    texts = (types.is_string, types.is_large_string, types.is_null)
    return any(
        is_kind(kind) for is_kind in (*texts, getattr(types, "is_string_view", types.is_string))
    )


def _text_of(scalar: Any, column: str) -> tuple[str | None, str]:
    try:
        text = scalar.as_py()
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return text, "" if isinstance(text, str) else f"column {column!r} is null"
