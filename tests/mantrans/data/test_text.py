"""Local files: the right documents whatever the chunks, and bounded memory whatever the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mantrans.data import text
from mantrans.data.files import local_files
from mantrans.data.text import Piece, ReadReport, pieces_of, read_files, read_jsonl
from mantrans.data.tokenizer import load_tokenizer
from mantrans.errors import DataError

ROOT = Path(__file__).parents[3]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def documents(pieces: list[Piece]) -> list[str]:
    """Pieces put together again; every document must have been ended."""
    found, open_text = [], ""
    for piece in pieces:
        open_text += piece.text
        if piece.is_last:
            found.append(open_text)
            open_text = ""
    assert open_text == ""
    return found


def in_memory(raw: str, separator: str) -> list[str]:
    """What the documents are, read the simple way."""
    plain = raw.removeprefix("\ufeff").replace("\r\n", "\n")
    parts = plain.split("<|endoftext|>") if separator == "eot" else [""]
    if separator == "blank_line":
        for line in re.findall(r"[^\n\r\v\f\x85\u2028\u2029]*.?", plain, re.DOTALL):
            if line.strip():
                parts[-1] += line
            else:
                parts.append("")
    return [part.strip() for part in parts if part.strip()]


PARTS = st.lists(
    st.sampled_from(["a", "word", " ", "\n", "\r\n", "\r", "\t", "\n\n", "<|endoftext|>"])
    | st.sampled_from(["<|endof", "text|>", "<", "\u00e9", "\u6f22", "\U0001f600", "\0", "\ufeff"])
    | st.sampled_from(["\f", "\v", "\x85", "\u2028", "\u2029", "\xa0", "\u3000", "\x1c", "\u200b"])
    | st.text(max_size=3),
    max_size=40,
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(PARTS, st.sampled_from(["eot", "blank_line"]), st.integers(1, 30))
@example(["<|endoftext|>", "a", "<|endoftext|>", "<|endoftext|>"], "eot", 5)
@example(["\ufeff", "a", "\r\n", "\r\n", "b", "\r"], "blank_line", 1)
def test_documents_any_chunks(tmp_path: Path, parts: list[str], separator: str, chunk: int) -> None:
    """Documents do not depend on how the file is read."""
    raw = "".join(parts)
    file = tmp_path / "a.txt"
    file.write_bytes(raw.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_CHUNK", chunk)
        assert documents([*text.read_txt(file, separator)]) == in_memory(raw, separator)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.integers(1, 10))
def test_pieces_join(document: str, size: int) -> None:
    """The pieces of a document are the document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", size)
        pieces = [*pieces_of(document)]
    assert documents(pieces) == ([document.strip()] if document.strip() else [])
    assert all(0 < len(piece.text) <= size for piece in pieces)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no real text at {SHAKESPEARE}")
def test_pieces_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a document does not change its tokens."""
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    whole = tokenizer.encode(SHAKESPEARE.read_text(encoding="utf-8").strip())
    monkeypatch.setattr(text, "_CHUNK", 3000)
    pieces = [*text.read_txt(SHAKESPEARE)]
    assert len(pieces) > 300
    parts = tokenizer.encode_batch([piece.text for piece in pieces])
    assert list(chain.from_iterable(parts)) == whole


@pytest.mark.promise("odd text")
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"\xef\xbb\xbf", []),
        (b"\xef\xbb\xbfa", ["a"]),
        (b"\n \r\n\t", []),
        (b"\0", ["\0"]),
        (b"a\0b", ["a\0b"]),
        (b"a\r\nb\rc", ["a\nb\rc"]),
        (b"a<|endoftext|>b<|endoftext|>", ["a", "b"]),
        (b"a\n\nb", ["a\n\nb"]),
    ],
)
def test_documents_unusual_files(tmp_path: Path, raw: bytes, expected: list[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(raw)
    assert documents([*text.read_txt(file)]) == expected


@pytest.mark.promise("odd text")
@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"caf\xe9 au lait", 3),  # Latin-1
        (b"\xef\xbb\xbfab\x80", 5),
        (b"a" * 2999 + b"\xe6\xbc", 2999),  # a character cut off by the end of the file
        (b"a" * 1023 + b"\xe6" + b"b" * 50, 1023),  # one that a chunk's end divides
        ("\u6f22".encode() * 400 + b"\xc0", 1200),
    ],
)
def test_documents_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, place: int
) -> None:
    """Text that is not UTF-8 is refused with its place."""
    file = tmp_path / "a.txt"
    file.write_bytes(raw)
    for chunk in (1, 7, 1024, 2**20):
        monkeypatch.setattr(text, "_CHUNK", chunk)
        with pytest.raises(
            DataError, match=rf"a\.txt: expected UTF-8, got 0x.. at byte {place};.*iconv"
        ):
            list(text.read_txt(file))


BLANKS = ["", "   ", "\t", "\xa0", "\xa0 \u2003\t", "\f", "\u3000", "\x1c"]


@pytest.mark.promise("Parquet and lines")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029", "\v", "\f"])
@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_documents_blank_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, blank: str
) -> None:
    """Whatever ends its lines and whatever white space is in it."""
    stories = [f"Story {i} says{end}what happened." for i in range(20)]
    file = tmp_path / "a.txt"
    file.write_bytes(f"{end}{blank}{end}".join(stories).encode())
    expected = [story.replace("\r\n", "\n") for story in stories]
    for chunk in (1, 7, 2**18):
        monkeypatch.setattr(text, "_CHUNK", chunk)
        assert documents([*text.read_txt(file, "blank_line")]) == expected
    assert len(documents([*text.read_txt(file, "eot")])) == 1


@pytest.mark.parametrize("space", ["\r", "\xa0", "\u2028", "\u3000"], ids=ascii)
def test_documents_long_blank_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    """Long text without plain spaces is not cut inside a blank line."""
    monkeypatch.setattr(text, "PIECE", 50)
    story = space.join(["fox"] * 12)
    for chunk in range(20, 80):
        monkeypatch.setattr(text, "_CHUNK", chunk)
        (tmp_path / "a.txt").write_bytes("\r\r".join([story] * 9).encode())
        assert documents([*text.read_txt(tmp_path / "a.txt", "blank_line")]) == [story] * 9


# --- JSON lines --------------------------------------------------------------------------------

BROKEN = {
    b"{": "not JSON",
    b"[1, 2]": "not a JSON object but list",
    b"null": "not a JSON object but NoneType",
    b'{"body": "x"}': "no field 'text', only 'body'",
    b'{"text": 3}': "field 'text' is int",
    b'{"text": null}': "field 'text' is NoneType",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "\xff"}': "not UTF-8",
    b"[" * 100_000: "not JSON",
    b"\0\0": "not JSON",
    b'{"text": ' + b"9" * 6000 + b"}": "not",
}


@pytest.mark.promise("odd text")
@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_jsonl_broken_lines(tmp_path: Path, line: bytes) -> None:
    """Broken lines are counted or refused."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n' + line + b'\n{"text": " two "}\n' + line)
    report = ReadReport()
    assert documents([*read_jsonl(file, "text", False, report)]) == ["one", "two"]
    assert report.broken == 2
    assert report.notes() == [f"2 of 4 rows skipped; the first: {report.first_broken}"]
    assert BROKEN[line] in report.first_broken and "(a.jsonl, line 3)" in report.first_broken
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .*on_broken_lines"):
        list(read_jsonl(file, "text", True, ReadReport()))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_jsonl_line_ends(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(end.join([b'{"text": "a\xe2\x80\xa8b"}', b"", b"{"] * 9))
    report = ReadReport()
    assert documents([*read_jsonl(tmp_path / "a.jsonl", "text", False, report)]) == ["a\u2028b"] * 9
    assert (report.rows, report.broken) == (18, 9) and "line 3" in report.first_broken


def test_jsonl_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": " "}\n{"text": ""}\n{"text": null}'
    )
    report = ReadReport()
    assert documents([*read_jsonl(tmp_path / "a.jsonl", "text", False, report)]) == ["one"]
    assert (report.rows, report.broken, report.empty) == (4, 1, 2)


def test_jsonl_broken_lines_only(tmp_path: Path) -> None:
    """A file of broken lines only says what fields there are."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"story": "one"}\n' * 3)
    with pytest.raises(DataError, match=r"none of its lines can be used.*'text', only 'story'"):
        list(read_jsonl(file, "text", False, ReadReport()))
    assert documents([*read_jsonl(file, "story", False, ReadReport())]) == ["one"] * 3


def test_jsonl_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless line is broken but not read whole."""
    monkeypatch.setattr(text, "_LONGEST_JSON_LINE", 100)
    file = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 5000})
    file.write_text(f'{{"text": "one"}}\n{long}\n{{"text": "two"}}\n{long}')
    report = ReadReport()
    assert documents([*read_jsonl(file, "text", False, report)]) == ["one", "two"]
    assert report.broken == 2


def test_jsonl_any_text(tmp_path: Path) -> None:
    """A text in JSON may hold anything."""
    stories = ["<|endoftext|> inside", "a\n\nb", "\0", "\U0001f600\r\n\u2028x"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    assert documents([*read_jsonl(file, "text", True, ReadReport())]) == stories


# --- Parquet, folders --------------------------------------------------------------------------


def test_parquet_text_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", " ", None, "two"], "n": [1, 2, 3, 4]}).to_parquet(
        str(file)
    )
    assert documents([*read_files([file], "eot", "text", False, ReadReport())]) == ["one", "two"]
    with pytest.raises(
        DataError, match=r"expected one column .body., got text, n; set data\.text_field"
    ):
        list(read_files([file], "eot", "body", False, ReadReport()))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: expected a Parquet file, got") as error:
        list(read_files([file], "eot", "text", False, ReadReport()))
    assert "\n" not in str(error.value)


def test_folder_order(tmp_path: Path) -> None:
    """A folder is read in order at any depth."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("c.txt", "a.jsonl", "b/z.TXT", "b/notes.md", ".hidden/x.txt"):
        (tmp_path / name).write_text('{"text": "json"}' if name.endswith("l") else name)
    files, _ = local_files(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.jsonl", "b/z.TXT", "c.txt"]
    found = documents([*read_files(files, "eot", "text", True, ReadReport())])
    assert found == ["json", "b/z.TXT", "c.txt"]


def test_path_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(
        DataError, match=r"expected a file \.txt, .* or \.bin \(tokens\), or a folder, got .*\.csv"
    ):
        local_files(tmp_path / "a.csv")
    with pytest.raises(DataError, match="expected a folder with"):
        local_files(tmp_path)
    with pytest.raises(DataError, match="got no such path"):
        local_files(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        list(read_files([tmp_path / "b.txt"], "eot", "text", False, ReadReport()))


# --- memory ------------------------------------------------------------------------------------

MEASURE = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    from mantrans.data.dataset import prepare
    from mantrans.data.tokenizer import load_tokenizer

    config = SimpleNamespace(
        dataset="local", path=sys.argv[1], text_field=None, document_separator=sys.argv[3],
        on_broken_lines="skip", subset_size=None, val_subset_size=None, share_held_out=0.01,
        val_path=None,
    )
    tokenizer = load_tokenizer("tinystories_bpe_4096")
    tokenizer.encode("warm up " * 1000)
    # not ru_maxrss, which counts the process that started this one
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    before = peak()
    data = prepare(config, tokenizer, cache_dir=sys.argv[2], quiet=True)
    print(before, peak(), data.train.n_bytes + data.validation.n_bytes)
"""


def peak_megabytes(file: Path, separator: str) -> tuple[float, float, int]:
    """Resident memory before and at most while preparing, in MB, and the bytes prepared."""
    script = textwrap.dedent(MEASURE)
    command = [sys.executable, "-c", script, str(file), str(file.parent / "cache"), separator]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    before, peak, n_bytes = result.stdout.split()
    return float(before), float(peak), int(n_bytes)


def write_line(file: Path, megabytes: int) -> int:
    """One line with spaces in it, no separator: a single document. Returns its bytes."""
    words = ("once upon a time there was a mouse who ate the cheese " * 20_000)[: 2**20]
    with file.open("w") as stream:
        for _ in range(megabytes):
            stream.write(words)
    return megabytes * 2**20


def test_prepare_long_line_memory(tmp_path: Path) -> None:
    """One long line is prepared in bounded memory."""
    size = write_line(tmp_path / "long.txt", 8)
    before, peak, n_bytes = peak_megabytes(tmp_path / "long.txt", "eot")
    assert abs(n_bytes - size) < 2  # the space at its end is stripped
    assert peak - before < 160  # a few calls' worth of tokens, whatever the file


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["eot", "blank_line"])
def test_prepare_two_gigabytes_memory(tmp_path: Path, separator: str) -> None:
    """Two gigabytes are prepared in less than one."""
    size = write_line(tmp_path / "long.txt", 2048)
    _, peak, n_bytes = peak_megabytes(tmp_path / "long.txt", separator)
    assert abs(n_bytes - size) < 2
    assert peak < 1000
