"""What is launched: the project's own code, at the sizes that it ships with and is tested at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mantrans.config import Config
from mantrans.data.tokenizer import load_tokenizer
from mantrans.kernels import selfcheck
from mantrans.kernels import triton as ops
from mantrans.kernels.selfcheck import Shapes
from mantrans.training import first_step
from mantrans.training.building import build_wrapper
from mantrans.training.first_step import CPU, Tokens, bound
from tests.gpu import (
    small_runs,
    small_shapes,
    test_gpu_families,
    test_gpu_kernels,
    test_gpu_selfcheck,
)

CONFIGS = Path(__file__).parents[2] / "configs"
# The entries of tokenizers that are not in the repository: GPT-2's, and the user's own in README.
ELSEWHERE = {
    "gpt2": 50_257,
    "tokenizers/mine": 1_024,
    "tokenizers/smollm2": 49_152,
    "tokenizers/qwen2.5": 151_936,
}


class Program(NamedTuple):
    """Something to run whose launches are of interest."""

    group: str  # of programs that are reported together
    name: str
    run: Callable[[], object]


def programs(capability: int) -> Iterator[Program]:
    """All of them; what a run meets first, first."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        yield from of_config(path)
    yield from of_gpu_tests(test_gpu_kernels.ALL if capability == 90 else SELECTABLE)
    yield from at_the_edge()


# ------------------------------------------------------------------------------- shipped configs


def of_config(path: Path) -> Iterator[Program]:
    """What a run of a shipped config launches: until its first step has run, and after."""
    config = Config.load(path)
    vocabulary = vocabulary_of(config)
    group = f"config {path.stem}"
    for program in first_step.programs(config, vocabulary, torch.bfloat16):
        yield Program(group, *program)
    config = first_step.on_cpu(config, torch.bfloat16)
    yield Program(f"{group}, later", "samples", lambda: samples_of(config, vocabulary))


def vocabulary_of(config: Config) -> int:
    """The entries of a config's tokenizer."""
    name = config.data.tokenizer
    return ELSEWHERE.get(name) or load_tokenizer(name).vocab_size


def samples_of(config: Config, vocabulary: int) -> None:
    """Two tokens of each sample."""
    model = build_wrapper(config, vocabulary).model
    prompts = torch.empty(len(config.evaluation.generation_prompts), 7, dtype=torch.int64)
    lengths = torch.empty(len(prompts), dtype=torch.int64)
    cache = model.new_cache(len(prompts), config.evaluation.max_generation_length)
    model.prefill(prompts, lengths, cache)
    model.decode(lengths, lengths, cache)


def selfcheck_programs(group: str, shapes: Shapes, dtype: torch.dtype) -> Iterator[Program]:
    """All of the self-check's programs."""
    for program in first_step.of_selfcheck(shapes, dtype):
        yield Program(group, *program)


# ------------------------------------------------------------------------------------- GPU tests


# The dtypes that a config can choose. float16 is the kernels' alone, and costs a third of the time:
# its cases are for Hopper only.
SELECTABLE = (torch.bfloat16, torch.float32)


def of_gpu_tests(dtypes: Sequence[torch.dtype]) -> Iterator[Program]:
    """What tests/gpu launch, by the cases, sizes and models that stand there."""
    group = "GPU tests"
    by_name = {program.__name__: (draw, program) for draw, program in selfcheck.PROGRAMS}
    for case in test_gpu_kernels.CASES:
        name, dtype, shapes = case
        by_products = dtype == torch.float32 and shapes.D > ops.WIDEST_FLOAT32_HEAD
        if dtype not in dtypes or (name == "attention" and by_products):
            continue  # the latter launches no kernel of ours
        draw, program = by_name[name]
        label = test_gpu_kernels.label(case)
        yield Program(group, label, bound(program, draw, shapes, dtype))
        if name in ("layer_norm", "rms_norm"):
            norm = bound_norm(name, dtype, shapes.N, shapes.C)
            yield Program(group, f"{label} without biases", norm)
    for run, T in test_gpu_selfcheck.RUNS:
        for dtype in (torch.bfloat16, torch.float32):
            shapes = selfcheck.run_shapes(**run, sequence_length=T)
            yield from selfcheck_programs(group, shapes, dtype)
    for shapes, dtype in small_shapes.PARTS.values():
        yield from selfcheck_programs(group, shapes, dtype)
    yield Program(group, "more than 2³¹ logits", lambda: many_logits(2**31 // 50_304 + 300, 50_304))
    yield Program(group, "more than 2³¹ of qkv", lambda: long_attention(90, 16_384, 8, 64))
    for name, options in small_models():
        yield Program(group, f"a small model's step, {name}", bound_step(**options))


def small_models() -> Iterator[tuple[str, dict[str, Any]]]:
    """The models and options of the tests of a whole step and of a model."""
    for dtype in (torch.bfloat16, torch.float32):
        for end in (None, small_runs.END_OF_TEXT):
            yield f"{dtype}, end of text {end}", {"dtype": dtype, "end_of_text": end}
        for n_heads in (2, 8):
            yield f"{dtype}, {n_heads} heads", {"dtype": dtype, "model": {"n_heads": n_heads}}
    for change in (
        {"recompute": "gelu"}, {"recompute": "block"}, {"stochastic_rounding": True},
        {"optimizer": "sgd"}, {"optimizer": "muon"}, {"bias": False, "tie_embeddings": False},
    ):  # fmt: skip
        yield str(change), {"model": change}
    yield "float32, no bias", {"dtype": torch.float32, "model": {"bias": False}}
    for name, model in test_gpu_families.MODELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{dtype}, {name}", {"dtype": dtype, "model": model}


def bound_step(**options: Any) -> Callable[[], object]:
    def run() -> None:
        source = lambda _, device: Tokens(small_runs.B, small_runs.T)  # noqa: E731
        _, step = small_runs.build(CPU, source=source, micro_batches=2, **options)
        step.run(0, 1e-3)

    return run


def bound_norm(name: str, dtype: torch.dtype, N: int, C: int) -> Callable[[], object]:
    """A norm without biases, as in a model with `bias: false`: no program has that."""

    def run() -> None:
        x, weight = torch.empty(N, C, dtype=dtype), torch.empty(C, dtype=dtype)
        rows = torch.empty(ops.partial_rows(CPU), C)
        if name == "rms_norm":
            y, rstd = ops.rms_norm_forward(x, weight, 1e-5)
            ops.add_rms_norm_forward(x, x, weight, 1e-5)
            for residual in (None, x):
                ops.rms_norm_backward(y, x, weight, rstd, rows, residual)
            return
        y, mean, rstd = ops.layer_norm_forward(x, weight, None, 1e-5)
        ops.add_layer_norm_forward(x, x, weight, None, 1e-5)
        for residual in (None, x):
            ops.layer_norm_backward(y, x, weight, mean, rstd, rows, None, residual)

    return run


def many_logits(N: int, V: int) -> None:
    logits = torch.empty(N, V, dtype=torch.bfloat16)
    targets, scale = torch.empty(N, dtype=torch.int64), torch.empty(())
    ops.cross_entropy_forward_backward(logits, targets, scale, V)


def long_attention(B: int, T: int, H: int, D: int) -> None:
    qkv = torch.empty(B, T, 3 * H * D, dtype=torch.bfloat16)
    out, statistics = ops.attention_forward(qkv, H)
    ops.attention_backward(out, qkv, out, statistics, H)


# -------------------------------------------------------------------------------- the grids' ends

# More of everything than a grid's second axis holds (65,535): pairs of sequence and head, rows,
# blocks of columns. A GPU would run them; the tests there are smaller.
LARGE = Shapes(
    B=8_200, T=70, H=8, H_kv=8, D=64, C=512, F=1024, V=1000, Vp=1024, N=1_100_003
)  # fmt: skip


def at_the_edge() -> Iterator[Program]:
    """Sizes that a grid could be too small for."""
    for draw, program in selfcheck.PROGRAMS:
        run = bound(program, draw, LARGE, torch.bfloat16)
        yield Program("large grids", f"{program.__name__} {LARGE}", run)


# ------------------------------------------------------------------------------ one for the tests


def small() -> Iterator[Program]:
    """A step of two small models, one with documents, for `make test`: some 40 kernels."""
    options = {"end_of_text": small_runs.END_OF_TEXT, "model": {"n_blocks": 1}}
    yield Program("small", "step of a GPT-2", bound_step(**options))
    qwen = {**test_gpu_families.MODELS["qwen3"], "n_blocks": 1}
    yield Program("small", "step of a Qwen3", bound_step(model=qwen))
