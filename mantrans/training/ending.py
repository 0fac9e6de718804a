"""How a run ends: with a report, at a signal, or because its steps are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.errors import MantransError, ModelError
from mantrans.evaluation.evaluator import as_json, as_text, evaluate
from mantrans.training.diagnosis import FINITE, first_non_finite

if TYPE_CHECKING:
    from mantrans.training.trainer import Trainer


def finish(run: Trainer) -> dict[str, Any]:
    """Validate and sample once more; print the report and where the files are. For rank 0."""
    run.train_step.release()  # whose memory samples may need
    report = _evaluate(run)
    about = {"step": run.progress.step, **run.wrapper.get_model_info()}
    about |= {"init_from": run.origin} if run.origin else {}
    _write_report(run, {"run": about} | report)
    from mantrans.report.page import write_page  # its templates are needed only here

    try:
        write_page(run.directory)
    except MantransError as failure:
        run.logger.message(f"warning: {failure}")
    run.logger.console.close()
    run.logger.message(
        f"\n{as_text(report)}\n\n"
        f"metrics, report   {run.directory}/ (open report.html)\n"
        f"checkpoints       {run.folder.latest}, {run.folder.best}\n"
        f"look at next      mantrans explain --checkpoint {run.folder.best}   "
        f"(one step, every gradient: {run.directory}/explain.html)"
    )
    return report


def _evaluate(run: Trainer) -> dict[str, Any]:
    """The final report; without samples, and a line that says why, if none can be drawn."""

    def report(generate: bool) -> dict[str, Any]:
        return evaluate(
            run.wrapper,
            run.tokenizer,
            run.dataset.validation,
            run.config,
            max_batches=run.config.training.eval_batches,
            generate=generate,
            coherence=run.evaluate_coherence,
            say=run.logger.say_once,
        )

    try:
        return report(generate=True)
    except ModelError as broken:
        run.logger.message(f"warning: no samples: {broken}")
        return report(generate=False)


def _write_report(run: Trainer, report: dict[str, Any]) -> None:
    path = run.directory / "report.json"
    try:
        with replacing(path) as file:
            write_all(file, as_json(report).encode())
    except OSError as error:
        raise MantransError(f"{path}: cannot be written ({error.strerror})") from None


def give_up(run: Trainer, step: int) -> None:
    """Stop after too many steps that were not finite; name the first value that is not."""
    run.train_step.release()  # the batch runs again without it, and takes as much memory
    run.train_step.source.load(step)
    found = run.world.texts(
        "diagnosis", first_non_finite(run.wrapper.model, run.train_step.batch())
    )
    rank = next((rank for rank, where in enumerate(found) if where != FINITE), 0)
    where = found[rank] + (f" (on rank {rank})" if run.world.size > 1 else "")
    n = run.progress.not_finite_in_a_row

    def reason() -> str:
        is_saved = run.latest.exists()
        saved = f"the last good checkpoint is {run.latest}" if is_saved else "none is saved"
        return f"step {step + 1}: {n} step{'s' * (n > 1)} in a row not finite; {where}; {saved}"

    raise MantransError(run.world.from_first("give up", reason))
