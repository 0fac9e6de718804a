"""Checkpoints: every bit comes back, every damage is seen, no crash loses what was saved before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mantrans import CustomTransformerWrapper
from mantrans.checkpoint import atomic, plain, state_file, tensor_file
from mantrans.checkpoint.convert import convert
from mantrans.checkpoint.folder import CheckpointFolder, newest_intact
from mantrans.checkpoint.state_file import load, save, verify
from mantrans.errors import CheckpointError, MantransError
from mantrans.training.lock import run_lock
from tests.support.compare import assert_same_bits
from tests.support.damage import damaged

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool]


def example_state(step: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    flat = torch.randn(300, generator=generator)
    return {
        "step": step,
        "weights": {"a": flat[:200].view(10, 20), "b": flat[200:210], "flat": flat},
        "moments": torch.randn(7, 9, generator=generator).bfloat16(),
        "counters": [torch.tensor(step), torch.zeros(0, 4), torch.tensor([True, False])],
        "config": {"model": {"d_model": 8, "bias": True, "d_ffn": None}, "prompts": ["é\n", ""]},
        "loss": [1.5, float("inf"), -0.0, 1e-310, 2**70, -(2**40), -1, (1, (2, ())), ()],
        3: "an integer key",
    }


def refusal(path: Path) -> str:
    """The message with which both `load` and `verify` refuse `path`."""
    messages = []
    for read in (load, verify):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and messages[0].isprintable()
    assert messages[0].startswith(f"{path}: ")
    return messages[0]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A file with two tensors, short enough to damage in every place."""
    state = {"step": 1, "w": torch.arange(6.0), "m": torch.ones(3).bfloat16(), "names": ["a", "b"]}
    save(tmp_path / "short.pt", state)
    return tmp_path / "short.pt"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "saved.pt", example_state())
    return tmp_path / "saved.pt"


# ------------------------------------------------------------------------------------ what is kept


def test_save_and_load_bits(saved: Path) -> None:
    """The state comes back bit for bit."""
    assert_same_bits(load(saved), example_state())
    verify(saved)


def test_safetensors_package_reads(saved: Path) -> None:
    """Names, dtypes, shapes and bits of all tensors, with the seal as one more."""
    state = example_state()
    expected = {f"weights.{name}": tensor for name, tensor in state["weights"].items()}
    expected |= {f"counters.{index}": tensor for index, tensor in enumerate(state["counters"])}
    expected["moments"] = state["moments"]
    with safe_open(saved, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["format"] == state_file.FORMAT
        plainly = dict(json.loads(file.metadata()["state"])["$dict"])
        assert plainly["config"] == state["config"] and plainly[3] == state[3]
    assert tensors.pop("seal").shape == (len(expected) + 1, 32)
    assert_same_bits(dict(sorted(tensors.items())), dict(sorted(expected.items())))


def test_save_tensor_views(tmp_path: Path) -> None:
    """Neither the order of a flat buffer nor its padding comes into the file."""
    flat = torch.arange(100_000.0)
    state = {"b": flat[50_000:50_010], "a": flat[:6].view(2, 3)}
    save(tmp_path / "views.pt", state)
    save(tmp_path / "copies.pt", {name: tensor.clone() for name, tensor in state.items()})
    assert (tmp_path / "views.pt").read_bytes() == (tmp_path / "copies.pt").read_bytes()
    assert (tmp_path / "views.pt").stat().st_size < 1000


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_load_by_name(tmp_path: Path, optimizer: str) -> None:
    """So that another layout of the flat buffers reads the same files."""

    def wrapper(seed: int) -> CustomTransformerWrapper:
        return CustomTransformerWrapper(
            vocab_size=30, d_model=16, n_blocks=2, n_heads=2, max_seq_len=8, device="cpu",
            dtype=torch.bfloat16, optimizer=optimizer, seed=seed,
        )  # fmt: skip

    def backwards(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: backwards(inner) for key, inner in reversed(value.items())}

    trained, other = wrapper(1), wrapper(2)
    ids = torch.arange(24).view(3, 8)
    trained.train_step(ids, ids)
    save(tmp_path / "x.pt", backwards({**trained.state_dict(), "extra": {}}))
    other.load_checkpoint(tmp_path / "x.pt")
    assert_same_bits(other.state_dict(), trained.state_dict())
    other.train_step(ids, ids)
    trained.train_step(ids, ids)
    assert_same_bits(other.state_dict(), trained.state_dict())


def test_save_paths_reading_alike(tmp_path: Path) -> None:
    """Paths that read alike name different tensors."""
    state = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(2), "seal": torch.full((3,), 2.0)}
    state |= {"__metadata__": torch.full((4,), 3.0), "seal'": torch.zeros(5)}  # type: ignore[dict-item]
    save(tmp_path / "x.pt", state)
    assert_same_bits(load(tmp_path / "x.pt"), state)


def test_load_mapped_private(saved: Path) -> None:
    """Mapped, not copied; the file keeps its bytes, also when it is replaced meanwhile."""
    before = saved.read_bytes()
    big = saved.with_name("big.pt")
    save(big, {"w": torch.ones(10 << 20)})
    resident = resident_bytes()
    state = load(big)
    assert resident_bytes() - resident < 8 << 20
    assert state["w"].sum() == 10 << 20
    loaded = load(saved)
    loaded["moments"].zero_()
    save(saved, {"other": 1})
    assert_same_bits(loaded["weights"], example_state()["weights"])
    save(saved, example_state())
    assert saved.read_bytes() == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_any_dtype_and_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(24).to(dtype)
    state = {
        "whole": base.view(2, 3, 4),
        "transposed": base.view(4, 6).t(),
        "strided": base[::2],
        "expanded": base[:1].expand(5),
        "scalar": base[3],
        "bytes": base.view(torch.uint8),
    }
    save(tmp_path / "x.pt", state)
    assert_same_bits(load(tmp_path / "x.pt"), {k: v.contiguous() for k, v in state.items()})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None, database=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=5))
def test_save_plain_data(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Any plain data comes back."""
    path = tmp_path_factory.getbasetemp() / "plain.pt"
    save(path, state)
    assert_same_bits(load(path), state)


def test_save_numpy_numbers(tmp_path: Path) -> None:
    """NumPy numbers become plain ones."""
    save(tmp_path / "x.pt", {"loss": np.float64(1.5)})
    assert type(load(tmp_path / "x.pt")["loss"]) is float


def test_save_not_data(tmp_path: Path) -> None:
    """It is named before anything is written."""
    deep: Any = 1
    for _ in range(plain.MAX_DEPTH + 1):
        deep = [deep]
    wrong = [
        object(),
        {"a": [set()]},
        np.zeros(2),
        torch.float32,
        {1.5: 2},
        b"bytes",
        deep,
        2**5000,
    ]
    for value in (*wrong, 2**5000, torch.zeros([1] * 9), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"state\.x"):
            save(tmp_path / "x.pt", {"x": value})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.promise("damaged checkpoint")
def test_load_flipped_bit(short: Path) -> None:
    """Every byte of the file, one random bit each: of length, header, tensors and seal."""
    content = short.read_bytes()
    rng = random.Random(0)
    broken = short.with_name("broken.pt")
    for place in range(len(content)):
        broken.write_bytes(damaged(content, rng, place))
        with pytest.raises(CheckpointError, match=r"broken\.pt: is damaged"):
            load(broken)
        if place % 10 == 0:
            assert "--resume latest" in refusal(broken)


@pytest.mark.promise("damaged checkpoint")
def test_load_truncated(short: Path) -> None:
    """Truncation at any length is detected."""
    content = short.read_bytes()
    broken = short.with_name("broken.pt")
    for length in range(len(content)):
        broken.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            verify(broken)
    broken.write_bytes(content + b"\0")
    assert "bytes of tensors, got" in refusal(broken)


@pytest.mark.promise("damaged checkpoint")
def test_load_zeroed_or_swapped_blocks(saved: Path) -> None:
    """Blocks of zeros and swapped blocks are detected."""
    content = saved.read_bytes()
    rng = random.Random(1)
    broken = saved.with_name("broken.pt")
    for _ in range(300):
        first, second = (rng.randrange(len(content)) for _ in range(2))
        length = rng.randrange(1, 600)
        zeroed = content[:first] + bytes(length) + content[first + length :]
        moved = bytearray(content)
        moved[first : first + length] = content[second : second + length]
        for changed in (zeroed[: len(content)], bytes(moved)):
            if changed != content:
                broken.write_bytes(changed)
                with pytest.raises(CheckpointError):
                    load(broken)


@pytest.mark.promise("damaged checkpoint")
def test_load_damaged_tensor_name(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    start = content.index(example_state()["moments"].view(torch.uint8).numpy().tobytes())
    content[start + 5] ^= 1
    saved.write_bytes(content)
    assert "the tensor 'moments' has changed" in refusal(saved)


def test_load_not_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "text.pt").write_text("no\n" * 100)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "zeros.pt").write_bytes(bytes(10_000))
    for path in tmp_path.iterdir():
        assert "is damaged or not a checkpoint" in refusal(path)
    assert "not a regular file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / ("x" * 300))


class FailingDisk:
    """An open file whose bytes beyond the first 2000 are gone, or cannot be read."""

    def __init__(self, file: Any, error: OSError | None) -> None:
        self.file, self.error = file, error
        self.seek, self.fileno = file.seek, file.fileno

    def read(self, size: int) -> bytes:
        if self.file.tell() < 2000:
            return self.file.read(size)
        if self.error:
            raise self.error
        return b""


@pytest.mark.promise("damaged checkpoint")
def test_load_bad_sector_or_shrinking_file(saved: Path, monkeypatch: Any) -> None:
    """Bytes are verified by reads: through a map, an error of the disk would end the process."""
    read = tensor_file.read
    for error, expected in (
        (OSError(errno.EIO, os.strerror(errno.EIO)), "cannot be read (Input/output error)"),
        (None, "it was cut short"),
    ):
        monkeypatch.setattr(tensor_file, "read", lambda file, e=error: read(FailingDisk(file, e)))
        assert expected in refusal(saved)
        with pytest.raises(CheckpointError, match="expected an intact checkpoint, got 1 damaged"):
            newest_intact(saved.parent)


# ---------------------------------------------------------------------------------- hostile files


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
CONTENT = np.arange(4, dtype=np.float32).tobytes()
HONEST = '{"w":{"$tensor":"w"}}'


def header_of(claims: dict[str, Any], state: str = HONEST, n_bytes: int = len(CONTENT)) -> str:
    """A header with the metadata and the seal that belong to it, around any claims."""
    rows = len(claims) + 1
    seal = {"dtype": "U8", "shape": [rows, 32], "data_offsets": [n_bytes, n_bytes + 32 * rows]}
    metadata = {"format": state_file.FORMAT, "state": state}
    return json.dumps({"__metadata__": metadata, **claims, "seal": seal})


def sealed(path: Path, header: str | bytes, content: bytes = CONTENT, tensors: int = 1) -> Path:
    """A file with correct digests around any header: a stranger who knows the format made it."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digests = hashlib.sha256(content).digest() * tensors
    path.write_bytes(head + content + digests + hashlib.sha256(head + digests).digest())
    return path


def test_hostile_files_differ_in_one_thing(tmp_path: Path) -> None:
    """The hostile files below differ from a good one in one thing."""
    path = sealed(tmp_path / "good.pt", header_of({"w": GOOD}))
    assert_same_bits(load(path), {"w": torch.arange(4.0).view(2, 2)})


COUNTS, BYTES, PLACE = "expected counts", r"expected \d+ bytes", "a gap before it, overlaps"


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({"shape": [2**60]}, COUNTS),
        ({"shape": [2**47]}, "expected 562949953421312 bytes, got 16"),
        ({"shape": [2**40], "data_offsets": [0, 2**42]}, PLACE),
        ({"shape": [2**40, 0, 2**40]}, "up to 2.48"),
        ({"shape": [2**48, 0]}, BYTES),
        ({"shape": [5]}, BYTES),
        ({"dtype": "F64"}, BYTES),
        ({"dtype": "F8_E4M3"}, "expected a dtype"),
        ({"dtype": ["F32"]}, "expected a dtype"),
        ({"dtype": None}, "expected a dtype"),
        ({"shape": [3], "data_offsets": [4, 16]}, PLACE),
        ({"shape": [3], "data_offsets": [0, 12]}, PLACE),
        ({"data_offsets": [16, 0]}, BYTES),
        ({"data_offsets": [-16, 0]}, COUNTS),
        ({"data_offsets": [0, 16, 16]}, "two offsets"),
        ({"data_offsets": 16}, "two offsets"),
        ({"shape": [-2, -2]}, COUNTS),
        ({"shape": [2.0, 2]}, COUNTS),
        ({"shape": [True, 4]}, COUNTS),
        ({"shape": ["x" * 1000, 2**30]}, COUNTS),
        ({"shape": "22"}, COUNTS),
        ({"shape": {}, "data_offsets": [12, 16]}, COUNTS),
        ({"shape": None}, "a shape"),
        ({"shape": [1] * 9 + [4]}, "8 dimensions"),
        ({"shape": [2**48] * 200_000}, "8 dimensions"),
    ],
)
def test_load_claims_beyond_file(tmp_path: Path, claim: dict[str, Any], expected: str) -> None:
    """Claims beyond the file are refused without allocating."""
    path = sealed(tmp_path / "x.pt", header_of({"w": GOOD | claim}))
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert re.search(expected, message)
    assert peak < 16 << 20 and len(message) < 400


@pytest.mark.promise("claims of a file")
def test_load_overlapping_tensors(tmp_path: Path) -> None:
    """Tensors that overlap or leave gaps are refused."""

    def claim(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}

    for claims in (
        {"w": GOOD, "v": GOOD},
        {"w": claim("F32", [2], 0, 8), "v": claim("F32", [3], 4, 16)},
        {"w": claim("F32", [4], 0, 16), "v": claim("F32", [2], 4, 12)},
        {"w": claim("U8", [2], 0, 2), "v": claim("F32", [3], 2, 14), "u": claim("U8", [2], 14, 16)},
        {"w": GOOD, "v": claim("F32", [0], 8, 8)},
    ):
        header = header_of(claims, json.dumps({name: {"$tensor": name} for name in claims}))
        assert PLACE in refusal(sealed(tmp_path / "x.pt", header, tensors=len(claims)))


GOOD_HEADER = header_of({"w": GOOD})


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[" + b"[]," * 50_000 + b"[]]",
        b"9" * 1_000_000,
        b'{"__metadata__":1}',
        b"\xff" + GOOD_HEADER.encode(),
        GOOD_HEADER.encode("utf-16"),
        GOOD_HEADER.encode() + b"{}",
        GOOD_HEADER.replace("16]", "NaN]", 1),
        GOOD_HEADER.replace("16]", "Infinity]", 1),
        GOOD_HEADER.replace("16]", "1e999]", 1),
        GOOD_HEADER.replace("16]", f"{'9' * 5000}]", 1),
        GOOD_HEADER.replace('"w"', '"w": 1, "w"', 1),
        GOOD_HEADER.replace('"shape"', '"shape": [4], "shape"', 1),
        GOOD_HEADER.replace('"state"', '"state": 1, "other"'),
        GOOD_HEADER.replace('"seal"', '"deal"'),
        GOOD_HEADER.replace("[2, 32]", "[32, 2]"),
        GOOD_HEADER.replace("[2, 32]", "[64]"),
        GOOD_HEADER.replace('"__metadata__"', '"metadata"'),
        GOOD_HEADER.replace(state_file.FORMAT, "mantrans checkpoint 3"),
        GOOD_HEADER.replace(state_file.FORMAT, "\\n\\u001b[31m" * 1000),
        header_of({"w" * 100_000: GOOD | {"dtype": 1}}),
        header_of({}, n_bytes=16),
        header_of({}, n_bytes=0),
    ],
)
def test_load_malformed_header(tmp_path: Path, header: str | bytes) -> None:
    """A malformed header is refused in little time and memory."""
    begun = time.process_time()
    assert "is damaged or not a checkpoint" in refusal(sealed(tmp_path / "x.pt", header))
    assert time.process_time() - begun < 5


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize("claimed", [2**64 - 1, 2**63, 2**40, 2**24 + 1, 10_000])
def test_load_header_longer_than_file(tmp_path: Path, claimed: int) -> None:
    """A header longer than the file is refused before it is read."""
    path = sealed(tmp_path / "x.pt", GOOD_HEADER)
    path.write_bytes(claimed.to_bytes(8, "little") + path.read_bytes()[8:])
    assert f"claims {claimed} of " in refusal(path)


def beside_the_tensor(value: str) -> str:
    """A state that is sound but perhaps for `value`."""
    return HONEST[:-1] + f',"v":{value}' + "}"


def test_load_values_json_lacks(tmp_path: Path) -> None:
    """Values that JSON lacks are read from their own forms."""
    value = '[{"$tuple":[]},{"$float":"7ff0000000000000"},{"$dict":[[1,2],["$x",null]]}]'
    path = sealed(tmp_path / "x.pt", header_of({"w": GOOD}, beside_the_tensor(value)))
    assert_same_bits(load(path)["v"], [(), float("inf"), {1: 2, "$x": None}])
    alike = {"$tensor": "w", "$tuple": [], "in": {"$float": "7ff0000000000000"}, "$": {"$dict": []}}
    save(path, alike)
    assert_same_bits(load(path), alike)


@pytest.mark.promise("claims of a file")
@pytest.mark.parametrize(
    "state",
    [
        "", "{", "1", "[]", "null", '"w"', '{"$tuple":[]}', "{}", '{"w":"w"}', '{"$w":1}',
        '{"w":{"$tensor":"v"}}', '{"w":{"$tensor":"seal"}}', '{"w":{"$tensor":["w"]}}',
        '{"w":{"$tensor":"w","more":1}}', '{"w":{"$tensor":"w"},"w":1}',
        *map(beside_the_tensor, [
            "NaN", "-Infinity", '{"$tensor":"w"}', '{"$tensor":1}', '{"a":1,"a":1}',
            '{"$float":"7ff0"}', '{"$float":7}', '{"$float":"x000000000000000"}',
            '{"$float":"7ff0000000000000","a":1}', '{"$tuple":1}', '{"$tuple":{}}',
            '{"$dict":{}}', '{"$dict":[[1]]}', '{"$dict":[[[],1]]}', '{"$dict":[[1,2],[1,3]]}',
            '{"$dict":[[null,2]]}', '{"$dict":[[1.5,2]]}', '{"$call":"os.system"}', '{"$":1}',
            "[" * 33 + "]" * 33, "[" * 100_000 + "]" * 100_000,
        ]),
    ],
)  # fmt: skip
def test_load_malformed_state(tmp_path: Path, state: str) -> None:
    path = sealed(tmp_path / "x.pt", header_of({"w": GOOD}, state))
    assert "is damaged or not a checkpoint" in refusal(path)


@pytest.mark.promise("code in a checkpoint")
@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_load_mutated_header(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Sealed again after up to four bytes of it were changed."""
    state = json.dumps({"a": {"$tuple": [{"$float": "7ff0000000000000"}]}, **json.loads(HONEST)})
    base = bytearray(header_of({"w": GOOD}, state).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    path = sealed(tmp_path_factory.getbasetemp() / "mutated.pt", bytes(base))
    try:
        value = load(path)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert_same_bits(value, plain.restore(*plain.flatten(value)))


class Runs:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.promise("code in a checkpoint")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_load_pickle(tmp_path: Path, protocol: int) -> None:
    """By itself, as torch.save writes it, and, marked as a file of ours, by the converter too."""
    mark, new = tmp_path / "ran", tmp_path / "new.pt"
    calls = [Runs(os.system, f"touch {mark}"), Runs(eval, f"open({str(mark)!r}, 'w')")]
    calls += [Runs(getattr, "x", "upper"), Runs(torch.load, str(mark))]
    for number, call in enumerate(calls):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(pickle.dumps({"w": call}, protocol=protocol))
        assert "is damaged or not a checkpoint" in refusal(path)
        torch.save({"w": call}, path, pickle_protocol=max(protocol, 2))
        assert "the first format, a pickle" in refusal(path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"mantrans-checkpoint 1 " + b"0" * 20 + b" " + b"0" * 64
        with pytest.raises(
            CheckpointError, match="expected an intact checkpoint of the first format"
        ):
            convert(path, new)
        assert not mark.exists() and not new.exists()


def test_save_plain_data_too_large(tmp_path: Path, monkeypatch: Any) -> None:
    """Plain data larger than any state are neither written nor read."""
    with pytest.raises(CheckpointError, match="expected at most 16777216 bytes of header"):
        save(tmp_path / "x.pt", {"x": "x" * tensor_file.MAX_HEADER_BYTES})
    assert not (tmp_path / "x.pt").exists()
    save(tmp_path / "y.pt", example_state())
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 100)
    assert "its header claims" in refusal(tmp_path / "y.pt")


# -------------------------------------------------------------------------- failures of the machine


@pytest.mark.promise("full disk")
def test_save_full_disk_simulated(tmp_path: Path, monkeypatch: Any) -> None:
    """ENOSPC at every single write of a save."""
    path = tmp_path / "x.pt"
    save(path, example_state(1))
    before = path.read_bytes()
    writes = 0
    fail_at = 0

    def failing(file: Any, data: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        atomic.write_all(file, data)

    monkeypatch.setattr(state_file, "write_all", failing)
    for attempt in range(1, 1000):
        writes, fail_at = 0, attempt
        try:
            save(path, example_state(2))
        except CheckpointError as error:
            assert "No space left on device" in str(error) and str(path) in str(error)
            assert path.read_bytes() == before
            assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
        else:
            break
    assert attempt > 2 + 7  # the header, seven tensors, the seal
    assert_same_bits(load(path), example_state(2))


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel's own refusal to let a file grow: an error in the midst of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_save_file_size_limit(saved: Path, request: Any) -> None:
    """A file size limit is an error and not the end."""
    before = saved.read_bytes()
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match=r"File too large.*saved before is intact"):
        save(saved, example_state(5))
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved.pt"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.promise("full disk")
def test_save_full_disk(full_disk: Path) -> None:
    folder = CheckpointFolder(full_disk, "run", keep=2)
    folder.save(1, example_state(1))
    with pytest.raises(CheckpointError, match="No space left on device"):
        folder.save(2, {"w": torch.zeros(100_000)})
    assert_same_bits(load(folder.latest), example_state(1))
    folder.save(3, example_state(3))
    assert_same_bits(load(folder.latest), example_state(3))


def test_save_folder_unwritable(tmp_path: Path, monkeypatch: Any) -> None:
    """Root may write anywhere, so the refusal is played: as by a read-only file system."""
    folder = CheckpointFolder(tmp_path, "run", keep=2)
    folder.save(1, example_state(1))

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr("mantrans.checkpoint.atomic.open", refuse, raising=False)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            folder.save(2, example_state(2))
    for function in ("replace", "unlink", "symlink", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            with pytest.raises(CheckpointError, match="Read-only file system"):
                folder.save(2, example_state(2))
        assert load(folder.latest)["step"] in (1, 2)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be changed"):
        CheckpointFolder(tmp_path / "file", "run", keep=2)


KILLED = """
import sys, torch
from mantrans.checkpoint.convert import convert
from mantrans.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder(sys.argv[1], "run", keep=2)
for step in range(int(sys.argv[2]), 10**6):
    more = [torch.zeros(1)] * 20
    state = {"step": step, "w": torch.full((500,), float(step)), "more": more}
    folder.save(step, state, best=step % 3 == 0)
    print(step, flush=True)
"""


@pytest.mark.promise("killed at random")
@pytest.mark.slow
def test_save_killed(tmp_path: Path) -> None:
    """SIGKILL at random moments, with writes slowed so that most fall inside one."""
    rng = random.Random(2)
    environment = {**os.environ, state_file.SLOW_WRITE_VARIABLE: "0.002", "PYTHONPATH": str(ROOT)}
    begin = 1
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(begin)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        done = int(process.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        done = max([done, *(int(line) for line in process.stdout.read().split())])
        assert process.wait() == -signal.SIGKILL
        for name in ("latest.pt", "run/latest.pt"):
            assert load(tmp_path / name)["step"] >= done - 1
        path, skipped = newest_intact(tmp_path / "run")
        state = load(path)
        assert skipped == [] and state["step"] >= done
        assert torch.equal(state["w"], torch.full((500,), float(state["step"])))
        begin = state["step"] + 1
    CheckpointFolder(tmp_path, "run", keep=2)
    assert not list((tmp_path / "run").glob(".*"))


# ------------------------------------------------------------------------------ a run's checkpoints


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_manager_rotation_links_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "first", keep=2)
    for step in range(1, 6):
        assert folder.save(step, example_state(step), best=step == 2) == folder.latest
        assert load(tmp_path / "latest.pt")["step"] == step
    kept = {"step_00000004.pt", "step_00000005.pt", "latest.pt", "best.pt"}
    assert names(folder.folder) == kept
    assert load(folder.best)["step"] == load(tmp_path / "best.pt")["step"] == 2
    assert folder.latest.samefile(folder.folder / "step_00000005.pt")
    assert os.readlink(tmp_path / "latest.pt") == "first/latest.pt"
    assert stat.S_IMODE(folder.latest.stat().st_mode) & 0o400

    other = CheckpointFolder(tmp_path, "second", keep=0)
    other.save(7, example_state(7))
    assert names(other.folder) == {"latest.pt"}
    assert load(tmp_path / "latest.pt")["step"] == 7
    assert not (tmp_path / "best.pt").is_symlink()  # the newest run has none yet
    other.save(8, example_state(8), best=True)
    assert load(tmp_path / "best.pt")["step"] == 8
    assert load(folder.best)["step"] == 2
    folder.save(9, example_state(9))
    assert load(tmp_path / "best.pt")["step"] == 2


def test_manager_resumed_from_older(tmp_path: Path) -> None:
    """A run resumed from an older step keeps its new checkpoints."""
    folder = CheckpointFolder(tmp_path, "run", keep=2)
    for step in (100, 200, 110):
        folder.save(step, example_state(step))
    assert names(folder.folder) == {"step_00000200.pt", "step_00000110.pt", "latest.pt"}
    assert load(newest_intact(folder.folder)[0])["step"] == 110


def test_manager_without_hard_links(tmp_path: Path, monkeypatch: Any) -> None:
    """Without hard links a copy does."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, "run", keep=1)
    for step in (1, 2):
        folder.save(step, example_state(step), best=True)
    assert_same_bits(load(folder.latest), example_state(2))
    assert not folder.latest.samefile(folder.folder / "step_00000002.pt")


def test_manager_foreign_file(tmp_path: Path) -> None:
    """Somebody else's file is not replaced by a link."""
    (tmp_path / "latest.pt").write_text("mine")
    folder = CheckpointFolder(tmp_path, "run", keep=1)
    with pytest.raises(CheckpointError, match="is a file, not a link"):
        folder.save(1, example_state(1))
    assert (tmp_path / "latest.pt").read_text() == "mine"
    assert load(folder.latest)["step"] == 1


@pytest.mark.promise("newest intact checkpoint")
def test_latest_intact_behind_damaged(tmp_path: Path) -> None:
    """The newest intact checkpoint is found behind damaged ones."""
    folder = CheckpointFolder(tmp_path, "run", keep=5)
    for step in (1, 2, 3):
        folder.save(step, example_state(step))
    content = folder.latest.read_bytes()
    (folder.folder / "step_00000003.pt").write_bytes(content[:-1])  # latest.pt is the same file
    path, skipped = newest_intact(folder.folder)
    assert path.name == "step_00000002.pt"
    assert len(skipped) == 1 and "step_00000003.pt: is damaged" in skipped[0]
    for broken in folder.folder.glob("*.pt"):
        broken.write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected an intact checkpoint, got 3 damaged"):
        newest_intact(folder.folder)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .*, got none"):
        newest_intact(tmp_path / "none")


# --------------------------------------------------------------------------------------- the lock


@pytest.mark.promise("two processes")
def test_run_lock_second_process(tmp_path: Path) -> None:
    """It is refused; a dead process leaves no lock."""
    code = (
        "import time; from mantrans.training.lock import run_lock\n"
        f"with run_lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with (
        pytest.raises(MantransError, match=f"in use by process {process.pid}; wait"),
        run_lock(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with (
        run_lock(tmp_path),
        pytest.raises(MantransError, match=f"process {os.getpid()}"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):
        pass


def test_run_lock_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MantransError, match="cannot be written"), run_lock(tmp_path / "file" / "x"):
        pass
