"""Are the kernels' tests able to fail?  Breaks kernels on purpose, and sees whether they notice.

    python -m tools.mutations [--only WORD] [--write tools/mutations.md]

Each mutation replaces one piece of one line of a kernel in a copy of the tree, by a mistake that
people make. Then the interpreter tests of that kernel run on the copy. A mutation that they do not
catch is a gap in the tests: the command then exits with 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "mantrans", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    """One deliberate mistake."""

    mistake: str
    kernel: str  # kernels/triton/<kernel>.py
    right: str  # occurs exactly once in that file
    wrong: str
    tests: str  # tests/kernels/test_<tests>.py


MUTATIONS = (
    Mutation(
        "a query sees one key of the future",
        "attention",
        "seen = keys <= rows\n",
        "seen = keys <= rows + 1\n",
        "attention",
    ),
    Mutation(
        "scores are not divided by √D",
        "attention_tiles",
        "return self.D**-0.5",
        "return 1.0",
        "attention",
    ),
    Mutation(
        "the online softmax rescales by the inverse",
        "attention",
        "rescale = tl.math.exp2((row_max - new_max)",
        "rescale = tl.math.exp2((new_max - row_max)",
        "attention",
    ),
    Mutation(
        "a document's first token sees the one before it",
        "attention",
        "keys >= tl.load(document_start + rows",
        "keys + 1 >= tl.load(document_start + rows",
        "attention",
    ),
    Mutation(
        "dq lacks the scale",
        "attention",
        "store_tile(dqkv, dq * scale,",
        "store_tile(dqkv, dq,",
        "attention",
    ),
    Mutation(
        "the gradient of the scores forgets δ",
        "attention",
        "ds = p * (dp - delta_m[:, None])",
        "ds = p * dp",
        "attention",
    ),
    Mutation(
        "a query reads the keys of another group",
        "attention",
        "return n_heads + head // GROUP\n",
        "return n_heads + head % (n_heads // GROUP)\n",
        "attention",
    ),
    Mutation(
        "dk comes from the last query head of a group alone",
        "attention",
        "ds_t = p_t * (dp_t - delta_m[None, :])",
        "ds_t = p_t * (dp_t - delta_m[None, :]) * (g == GROUP - 1)",
        "attention",
    ),
    Mutation(
        "the last position is never written",
        "attention",
        "    corner = target + (batch.to(tl.int64) * T + row) * width + head * D\n",
        "    corner = target + (batch.to(tl.int64) * T + row) * width + head * D\n    T -= 1\n",
        "attention",
    ),
    Mutation(
        "decoding looks at one key past the end",
        "decode_attention",
        "there = keys < end",
        "there = keys <= end",
        "triton_training",
    ),
    Mutation(
        "decoding's window is one key short",
        "decode_attention",
        "first = tl.maximum(length - window, 0)",
        "first = tl.maximum(length - window + 1, 0)",
        "attention_window",
    ),
    Mutation(
        "dk of a window misses the last queries that see it",
        "attention",
        "stop = tl.load(seen_until + tl.minimum(key + N, T) - 1)",
        "stop = tl.load(seen_until + key)",
        "attention_window",
    ),
    Mutation(
        "RoPE turns half of a head the other way",
        "rotary",
        "(x2 * cos + x1 * sin).to(",
        "(x2 * cos - x1 * sin).to(",
        "rotary",
    ),
    Mutation(
        "RoPE's backward turns on, not back",
        "rotary",
        "        sin = -sin\n",
        "        sin = sin * 1.0\n",
        "rotary",
    ),
    Mutation(
        "RoPE's pairs are neighbors, not halves",
        "rotary",
        "x2 = tl.load(first + HALF,",
        "x2 = tl.load(first + 1,",
        "rotary",
    ),
    Mutation(
        "heads of v are turned too",
        "norm_rotary",
        "y1 = tl.where(is_v, x1, n1 * cos - n2 * sin)",
        "y1 = n1 * cos - n2 * sin",
        "rotary",
    ),
    Mutation(
        "heads of k get the gain of q",
        "norm_rotary",
        "is_q = (heads < n_heads)",
        "is_q = (heads < n_turned)",
        "rotary",
    ),
    Mutation(
        "the head norm leaves ε out",
        "norm_rotary",
        "tl.sqrt(mean_square + eps)",
        "tl.sqrt(mean_square)",
        "rotary",
    ),
    Mutation(
        "the head norm's backward forgets that the root depends on x",
        "norm_rotary",
        "dx2 = rstd * (g2 - x2 * rstd * mean_gx)",
        "dx2 = rstd * g2",
        "rotary",
    ),
    Mutation(
        "the head norm's backward takes the mean of half a head",
        "norm_rotary",
        "(1.0 / (2 * HALF)) * rstd",
        "(1.0 / HALF) * rstd",
        "rotary",
    ),
    Mutation(
        "half of a row of dγ is overwritten, not added to",
        "norm_rotary",
        "s2 += tl.load(sums + HALF, mask=in_half, other=0.0)",
        "s2 += 0.0",
        "rotary",
    ),
    Mutation(
        "LayerNorm leaves ε out",
        "layer_norm",
        "tl.sqrt(variance + eps)",
        "tl.sqrt(variance)",
        "layer_norm",
    ),
    Mutation(
        "LayerNorm's variance is that of a sample",
        "layer_norm",
        "tl.sum(centered * (centered * share), 1)",
        "tl.sum(centered * centered, 1) / (n_columns - 1)",
        "layer_norm",
    ),
    Mutation(
        "the residual's gradient is dropped",
        "layer_norm",
        "if dresidual_ptr is not None:",
        "if False:",
        "layer_norm",
    ),
    Mutation(
        "LayerNorm's backward subtracts the mean of dy, not of γ dy",
        "layer_norm",
        "mean_g = tl.sum(g, 1)",
        "mean_g = tl.sum(dy, 1)",
        "layer_norm",
    ),
    Mutation(
        "RMS norm leaves ε out",
        "rms_norm",
        "tl.sqrt(mean_square + eps)",
        "tl.sqrt(mean_square)",
        "rms_norm",
    ),
    Mutation(
        "RMS norm divides by the sum of the squares, not by their mean",
        "rms_norm",
        "tl.sum(x * (x * (1.0 / n_columns)), 1)",
        "tl.sum(x * x, 1)",
        "rms_norm",
    ),
    Mutation(
        "RMS norm hides a row whose squares overflow",
        "rms_norm",
        'tl.where(mean_square < float("inf"), rstd, float("nan"))',
        "rstd + 0.0",
        "rms_norm",
    ),
    Mutation(
        "RMS norm's backward projects dy, not γ dy",
        "rms_norm",
        "tl.sum(g * x_hat, 1)",
        "tl.sum(dy * x_hat, 1)",
        "rms_norm",
    ),
    Mutation(
        "RMS norm's gain gets the sum of γ dy x̂",
        "rms_norm",
        "dweight += dy * x_hat",
        "dweight += g * x_hat",
        "rms_norm",
    ),
    Mutation(
        "RMS norm drops the residual's gradient",
        "rms_norm",
        "if dresidual_ptr is not None:",
        "if False:",
        "rms_norm",
    ),
    Mutation(
        "a norm keeps the unrounded sum of branch and residual",
        "norm_tiles",
        "x = rounded.to(tl.float32)",
        "x = residual + branch",
        "rms_norm",
    ),
    Mutation(
        "SwiGLU takes up for the gate",
        "swiglu",
        "y = g * s * u",
        "y = g * sigmoid_and_motion(u)[0] * u",
        "swiglu",
    ),
    Mutation(
        "SwiGLU's sigmoid overflows",
        "swiglu",
        "tl.exp2(tl.abs(g) * MINUS_LOG2_E)",
        "tl.exp2(g * MINUS_LOG2_E)",
        "swiglu",
    ),
    Mutation(
        "SwiGLU's gate has no motion of its own",
        "swiglu",
        "(s + g * motion)",
        "s",
        "swiglu",
    ),
    Mutation(
        "SwiGLU writes the gradients of gate and up in each other's place",
        "swiglu",
        "tl.store(dh_ptr + gate_offsets + n_columns, du.to",
        "tl.store(dh_ptr + gate_offsets + n_columns, dg.to",
        "swiglu",
    ),
    Mutation(
        "SwiGLU's last columns are another row's",
        "swiglu",
        "(columns < n_columns)[None, :]",
        "(columns < 2 * n_columns)[None, :]",
        "swiglu",
    ),
    Mutation(
        "GELU's backward gives no bias gradient",
        "gelu",
        "dbias += tl.sum(dh, 0)",
        "dbias += tl.sum(dh, 0) * 0.0",
        "gelu",
    ),
    Mutation(
        "a bias gradient is overwritten, not added to",
        "partials",
        "gradients + tl.sum(sums, 0), mask",
        "tl.sum(sums, 0), mask",
        "gelu",
    ),
    Mutation(
        "partial sums are not cleared after they were summed up",
        "partials",
        "tl.store(partials_ptr + offsets, tl.zeros_like(sums), mask=mask)",
        "pass",
        "layer_norm",
    ),
    Mutation(
        "a row of partial sums is overwritten, not added to",
        "norm_tiles",
        "sums += tl.load(ptrs, mask=in_columns, other=0.0)",
        "sums += 0.0",
        "layer_norm",
    ),
    Mutation(
        "a branch's bias gets the sum of dy, not of dx",
        "layer_norm",
        "tl.where(mask, rounded.to(tl.float32), 0.0)",
        "dy",
        "layer_norm",
    ),
    Mutation(
        "an ignored label is counted in the loss",
        "cross_entropy",
        "tl.where(target == ignore_index, 0.0, loss)",
        "loss",
        "cross_entropy",
    ),
    Mutation(
        "padded columns receive a gradient",
        "cross_entropy",
        "tl.where(columns < end, dz, 0.0)",
        "tl.where(columns < n_columns, dz, 0.0)",
        "cross_entropy",
    ),
    Mutation(
        "the target's column lacks its -1",
        "cross_entropy",
        "dz_target = -s * factor",
        "dz_target = exponential(z_target - m) * factor",
        "cross_entropy",
    ),
    Mutation(
        "large logits are rounded before their difference is taken",
        "cross_entropy",
        "exponential(z - new_max[:, None])",
        "tl.exp2(z * LOG2_E - (new_max * LOG2_E)[:, None])",
        "cross_entropy_edges",
    ),
    Mutation(
        "the loss of a sure token loses its digits",
        "cross_entropy",
        "tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))",
        "tl.log(y)",
        "cross_entropy_edges",
    ),
    Mutation(
        "a row's running maximum starts above the lowest logits",
        "cross_entropy",
        "LOWEST = tl.constexpr(-3.4028234663852886e38)",
        "LOWEST = tl.constexpr(-1e38)",
        "cross_entropy_edges",
    ),
    Mutation(
        "a token's last reader is left out",
        "embedding",
        "end = i + tl.sum(in_piece.to(tl.int32), 0)",
        "end = i + tl.sum(in_piece.to(tl.int32), 0) - 1",
        "embedding",
    ),
    Mutation(
        "weights do not decay",
        "adamw",
        "w *= 1.0 - rate * WEIGHT_DECAY",
        "w *= 1.0",
        "optimizers",
    ),
    Mutation(
        "AdamW steps although the gradient is not finite",
        "adamw",
        "if tl.load(finite_ptr):",
        "if tl.load(finite_ptr) | True:",
        "optimizers",
    ),
    Mutation(
        "SGD steps although the gradient is not finite",
        "sgd",
        "if tl.load(finite_ptr):",
        "if tl.load(finite_ptr) | True:",
        "optimizers",
    ),
    Mutation(
        "AdamW's second moment is of g, not of g²",
        "adamw",
        "v = v * BETA2 + g * g * (1.0 - BETA2)",
        "v = v * BETA2 + g * (1.0 - BETA2)",
        "optimizers",
    ),
    Mutation(
        "Muon's momentum moves although the gradient is not finite",
        "nesterov_momentum",
        "if tl.load(finite_ptr):",
        "if tl.load(finite_ptr) | True:",
        "optimizers",
    ),
    Mutation(
        "Muon's update does not look ahead",
        "nesterov_momentum",
        "(m * BETA + g).to(",
        "m.to(",
        "optimizers",
    ),
    Mutation(
        "stochastic rounding adds a half instead of noise",
        "weights",
        "(hash32(index, seed) & 0xFFFF)",
        "0x8000",
        "optimizers",
    ),
    Mutation(
        "the gradient norm squares in float32",
        "gradient_norms",
        "g = g.to(tl.float64)",
        "g = g.to(tl.float32)",
        "gradient_norms_edges",
    ),
    Mutation(
        "the gradient norm leaves out the last element",
        "gradient_norms",
        "mask=index < size, other",
        "mask=index < size - 1, other",
        "optimizers",
    ),
)


class Verdict(NamedTuple):
    """What the tests said to a mutation."""

    mutation: Mutation
    caught_by: str  # the first test that failed, "" if none did


def mutate(mutation: Mutation, root: Path) -> None:
    """Write the mistake into the tree at `root`. ValueError if the kernel's text has moved on."""
    path = root / "kernels" / "triton" / f"{mutation.kernel}.py"
    text = path.read_text()
    if text.count(mutation.right) != 1:
        raise ValueError(
            f"kernels/triton/{mutation.kernel}.py: {mutation.right!r} occurs "
            f"{text.count(mutation.right)} times; a mutation needs exactly 1"
        )
    path.write_text(text.replace(mutation.right, mutation.wrong))


def run_tests(tests: str, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The interpreter tests of one kernel, in a process of their own."""
    path = f"tests/kernels/test_{tests}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options, path], cwd=root, capture_output=True, text=True, check=False
    )


def copy_tree(directory: Path) -> Path:
    """A copy of what the tests need, to break."""
    for name in COPIED:
        source, target = ROOT / name, directory / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, symlinks=True, ignore=ignore)  # mantrans/kernels is one
        else:
            shutil.copy(source, target)
    return directory


def judge(mutation: Mutation) -> Verdict:
    """Break a copy, test it, and see. RuntimeError if the tests do not even run."""
    with tempfile.TemporaryDirectory() as directory:
        root = copy_tree(Path(directory))
        mutate(mutation, root)
        run = run_tests(mutation.tests, root, "-x")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", run.stdout, re.M)
    if run.returncode not in (0, 1) or (run.returncode == 1 and not failed):
        raise RuntimeError(f"the tests of {mutation.tests} did not run:\n{run.stdout}{run.stderr}")
    return Verdict(mutation, failed[0] if failed else "")


def document(verdicts: Sequence[Verdict]) -> str:
    """The page that --write leaves behind."""
    rows = [
        f"| {m.mistake} | `kernels/triton/{m.kernel}.py` | {caught_by(verdict)} |"
        for verdict in verdicts
        for m in [verdict.mutation]
    ]
    caught = sum(bool(verdict.caught_by) for verdict in verdicts)
    return (
        "# Deliberate mistakes, and whether the tests notice\n\n"
        "Written by `python -m tools.mutations --write tools/mutations.md`: each row is a mistake "
        "in one line of a kernel, and the first of its interpreter tests (`tests/kernels`) "
        f"that failed on it. {caught} of {len(verdicts)} were caught.\n\n"
        "| mistake | in | caught by |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def caught_by(verdict: Verdict) -> str:
    return f"`{verdict.caught_by}`" if verdict.caught_by else "**not caught**"


def main() -> int:
    """Judge the mutations one after the other; 1 if one was not caught."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="WORD", help="mutations that mention it")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there as well")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only in f"{m.mistake} {m.kernel}"]
    for tests in sorted({m.tests for m in chosen}):
        run = run_tests(tests, ROOT)
        if run.returncode:
            parser.error(f"test_{tests}.py fails on the kernels as they are:\n{run.stdout}")

    verdicts = []
    for mutation in chosen:
        verdicts.append(judge(mutation))
        print(f"{mutation.kernel}: {mutation.mistake}: {caught_by(verdicts[-1])}", flush=True)
    if arguments.write:
        arguments.write.write_text(document(verdicts))
    missed = [verdict for verdict in verdicts if not verdict.caught_by]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} caught")
    return 1 if missed or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
