"""`data.dataset: hub:NAME[:FIELD]`, against a hub on this machine."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from mantrans.cli import main
from mantrans.config import Config, DataConfig
from mantrans.data import tokenizer_tool
from mantrans.data.dataset import TokenDataset, prepare
from mantrans.data.holdout import held_out
from mantrans.data.text import Piece
from mantrans.data.tokenizer import Tokenizer, load_tokenizer
from mantrans.errors import ConfigError, DataError, UnfinishedError
from tests.support.hub import CONVERTED, Hub, serving

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[3]


def table(first: int, count: int, **others: list) -> bytes:
    """A Parquet file with numbered stories."""
    stories = [f"story {number}" for number in range(first, first + count)]
    raw = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": stories, "id": [*range(count)], **others}), raw)
    return raw.getvalue()


SETS = {
    "owner/split": {
        "main": {
            "README.md": b"# a card",
            "data/train-00000-of-00002.parquet": table(0, 40),
            "data/train-00001-of-00002.parquet": table(40, 30),
            "data/validation-00000-of-00001.parquet": table(70, 5),
            "data/test-00000-of-00001.parquet": table(900, 5),
        }
    },
    "owner/plain": {"main": {"a.parquet": table(0, 30), "b.parquet": table(30, 30)}},
    "old": {
        "main": {"x.csv": b"a"}, CONVERTED: {"default/partial-train/0000.parquet": table(0, 9)}
    },
    "owner/two": {
        "main": {"de/train/0.parquet": table(0, 9), "en/train/0.parquet": table(100, 9)}
    },
    "owner/no-parquet": {"main": {"x.csv": b"a"}},
    "owner/only-test": {"main": {"test.parquet": table(0, 9)}},
    "owner/leads-out": {"main": {"../../x.parquet": table(0, 9)}},
    "owner/gone": {"main": {"x.parquet": b""}},
    "owner/damaged": {"main": {"x.parquet": table(0, 9)[:-20]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tinystories_bpe_4096")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(SETS) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's tries
        yield found


def checked(**fields: object) -> DataConfig:
    return Config.from_dict({"data": fields, "training": {"max_steps": 1}}).data


def prepared(dataset: str, cache: Path, tokenizer: Tokenizer, **fields: object) -> TokenDataset:
    config = checked(dataset=dataset, **fields)
    return prepare(config, tokenizer, cache_dir=cache, quiet=True)


def stories(data: TokenDataset, tokenizer: Tokenizer) -> list[list[str]]:
    """The documents of both splits."""
    texts = [tokenizer.decode(stream.tokens.tolist()) for stream in (data.train, data.validation)]
    return [text.split("<|endoftext|>")[:-1] for text in texts]


def numbered(first: int, count: int) -> list[str]:
    return [f"story {number}" for number in range(first, first + count)]


@pytest.mark.parametrize("field", ["", ":text"])
def test_hub_splits(tmp_path: Path, hub: Hub, tokenizer: Tokenizer, field: str) -> None:
    """Each file once, in the order of their names; then neither the hub nor a copy is needed."""
    data = prepared(f"hub:owner/split{field}", tmp_path, tokenizer)
    assert stories(data, tokenizer) == [numbered(0, 70), numbered(70, 5)]
    files = list(SETS["owner/split"]["main"])
    assert sorted(hub.asked) == sorted(files[1:4])
    folder = data.train.path.parent
    assert folder.name.startswith("hub-owner-split-tinystories")
    assert sorted(os.listdir(folder)) == ["train.tokens", "validation.tokens"]
    hub.down = True
    again = prepared(f"hub:owner/split{field}", tmp_path, tokenizer)
    assert again.identity == data.identity and len(hub.asked) == 3


def test_hub_without_splits(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    """A share is held out, as of any text; a subset needs only the files that it is in."""
    data = prepared("hub:owner/plain", tmp_path, tokenizer, validation_fraction=0.2)
    trained, held = stories(data, tokenizer)
    assert sorted(trained + held) == sorted(numbered(0, 60)) and len(held) > 3
    hub.asked.clear()
    sizes = {"subset_size": 5, "val_subset_size": 1}
    data = prepared("hub:owner/plain:text", tmp_path, tokenizer, **sizes, validation_fraction=0.3)
    assert (data.train.n_documents, data.validation.n_documents) == (5, 1)
    assert hub.asked == ["a.parquet"] and data.usage().startswith("6 of more documents, ")


def test_hub_converted(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    """Of a set without Parquet files those that the hub has made."""
    data = prepared("hub:old", tmp_path, tokenizer, validation_fraction=0.4)
    assert sorted(chain(*stories(data, tokenizer))) == numbered(0, 9)


def test_hub_subset(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    data = prepared("hub:owner/two/en", tmp_path, tokenizer, validation_fraction=0.4)
    assert sorted(chain(*stories(data, tokenizer))) == numbered(100, 9)


REFUSED = {
    "hub:owner/none": "expected a data set on the hub, got no such set, or one that needs HF_TOKEN",
    "hub:owner/split:body": "expected one of its fields text, id, as hub:NAME:FIELD, got 'body'",
    "hub:owner/split:id": "expected text in column 'id', got int64",
    "hub:owner/two": "expected one subset, as hub:owner/two/FOLDER, got the folders de/train, en/",
    "hub:owner/two/fr": "expected one subset, as hub:owner/two/FOLDER, got no file there",
    "hub:owner/no-parquet": "expected Parquet files, got a set that has none on the hub",
    "hub:owner/only-test": "expected files to train on, got only test",
    "hub:owner/leads-out": "expected names of files, got ../../x.parquet",
    "hub:owner/gone": "expected the files that it lists, got 404",
    "hub:owner/damaged": "expected a Parquet file, got",
    "hub:owner/a--b": "expected a name that the hub accepts, got another: ",
}


@pytest.mark.promise("any configuration")
@pytest.mark.parametrize(("dataset", "message"), REFUSED.items())
def test_hub_refused(
    tmp_path: Path, hub: Hub, tokenizer: Tokenizer, dataset: str, message: str
) -> None:
    with pytest.raises(DataError) as error:
        prepared(dataset, tmp_path / "cache", tokenizer)
    assert message in str(error.value) and str(error.value).isprintable()
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    "dataset", ["hub:", "hub:../x", "hub:a/../b", "hub:/a", "hub:a b", "hub:a:", "hub:a/b\n"]
)
def test_hub_name_refused(dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset: expected one of .*, or hub:NAME\[:F"):
        checked(dataset=dataset)


def test_hub_field_twice() -> None:
    with pytest.raises(ConfigError, match=r"text_field: expected null, since data\.dataset names"):
        checked(dataset="hub:a:b", text_field="c")
    assert checked(dataset="hub:a", text_field="c").text_field == "c"


@pytest.mark.promise("prepared text survives kills")
@pytest.mark.parametrize("after", [0, 100])
def test_hub_dead(tmp_path: Path, hub: Hub, tokenizer: Tokenizer, after: int) -> None:
    """One line; the files that are there, and the begun one, are not downloaded again."""
    name = "data/train-00001-of-00002.parquet"
    hub.breaks[name] = after
    with pytest.raises(UnfinishedError) as error:
        prepared("hub:owner/split", tmp_path / "new", tokenizer)
    assert str(error.value).startswith("hub:owner/split: the hub does not answer (")
    assert str(error.value).isprintable() and "what is done is kept" in str(error.value)
    with pytest.raises(UnfinishedError):  # still dead
        prepared("hub:owner/split", tmp_path / "new", tokenizer)
    hub.down = False
    hub.asked.clear()
    data = prepared("hub:owner/split", tmp_path / "new", tokenizer)
    assert hub.asked == [name] and hub.lists == 1  # the same revision, whatever is newer
    whole = prepared("hub:owner/split", tmp_path / "whole", tokenizer)
    for ours, theirs in ((data.train, whole.train), (data.validation, whole.validation)):
        assert ours.path.read_bytes() == theirs.path.read_bytes()


def broken_off(hub: Hub, cache: Path, tokenizer: Tokenizer) -> Path:
    """The folder of a set whose second file did not come."""
    hub.breaks["data/train-00001-of-00002.parquet"] = 0
    with pytest.raises(UnfinishedError):
        prepared("hub:owner/split", cache, tokenizer)
    hub.down = False
    hub.asked.clear()
    [folder] = cache.glob("*.unfinished")
    return folder


@pytest.mark.promise("prepared text survives kills")
@pytest.mark.parametrize("content", ["", "[]", "{}", "[1, {}]", '["a", {"b": "c"}]', '["a", []]'])
def test_hub_list_damaged(tmp_path: Path, hub: Hub, tokenizer: Tokenizer, content: str) -> None:
    """The hub is asked again; the files are there."""
    folder = broken_off(hub, tmp_path, tokenizer)
    (folder / "hub.json").write_text(content)
    data = prepared("hub:owner/split", tmp_path, tokenizer)
    assert stories(data, tokenizer) == [numbered(0, 70), numbered(70, 5)]
    assert hub.asked == ["data/train-00001-of-00002.parquet"]


@pytest.mark.promise("prepared text survives kills")
def test_hub_file_cut(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    """As by a lack of power: it is downloaded again."""
    name = "data/train-00000-of-00002.parquet"
    file = broken_off(hub, tmp_path, tokenizer) / "hub" / name
    file.write_bytes(file.read_bytes()[:-9])
    data = prepared("hub:owner/split", tmp_path, tokenizer)
    assert stories(data, tokenizer) == [numbered(0, 70), numbered(70, 5)]
    assert hub.asked[0] == name


def test_hub_revision_gone(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    """What was begun is of no use; the next call begins anew."""
    broken_off(hub, tmp_path, tokenizer)
    hub.rewritten = True
    with pytest.raises(DataError, match=r"expected the revision that was listed before, got none"):
        prepared("hub:owner/split", tmp_path, tokenizer)
    assert not list(tmp_path.glob("*.unfinished"))
    hub.rewritten = False
    data = prepared("hub:owner/split", tmp_path, tokenizer)
    assert stories(data, tokenizer) == [numbered(0, 70), numbered(70, 5)]


@pytest.mark.parametrize("sizes", [(40, 5), (39, 4), (41, 1)])
def test_hub_part(tmp_path: Path, hub: Hub, tokenizer: Tokenizer, sizes: tuple[int, int]) -> None:
    """A part that ends with a file does not need the next one."""
    sizes_by_name = {"subset_size": sizes[0], "val_subset_size": sizes[1]}
    data = prepared("hub:owner/split", tmp_path, tokenizer, **sizes_by_name)
    assert stories(data, tokenizer) == [numbered(0, sizes[0]), numbered(70, sizes[1])]
    assert len(hub.asked) == 2 + (sizes[0] > 40)


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (403, "GatedRepo", DataError, "expected a set that may be read, got one whose terms are"),
        (403, "", DataError, "expected a data set on the hub, got no such set, or one that needs"),
        (404, "", DataError, "expected a data set on the hub, got no such set, or one that needs"),
        (500, "", UnfinishedError, "the hub does not answer ("),
    ],
)
def test_hub_refuses(
    tmp_path: Path,
    hub: Hub,
    tokenizer: Tokenizer,
    status: int,
    code: str,
    kind: type[DataError],
    message: str,
) -> None:
    """Only what may be better later is said to be unfinished."""
    hub.refusal = status, code
    with pytest.raises(DataError) as error:
        prepared("hub:owner/split", tmp_path, tokenizer)
    assert str(error.value).startswith(f"hub:owner/split: {message}")
    assert type(error.value) is kind and str(error.value).isprintable()


@pytest.mark.promise("full disk")
def test_hub_disk_full(
    tmp_path: Path, hub: Hub, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the hub that is blamed, and what is done is kept."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", full)
        with pytest.raises(UnfinishedError, match=r"^tokens cannot .*: No space left.*is kept in"):
            prepared("hub:owner/split", tmp_path, tokenizer)
    data = prepared("hub:owner/split", tmp_path, tokenizer)
    assert stories(data, tokenizer) == [numbered(0, 70), numbered(70, 5)] and hub.lists == 1


def test_hub_never_there(tmp_path: Path, hub: Hub, tokenizer: Tokenizer) -> None:
    """Nothing was begun: nothing is left."""
    hub.down = True
    with pytest.raises(UnfinishedError, match="the hub does not answer"):
        prepared("hub:owner/split", tmp_path, tokenizer)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_hub_command(tmp_path: Path, hub: Hub) -> None:
    """Through HF_ENDPOINT, as a user sets it."""
    command = [sys.executable, "-m", "mantrans", "prepare", "--processes", "1"]
    done = subprocess.run(
        [*command, "--set", "data.dataset=hub:owner/split", "--set", f"data.cache_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_ENDPOINT": hub.address, "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "75 documents" in done.stdout and "100%" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hub_tokenizer(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is learned from what is trained on: the split, or all but what is held out of all."""
    learned: list[list[str]] = []

    def train(pieces: Iterable[Piece], *_: object, **__: object) -> Tokenizer:
        learned.append([piece.text for piece in pieces])
        raise DataError("enough")

    monkeypatch.setattr(tokenizer_tool, "train", train)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = ["tokenizer", "train", "--output", str(tmp_path / "new"), "--dataset"]
    assert main([*command, "hub:owner/split", "--hold-out", "0.3"]) == 2
    assert main([*command, "hub:owner/plain:text", "--hold-out", "0.3"]) == 2
    kept = [f"story {i}" for i in range(60) if not held_out(i, 0.3)]
    assert learned == [numbered(0, 70), kept] and 30 < len(kept) < 60
    hub.asked.clear()
    assert main([*command, "hub:owner/plain", "--limit", "30"]) == 2
    assert learned[2] == numbered(0, 30) and hub.asked == ["a.parquet"]
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    hub.down = True
    assert main([*command, "hub:owner/plain"]) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith("error: hub:owner/plain: the hub does not answer (") and "kept" not in line
    )
    assert main([*command, "hub:../x"]) == 2
    assert "--dataset: expected one of builtin-stories, " in capsys.readouterr().err
