"""The command `mantrans prepare`: tokens before training, and as files of other trainers."""

from __future__ import annotations

from pathlib import Path

from mantrans.config import DataConfig
from mantrans.cores import share_of_cores
from mantrans.data.bin_file import write_bin
from mantrans.data.dataset import prepare
from mantrans.data.tokenizer import Tokenizer
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
    Raises DataError for text that cannot be used, OSError for a folder that cannot be written.
    """
    dataset = prepare(
        data, tokenizer, cache_dir=data.cache_dir, processes=processes or share_of_cores()
    )
    show(
        f"{dataset.train.path.parent}: {dataset.usage()}; {len(dataset.train):,} tokens to train "
        f"on, {len(dataset.validation):,} to validate"
    )
    if form is not None and output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for stream, name in ((dataset.train, "train"), (dataset.validation, "val")):
            for file in write_bin(stream, output, name, form):
                show(f"wrote {file}: {file.stat().st_size:,} bytes")
