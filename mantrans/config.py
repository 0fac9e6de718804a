"""What a run is asked to do: the YAML sections model, data, training, evaluation as dataclasses.

Each field states its meaning and its limits once, in `option(...)`; reading, checking and the error
messages all follow from that. `Config.load` refuses everything it does not understand with one
line that names the file, the field, what was found and what is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mantrans import strict_yaml
from mantrans.assets import find_config
from mantrans.errors import ConfigError
from mantrans.options import checked_value, kind_of, option, show

DATASETS = (
    "builtin-stories",
    "tinystories",
    "tiny-textbooks",
    "tiny-strange-textbooks",
    "tiny-codes",
    "local",
)
# Of each pair one field says what the other would: giving one on the command line replaces the
# other of the file.
_ALTERNATIVES = {
    "max_steps": "num_epochs",
    "num_epochs": "max_steps",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
}
_MAX_COUNT = 10**12


@dataclass
class ModelConfig:
    """The network's shape: GPT-2's architecture."""

    d_model: int = option(256, "width C of the residual stream", at_least=1, at_most=65_536)
    n_blocks: int = option(4, "transformer blocks", at_least=1, at_most=1_024)
    n_heads: int = option(
        4, "attention heads H; d_model must be a multiple", at_least=1, at_most=65_536
    )
    d_ffn: int | None = option(
        None, "inner width F of the MLP; null: 4 * d_model", at_least=1, at_most=1_048_576
    )
    max_seq_len: int = option(
        256, "positions the model has; the longest context it can see", at_least=1, at_most=2**20
    )
    vocab_size: int | None = option(
        None, "token ids; null: the tokenizer's count", at_least=1, at_most=2**24
    )
    tie_embeddings: bool = option(True, "output projection shares the token embedding's weights")
    bias: bool = option(True, "linear layers and layer norms have biases")
    layer_norm_epsilon: float = option(
        1e-5, "added to the variance before its root", above=0.0, at_most=1.0
    )
    initializer_range: float = option(
        0.02, "standard deviation of the initial matrices; GPT-2's is 0.02", above=0.0, at_most=1.0
    )
    dtype: str = option(
        "auto",
        "weights and activations; auto: bfloat16 where the processor multiplies it, else float32",
        choices=("auto", "float32", "bfloat16", "float64"),
    )

    @property
    def feed_forward_width(self) -> int:
        """F with its default resolved."""
        return 4 * self.d_model if self.d_ffn is None else self.d_ffn


@dataclass
class DataConfig:
    """The text and how it becomes tokens."""

    dataset: str = option("builtin-stories", "which text to learn", choices=DATASETS)
    tokenizer: str = option(
        "tinystories_bpe_4096",
        "folder under assets/models/tokenizers/, any folder with a tokenizer, or gpt2",
        pattern=r"(?!.*(?:^|[/\\])\.\.(?:[/\\]|$)).+",
        form="a name, or a folder's path without '..'",
    )
    max_length: int | None = option(
        None, "tokens in one training sequence; null: model.max_seq_len", at_least=1, at_most=2**20
    )
    subset_size: int | None = option(
        None, "documents of the training split to use; null: all", at_least=1, at_most=_MAX_COUNT
    )
    val_subset_size: int | None = option(
        None, "documents of the validation split to use; null: all", at_least=1, at_most=_MAX_COUNT
    )
    path: str | None = option(None, "dataset local only: a .txt, .jsonl or .parquet, or a folder")
    text_field: str | None = option(
        None, "field of .jsonl or .parquet rows that holds the text; null: the dataset's own"
    )
    document_separator: str = option(
        "eot",
        "what parts documents in a .txt: the text <|endoftext|>, or a blank line",
        choices=("eot", "blank_line"),
    )
    validation_fraction: float = option(
        0.05, "share held out where the dataset has no validation split", above=0.0, at_most=0.5
    )
    cache_dir: str = option(".cache/tokens", "folder where token files are kept between runs")
    attend_across_documents: bool = option(
        True, "a token sees the whole packed sequence; false: only its own document"
    )
    on_broken_lines: str = option(
        "skip", "a .jsonl line that is not JSON", choices=("skip", "refuse")
    )


@dataclass
class TrainingConfig:
    """How the weights are found, and where the run's files go."""

    experiment_name: str = option(
        "experiment",
        "names the run's folders",
        pattern=r"(?!.*\.pt$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
        form="a letter or digit, then up to 99 of letters, digits, . _ - (not ending in .pt)",
    )
    seed: int = option(
        0, "of the weights, the batches and the samples", at_least=0, at_most=2**63 - 1
    )
    device: str = option(
        "auto",
        "auto: a CUDA GPU if there is one",
        pattern=r"auto|cpu|cuda(?::[0-9]{1,3})?",
        form="auto, cpu, cuda or cuda:N",
    )
    backend: str = option(
        "auto",
        "kernels; auto: triton on a GPU, native on a CPU",
        choices=("auto", "reference", "native", "triton"),
    )
    optimizer: str = option("adamw", "update rule", choices=("adamw", "sgd"))
    learning_rate: float = option(
        1e-3, "the highest, reached after warm-up", above=0.0, at_most=100.0
    )
    min_learning_rate: float = option(0.0, "where the decay ends", at_least=0.0, at_most=100.0)
    lr_decay: str = option(
        "cosine",
        "after warm-up; wsd holds, then falls linearly",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    decay_fraction: float = option(
        0.2, "wsd: the last share of the steps, in which it falls", above=0.0, at_most=1.0
    )
    warmup_steps: int | None = option(
        None, "steps of linear warm-up (this or warmup_ratio)", at_least=0, at_most=_MAX_COUNT
    )
    warmup_ratio: float | None = option(
        None, "the same as a share of all steps; both null: none", at_least=0.0, at_most=1.0
    )
    weight_decay: float = option(0.1, "decoupled, on matrices only", at_least=0.0, at_most=100.0)
    beta1: float = option(0.9, "AdamW: memory of the gradient", at_least=0.0, below=1.0)
    beta2: float = option(0.95, "AdamW: memory of its square", at_least=0.0, below=1.0)
    epsilon: float = option(1e-8, "AdamW: added to the denominator", above=0.0, at_most=1.0)
    batch_size: int = option(16, "sequences in one micro-batch", at_least=1, at_most=2**20)
    gradient_accumulation_steps: int = option(
        1, "micro-batches in one step", at_least=1, at_most=2**20
    )
    max_steps: int | None = option(
        None, "length of the run in steps (this or num_epochs)", at_least=1, at_most=_MAX_COUNT
    )
    num_epochs: int | None = option(
        None, "length of the run in passes over the data", at_least=1, at_most=10**6
    )
    max_grad_norm: float | None = option(
        1.0, "longer gradients are scaled down to this; null: never", above=0.0, at_most=1e9
    )
    max_nan_count: int = option(
        10, "skipped steps in a row before the run stops", at_least=1, at_most=_MAX_COUNT
    )
    outlier_z_score: float | None = option(
        None, "skip steps this many deviations off; null: off", above=0.0, at_most=1e6
    )
    outlier_window: int = option(
        128, "steps the deviation is taken over", at_least=8, at_most=10**6
    )
    log_every: int = option(10, "steps between lines of metrics", at_least=1, at_most=10**5)
    eval_every: int = option(200, "steps between validations", at_least=1, at_most=_MAX_COUNT)
    eval_batches: int | None = option(
        50, "batches in one validation; null: the whole set", at_least=1, at_most=_MAX_COUNT
    )
    save_every: int = option(500, "steps between checkpoints", at_least=1, at_most=_MAX_COUNT)
    keep_checkpoints: int = option(
        3, "numbered checkpoints kept, beside latest and best", at_least=0, at_most=10**6
    )
    compile_step: bool = option(True, "GPU: capture the step as one CUDA graph")
    recompute: str = option(
        "none",
        "activations computed again in the backward pass to save memory",
        choices=("none", "gelu", "block"),
    )
    stochastic_rounding: bool = option(
        False, "bfloat16 weights without fp32 masters, rounded at random"
    )
    output_dir: str = option("runs", "folder of metrics, logs and samples")
    checkpoint_dir: str = option("checkpoints", "folder of checkpoints")

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one update of the weights sees."""
        return self.batch_size * self.gradient_accumulation_steps

    def warmup(self, total_steps: int) -> int:
        """Return the steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_ratio or 0.0) * total_steps)


@dataclass
class EvaluationConfig:
    """The samples a run shows, and how they are judged."""

    generation_prompts: list[str] = option(  # noqa: RUF009 (a default_factory inside)
        ("Once upon a time", "One day, a little girl named Lily", "The dog was sad because"),
        "beginnings the model is asked to continue",
    )
    max_generation_length: int = option(
        128, "tokens in a sample, the prompt counted", at_least=1, at_most=2**20
    )
    temperature: float = option(
        0.8, "below 1 safer, above 1 wilder, 0 always the likeliest", at_least=0.0, at_most=100.0
    )
    top_k: int | None = option(
        50, "choose among the k likeliest tokens; null: all", at_least=1, at_most=2**24
    )
    top_p: float | None = option(
        None, "choose among the likeliest that sum to p; null: all", above=0.0, at_most=1.0
    )
    evaluate_coherence: bool = option(False, "let a Claude model grade the samples (needs a key)")
    coherence_model: str = option("claude-haiku-4-5", "the Claude model that grades")
    coherence_samples: int = option(8, "samples to grade", at_least=1, at_most=10_000)
    batch_size: int = option(16, "sequences in one batch of evaluate.py", at_least=1, at_most=2**20)


@dataclass
class Config:
    """A whole run. `Config.load` is the usual way to one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def sequence_length(self) -> int:
        """Tokens T in one training sequence, with the default resolved."""
        return self.model.max_seq_len if self.data.max_length is None else self.data.max_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update of the weights sees."""
        return self.training.sequences_per_step * self.sequence_length

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file, then apply `section.field=value` overrides in order.

        configs/NAME.yaml is the shipped one where the current directory has none.

        An override's value is read as YAML. `max_steps` given there replaces the file's
        `num_epochs`, and the other way round; likewise `warmup_steps` and `warmup_ratio`.

        Raises:
            ConfigError: the file or an override is not a valid configuration.
        """
        values = _sections(strict_yaml.read(find_config(path)), strict_yaml.single_line(str(path)))
        named: dict[tuple[str, str], str] = {}
        for override in overrides:
            section, name = _apply_override(values, override)
            named[section, name] = f"--set {strict_yaml.single_line(override)}"
            other = _ALTERNATIVES.get(name)
            if other and values[section][name] is not None and (section, other) not in named:
                values[section].pop(other, None)
        return _build(values, strict_yaml.single_line(str(path)), named)

    @classmethod
    def from_dict(cls, values: Any, source: str = "configuration") -> Config:
        """Check `values` ({section: {field: value}}) and return the Config; `source` names it.

        Raises:
            ConfigError: a section or field is unknown, or a value is not accepted.
        """
        return _build(_sections(values, source), source, {})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {section: {field: value}} of plain data; `from_dict` takes it back."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write every field, defaults included, as YAML that `load` takes back."""
        Path(path).write_text(strict_yaml.dump(self.to_dict()), encoding="utf-8")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
}
_TYPES = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
_FIELDS = {
    name: {f.name: f for f in dataclasses.fields(section)} for name, section in SECTIONS.items()
}


def _sections(values: Any, source: str) -> dict[str, dict[str, Any]]:
    """Return a copy of `values` as {section: {field: value}}, each section and field known."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: found {show(values)} at the top; accepted: the sections "
            + ", ".join(SECTIONS)
        )
    result: dict[str, dict[str, Any]] = {}
    for section, fields in values.items():
        if section not in SECTIONS:
            raise ConfigError(f"{source}: {_unknown(section)}")
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(
                f"{source}: {section}: found {show(fields)}; accepted: a mapping of its fields"
            )
        for name in fields or {}:
            if name not in _FIELDS[section]:
                raise ConfigError(f"{source}: {_unknown(name, section)}")
        result[section] = dict(fields or {})
    return result


def _apply_override(values: dict[str, dict[str, Any]], override: str) -> tuple[str, str]:
    """Set one `section.field=value` in `values`; return which field it was."""
    source = f"--set {strict_yaml.single_line(override)}"
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"{source}: accepted: section.field=value")
    if section not in SECTIONS:
        raise ConfigError(f"{source}: {_unknown(section)}")
    if name not in _FIELDS[section]:
        raise ConfigError(f"{source}: {_unknown(name, section)}")
    value = strict_yaml.parse(text, source)
    # A shell has taken the quotes away: 2024 or true meant as a name can only be meant as text.
    if kind_of(_TYPES[section][name])[0] is str and isinstance(value, bool | int | float):
        value = text.strip()
    values.setdefault(section, {})[name] = value
    return section, name


def _build(
    values: dict[str, dict[str, Any]], source: str, named: dict[tuple[str, str], str]
) -> Config:
    """Return the Config of checked sections; `named` gives some fields another source."""
    sections = {}
    for section, kind in SECTIONS.items():
        checked = {}
        for name, value in values.get(section, {}).items():
            where = named.get((section, name), f"{source}: {section}.{name}")
            limits = _FIELDS[section][name].metadata
            checked[name] = checked_value(value, _TYPES[section][name], limits, where)
        sections[section] = kind(**checked)
    config = Config(**sections)
    problem = _contradiction(config)
    if problem is not None:
        raise ConfigError(f"{source}: {problem}")
    return config


def _contradiction(config: Config) -> str | None:
    """Return what is wrong between fields that are each acceptable, or None."""
    model, data, training = config.model, config.data, config.training
    if model.d_model % model.n_heads:
        return (
            f"model.d_model: found {model.d_model}; accepted: a multiple of "
            f"model.n_heads ({model.n_heads})"
        )
    if config.sequence_length > model.max_seq_len:
        return (
            f"data.max_length: found {data.max_length}; accepted: at most "
            f"model.max_seq_len ({model.max_seq_len})"
        )
    if data.dataset == "local" and data.path is None:
        return "data.path: found null; accepted: a file or folder, since data.dataset is local"
    if data.dataset != "local" and data.path is not None:
        return f"data.dataset: found {data.dataset!r}; accepted: local, since data.path is given"
    if model.dtype in ("float32", "float64") and training.stochastic_rounding:
        return (
            "training.stochastic_rounding: found true; accepted: false, since model.dtype is "
            f"{model.dtype}"
        )
    return _schedule_contradiction(training)


def _schedule_contradiction(training: TrainingConfig) -> str | None:
    """Return what is wrong between the fields that shape the run's length and learning rate."""
    if (training.max_steps is None) == (training.num_epochs is None):
        found = "neither" if training.max_steps is None else "both"
        return f"training.max_steps, training.num_epochs: found {found}; accepted: exactly one"
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        return "training.warmup_steps, training.warmup_ratio: found both; accepted: at most one"
    if training.min_learning_rate > training.learning_rate:
        return (
            f"training.min_learning_rate: found {training.min_learning_rate:g}; accepted: at most "
            f"training.learning_rate ({training.learning_rate:g})"
        )
    if training.max_steps is not None and training.warmup(training.max_steps) > training.max_steps:
        return (
            f"training.warmup_steps: found {training.warmup_steps}; accepted: at most "
            f"training.max_steps ({training.max_steps})"
        )
    rising = training.warmup_ratio or 0.0
    if training.max_steps is not None:
        rising = training.warmup(training.max_steps) / training.max_steps
    if training.lr_decay == "wsd" and rising + training.decay_fraction > 1.0:
        return (
            f"training.decay_fraction: found {training.decay_fraction:g}; accepted: at most "
            f"{1.0 - rising:g}, what warm-up leaves of the run"
        )
    return None


def _unknown(name: Any, section: str | None = None) -> str:
    """Return a message about a section (or a section's field) that does not exist."""
    known = list(SECTIONS) if section is None else list(_FIELDS[section])
    path, what = ("", "section") if section is None else (f"{section}.", "field")
    shown = strict_yaml.single_line(name) if isinstance(name, str) else show(name)
    found = f"found the unknown {what} {path}{shown}"
    if isinstance(name, str):
        homes = [s for s in SECTIONS if name in _FIELDS[s]]
        if homes:
            return f"{found}; did you mean {homes[0]}.{name}?"
        nearest = difflib.get_close_matches(name[:100], known, n=1)
        if nearest:
            return f"{found}; did you mean {path}{nearest[0]}?"
    return f"{found}; accepted: {', '.join(known)}"
