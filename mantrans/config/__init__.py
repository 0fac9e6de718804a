"""The configuration of a run: the YAML sections model, data, training and evaluation.

Each field states its meaning and its limits once. Checks, error messages, the editors' schema
(configs/schema.json) and the reference page (docs/configuration.md) are all derived from that. A
wrong configuration is refused in one line: "FILE: FIELD: expected X, got Y".
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator
from typing_extensions import Self

from mantrans.assets import find_config
from mantrans.config import strict_yaml
from mantrans.config.messages import NO_NAMES, Names, clash
from mantrans.config.section import (
    Count,
    Decay,
    FilePath,
    Prompt,
    Section,
    Share,
    Size,
    Text,
    Vocabulary,
    ZScore,
    kinds,
    setting,
)
from mantrans.errors import ConfigError, show, single_line

Dataset = Literal[
    "builtin-stories",
    "tinystories",
    "tiny-textbooks",
    "tiny-strange-textbooks",
    "tiny-codes",
    "local",
]
DATASETS: tuple[str, ...] = get_args(Dataset)
_NAMES = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
HUB_SET = rf"^hub:{_NAMES}(?:/{_NAMES}){{0,8}}(?::.{{1,200}})?$"
HubSet = Annotated[
    str, Field(pattern=HUB_SET, json_schema_extra={"patternErrorMessage": "hub:NAME[:FIELD]"})
]
# Each pair has two ways to set the same thing: one of them on the command line replaces the other
# in the file.
_PAIRS = [
    ("max_steps", "num_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("val_path", "validation_fraction"),
]
_ALTERNATIVES = dict(_PAIRS) | {other: one for one, other in _PAIRS}
# What a file says about its own dataset, and about no other.
_OF_A_DATASET = tuple(
    f"data.{name}" for name in ("subset_size", "val_subset_size", "path", "val_path", "text_field")
)


MOST_TIMES = 10**6  # that a group's learning rate may be of the other's


class ModelConfig(Section):
    """The network's shape. The defaults are GPT-2's architecture; Llama's and Qwen's blocks have
    norm: rms_norm, position: rope, mlp: swiglu and bias: false."""

    d_model: int = setting(256, "width C of the residual stream", ge=1, le=65_536)
    n_blocks: int = setting(4, "transformer blocks", ge=1, le=1_024)
    n_heads: int = setting(4, "attention heads H", ge=1, le=65_536)
    n_kv_heads: int | None = setting(
        None, "heads of keys and values, shared by groups of heads; null: n_heads", ge=1, le=65_536
    )
    head_dim: int | None = setting(
        None, "width D of a head; null: d_model / n_heads", ge=1, le=8192
    )
    d_ffn: Size | None = setting(
        None, "inner width F of the MLP; null: 4 * d_model, with swiglu 8/3 (a multiple of 64)"
    )
    max_seq_len: Size = setting(256, "number of positions: the longest context the model can see")
    vocab_size: Vocabulary | None = setting(None, "token ids; null: the tokenizer's count")
    tie_embeddings: bool = setting(True, "output projection shares the token embedding's weights")
    norm: Literal["layer_norm", "rms_norm"] = setting("layer_norm", "before each branch")
    position: Literal["learned", "rope"] = setting(
        "learned", "a table of positions, or rotary position embeddings (RoPE) of q and k"
    )
    rope_theta: float = setting(10_000.0, "RoPE: base of the frequencies", gt=1.0, le=1e9)
    rope_scaling_factor: float | None = setting(
        None, "RoPE: slow frequencies are divided by this, as Llama 3's; null: none", ge=1.0, le=1e4
    )
    rope_low_freq_factor: float = setting(
        1.0, "scaled RoPE: slow is fewer turns than this in the original context", gt=0.0, le=1e4
    )
    rope_high_freq_factor: float = setting(
        4.0, "scaled RoPE: fast, and not scaled, is more turns than this", gt=0.0, le=1e4
    )
    rope_original_length: Size = setting(8192, "scaled RoPE: tokens of the original context")
    mlp: Literal["gelu", "swiglu"] = setting("gelu", "GPT-2's feed-forward branch, or Llama's")
    qk_norm: bool = setting(False, "RMS norm of each head of q and k, as in Qwen3")
    attention_window: Size | None = setting(
        None, "keys that a query sees, its own included; null: all before it"
    )
    bias: bool = setting(True, "linear layers and layer norms have biases")
    qkv_bias: bool | None = setting(None, "the projection to q, k and v has one; null: as bias")
    projection_bias: bool | None = setting(None, "attention's second projection; null: as bias")
    mlp_bias: bool | None = setting(None, "the MLP's linear layers; null: as bias")
    layer_norm_epsilon: Share = setting(
        1e-5, "added to the variance before its root; with rms_norm to the mean square"
    )
    initializer_range: Share = setting(
        0.02, "standard deviation of initial matrices; GPT-2's: 0.02"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto",
        "weights and activations; auto: bfloat16 where the processor multiplies it, else float32",
    )

    @property
    def feed_forward_width(self) -> int:
        """F with its default resolved: the same number of weights for both kinds of MLP."""
        if self.d_ffn is not None:
            return self.d_ffn
        return 4 * self.d_model if self.mlp == "gelu" else -(-self.d_model // 24) * 64

    @property
    def head_width(self) -> int:
        """D with its default resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def key_value_heads(self) -> int:
        """H_kv with its default resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def resolved(self) -> dict[str, Any]:
        """All fields; defaults that depend on other fields are resolved, and fields that change
        nothing in this network have their defaults."""
        rope = [name for name in type(self).model_fields if name.startswith("rope_")]
        unused = rope if self.position == "learned" else rope[1:]
        unused = [] if self.rope_scaling_factor is not None else unused
        return {
            **self.model_dump(),
            **{name: type(self).model_fields[name].default for name in unused},
            "d_ffn": self.feed_forward_width,
            "n_kv_heads": self.key_value_heads,
            "head_dim": self.head_width,
            "bias": self.bias and self.norm == "layer_norm",
            **{
                name: self.bias if getattr(self, name) is None else getattr(self, name)
                for name in ("qkv_bias", "projection_bias", "mlp_bias")
            },
        }

    @classmethod
    def complete(cls, values: Any, source: str, names: Names = NO_NAMES) -> Self:
        """Like `checked`, but vocab_size must be given."""
        model = cls.checked(values, source, names)
        if model.vocab_size is None:
            name = names.get("vocab_size", "vocab_size")
            raise ConfigError(f"{source}: {name}: expected an integer at least 1, got null")
        return model

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise clash(self, "d_model", "a multiple of {} ({})", "n_heads")
        if self.n_heads % self.key_value_heads:
            raise clash(self, "n_heads", "a multiple of {} ({})", "n_kv_heads")
        for other, needs in (("position", self.position == "rope"), ("qk_norm", self.qk_norm)):
            if needs and self.head_width % 2:
                field = "d_model" if self.head_dim is None else "head_dim"
                raise clash(self, field, "an even width of a head, since {} is {}", other)
        if self.position == "learned" and self.rope_scaling_factor is not None:
            raise clash(self, "rope_scaling_factor", "null, since {} is {}", "position")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise clash(self, "rope_high_freq_factor", "more than {} ({})", "rope_low_freq_factor")
        return self


class DataConfig(Section):
    """The text and its conversion to tokens."""

    dataset: Dataset | HubSet = setting(
        "builtin-stories", "the text to train on; hub: a data set of the Hugging Face hub"
    )
    tokenizer: Text = setting(
        "tinystories_bpe_4096",
        "folder under assets/models/tokenizers/, any folder with a tokenizer, or gpt2",
    )
    max_length: Size | None = setting(
        None, "tokens in one training sequence; null: model.max_seq_len"
    )
    subset_size: Count | None = setting(None, "documents of the training split to use; null: all")
    val_subset_size: Count | None = setting(
        None, "documents of the validation split to use; null: all"
    )
    path: FilePath | None = setting(
        None, "dataset local only: a .txt, .jsonl, .parquet or .bin (tokens), or a folder"
    )
    val_path: FilePath | None = setting(
        None, "dataset local only: the same, to validate on; null: validation_fraction is held out"
    )
    text_field: Text | None = setting(
        None, "field of .jsonl or .parquet rows that holds the text; null: the dataset's default"
    )
    document_separator: Literal["eot", "blank_line"] = setting(
        "eot", "separator of documents in a .txt: the text <|endoftext|>, or a blank line"
    )
    validation_fraction: float | None = setting(
        None,
        "share held out if the dataset has no validation split; null: 0.05 (not with val_path)",
        gt=0.0,
        le=0.5,
    )
    cache_dir: FilePath = setting(".cache/tokens", "folder where token files are kept between runs")
    attend_across_documents: bool = setting(
        True, "a token sees the whole packed sequence; false: only its document"
    )
    on_broken_lines: Literal["skip", "refuse"] = setting(
        "skip", "a row of .jsonl or .parquet that is not JSON or UTF-8, or has no text in its field"
    )

    @property
    def share_held_out(self) -> float:
        """validation_fraction with its default resolved."""
        return 0.05 if self.validation_fraction is None else self.validation_fraction

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.dataset == "local" and self.path is None:
            raise clash(self, "path", "a file or folder, since {} is {}", "dataset")
        if self.dataset != "local" and self.path is not None:
            raise clash(self, "dataset", "local, since {} is given", "path")
        if self.dataset != "local" and self.val_path is not None:
            raise clash(self, "dataset", "local, since {} is given", "val_path")
        if self.dataset.startswith("hub:") and ":" in self.dataset[4:] and self.text_field:
            raise clash(self, "text_field", "null, since {} names a field ({})", "dataset")
        if self.val_path is not None and self.validation_fraction is not None:
            raise clash(self, "validation_fraction", "null, since {} is given", "val_path")
        return self


class TrainingConfig(Section):
    """Optimization, and where the run's files go."""

    experiment_name: Text = setting(
        "experiment",
        "names the run's folders",
        pattern=r"^(?!.*\.pt$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        form="a letter or digit, then up to 99 of letters, digits, . _ - (not ending in .pt)",
    )
    init_from: FilePath | None = setting(
        None,
        "folder of a model of transformers to train on: its shape, its weights, and its tokenizer "
        "unless data.tokenizer is given; null: new weights",
    )
    seed: int = setting(0, "of the weights, the batches and the samples", ge=0, le=2**63 - 1)
    device: Text = setting(
        "auto",
        "auto: a CUDA GPU if there is one",
        pattern=r"^(?:auto|cpu|cuda(?::[0-9]{1,3})?)$",
        form="auto, cpu, cuda or cuda:N",
    )
    backend: Literal["auto", "reference", "native", "triton"] = setting(
        "auto", "kernels; auto: triton on a GPU, native on a CPU"
    )
    optimizer: Literal["adamw", "muon", "sgd"] = setting(
        "adamw", "update rule; muon: Muon for the matrices in blocks, AdamW for all else"
    )
    learning_rate: float = setting(1e-3, "the peak, reached after warm-up", gt=0.0, le=100.0)
    min_learning_rate: float = setting(0.0, "at the end of the decay", ge=0.0, le=100.0)
    lr_decay: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "cosine", "after warm-up; wsd stays constant, then falls linearly"
    )
    decay_fraction: Share = setting(
        0.2, "wsd: the share of the steps, at the end, in which it falls"
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up (this or warmup_ratio)", ge=0, le=10**12
    )
    warmup_ratio: float | None = setting(
        None, "the same as a share of all steps; both null: none", ge=0.0, le=1.0
    )
    weight_decay: float = setting(0.1, "decoupled, on matrices only", ge=0.0, le=100.0)
    beta1: Decay = setting(0.9, "AdamW: decay of the gradient's mean")
    beta2: Decay = setting(0.95, "AdamW: decay of the squared gradient's mean")
    # Below its least, a gradient's square vanishes in float32 where the gradient, divided by
    # epsilon, is still large.
    epsilon: float = setting(1e-8, "AdamW: added to the denominator", ge=1e-18, le=1.0)
    muon_learning_rate: float | None = setting(
        None, "Muon: the peak for the matrices in blocks; null: learning_rate", gt=0.0, le=100.0
    )
    muon_momentum: Decay = setting(0.95, "Muon: decay of the gradient's mean")
    muon_scale: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw",
        "Muon: length of an update of M x K; 0.2 √max(M, K), about AdamW's, or √max(1, M / K)",
    )
    batch_size: Size = setting(16, "sequences in one micro-batch")
    gradient_accumulation_steps: Size = setting(1, "micro-batches in one step")
    max_steps: Count | None = setting(None, "length of the run in steps (this or num_epochs)")
    num_epochs: int | None = setting(
        None, "length of the run in passes over the data", ge=1, le=10**6
    )
    max_grad_norm: float | None = setting(
        1.0, "longer gradients are scaled down to this; null: never", gt=0.0, le=1e9
    )
    max_consecutive_skips: Count = setting(10, "skipped steps in a row before the run stops")
    outlier_z_score: ZScore | None = setting(
        None, "skip steps this many standard deviations above the mean; null: off"
    )
    outlier_window: int = setting(128, "steps over which these are computed", ge=8, le=10**6)
    log_every: int = setting(10, "steps between lines of metrics", ge=1, le=10**5)
    eval_every: Count = setting(200, "steps between validations")
    eval_batches: Count | None = setting(
        50, "batches (evaluation.batch_size) in one validation; null: the whole set"
    )
    save_every: Count = setting(500, "steps between checkpoints")
    keep_checkpoints: int = setting(
        3, "numbered checkpoints kept, besides latest and best", ge=0, le=10**6
    )
    compile_step: bool = setting(True, "GPU: capture the step as one CUDA graph")
    recompute: Literal["none", "gelu", "block"] = setting(
        "none",
        "recomputed in the backward pass to save memory; gelu: the MLP's activation function",
    )
    stochastic_rounding: bool = setting(
        False, "bfloat16 weights without fp32 masters, rounded stochastically"
    )
    shard: Literal["none", "optimizer", "gradients"] = setting(
        "none",
        "several processes: each keeps only its part of masters and moments, or also of gradients",
    )
    gradient_sum: Literal["tree", "running"] = setting(
        "tree",
        "order in which micro-batches are added; tree: the same bits with any number of processes "
        "that is a power of two",
    )
    distributed_timeout: float = setting(
        120.0, "several processes: seconds without a sign of one before all end", ge=5.0, le=1e6
    )
    compare_ranks_every: Count = setting(
        100, "several processes: steps between comparisons of their weights"
    )
    recheck_every: Count | None = setting(
        None,
        "steps after which one's loss and gradient norm are computed twice: other bits end the "
        "run; null: off",
    )
    threads: int | None = setting(
        None,
        "CPU: threads of each process; null: as OMP_NUM_THREADS says, or all cores; of several "
        "processes each has an equal share of the machine's cores",
        ge=1,
        le=4096,
    )
    tracker: Literal["trackio", "wandb"] | None = setting(
        None, "send what is measured to trackio or Weights & Biases too, if it is installed"
    )
    tracker_project: Text | None = setting(None, "the project there; null: mantrans")
    output_dir: FilePath = setting("runs", "folder of metrics, logs and samples")
    checkpoint_dir: FilePath = setting("checkpoints", "folder of checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _read_old_name(cls, values: Any) -> Any:
        """max_consecutive_skips was max_nan_count in the first runs and checkpoints."""
        old, new = "max_nan_count", "max_consecutive_skips"
        if isinstance(values, dict) and old in values and new not in values:
            values = {new if name == old else name: value for name, value in values.items()}
        return values

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one update of the weights."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def muon_rate_ratio(self) -> float:
        """muon_learning_rate, as a multiple of learning_rate, whose schedule it follows."""
        return (self.muon_learning_rate or self.learning_rate) / self.learning_rate

    def warmup(self, total_steps: int) -> int:
        """Return the steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_ratio or 0.0) * total_steps)

    def require_room(self, total_steps: int) -> None:
        """ConfigError unless warm-up and decay fit into a run of `total_steps`."""
        if misfit := self._misfit(total_steps):
            field, expected = misfit
            got = show(getattr(self, field))
            raise ConfigError(f"training.{field}: expected {expected}, got {got}")

    def _misfit(self, total_steps: int | None) -> tuple[str, str] | None:
        """(field, what would fit) of a warm-up or decay that is too long; None steps: unknown."""
        rising = self.warmup_ratio or 0.0
        if total_steps is not None:
            rising = self.warmup(total_steps) / total_steps
        if rising > 1.0:
            return "warmup_steps", f"at most {total_steps}, the steps of the run"
        if self.lr_decay == "wsd" and rising + self.decay_fraction > 1.0:
            return "decay_fraction", f"at most {1.0 - rising:g}, the rest of the run after warm-up"
        return None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_steps is not None and self.num_epochs is not None:
            raise clash(self, "num_epochs", "null, since {} is given", "max_steps")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise clash(self, "warmup_ratio", "null, since {} is given", "warmup_steps")
        if self.min_learning_rate > self.learning_rate:
            raise clash(self, "min_learning_rate", "at most {} ({})", "learning_rate")
        if self.muon_rate_ratio > MOST_TIMES:
            limit = f"at most {MOST_TIMES:,} times {{}} ({{}})"
            raise clash(self, "muon_learning_rate", limit, "learning_rate")
        if misfit := self._misfit(self.max_steps):
            raise clash(self, *misfit)
        return self


class EvaluationConfig(Section):
    """The samples of a run, and their scores."""

    generation_prompts: list[Prompt] = setting(
        ["Once upon a time", "One day, a little girl named Lily", "The dog was sad because"],
        "texts that the model continues",
    )
    max_generation_length: Size = setting(128, "tokens in a sample, prompt included")
    temperature: float = setting(
        0.8, "below 1 safer, above 1 wilder, 0 always the most likely", ge=0.0, le=100.0
    )
    top_k: Vocabulary | None = setting(50, "sample from the k most likely tokens; null: all")
    top_p: Share | None = setting(None, "sample from the most likely that sum to p; null: all")
    min_p: Share | None = setting(
        None, "sample from those at least p times as likely as the most likely; null: all"
    )
    repetition_penalty: float = setting(
        1.0, "above 1 tokens that are there already become less likely", gt=0.0, le=100.0
    )
    stop: list[Prompt] = setting([], "texts that end a sample, which does not contain them")
    evaluate_coherence: bool = setting(False, "let a Claude model score the samples (needs a key)")
    coherence_model: Text = setting("claude-haiku-4-5", "the Claude model that scores")
    coherence_samples: int = setting(8, "samples to score", ge=1, le=10_000)
    batch_size: Size | None = setting(
        None, "sequences in a batch of validation and samples; null: training.batch_size"
    )


class Config(Section):
    """A run's complete configuration, usually made by `Config.load`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @property
    def sequence_length(self) -> int:
        """Tokens T in one training sequence, with the default resolved."""
        return self.model.max_seq_len if self.data.max_length is None else self.data.max_length

    @property
    def evaluation_batch(self) -> int:
        """Sequences in one batch of validation and of samples, with the default resolved."""
        chosen = self.evaluation.batch_size
        return self.training.batch_size if chosen is None else chosen

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one update of the weights."""
        return self.training.sequences_per_step * self.sequence_length

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file, then apply `section.field=value` overrides in order.

        configs/NAME.yaml is the shipped file if the current directory has none.

        Raises:
            ConfigError: the file or an override is not a valid configuration.
        """
        return cls.from_dict(strict_yaml.read(find_config(path)), single_line(str(path)), overrides)

    @classmethod
    def from_dict(
        cls, values: Any, source: str = "configuration", overrides: Iterable[str] = ()
    ) -> Config:
        """Check {section: {field: value}} from `source`, changed by overrides.

        An override's value is read as YAML. An override of `max_steps` replaces the `num_epochs` in
        `values` and vice versa; likewise `warmup_steps` and `warmup_ratio`, `val_path` and
        `validation_fraction`. Another `dataset` than that in `values` takes the fields that
        describe that one along: they do not apply to it unless they are overrides too. So does
        another `init_from` with the model's shape and the tokenizer.

        Raises:
            ConfigError: a section or field is unknown, or a value is not accepted.
        """
        sources: dict[str, str] = {}
        if isinstance(values, dict):
            plain = (dict, type(None))  # null: a section of defaults
            values = {k: dict(v or {}) if isinstance(v, plain) else v for k, v in values.items()}
            for override in overrides:
                _apply(override, values, sources)
        return cls.checked(values, source, sources=sources)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {section: {field: value}} of plain data, which `from_dict` reads."""
        return self.model_dump()

    def save(self, path: str | Path) -> None:
        """Write every field, defaults included, as YAML, which `load` reads."""
        Path(path).write_text(strict_yaml.dump(self.to_dict()), encoding="utf-8")

    def with_model(self, shape: dict[str, Any], source: str) -> Self:
        """This configuration with a model of the shape of `source`, as keywords of `ModelConfig`,
        and with the tokenizer of training.init_from, unless another is given.

        Raises ConfigError where a field of the model that is given here is not that of `source`.
        """
        model = ModelConfig.complete({**shape, "dtype": self.model.dtype}, source)
        expected = model.resolved()
        given = self.model.model_dump(include=self.model.model_fields_set, exclude_none=True)
        for name in given.keys() - {"dtype", "initializer_range"}:
            if given[name] != expected[name]:
                raise ConfigError(
                    f"model.{name}: expected {show(expected[name])}, as {source} has, "
                    f"got {show(given[name])}"
                )
        values = {**self.to_dict(), "model": model.model_dump()}
        if "tokenizer" not in self.data.model_fields_set:
            values["data"]["tokenizer"] = self.training.init_from
        config = self.checked(values, "configuration")
        if config.sequence_length > model.max_seq_len:
            raise ConfigError(
                f"data.max_length: expected at most the {model.max_seq_len} positions of {source}, "
                f"got {config.sequence_length}"
            )
        return config

    @model_validator(mode="after")
    def _agree(self) -> Self:
        is_complete = self.training.init_from is None  # else the model is the folder's
        if is_complete and self.sequence_length > self.model.max_seq_len:
            raise clash(self, "data.max_length", "at most {} ({})", "model.max_seq_len")
        if self.model.dtype in ("float32", "float64") and self.training.stochastic_rounding:
            raise clash(
                self, "training.stochastic_rounding", "false, since {} is {}", "model.dtype"
            )
        if self.training.max_steps is None and self.training.num_epochs is None:
            epochs = "training.num_epochs"
            raise clash(self, "training.max_steps", "a number of steps, since {} is null", epochs)
        return self


# What a file says about its own model, and about no other.
_OF_A_MODEL = ("data.tokenizer", *(f"model.{n}" for n in ModelConfig.model_fields if n != "dtype"))
SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}


def _apply(override: str, values: dict[Any, Any], sources: dict[str, str]) -> None:
    """Set one `section.field=value` in `values`, and add its source to `sources`.

    Unknown sections and fields are refused later, by the check of all values.
    """
    source = f"--set {single_line(override)}"
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"{source}: expected section.field=value, got {single_line(key)}")
    value = strict_yaml.parse(text, source)
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    # The shell has removed quotes: 2024 or true in a field of text must be meant as text.
    if field and str in kinds(field) and isinstance(value, bool | int | float):
        value = text.strip()
    if section not in values:
        values[section], sources[section] = {}, source
    if isinstance(values[section], dict):
        for other in _replaced(section, name, value, values[section]):
            home, _, field_name = other.partition(".")
            if other not in sources and isinstance(values.get(home), dict):
                values[home].pop(field_name, None)
        values[section][name], sources[f"{section}.{name}"] = value, source


def _replaced(section: str, name: str, value: Any, fields: dict[Any, Any]) -> tuple[str, ...]:
    """The fields of the file, as section.field, that an override of `name` does away with."""
    if (section, name) == ("data", "dataset"):
        before = fields.get(name, DataConfig.model_fields[name].default)
        return () if value == before else _OF_A_DATASET
    if (section, name) == ("training", "init_from"):
        return () if value in (None, fields.get(name)) else _OF_A_MODEL
    return (
        (f"{section}.{_ALTERNATIVES[name]}",) if value is not None and name in _ALTERNATIVES else ()
    )
