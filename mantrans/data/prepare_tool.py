"""The command `mantrans prepare`: tokens before training, and as files of other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mantrans.config import DataConfig
from mantrans.cores import share_of_cores
from mantrans.data.bin_file import write_bin
from mantrans.data.dataset import TokenDataset, prepare
from mantrans.data.tokenizer import Tokenizer
from mantrans.errors import DataError
from mantrans.terminal import show


def run(
    data: DataConfig,
    tokenizer: Tokenizer,
    processes: int | None,
    form: str | None,
    output: Path | None,
) -> None:
    """Prepare the tokens of a configuration; show where they are and how many.

    processes: that tokenize; None: one for each core that this process may use.
    form, output: write them in that form (`bin_file.FORMATS`) to that folder too.
    Raises DataError for text that cannot be used, and for a folder that cannot be written.
    """
    dataset = prepare(
        data, tokenizer, cache_dir=data.cache_dir, processes=processes or share_of_cores()
    )
    show(
        f"{dataset.train.path.parent}: {dataset.usage()}; {len(dataset.train):,} tokens to train "
        f"on, {len(dataset.validation):,} to validate"
    )
    if form is not None and output is not None:
        for file in _written(dataset, form, output):
            show(f"wrote {file}: {file.stat().st_size:,} bytes")


def _written(dataset: TokenDataset, form: str, output: Path) -> Iterator[Path]:
    """The files, each when it is written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stream, name in ((dataset.train, "train"), (dataset.validation, "val")):
            yield from write_bin(stream, output, name, form)
    except OSError as error:
        raise DataError(
            f"--output: expected a folder that can be written, got {output}: "
            f"{error.strerror or error}"
        ) from None
