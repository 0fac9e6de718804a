"""Which files are read, how they are opened, and what is said of those that are not text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mantrans.data.files import kind_of, local_files
from mantrans.data.registry import find_source
from mantrans.data.text import ReadReport, read_files
from mantrans.errors import DataError

STORIES = [f"Tale {i}: a naïve fox (№ {i}) ran home to its den.\n\nThe end." for i in range(200)]
TEXT = "\n<|endoftext|>\n".join(STORIES)
LINES = "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in STORIES)


def documents(*files: Path) -> list[str]:
    found, text = [], ""
    for piece in read_files(files, "eot", "text", True, ReadReport()):
        text += piece.text
        if piece.is_last:
            found.append(text)
            text = ""
    return found


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as error:
        documents(file)
    message = str(error.value)
    assert message.isprintable() and message.startswith(str(file))
    return message


def zstd(raw: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return bytes(pyarrow.Codec("zstd").compress(raw))


# --- compressed files --------------------------------------------------------------------------

PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.promise("not UTF-8")
@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(("kind", "content"), [(".txt", TEXT), (".jsonl", LINES)])
def test_open_compressed(tmp_path: Path, suffix: str, kind: str, content: str) -> None:
    """Compressed text is read as it is."""
    pack, raw = PACKERS[suffix], content.encode()
    for name, packed in (
        (f"a{kind}{suffix}", pack(raw)),
        (f"B.1{kind}{suffix}".upper(), pack(raw[:1001]) + pack(raw[1001:])),  # two members
    ):
        (tmp_path / name).write_bytes(packed)
        assert kind_of(tmp_path / name) == kind
        assert documents(*local_files(tmp_path / name).files) == STORIES


@pytest.mark.promise("not UTF-8")
@pytest.mark.parametrize("suffix", PACKERS)
def test_open_damaged_compressed(tmp_path: Path, suffix: str) -> None:
    """Damaged compressed text is refused in one line."""
    file, packed = tmp_path / f"a.txt{suffix}", PACKERS[suffix](TEXT.encode())
    broken = bytearray(packed)
    broken[len(packed) // 2] ^= 0xFF
    name = {".gz": "gzip", ".zst": "Zstandard"}[suffix]
    checked = [bytes(broken)] if suffix == ".gz" else []  # Zstandard's checksum is not always there
    for raw in (packed[:-3], packed[: len(packed) // 2], *checked, b"plain text", b"x" * 9):
        file.write_bytes(raw)
        assert f"expected whole {name} data, got" in refusal(file)


# --- what is not UTF-8 text --------------------------------------------------------------------

ALPHABETS = {
    "English": TEXT,
    "Russian": "Жил да был старый медведь в лесу. " * 300,
    "Greek": "Μια φορά κι έναν καιρό ήταν ένας λύκος. " * 300,
    "Hindi": "एक बार की बात है, एक छोटा सा गाँव था। " * 300,
    "Arabic": "كان يا ما كان في قديم الزمان. " * 300,
    "Chinese": "从前有一只小狐狸，住在森林里。\n" * 300,
    "Japanese without plain spaces": "むかしむかし、　あるところに　おじいさんがいました。　" * 300,
    "Japanese": "むかしむかし、あるところに おじいさんがいました。\n" * 300,
}


@pytest.mark.promise("not UTF-8")
@pytest.mark.parametrize("language", ALPHABETS)
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-32-be", b"\0\0\xfe\xff"),
    ],
)
def test_open_utf16_and_utf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, encoding: str, mark: bytes
) -> None:
    """With and without a byte order mark, as .txt, as .jsonl and compressed."""
    monkeypatch.chdir(tmp_path)
    raw = ALPHABETS[language].encode(encoding)
    unmarked = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    for name, content, named in (
        ("it's a.txt", mark + raw, unmarked[:6]),
        ("b.txt", raw, unmarked),
        ("c.jsonl", raw, unmarked),
        ("d.txt.gz", gzip.compress(raw), unmarked),
    ):
        Path(name).write_bytes(content)
        message = refusal(Path(name))
        assert f"expected UTF-8 text, got {named}; convert it: " in message
        if name[0] in "id" and language in ("English", "Chinese"):
            subprocess.run(message.partition("convert it: ")[2], shell=True, check=True)
            converted = Path(f"{name.partition('.')[0]}-utf8.txt").read_text("utf-8-sig")
            assert converted == ALPHABETS[language]


def in_zip(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", raw)
    return buffer.getvalue()


def in_tar(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(raw)
        archive.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()


OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "gzip data; rename it to .*a.txt.gz,"),
    "zstd": (zstd, "Zstandard data; rename it to .*a.txt.zst,"),
    "bzip2": (bz2.compress, "bzip2 data; decompress it: bunzip2 < "),
    "xz": (lzma.compress, "xz data; decompress it: xz -d < "),
    "zip": (in_zip, "a zip archive; unpack it: unzip "),
    "tar": (in_tar, "a tar archive; unpack it: tar -xf "),
    "tar.gz": (lambda raw: in_tar(raw), "a tar archive"),
    "PDF": (lambda raw: b"%PDF-1.7\n%\xe2\xe3\n" + raw, "a PDF; extract its text: pdftotext "),
    "RTF": (lambda raw: b"{\\rtf1\\ansi " + raw, "an RTF document; save it as plain text"),
    "Parquet": (lambda raw: b"PAR1" + raw, "a Parquet file; rename it to a.parquet"),
    "ELF": (lambda raw: b"\x7fELF\2\1\1" + bytes(9) + bytes(range(256)) * 40, "binary data"),
    "numbers": (lambda raw: b"".join(i.to_bytes(4, "little") for i in range(9999)), "binary data"),
    "bytes": (lambda raw: bytes(i * i % 251 for i in range(9999)), "binary data"),
}


@pytest.mark.promise("not UTF-8")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_open_not_text(tmp_path: Path, name: str, suffix: str) -> None:
    """What is no text is named with what to do."""
    pack, expected = OTHERS[name]
    file = tmp_path / f"a{suffix}"
    file.write_bytes(pack(TEXT.encode()))
    message = refusal(file)
    assert re.search(expected.replace("a.txt", f"a{suffix}"), message)
    _, decompress, command = message.partition("decompress it: ")
    if decompress and shutil.which(command.split()[0]):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "a-utf8.txt").read_text() == TEXT


@pytest.mark.parametrize(
    "raw",
    [
        ("c\0t sat\n" * 4000).encode(),  # NUL now and then
        b"\0" * 15,
        b"a\0b",
        b"%PD is no PDF, BZh is no bzip2, PK is nobody" * 50,
        b"\x1b[31mred\x1b[0m \x1b[32mgreen\x1b[0m\n" * 900,  # a terminal's
        "😀 \u200b\ufeff漢字\n".encode() * 900,
        b"a\tb\x1fc\x1ed\n" * 900,  # separators of fields and records
    ],
)
def test_open_unusual_text(tmp_path: Path, raw: bytes) -> None:
    """Unusual but good text is read."""
    (tmp_path / "a.txt").write_bytes(raw)
    assert documents(tmp_path / "a.txt") == [raw.decode().strip()]


def test_open_other_bytes(tmp_path: Path) -> None:
    """Other bytes are named with their place."""
    (tmp_path / "a.txt").write_bytes(("Ein Käse. " * 10).encode("cp1252"))
    message = refusal(tmp_path / "a.txt")
    assert "expected UTF-8, got 0xe4 at byte 5" in message and "iconv -f WINDOWS-1252" in message


# --- paths -------------------------------------------------------------------------------------


def tree(root: Path) -> None:
    for name in ("b/2.txt", "b/deep/3.jsonl", "c.txt", "skip.csv", "b/LICENSE", ".git/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


@pytest.mark.promise("what is used is said")
def test_list_linked_folders(tmp_path: Path) -> None:
    """They are followed once, and named."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    tree(root)
    tree(outside)
    plain = [file.relative_to(root).as_posix() for file in local_files(root).files]
    assert plain == ["b/2.txt", "b/deep/3.jsonl", "c.txt"]
    (root / "a").symlink_to(outside, target_is_directory=True)
    (root / "b" / "again").symlink_to(outside)
    (outside / "back").symlink_to(root)  # a loop
    (outside / "self").symlink_to(outside)
    (root / "into").symlink_to(root / "b")  # inside already
    (root / "gone").symlink_to(tmp_path / "nothing")
    files, notes = local_files(root)
    found = [file.relative_to(root).as_posix() for file in files]
    assert found == ["a/b/2.txt", "a/b/deep/3.jsonl", "a/c.txt", *plain]
    assert notes[0] == "linked folders were followed: a"
    # skip.csv and LICENSE, twice, and gone
    assert notes[1].startswith(f"files in {root} that are not .txt") and notes[1].endswith(": 5")


def test_list_unreadable_folder(tmp_path: Path) -> None:
    """A folder that cannot be read is not passed over."""
    tree(tmp_path / "root")

    def refuse(place: object) -> object:
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            find_source("local", path=tmp_path / "root")


@pytest.mark.promise("not UTF-8")
def test_list_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, what in (
            (tmp_path / "pipe.txt", "a pipe"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/null"), "a device"),
            (Path("/dev/zero"), "a device"),
        ):
            with pytest.raises(DataError, match=f"got {what}: {path}; write the text to a file"):
                local_files(path)
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(OSError, match="symbolic links"):
        local_files(tmp_path / "loop.txt")


def test_list_pipe(tmp_path: Path) -> None:
    """Standard input that is a pipe is refused."""
    reading, writing = os.pipe()
    threading.Thread(target=os.close, args=[writing]).start()
    with pytest.raises(DataError, match="got a pipe"):
        local_files(f"/proc/self/fd/{reading}")
    os.close(reading)


def test_list_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder may be written as a tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert local_files("~/a.txt").files == [tmp_path / "a.txt"]
