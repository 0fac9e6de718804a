"""Before a run on a GPU: the kernels of its self-check and first step are compiled side by side.

The first run of a shape compiles some forty kernels, which takes longer than all else before its
first step. So the programs run first without computing anything (`first_step`, `ShapesOnly`); each
launch asks Triton for its kernel, and threads compile them: the compiler's passes, `ptxas`, and the
C compiler that builds a launcher for Triton 3.6, work outside Python's lock.

No result depends on it. A kernel that was missed, or cannot be compiled, is compiled again when it
is launched, and that is where its error is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from mantrans.config import Config
from mantrans.cores import share_of_cores
from mantrans.models.transformer import CustomTransformer
from mantrans.terminal import Progress
from mantrans.training import first_step
from mantrans.training.first_step import Program
from mantrans.training.shapes_only import ShapesOnly


def compile_for(
    config: Config,
    model: CustomTransformer,
    *,
    checks: bool = True,
    local_ranks: int = 1,
    quiet: bool = False,
) -> list[str]:
    """Compile what a run launches until its first step is done, unless that was done before.

    checks: whether the run compares its kernels first. local_ranks: the processes that share this
    machine's cores. Returns what the user should know: a line for each program that failed.
    """
    if not model.ops.__name__.endswith(".triton"):
        return []
    from mantrans.kernels.triton.launch import interpreted

    weights, chunk_rows = model.parameters.weights, model.output.chunk_rows
    if interpreted() or (done := note_of(config, weights, checks, chunk_rows)).exists():
        return []
    programs = first_step.programs(
        config, model.vocab_size, weights.dtype, checks=checks, chunk_rows=chunk_rows
    )
    notes = compile_all(programs, weights.device, share_of_cores(local_ranks), quiet=quiet)
    with contextlib.suppress(OSError):
        done.touch()
    return notes


def note_of(config: Config, weights: torch.Tensor, *others: object) -> Path:
    """The empty file in Triton's cache that says that this run's kernels were compiled."""
    import triton

    from mantrans.kernels.triton import launch

    sources = [path.read_bytes() for path in sorted(Path(launch.__file__).parent.glob("*.py"))]
    data, training = config.data, config.training
    named = {"experiment_name", "output_dir", "checkpoint_dir"}
    of_run = (
        (triton.__version__, launch.gpu_of(weights.device), weights.dtype, *others),
        (config.model, data.tokenizer, data.max_length, data.attend_across_documents),
        training.model_dump(exclude=named),
        sorted(item for item in os.environ.items() if item[0].startswith("TRITON_")),  # its ptxas
    )
    key = hashlib.sha256(b"".join(sources) + repr(of_run).encode()).hexdigest()
    return Path(triton.knobs.cache.dir, f"mantrans-{key}")


def compile_all(
    programs: Iterable[Program], device: torch.device, threads: int, *, quiet: bool = False
) -> list[str]:
    """Compile the kernels that programs launch on `device`, so many at a time.

    Returns a line for each program that failed.
    """
    from triton import AsyncCompileMode

    from mantrans.kernels.triton.launch import compiling_only

    notes = []
    bar = Progress(None, "compiling kernels", "", keep=False, quiet=quiet)
    with Compilers(threads) as pool, AsyncCompileMode(pool, ignore_errors=True) as mode, bar:
        try:
            with compiling_only(device), ShapesOnly():
                for name, run in programs:
                    try:
                        run()
                    except Exception as error:
                        notes.append(f"note: {name} is compiled when it runs ({error!r})")
            for _ in as_completed(mode.raw_futures):
                bar.update()
        finally:
            # After Ctrl-C, what has not begun is dropped. Triton would wait for it forever.
            mode.raw_futures.clear()
            pool.shutdown(cancel_futures=True)
            for kernel in mode.future_kernels.values():
                if not kernel.future.cancelled() and kernel.future.exception() is None:
                    kernel.result()  # Triton remembers it
    return notes


class Compilers(ThreadPoolExecutor):
    """Threads that each compile a kernel, and what Triton launches it with."""

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        from triton.runtime import driver

        def with_launcher() -> Any:
            kernel = compiled()
            driver.active.launcher_cls(kernel.src, kernel.metadata)  # kept in Triton's cache
            return kernel

        future = super().submit(with_launcher)
        of_thread = future.result

        def result(timeout: float | None = None) -> Any:
            # Triton 3.7 and 3.8 remember what was dropped or failed, and ask for it at each launch.
            try:
                return of_thread(timeout)
            except Exception:
                return compiled()

        future.result = result  # type: ignore[method-assign]
        return future
