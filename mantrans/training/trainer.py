"""The training loop, to be read from top to bottom.

    set up → for each step: run it; now and then read results, log, validate, save → report

`training.saving` has what a resumed run needs to continue bit for bit: weights, moments, the step
number (batches and learning rates are functions of it), and the counters.

Every rank runs this. What only rank 0 has (folders, records, profile) is `Silent` elsewhere; what
only it computes (validation, the report) the others wait for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from mantrans.checkpoint import state_file
from mantrans.checkpoint.folder import CheckpointFolder
from mantrans.config import Config, TrainingConfig
from mantrans.config.arguments import Steps, checked
from mantrans.data.dataset import prepare
from mantrans.data.loader import BatchLoader
from mantrans.distributed.world import World, device_of
from mantrans.evaluation.evaluator import measure_stream
from mantrans.optim.guards import OutlierGuard
from mantrans.optim.schedule import rate
from mantrans.runtime import disable_malloc_trim, resolve_device, set_threads
from mantrans.training import (
    agreement,
    compiling,
    flops,
    kernel_check,
    rehearsal,
    room,
    saving,
)
from mantrans.training.alone import on_first
from mantrans.training.batches import token_source
from mantrans.training.building import build_wrapper
from mantrans.training.ending import finish, give_up
from mantrans.training.layer_norms import LayerNorms, Norms
from mantrans.training.logger import RunLogger
from mantrans.training.profile import StepProfiler
from mantrans.training.progress import Progress
from mantrans.training.restoring import continue_data, load_state, open_checkpoint
from mantrans.training.resume import Checkpoint
from mantrans.training.run_folder import RunFolders
from mantrans.training.share import share_of
from mantrans.training.signals import StopSignals
from mantrans.training.start import start
from mantrans.training.step import TrainStep


class Trainer:
    """One run. `Trainer(config).run()` trains, validates, saves and reports.

    resume: a checkpoint, "latest", or a run: see `mantrans.training.resume`.
    allow_other_data: resume on tokens that are not the checkpoint's.
    evaluate_coherence: False overrides the config. debug_nan: stop at the first step that is not
    finite and name the layer. check_kernels: compare each Triton kernel with the reference first.
    profile: the number of steps to record (see `mantrans.training.profile`).
    world: the processes that train together (`World.from_environment()`); None for this one alone.
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
        world: World | None = None,
    ) -> None:
        self.config, self.debug_nan = config, debug_nan
        self.world = world or World.single()
        self.world.watch(timeout=config.training.distributed_timeout)
        self.share = share_of(config.training, self.world)
        self.evaluate_coherence = evaluate_coherence
        self.allow_other_data = allow_other_data
        self.signals = StopSignals()
        self.progress = Progress()
        self.directory = Path(config.training.output_dir) / config.training.experiment_name
        self.latest = Path(
            config.training.checkpoint_dir, config.training.experiment_name, "latest.pt"
        )
        self.folders = on_first(self.world, RunFolders, config.training)
        self.world.before_leaving(self.folders.close)
        try:
            notes = self._set_up(resume, check_kernels, quiet)
        except BaseException:
            self.folders.close()
            raise
        self.profiler = None
        if profile:
            self.profiler = on_first(
                self.world,
                StepProfiler,
                profile,
                self.directory,
                self.wrapper.device,
                self.wrapper.dtype,
                self.logger.message,
            )
        about = [self.describe()] if self.world.is_first else []
        for note in [*notes, *self.share.notes, *about]:
            self.logger.message(note)

    def _set_up(self, resume: str | None, check_kernels: bool, quiet: bool) -> list[str]:
        """Whatever may be refused, the quick before the slow; then the run's folders.

        Returns what the user should know about it.
        """
        quiet = quiet or not self.world.is_first
        checkpoint, notes = open_checkpoint(self, resume)
        goes_on = checkpoint is not None and self.folders.is_of_this_run(*checkpoint.origin)
        self.folders.check(replaced=not goes_on and self.folders.has_run())
        begun = start(self.config, checkpoint)
        self.config, self.tokenizer, self.origin = begun.config, begun.tokenizer, begun.origin
        agreement.agree(
            self.world,
            "configuration",
            {
                **agreement.of_config(self.config),
                **agreement.of_software(),
                "hash of the tokenizer": self.tokenizer.hash,
                "digest of the checkpoint": checkpoint.digest if checkpoint else None,
            },
        )
        self._build(checkpoint)
        notes += begun.load_weights(self.wrapper)
        if checkpoint:
            notes += load_state(self, checkpoint)
        self._load_data(quiet)
        if self.world.is_first:
            windows = -(-len(self.dataset.validation) // self.config.sequence_length)
            self.predicted = room.require_evaluation_memory(
                self.placed,
                self.tokenizer.vocab_size,
                windows,
                self.world.size,
                self.memory.chunk_rows,
            )
        if checkpoint:
            notes += continue_data(self, checkpoint)
        if self.wrapper.device.type == "cuda":
            notes += compiling.compile_for(
                self.config,
                self.wrapper.model,
                checks=check_kernels,
                local_ranks=self.world.local_size,
                quiet=quiet,
            )
        if check_kernels and self.wrapper.device.type == "cuda":
            notes += kernel_check.check(self.config, self.wrapper.model, quiet=quiet)
        self._meet()
        self._make_step()
        notes += self._open_folders(checkpoint if goes_on else None)
        self.logger = on_first(
            self.world,
            RunLogger,
            self.directory,
            self.progress.step if checkpoint else None,
            config=self.config,
            total_steps=self.total_steps,
            processes=self.world.size,
            quiet=quiet,
        )
        if checkpoint:
            self.tell_last_saved(f"{checkpoint.path} (step {self.progress.step})")
            notes.append(f"resumed from {checkpoint.path} at step {self.progress.step}")
        if checkpoint and self.progress.step >= self.total_steps:
            at = f"{checkpoint.path} is already at step {self.progress.step}"
            notes.insert(-1, f"{at}: nothing left to train")
        return notes

    def _meet(self) -> None:
        """Wait until no rank refuses the run, compare what they are to train with, and connect."""
        agreement.agree(
            self.world,
            "model and data",
            {
                "device": self.wrapper.device.type,
                "dtype": str(self.wrapper.dtype),
                "backend": self.wrapper.model.ops.__name__.rpartition(".")[2],
                **{
                    f"{what} of {split} tokens": value
                    for split, identity in self.dataset.identity.items()
                    for what, value in (
                        ("number", identity["tokens"]),
                        ("checksum", identity["checksum"]),
                    )
                },
            },
        )
        self.world.connect(self.wrapper.device)
        agreement.require_same_weights(
            self.world, self.wrapper.model.parameters, self.progress.step
        )

    def tell_last_saved(self, checkpoint: str) -> None:
        """What messages about the end of several processes name."""
        self.world.watch(last_saved=f"the last checkpoint is {checkpoint}")

    def _open_folders(self, checkpoint: Checkpoint | None) -> list[str]:
        """Create the run's folders. A run that does not go on from `checkpoint` moves an earlier
        one of its name away; one that does sets aside what was saved after it."""
        training = self.config.training
        notes = self.folders.begin(replace=checkpoint is None) or []
        self.folder = on_first(
            self.world,
            CheckpointFolder,
            training.checkpoint_dir,
            training.experiment_name,
            training.keep_checkpoints,
        )
        if checkpoint and self.world.is_first:
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
        self.dataset = self.world.local_first(
            "data",
            lambda: prepare(data, self.tokenizer, cache_dir=data.cache_dir, quiet=quiet),
        )
        self.loader = BatchLoader(
            self.dataset.train,
            training.sequences_per_step,
            self.config.sequence_length,
            training.seed,
            self.share.rows,
        )
        self.set_length()

    def set_length(self) -> None:
        """The steps of the run; ConfigError if warm-up and decay take more."""
        self.total_steps = self.length_of(self.config.training)
        self.config.training.require_room(self.total_steps)

    def length_of(self, training: TrainingConfig) -> int:
        """The steps of a run with these settings on this run's data."""
        per_epoch = -(-self.loader.n_windows // training.sequences_per_step)
        return training.max_steps or (training.num_epochs or 1) * per_epoch

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and its optimizer, if the step has the memory."""
        training = self.config.training
        device = device_of(self.world, training.device)
        self.placed = self.config
        if device != training.device:
            placed = training.model_copy(update={"device": device})
            self.placed = self.config.model_copy(update={"training": placed})
        self._require_memory(checkpoint)
        disable_malloc_trim()
        if resolve_device(device).type == "cpu":
            set_threads(training.threads, self.world.local_size)
        self.wrapper = build_wrapper(self.placed, self.tokenizer.vocab_size, self.world)
        self.wrapper.model.output.chunk_rows = self.memory.chunk_rows
        model = self.wrapper.config
        self.flops_per_token = flops.flops_per_token(model, self.config.sequence_length)
        update = flops.update_flops(model, training.optimizer)
        self.flops_per_token += update / self.config.tokens_per_step
        if self.world.is_first:  # which logs
            self.peak = flops.peak(self.wrapper.device, self.wrapper.dtype)
        self.guard = None
        if training.outlier_z_score is not None:
            self.guard = OutlierGuard(
                training.outlier_z_score, training.outlier_window, self.wrapper.device
            )

    def _require_memory(self, checkpoint: Checkpoint | None) -> None:
        """Refuse a step without the memory; rank 0 chooses for all how many logits to have at a
        time, unless the checkpoint does. Of ranks that share a memory the first asks for all."""
        rows: int | Literal["auto"] | None = "auto"
        if checkpoint:
            with state_file.understood(checkpoint.path):
                rows = checkpoint.logits_chunk_rows()
        asks_for = self.world.local_size if self.world.local_rank == 0 else 0

        def require(rows: int | Literal["auto"] | None) -> room.StepMemory:
            return room.require_memory(
                self.placed, self.tokenizer.vocab_size, rows, asks_for, self.world.size
            )

        chosen = self.world.from_first(
            "rows of logits", lambda: json.dumps(require(rows).chunk_rows)
        )
        self.memory = self.world.local_first("memory", lambda: require(json.loads(chosen)))

    def _make_step(self) -> None:
        training, data = self.config.training, self.config.data
        taken = self.predicted.total if self.world.is_first else self.memory.bytes
        self.train_step = TrainStep(
            self.wrapper.model,
            self.wrapper.trainable(),
            token_source(self.loader, self.wrapper.device, taken),
            micro_batches=self.share.micro_batches,
            world=self.world,
            gradient_sum=training.gradient_sum,
            end_of_text=None if data.attend_across_documents else self.tokenizer.eot_id,
            guards=[self.guard] if self.guard else [],
            capture=training.compile_step and self.wrapper.device.type == "cuda",
            after_capture=lambda: rehearsal.rehearse(self),
            recheck_every=training.recheck_every,
            history=training.log_every,
        )
        self.layer_norms = LayerNorms(self.wrapper.model.parameters)

    # ----------------------------------------------------------------------------------- the loop

    def run(self) -> dict[str, Any] | None:
        """Train to the end. Returns the final report: on rank 0, unless a signal ended the run."""
        progress = self.progress
        self._timer = time.perf_counter(), progress.step
        try:
            with self.signals.caught():
                while progress.step < self.total_steps and not self._is_stopped():
                    self._advance()
                if progress.step >= self.total_steps:
                    return finish(self) if self.world.is_first else None
                self._interrupted()
                return None
        finally:
            if self.profiler:
                self.profiler.finish()
            self.logger.close()
            self.folders.close()

    def _is_stopped(self) -> bool:
        """Whether a signal has come, to any rank: all leave at the same step."""
        return self.world.any(self.signals.first is not None)

    def _advance(self) -> None:
        """Run one step, then whatever is due after it."""
        training, progress = self.config.training, self.progress
        step = progress.step + 1
        last = step == self.total_steps
        log = last or step % training.log_every == 0
        evaluate_now = last or step % training.eval_every == 0
        save = last or step % training.save_every == 0
        with self.world.step(f"step {step}"):
            self.train_step.run(progress.step, self.learning_rate(progress.step))
            progress.step = step
            norms = self.layer_norms.measure() if log else None  # launched before the wait
            if log or evaluate_now or save:
                self._read()
        if self.profiler:
            self.profiler.after_step()
        self.logger.progress(step)
        if norms is not None:
            self._log(self.layer_norms.read(norms))
        if step % training.compare_ranks_every == 0:
            agreement.require_same_weights(self.world, self.wrapper.model.parameters, step)
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
                give_up(self, step)

    def _log(self, norms: Norms) -> None:
        """Log a line of metrics since the last line: means over the steps that were not skipped,
        and the last one's norms by layer."""
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
            grad_norm_by_layer=norms.by_layer,
            grad_norm_by_kind=norms.by_kind,
            tokens=progress.step * self.config.tokens_per_step,
            epoch=self.loader.epoch(progress.step - 1),
            skipped=progress.skipped,
        )
        tokens_per_second = tokens / elapsed
        speed = {
            "tokens_per_second": tokens_per_second,
            "tflops": tokens_per_second * self.flops_per_token / 1e12,
        }
        if self.world.is_first:
            speed["share_of_peak"] = flops.share_of_peak(
                tokens_per_second / self.world.size, self.flops_per_token, self.peak.flops
            )
        self.logger.log_timing(progress.step, **speed)
        self.logger.show(progress.step, **values, **speed)
        progress.pending = []
        self._timer = time.perf_counter(), progress.step

    def _validate(self) -> bool:
        """Measure the validation loss, on rank 0; returns whether it is the lowest so far."""

        def measure() -> str:
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
                f"step {self.progress.step}  validation loss {measured.loss:.4f}, perplexity "
                f"{measured.perplexity:.2f}, bits per byte {measured.bits_per_byte:.4f}"
            )
            return json.dumps(measured.loss)

        loss = json.loads(self.world.from_first("validation", measure))
        if not loss < self.progress.best_loss:  # NaN is not an improvement either
            return False
        self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        return True

    def _save(self, *, best: bool, must_succeed: bool) -> None:
        saving.save(self, best=best, must_succeed=must_succeed)

    def _interrupted(self) -> None:
        """After a signal: save the last step and say how to resume."""
        self._read()
        self._save(best=False, must_succeed=True)
        self.logger.message(
            f"stopped at step {self.progress.step} of {self.total_steps}; "
            "to resume, add --resume latest to the same command, or give only "
            f"--resume {self.folder.folder}"
        )

    # -------------------------------------------------------------------------------------- start

    def describe(self) -> str:
        """The model, its memory, the data and the length of the run, in four lines; on rank 0."""
        info = self.wrapper.get_model_info()
        dtype, ranks = info["dtype"], self.world.size
        processes = f", {ranks} processes" if ranks > 1 else ""
        how = "listed" if self.peak.is_listed else "measured"
        return (
            f"model    {info['parameters']:,} parameters, {dtype}, {info['backend']} kernels on "
            f"{info['device']}{processes}; products at most {self.peak.flops / 1e12:.3g} TFLOP/s "
            f"({how})\n"
            f"memory   {room.shown(self.predicted, self.memory.free)}\n"
            f"data     {self.config.data.dataset}: {self.dataset.usage()}; "
            f"{len(self.dataset.train):,} tokens to train on, "
            f"{len(self.dataset.validation):,} to validate\n"
            f"run      {self.total_steps:,} steps of {self.config.tokens_per_step:,} tokens, "
            f"{self.total_steps / self.loader.batches_per_epoch:.2f} epochs"
        )
