"""Checkpoints: every bit comes back, every damage is seen, no crash loses what was saved before."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import resource
import signal
import stat
import struct
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

from mantrans.checkpoint import archive, atomic, plain_pickle, state_file
from mantrans.checkpoint.folder import CheckpointFolder, newest_intact
from mantrans.checkpoint.state_file import load, save, verify
from mantrans.errors import CheckpointError, MantransError
from mantrans.training.lock import run_lock

ROOT = Path(__file__).parents[1]
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


def assert_same(one: Any, other: Any) -> None:
    """Equality of values, types, dtypes, shapes and bits."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*bits)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert repr(one) == repr(other)


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
    """A file with two records, short enough to damage in every place."""
    state = {"step": 1, "w": torch.arange(6.0), "m": torch.ones(3).bfloat16(), "names": ["a", "b"]}
    save(tmp_path / "short.pt", state)
    return tmp_path / "short.pt"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "saved.pt", example_state())
    return tmp_path / "saved.pt"


# ------------------------------------------------------------------------------------ what is kept


def test_a_state_comes_back_bit_for_bit(saved: Path) -> None:
    assert_same(load(saved), example_state())
    verify(saved)


def test_torch_reads_the_same_with_weights_only(saved: Path) -> None:
    assert_same(torch.load(saved, weights_only=True), example_state())
    assert zipfile.ZipFile(saved).testzip() is None


def test_views_of_one_buffer_stay_views_of_one_buffer(saved: Path) -> None:
    weights = load(saved)["weights"]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert len(pointers) == 1
    assert saved.stat().st_size < 300 * 4 + 8_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_of_memory(tmp_path: Path, dtype: torch.dtype) -> None:
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
    assert_same(load(tmp_path / "x.pt"), {k: v.contiguous() for k, v in state.items()})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=5))
def test_any_plain_data_comes_back(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.pt"
    save(path, state)
    assert_same(load(path), state)


def test_numpy_numbers_become_plain_ones(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", {"loss": np.float64(1.5)})
    assert type(load(tmp_path / "x.pt")["loss"]) is float


def test_what_is_not_data_is_named_before_anything_is_written(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(plain_pickle.MAX_DEPTH + 1):
        deep = [deep]
    wrong = [object(), {"a": [set()]}, np.zeros(2), torch.float32, {1.5: 2}, b"bytes", deep]
    for value in (*wrong, torch.zeros([1] * 9), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"state\.x"):
            save(tmp_path / "x.pt", {"x": value})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_anywhere_is_detected(short: Path) -> None:
    """Every byte of the file, one random bit each: of header, tensors, padding and directory."""
    content = short.read_bytes()
    rng = random.Random(0)
    broken = short.with_name("broken.pt")
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        broken.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"broken\.pt: is (damaged|refused)"):
            load(broken)
        if place % 10 == 0:
            assert "--resume latest" in refusal(broken)


def test_truncation_at_any_length_is_detected(short: Path) -> None:
    content = short.read_bytes()
    broken = short.with_name("broken.pt")
    for length in range(len(content)):
        broken.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            verify(broken)
    broken.write_bytes(content + b"\0")
    assert "cut short" in refusal(broken)


def test_blocks_of_zeros_and_swapped_blocks_are_detected(saved: Path) -> None:
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


def test_a_damaged_tensor_is_named(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    entry = next(e for e in entries_of(saved).values() if e.name == "data/0")
    content[entry.offset + 5] ^= 1
    saved.write_bytes(content)
    assert "the tensor in data/0 has changed" in refusal(saved)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "torch.pt")
    (tmp_path / "text.pt").write_text("no\n" * 100)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "zeros.pt").write_bytes(bytes(10_000))
    for path in tmp_path.iterdir():
        assert "is damaged or not a checkpoint" in refusal(path)
    assert "not a regular file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / ("x" * 300))


# ---------------------------------------------------------------------------------- hostile files


def entries_of(path: Path) -> dict[str, archive.Entry]:
    with open(path, "rb", buffering=0) as file:
        return archive.open_sealed(file)


def sealed(path: Path, pickled: bytes, records: dict[str, bytes], method: int = 0) -> Path:
    """A file with a correct digest around any pickle: what an attacker who knows the format sends.

    The 64-bit end record that torch writes is left out: it is optional.
    """
    with zipfile.ZipFile(path, "w", compression=method) as zipped:
        zipped.writestr("archive/data.pkl", pickled)
        zipped.writestr("archive/byteorder", sys.byteorder, compress_type=0)
        for name, content in records.items():
            zipped.writestr(f"archive/data/{name}", content)
    with open(path, "r+b", buffering=0) as file:
        archive.seal(file)
    return path


def tensor_pickle(key: str, kind: str, n: int, offset: Any, shape: Any, strides: Any) -> bytes:
    """The pickle {"w": tensor} with these claims, written as torch writes it."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: Any) -> Any:
            return value.claim if isinstance(value, Claim) else None

    class Claim:
        claim = ("storage", getattr(torch, kind), key, "cpu", n)

    class Tensor:
        def __reduce__(self) -> Any:
            from collections import OrderedDict

            arguments = (Claim(), offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Tensor()})
    return out.getvalue()


def test_the_hostile_files_below_differ_from_a_good_one_in_one_thing(tmp_path: Path) -> None:
    good = tensor_pickle("0", "FloatStorage", 4, 0, (2, 2), (2, 1))
    records = {"0": np.arange(4, dtype=np.float32).tobytes()}
    path = sealed(tmp_path / "good.pt", good, records)
    assert_same(load(path), {"w": torch.arange(4.0).view(2, 2)})


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        (("0", "FloatStorage", 2**60, 0, (2**60,), (1,)), "has 16 bytes, not 1152921504606846976"),
        (("0", "FloatStorage", 4, 0, (2**60,), (1,)), "claims 1152921504606846976 elements of 4"),
        (("0", "FloatStorage", 4, 0, (2**60,), (0,)), "claims 1152921504606846976 elements of 4"),
        (("0", "FloatStorage", 4, 0, (2**62, 2**62), (1, 1)), "elements of 4"),
        (("0", "FloatStorage", 4, 0, (2**60, 0), (0, 1)), "elements of 4"),
        (("0", "FloatStorage", 5, 0, (5,), (1,)), "has 16 bytes, not 5"),
        (("0", "DoubleStorage", 4, 0, (4,), (1,)), "has 16 bytes, not 4 of torch.float64"),
        (("0", "FloatStorage", 4, 3, (2,), (1,)), "claims 2 elements"),
        (("0", "FloatStorage", 4, -1, (2,), (1,)), "not made of whole numbers"),
        (("0", "FloatStorage", 4, 0, (-2,), (1,)), "not made of whole numbers"),
        (("0", "FloatStorage", 4, 0, (2.0,), (1,)), "not made of whole numbers"),
        (("0", "FloatStorage", 4, 0, (2, 2), (1, 2)), "not stored row by row"),
        (("0", "FloatStorage", 4, 0, (2, 2), (1,)), "2 dimensions"),
        (("0", "FloatStorage", 4, 0, (1,) * 200, (2,) * 200), "200 dimensions"),
        (("0", "FloatStorage", -4, 0, (2,), (1,)), "not a number"),
        (("1", "FloatStorage", 4, 0, (4,), (1,)), "data/1 is missing"),
        (("../x", "FloatStorage", 4, 0, (4,), (1,)), "data/../x is missing"),
    ],
)
def test_claims_beyond_the_file_are_refused_without_allocating(
    tmp_path: Path, claims: Any, expected: str
) -> None:
    path = sealed(tmp_path / "x.pt", tensor_pickle(*claims), {"0": bytes(16)})
    tracemalloc.start()
    assert expected in refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


class Runs:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    calls = [Runs(os.system, f"touch {mark}"), Runs(eval, f"open({str(mark)!r}, 'w')")]
    calls += [Runs(getattr, "x", "upper"), Runs(bytearray, 2**40), Runs(torch.empty, 2**40)]
    for number, call in enumerate(calls):
        pickled = pickle.dumps({"w": call}, protocol=protocol)
        message = refusal(sealed(tmp_path / f"{number}.pt", pickled, {}))
        assert "is refused" in message
        assert not mark.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02}",
        b"\x80\x02]q\x00(h\x00h\x00e.",  # a list twice in itself
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo index of 2^32
        b"\x80\x02}(K\x01u.",  # a key without a value
        b"\x80\x02}\x8c\x01ac__main__\nx\ns.",
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\ns.",  # a name left as a value
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02(((((((.",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",  # nested 200,000 deep
        b"\x80\x02)" + b"\x85" * 200_000 + b".",
        b"\x80\x02X\xff\xff\xff\x7fshort.",  # a text of 2 GB in a few bytes
        b"\x80\x02\x8a\xffshort.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",  # a frame of 2^63 bytes
        b"I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_a_malformed_pickle_is_refused_in_little_time_and_memory(
    tmp_path: Path, pickled: bytes
) -> None:
    start = time.perf_counter()
    assert "is refused" in refusal(sealed(tmp_path / "x.pt", pickled, {}))
    assert time.perf_counter() - start < 5


@settings(max_examples=400, deadline=None, database=None)
@given(st.data())
def test_a_mutated_pickle_gives_plain_data_or_is_refused(data: st.DataObject) -> None:
    base = bytearray(tensor_pickle("0", "FloatStorage", 4, 0, (2, 2), (2, 1)))
    for _ in range(data.draw(st.integers(1, 4))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = plain_pickle.read(
            bytes(base), lambda claim: torch.zeros(min(claim.shape, default=1))
        )
    except plain_pickle.RefusedError as error:
        assert str(error).isprintable()
    else:
        plain_pickle._require_plain(value)


def test_compressed_encrypted_and_overlapping_entries_are_refused(tmp_path: Path) -> None:
    good = tensor_pickle("0", "FloatStorage", 4, 0, (4,), (1,))
    with pytest.raises(archive.DamagedError, match="is compressed"):
        sealed(tmp_path / "bomb.pt", good, {"0": bytes(10 << 20)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    # The same by hand: an honest file whose directory is then changed, the digest made to fit.
    path = sealed(tmp_path / "x.pt", good, {"0": bytes(16)})
    content = path.read_bytes()[: -archive.COMMENT_LENGTH]
    central = [i for i in range(len(content)) if content.startswith(b"PK\x01\x02", i)]
    changes = {
        "compressed": [(central[2] + 10, struct.pack("<H", 8))],
        "not a checkpoint's": [(central[2] + 8, struct.pack("<H", 1))],
        "overlap": [(central[2] + 42, content[central[0] + 42 :][:4])],
        "more than there are": [(central[2] + 20, struct.pack("<II", 2**30, 2**30))],
        "outside the file": [(central[2] + 42, struct.pack("<I", 2**31))],
    }
    for expected, edits in changes.items():
        changed = bytearray(content)
        for place, new in edits:
            changed[place : place + len(new)] = new
        changed[-2:] = b"\0\0"
        path.write_bytes(changed)
        with open(path, "r+b", buffering=0) as file, pytest.raises(archive.DamagedError) as caught:
            archive.seal(file)
        assert expected in str(caught.value)


def test_records_nothing_refers_to_are_refused(tmp_path: Path) -> None:
    path = sealed(tmp_path / "x.pt", b"\x80\x02}.", {"0": bytes(16)})
    assert "nothing refers to data/0" in refusal(path)
    path = sealed(tmp_path / "x.pt", b"\x80\x02].", {})
    assert "holds a list, not a state" in refusal(path)


def test_plain_data_larger_than_any_state_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(archive.DamagedError, match="exceed 16 MiB"):
        sealed(tmp_path / "x.pt", bytes(archive.MAX_PICKLE_BYTES + 1), {})
    monkeypatch.setattr(archive, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="exceed"):
        save(tmp_path / "y.pt", example_state())
    assert not (tmp_path / "y.pt").exists()
    monkeypatch.undo()
    save(tmp_path / "y.pt", example_state())
    monkeypatch.setattr(archive, "MAX_PICKLE_BYTES", 100)
    assert "bytes; at most 100" in refusal(tmp_path / "y.pt")


# -------------------------------------------------------------------------- failures of the machine


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    """ENOSPC at every single write of a save, of which there are dozens."""
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
    monkeypatch.setattr(archive, "write_all", failing)
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
    assert attempt > 30
    assert_same(load(path), example_state(2))


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel's own refusal to let a file grow: an error in the midst of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_size_limit_is_an_error_and_not_the_end(saved: Path, request: Any) -> None:
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


def test_a_really_full_disk(full_disk: Path) -> None:
    folder = CheckpointFolder(full_disk, "run", keep=2)
    folder.save(1, example_state(1))
    with pytest.raises(CheckpointError, match="No space left on device"):
        folder.save(2, {"w": torch.zeros(100_000)})
    assert_same(load(folder.latest), example_state(1))
    folder.save(3, example_state(3))
    assert_same(load(folder.latest), example_state(3))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
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
from mantrans.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder(sys.argv[1], "run", keep=2)
for step in range(int(sys.argv[2]), 10**6):
    folder.save(step, {"step": step, "w": torch.full((500,), float(step))}, best=step % 3 == 0)
    print(step, flush=True)
"""


def test_a_kill_inside_a_save_loses_nothing(tmp_path: Path) -> None:
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


def test_rotation_links_and_best(tmp_path: Path) -> None:
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


def test_a_run_resumed_from_an_older_step_keeps_its_new_checkpoints(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "run", keep=2)
    for step in (100, 200, 110):
        folder.save(step, example_state(step))
    assert names(folder.folder) == {"step_00000200.pt", "step_00000110.pt", "latest.pt"}
    assert load(newest_intact(folder.folder)[0])["step"] == 110


def test_without_hard_links_a_copy_does(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, "run", keep=1)
    for step in (1, 2):
        folder.save(step, example_state(step), best=True)
    assert_same(load(folder.latest), example_state(2))
    assert not folder.latest.samefile(folder.folder / "step_00000002.pt")


def test_somebody_elses_file_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "latest.pt").write_text("mine")
    folder = CheckpointFolder(tmp_path, "run", keep=1)
    with pytest.raises(CheckpointError, match="is a file, not a link"):
        folder.save(1, example_state(1))
    assert (tmp_path / "latest.pt").read_text() == "mine"
    assert load(folder.latest)["step"] == 1


def test_the_newest_intact_checkpoint_is_found_behind_damaged_ones(tmp_path: Path) -> None:
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
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is intact"):
        newest_intact(folder.folder)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        newest_intact(tmp_path / "none")


# --------------------------------------------------------------------------------------- the lock


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
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


def test_a_lock_in_an_impossible_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MantransError, match="cannot be written"), run_lock(tmp_path / "file" / "x"):
        pass
