"""The training loop, to be read from top to bottom.

    set up → for each step: run it; now and then read results, log, validate, save → report

`Trainer.state` has what a resumed run needs to continue bit for bit: weights, moments, the step
number (batches and learning rates are functions of it), and the counters.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

from mantrans.checkpoint import state_file
from mantrans.checkpoint.atomic import replacing, write_all
from mantrans.checkpoint.folder import CheckpointFolder
from mantrans.config import Config, TrainingConfig
from mantrans.config.arguments import Steps, checked
from mantrans.data.dataset import prepare
from mantrans.data.loader import RULE, BatchLoader
from mantrans.errors import CheckpointError, ConfigError, MantransError, ModelError
from mantrans.evaluation.evaluator import as_json, as_text, evaluate, measure_stream
from mantrans.inference.trained import saved_tokenizer
from mantrans.optim.guards import OutlierGuard
from mantrans.optim.schedule import scheduled_learning_rate
from mantrans.runtime import disable_malloc_trim
from mantrans.training import flops, kernel_check, memory
from mantrans.training.batches import token_source
from mantrans.training.diagnosis import first_non_finite
from mantrans.training.logger import RunLogger
from mantrans.training.profile import StepProfiler
from mantrans.training.progress import Progress
from mantrans.training.resume import (
    LATEST,
    Checkpoint,
    changed_settings,
    differences,
    find_checkpoint,
    was_restarted,
)
from mantrans.training.run_folder import RunFolders
from mantrans.training.signals import StopSignals
from mantrans.training.start import start
from mantrans.training.step import TrainStep
from mantrans.wrapper import CustomTransformerWrapper


class Trainer:
    """One run. `Trainer(config).run()` trains, validates, saves and reports.

    resume: a checkpoint, "latest", or a run: see `mantrans.training.resume`.
    allow_other_data: resume on tokens that are not the checkpoint's.
    evaluate_coherence: False overrides the config. debug_nan: stop at the first step that is not
    finite and name the layer. check_kernels: compare each Triton kernel with the reference first.
    profile: the number of steps to record (see `mantrans.training.profile`).
    Raises MantransError (one line) for anything that a user can correct.
    """

    @checked(
        profile=Steps,
        allow_other_data=bool,
        evaluate_coherence=bool,
        debug_nan=bool,
        check_kernels=bool,
        quiet=bool,
    )
    def __init__(
        self,
        config: Config,
        *,
        resume: str | None = None,
        allow_other_data: bool = False,
        evaluate_coherence: bool = True,
        debug_nan: bool = False,
        check_kernels: bool = True,
        profile: int = 0,
        quiet: bool = False,
    ) -> None:
        self.config, self.debug_nan = config, debug_nan
        self.evaluate_coherence = evaluate_coherence
        self.allow_other_data = allow_other_data
        self.signals = StopSignals()
        self.progress = Progress()
        self.directory = Path(config.training.output_dir) / config.training.experiment_name
        self.folders = RunFolders(config.training)
        try:
            notes = self._set_up(resume, check_kernels, quiet)
        except BaseException:
            self.folders.close()
            raise
        self.profiler = None
        if profile:
            self.profiler = StepProfiler(
                profile,
                self.directory,
                self.wrapper.device,
                self.wrapper.dtype,
                self.logger.message,
            )
        for note in [*notes, self.describe()]:
            self.logger.message(note)

    def _set_up(self, resume: str | None, check_kernels: bool, quiet: bool) -> list[str]:
        """Whatever may be refused, the quick before the slow; then the run's folders.

        Returns what the user should know about it.
        """
        if resume is None and was_restarted() and self.folders.has_checkpoints():
            resume = LATEST
        checkpoint, notes = self._open_checkpoint(resume)
        goes_on = checkpoint is not None and self.folders.is_of_this_run(*checkpoint.origin)
        self.folders.check(replaced=not goes_on and self.folders.has_run())
        begun = start(self.config, checkpoint)
        self.config, self.tokenizer, self.origin = begun.config, begun.tokenizer, begun.origin
        self._build(checkpoint)
        notes += begun.load_weights(self.wrapper)
        if checkpoint:
            notes += self._load_state(checkpoint)
        self._load_data(quiet)
        windows = -(-len(self.dataset.validation) // self.config.sequence_length)
        memory.require_evaluation_memory(self.config, self.tokenizer.vocab_size, windows)
        if checkpoint:
            notes += self._continue_data(checkpoint)
        self._make_step()
        if check_kernels and self.wrapper.device.type == "cuda":
            notes += kernel_check.check(self.config, self.wrapper.model, quiet=quiet)
        notes += self._open_folders(checkpoint if goes_on else None)
        self.logger = RunLogger(
            self.directory,
            self.progress.step if checkpoint else None,
            config=self.config,
            total_steps=self.total_steps,
            quiet=quiet,
        )
        if checkpoint and self.progress.step >= self.total_steps:
            at = f"{checkpoint.path} is already at step {self.progress.step}"
            notes.append(f"{at}: nothing left to train")
        if checkpoint:
            notes.append(f"resumed from {checkpoint.path} at step {self.progress.step}")
        return notes

    def _open_folders(self, checkpoint: Checkpoint | None) -> list[str]:
        """Create the run's folders. A run that does not go on from `checkpoint` moves an earlier
        one of its name away; one that does sets aside what was saved after it."""
        training = self.config.training
        notes = self.folders.begin(replace=checkpoint is None)
        self.folder = CheckpointFolder(
            training.checkpoint_dir, training.experiment_name, training.keep_checkpoints
        )
        if checkpoint:
            aside = self.folder.set_aside_later_than(checkpoint.path)
            if aside:
                notes.append(f"note: checkpoints saved after {checkpoint.path} moved to {aside}")
            elif self.folders.is_inside(checkpoint.path):
                best = self.progress.best_step == self.progress.step
                self.folder.name(checkpoint.path.resolve(), best=best)
        return notes

    def _load_data(self, quiet: bool) -> None:
        """Load the tokens; set their order and the length of the run."""
        training, data = self.config.training, self.config.data
        self.dataset = prepare(data, self.tokenizer, cache_dir=data.cache_dir, quiet=quiet)
        self.loader = BatchLoader(
            self.dataset.train,
            training.sequences_per_step,
            self.config.sequence_length,
            training.seed,
        )
        self._set_length()

    def _set_length(self) -> None:
        """The steps of the run; ConfigError if warm-up and decay take more."""
        self.total_steps = self._length_of(self.config.training)
        self.config.training.require_room(self.total_steps)

    def _length_of(self, training: TrainingConfig) -> int:
        """The steps of a run with these settings on this run's data."""
        per_epoch = -(-self.loader.n_windows // training.sequences_per_step)
        return training.max_steps or (training.num_epochs or 1) * per_epoch

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and its optimizer, if the step has the memory."""
        training = self.config.training
        rows: int | Literal["auto"] | None = "auto"
        if checkpoint:
            with state_file.understood(checkpoint.path):
                rows = checkpoint.logits_chunk_rows()
        self.memory = memory.require_memory(self.config, self.tokenizer.vocab_size, rows)
        disable_malloc_trim()
        self.wrapper = build_wrapper(self.config, self.tokenizer.vocab_size)
        self.wrapper.model.output.chunk_rows = self.memory.chunk_rows
        self.flops_per_token = flops.flops_per_token(
            self.wrapper.config, self.config.sequence_length
        )
        self.peak_flops = flops.peak_flops(self.wrapper.device, self.wrapper.dtype)
        self.guard = None
        if training.outlier_z_score is not None:
            self.guard = OutlierGuard(
                training.outlier_z_score, training.outlier_window, self.wrapper.device
            )

    def _make_step(self) -> None:
        training, data = self.config.training, self.config.data
        self.train_step = TrainStep(
            self.wrapper.model,
            self.wrapper.trainable(),
            token_source(self.loader, self.wrapper.device, self.memory.bytes),
            micro_batches=training.gradient_accumulation_steps,
            end_of_text=None if data.attend_across_documents else self.tokenizer.eot_id,
            guards=[self.guard] if self.guard else [],
            capture=training.compile_step and self.wrapper.device.type == "cuda",
            history=training.log_every,
        )

    # ----------------------------------------------------------------------------------- the loop

    def run(self) -> dict[str, Any] | None:
        """Train to the end. Returns the final report, or None if a signal ended the run early."""
        progress = self.progress
        self._timer = time.perf_counter(), progress.step
        try:
            with self.signals.caught():
                while progress.step < self.total_steps and self.signals.first is None:
                    self._advance()
                if progress.step >= self.total_steps:
                    return self._finish()
                self._interrupted()
                return None
        finally:
            if self.profiler:
                self.profiler.finish()
            self.logger.close()
            self.folders.close()

    def _advance(self) -> None:
        """Run one step, then whatever is due after it."""
        training, progress = self.config.training, self.progress
        self.train_step.run(progress.step, self.learning_rate(progress.step))
        if self.profiler:
            self.profiler.after_step()
        progress.step += 1
        self.logger.progress(progress.step)
        last = progress.step == self.total_steps
        log = last or progress.step % training.log_every == 0
        evaluate_now = last or progress.step % training.eval_every == 0
        save = last or progress.step % training.save_every == 0
        if log or evaluate_now or save:
            self._read()
        if log:
            self._log()
        improved = evaluate_now and self._validate()
        if save or improved:
            self._save(best=improved, must_succeed=last)
        if evaluate_now or save:
            self._timer = time.perf_counter(), progress.step

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        return rate(self.config.training, step, self.total_steps)

    def _read(self) -> None:
        """Fetch the results of the steps since the last call, and count the skipped ones."""
        progress = self.progress
        first = progress.step - self.train_step.unread
        for step, record in enumerate(self.train_step.read(), start=first):
            progress.pending.append(record)
            progress.skipped += not record.applied
            if not record.applied and record.loss == record.grad_norm == 0:
                self.logger.message(f"step {step + 1} had no target: nothing was updated")
            if record.trouble is None:
                progress.not_finite_in_a_row = 0
                continue
            progress.not_finite_in_a_row += 1
            self.logger.message(f"step {step + 1} was skipped: {record.trouble}")
            if (
                self.debug_nan
                or progress.not_finite_in_a_row >= self.config.training.max_consecutive_skips
            ):
                self._give_up(step)

    def _log(self) -> None:
        """Log a line of metrics since the last line: means over the steps that were not skipped."""
        progress = self.progress
        applied = [r for r in progress.pending if r.applied] or progress.pending
        elapsed = time.perf_counter() - self._timer[0]
        tokens = (progress.step - self._timer[1]) * self.config.tokens_per_step
        values = {
            "loss": sum(r.loss for r in applied) / len(applied),
            "learning_rate": self.learning_rate(progress.step - 1),
            "grad_norm": sum(r.grad_norm for r in applied) / len(applied),
        }
        self.logger.log(
            progress.step,
            **values,
            tokens=progress.step * self.config.tokens_per_step,
            epoch=self.loader.epoch(progress.step - 1),
            skipped=progress.skipped,
        )
        tokens_per_second = tokens / elapsed
        speed = {
            "tokens_per_second": tokens_per_second,
            "tflops": tokens_per_second * self.flops_per_token / 1e12,
            "mfu": flops.mfu(tokens_per_second, self.flops_per_token, self.peak_flops),
        }
        self.logger.log_timing(progress.step, **speed)
        self.logger.show(progress.step, **values, **speed)
        progress.pending = []
        self._timer = time.perf_counter(), progress.step

    def _validate(self) -> bool:
        """Measure the validation loss; returns whether it is the lowest so far."""
        measured = measure_stream(
            self.wrapper,
            self.tokenizer,
            self.dataset.validation,
            self.config,
            max_batches=self.config.training.eval_batches,
        )
        self.logger.log(
            self.progress.step,
            validation_loss=measured.loss,
            perplexity=measured.perplexity,
            bits_per_byte=measured.bits_per_byte,
        )
        self.logger.message(
            f"step {self.progress.step}  validation loss {measured.loss:.4f}, "
            f"perplexity {measured.perplexity:.2f}, bits per byte {measured.bits_per_byte:.4f}"
        )
        if not measured.loss < self.progress.best_loss:  # NaN is not an improvement either
            return False
        self.progress.best_loss, self.progress.best_step = measured.loss, self.progress.step
        return True

    # -------------------------------------------------------------------------- saving, resuming

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            **self.wrapper.state_dict(),
            "config": self.config.to_dict(),
            "tokenizer": saved_tokenizer(self.tokenizer, with_file=self.origin is not None),
            **({"init_from": self.origin} if self.origin else {}),
            "data": {"batches": self.loader.rule, **self.dataset.identity},
            "progress": self.progress.saved(),
            "guard": self.guard.state() if self.guard else {},
            "logits_chunk_rows": self.wrapper.model.output.chunk_rows,
            "extra": {},
        }

    def _save(self, *, best: bool, must_succeed: bool) -> None:
        """Write a checkpoint. If a periodic one fails, it is reported and the run continues."""
        try:
            self._refuse_weights_that_are_not_finite()
            self._sync_records()
            self.folder.save(self.progress.step, self.state(), best=best)
        except CheckpointError as failure:
            if must_succeed:
                raise
            self.logger.message(f"warning: {failure}; training goes on")

    def _refuse_weights_that_are_not_finite(self) -> None:
        """A skipped step leaves finite weights, but a step that is not skipped may overflow."""
        if not self.wrapper.model.parameters.best_weights().isfinite().all():
            raise CheckpointError(
                f"step {self.progress.step}: weights are not finite and are not saved; "
                "what was saved before is intact"
            )

    def _sync_records(self) -> None:
        """Flush the records: they must include every step that a checkpoint includes."""
        try:
            self.logger.sync()
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: the records cannot be written ({error.strerror}), and without "
                "them no checkpoint is saved"
            ) from None

    def _open_checkpoint(self, resume: str | None) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint that `resume` names, and why newer ones were skipped."""
        if resume is None:
            return None, []
        path, notes = find_checkpoint(resume, self.config.training)
        return Checkpoint.load(path), notes

    def _load_state(self, checkpoint: Checkpoint) -> list[str]:
        """Take over weights, moments and counters; returns which settings have changed."""
        state = checkpoint.state
        with state_file.understood(checkpoint.path):
            notes = differences(state["config"], self.config.to_dict())
            self.wrapper.load_state_dict(state)
            if self.guard and state["guard"]:
                window = state["guard"]["values"]
                if window.shape == self.guard.values.shape:
                    self.guard.load_state(state["guard"])
                else:
                    notes.append(
                        f"note: training.outlier_window was {len(window)}: the window starts empty"
                    )
            self.progress = Progress.from_saved(state["progress"])
        return notes

    def _continue_data(self, checkpoint: Checkpoint) -> list[str]:
        """Lay out batches as the checkpoint's run did; CheckpointError if its tokens were others.

        Returns what has changed since it was saved.
        """
        state = checkpoint.state
        with state_file.understood(checkpoint.path):
            # Checkpoints had no such record while batches followed the first rule.
            saved = state.get("data", {"batches": 1})
            self.loader.follow(saved["batches"])
            self._set_length()
            notes = []
            if self.loader.rule < RULE:
                notes.append(
                    "note: batches are those of an earlier version, with which the run began: the "
                    "last tokens of the text may never be targets"
                )
            for split, ours in self.dataset.identity.items():
                theirs = saved.get(split, ours)
                if theirs == ours:
                    continue
                other = f"{theirs['tokens']:,} {split} tokens ({theirs['checksum']:.8})"
                found = f"{ours['tokens']:,} ({ours['checksum']:.8})"
                if not self.allow_other_data:
                    changed = changed_settings(state["config"], self.config.to_dict(), "data")
                    raise CheckpointError(
                        f"data: expected the checkpoint's {other}, got {found}: "
                        f"{', '.join(changed) or 'the text has changed'}; "
                        "to go on with these, add --allow-other-data"
                    )
                notes.append(f"note: {found} {split} tokens instead of the checkpoint's {other}")
                if split == "validation":  # the lowest loss was another text's
                    self.progress.best_loss, self.progress.best_step = math.inf, 0
            return [*notes, *self._rate_change(state["config"])]

    def _rate_change(self, saved: dict[str, Any]) -> list[str]:
        """Say if the next step's learning rate is not that of the checkpoint's run, which, if it
        was at its end, had that of its last step."""
        try:
            before = Config.from_dict(saved).training
        except ConfigError:  # of another version
            return []
        step, length = self.progress.step, self._length_of(before)
        if not step < self.total_steps or length < 1:
            return []
        was, now = rate(before, min(step, length - 1), length), self.learning_rate(step)
        if math.isclose(was, now, rel_tol=0.01):
            return []
        return [
            f"note: the learning rate goes on at {now:.2e}; the checkpoint's run was at {was:.2e}"
        ]

    # ------------------------------------------------------------------------------------- ending

    def _finish(self) -> dict[str, Any]:
        """Validate and sample once more; print the report and where the files are."""
        report = self._evaluate()
        about = {"step": self.progress.step, **self.wrapper.get_model_info()}
        about |= {"init_from": self.origin} if self.origin else {}
        self._write_report({"run": about} | report)
        from mantrans.report.page import write_page  # its templates are needed only here

        try:
            write_page(self.directory)
        except MantransError as failure:
            self.logger.message(f"warning: {failure}")
        self.logger.console.close()
        self.logger.message(
            f"\n{as_text(report)}\n\n"
            f"metrics, report   {self.directory}/ (open report.html)\n"
            f"checkpoints       {self.folder.latest}, {self.folder.best}"
        )
        return report

    def _evaluate(self) -> dict[str, Any]:
        """The final report; without samples, and a line that says why, if none can be drawn."""

        def report(generate: bool) -> dict[str, Any]:
            return evaluate(
                self.wrapper,
                self.tokenizer,
                self.dataset.validation,
                self.config,
                max_batches=self.config.training.eval_batches,
                generate=generate,
                coherence=self.evaluate_coherence,
                say=self.logger.say_once,
            )

        try:
            return report(generate=True)
        except ModelError as broken:
            self.logger.message(f"warning: no samples: {broken}")
            return report(generate=False)

    def _write_report(self, report: dict[str, Any]) -> None:
        path = self.directory / "report.json"
        try:
            with replacing(path) as file:
                write_all(file, as_json(report).encode())
        except OSError as error:
            raise MantransError(f"{path}: cannot be written ({error.strerror})") from None

    def _interrupted(self) -> None:
        """After a signal: save the last step and say how to resume."""
        self._read()
        self._save(best=False, must_succeed=True)
        self.logger.message(
            f"stopped at step {self.progress.step} of {self.total_steps}; "
            "to resume, add --resume latest to the same command, or give only "
            f"--resume {self.folder.folder}"
        )

    def _give_up(self, step: int) -> None:
        """Stop after too many steps that were not finite; name the first value that is not."""
        self.train_step.source.load(step)
        where = first_non_finite(self.wrapper.model, self.train_step.batch())
        n = self.progress.not_finite_in_a_row
        last_good = self.folder.latest
        saved = (
            f"the last good checkpoint is {last_good}" if last_good.exists() else "none is saved"
        )
        raise MantransError(
            f"step {step + 1}: {n} step{'s' * (n > 1)} in a row not finite; {where}; {saved}"
        )

    # -------------------------------------------------------------------------------------- start

    def describe(self) -> str:
        """The model, the data and the length of the run, in three lines."""
        info = self.wrapper.get_model_info()
        dtype = info["dtype"]
        return (
            f"model    {info['parameters']:,} parameters, {dtype}, {info['backend']} kernels on "
            f"{info['device']}\n"
            f"data     {self.config.data.dataset}: {self.dataset.usage()}; "
            f"{len(self.dataset.train):,} tokens to train on, "
            f"{len(self.dataset.validation):,} to validate\n"
            f"run      {self.total_steps:,} steps of {self.config.tokens_per_step:,} tokens, "
            f"{self.total_steps / self.loader.batches_per_epoch:.2f} epochs"
        )


def rate(training: TrainingConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0, in a run of `total_steps`."""
    return scheduled_learning_rate(
        step,
        total_steps,
        training.learning_rate,
        minimum=training.min_learning_rate,
        warmup_steps=training.warmup(total_steps),
        decay=training.lr_decay,
        decay_fraction=training.decay_fraction,
    )


def build_wrapper(config: Config, vocab_size: int) -> CustomTransformerWrapper:
    """The model and optimizer that a config describes, for a tokenizer of `vocab_size` entries.

    Raises ConfigError if the config names another vocabulary size.
    """
    model, training = config.model, config.training
    if model.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"model.vocab_size: expected null or {vocab_size}, the entries of data.tokenizer "
            f"({config.data.tokenizer}), got {model.vocab_size}"
        )
    options: dict[str, Any] = {"weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        options |= {
            "beta1": training.beta1, "beta2": training.beta2, "epsilon": training.epsilon
        }  # fmt: skip
    return CustomTransformerWrapper.from_config(
        model.model_copy(update={"vocab_size": vocab_size}),
        device=training.device,
        backend=training.backend,
        optimizer=training.optimizer,
        optimizer_options={**options, "max_grad_norm": training.max_grad_norm},
        seed=training.seed,
        recompute=training.recompute,
        stochastic_rounding=training.stochastic_rounding,
    )
