"""Counts of work and memory, held against sums made by hand, a profiler, and the real tensors."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import peak_on_cpu
from mantrans.cli import main
from mantrans.config import Config, ModelConfig
from mantrans.errors import ConfigError
from mantrans.kernels import native, reference
from mantrans.kernels.triton.cross_entropy import chunk_rows_within
from mantrans.models.transformer import CustomTransformer
from mantrans.training import flops, memory, room
from mantrans.training.summary import summary
from mantrans.wrapper import CustomTransformerWrapper

GPT2 = ModelConfig(d_model=768, n_blocks=12, n_heads=12, max_seq_len=1024, vocab_size=50257)
SMALL = ModelConfig(
    d_model=32, n_blocks=3, n_heads=2, d_ffn=96, max_seq_len=24, vocab_size=256, bias=False
)


def configured(model: ModelConfig, **training: Any) -> Config:
    training = {"max_steps": 1, "batch_size": 5, **training}
    return Config.from_dict({"model": model.model_dump(), "training": training})


# ------------------------------------------------------------------------------------------ FLOPs


def test_flops_gpt2() -> None:
    """84,934,656 weights in the blocks and 38,597,376 in the output; 512.5 keys a query."""
    expected = 6 * (84_934_656 + 38_597_376) + 3 * 12 * 4 * 768 * 512.5
    assert flops.flops_per_token(GPT2) == expected


class Products(TorchDispatchMode):
    """Adds up the operations of the matrix products that really run, attention's inside not."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        factors = {"mm": args[0:2], "addmm": args[1:3], "addmm_": args[1:3]}
        name = function.overloadpacket.__name__
        assert "bmm" not in name
        if name in factors:
            left, right = factors[name]
            self.count += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def test_flops_products() -> None:
    """The products that run are those that are counted."""
    model = CustomTransformer(SMALL, native, dtype=torch.float64, device=torch.device("cpu"))
    tokens = torch.randint(256, (2, 24))
    with Products() as products:
        model.forward_backward(tokens, tokens, torch.tensor(1.0, dtype=torch.float64))
    attention = 3 * SMALL.n_blocks * 4 * SMALL.d_model * 12.5
    assert products.count == (flops.flops_per_token(SMALL, 24) - attention) * tokens.numel()


def test_flops_recompute() -> None:
    """Recomputing a block leaves out its last product."""
    tokens = torch.randint(256, (2, 24))
    counts = {}
    for mode in ("none", "block"):
        model = CustomTransformer(
            SMALL, native, dtype=torch.float64, device=torch.device("cpu"), recompute=mode
        )
        with Products() as products:
            model.forward_backward(tokens, tokens, torch.tensor(1.0, dtype=torch.float64))
        counts[mode] = products.count
    C, F, rows = SMALL.d_model, SMALL.feed_forward_width, tokens.numel()
    again = 2 * rows * (3 * C * C + C * C + C * F)  # qkv, projection, up; not down
    assert counts["block"] - counts["none"] == SMALL.n_blocks * again


def test_flops_length() -> None:
    assert flops.flops_per_token(SMALL, 24) == flops.flops_per_token(SMALL)
    difference = flops.flops_per_token(SMALL, 24) - flops.flops_per_token(SMALL, 12)
    assert difference == 3 * 3 * 4 * 32 * (12.5 - 6.5)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA H300", torch.bfloat16, None),
        ("", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
    ],
)
def test_peak_flops_device(name: str, dtype: torch.dtype, expected: float | None) -> None:
    """A peak is that of the very device or unknown."""
    assert flops.peak_flops("cuda", dtype, name=name) == expected


def test_share_of_peak() -> None:
    assert flops.share_of_peak(600_000, 8e8, 989.4e12) == pytest.approx(0.48514, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_peak_not_listed(dtype: torch.dtype) -> None:
    """A CPU's is measured, in a short time: no product is faster. One thread's CPU time: two that
    wait for one processor spin, and that counts."""
    begin = time.process_time()
    peak = flops.peak(torch.device("cpu"), dtype)
    assert not peak.is_listed and time.process_time() - begin < 0.3 * torch.get_num_threads()
    a = torch.rand(512, 512).to(dtype)
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3):
        begin = time.process_time()
        torch.mm(a, a)
        seconds.append(time.process_time() - begin)
    torch.set_num_threads(threads)
    assert 0.2 * peak.flops < 2 * 512**3 / min(seconds) < 2 * peak.flops


# ----------------------------------------------------------------------------------------- memory


def test_parameters_gpt2() -> None:
    """The groups sum to GPT-2's 124 million."""
    groups = memory.parameter_groups(GPT2)
    assert sum(groups.values()) == 124_439_808
    assert groups["token embedding"] == 50257 * 768 and groups["attention"] == 28_348_416
    untied = memory.parameter_groups(GPT2.model_copy(update={"tie_embeddings": False}))
    assert untied["output"] == 50257 * 768


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_buffers(bias: bool, recompute: str, dtype: torch.dtype) -> None:
    """Every tensor the model holds after a forward, each storage counted once."""
    shape = SMALL.model_copy(update={"bias": bias, "vocab_size": 130})
    config = configured(shape, recompute=recompute)
    model = CustomTransformer(
        shape, reference, dtype=dtype, device=torch.device("cpu"), recompute=recompute
    )
    predicted = memory.predict(config, dtype, "cpu")
    held = model.parameters
    assert predicted.weights == held.weights.nbytes
    assert predicted.masters == (0 if held.master is None else held.master.nbytes)
    assert predicted.gradients == held.gradients.nbytes
    assert predicted.moments == 2 * held.gradients.nbytes

    tokens = torch.randint(130, (5, 24))
    starts = torch.zeros(5, 24, dtype=torch.int32)
    model._trunk_forward(tokens, starts)
    kept = sum(storage_bytes(model._saved).values()) + tokens.nbytes  # the targets
    # The reference keeps as many statistics as a GPU; native fewer, a share too small to matter.
    assert predicted.activations == pytest.approx(kept, rel=0.02)


def storage_bytes(value: Any) -> dict[int, int]:
    """Bytes of each storage that a nest of tuples and lists of tensors holds."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    found: dict[int, int] = {}
    if isinstance(value, list | tuple):
        for item in value:
            found.update(storage_bytes(item))
    return found


def test_memory_recompute_and_sgd() -> None:
    """Recomputing saves activations, by its order; SGD saves its moments."""
    totals = [
        memory.predict(configured(GPT2, recompute=mode), torch.bfloat16, "cpu").total
        for mode in ("none", "gelu", "block")
    ]
    assert totals == sorted(totals, reverse=True) and totals[0] > 1.4 * totals[2]
    assert memory.predict(configured(GPT2, optimizer="sgd"), torch.bfloat16, "cpu").moments == 0
    rounded = configured(GPT2, stochastic_rounding=True)
    assert memory.predict(rounded, torch.bfloat16, "cpu").masters == 0


def test_memory_chunk_rows() -> None:
    """Chosen without a GPU: at most a quarter of what the step with small chunks leaves free."""
    config, device = configured(GPT2, batch_size=16), torch.device("cuda")
    rows = 16 * config.sequence_length
    small, large = (
        memory.predict(config, torch.bfloat16, device, chunk).total for chunk in (None, rows)
    )
    logits = rows * 50304 * 2
    assert small < large <= small + logits
    enough = small + 4 * (large - small)
    for free, expected in ((enough, rows), (enough - 4, None), (small, None), (2**60, rows)):
        assert memory.logits_chunk_rows(config, torch.bfloat16, device, free) == expected
    for elsewhere in (config, configured(GPT2, batch_size=16, backend="native")):
        place = device if elsewhere is not config else torch.device("cpu")
        assert memory.logits_chunk_rows(elsewhere, torch.bfloat16, place, 2**60) is None


class ResultsOnly:
    """Operations that compute nothing and take memory for their results alone, as the fused kernels
    do (a kernel's partial sums, some hundred rows, left out)."""

    @staticmethod
    def partial_rows(device: torch.device) -> int:
        return 0

    @staticmethod
    def embedding_forward(tokens: Tensor, token_table: Tensor, position_table: Tensor) -> Tensor:
        return token_table.new_empty(*tokens.shape, token_table.shape[1])

    @staticmethod
    def embedding_backward(*_: Any) -> None: ...

    @staticmethod
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def linear_backward(dy: Tensor, x: Tensor, *_: Any, dbias: Tensor | None = None) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def layer_norm_forward(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        rows = x.shape[:-1].numel()
        return torch.empty_like(x), torch.empty(rows, dtype=torch.float64), torch.empty(rows)

    @staticmethod
    def add_layer_norm_forward(branch: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
        y, mean, rstd = ResultsOnly.layer_norm_forward(residual)
        return y, torch.empty_like(residual), mean, rstd

    @staticmethod
    def layer_norm_backward(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def attention_forward(qkv: Tensor, n_heads: int, *_: Any) -> tuple[Tensor, Tensor]:
        B, T, three_C = qkv.shape
        return qkv.new_empty(B, T, three_C // 3), torch.empty(2, B, n_heads, T)

    @staticmethod
    def attention_backward(
        dout: Tensor, qkv: Tensor, out: Tensor, statistics: Tensor, *_: Any
    ) -> Tensor:
        delta, dqkv = torch.empty_like(statistics[0]), torch.empty_like(qkv)
        del delta
        return dqkv

    @staticmethod
    def bias_gelu_forward(h: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(h)

    @staticmethod
    def bias_gelu_backward(dy: Tensor, h: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(h)

    @staticmethod
    def linear_cross_entropy_forward_backward(
        x: Tensor, weight: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        losses, dx = torch.empty(len(x)), torch.empty_like(x)
        chunk = min(len(x), chunk_rows_within(len(x), len(weight) * x.itemsize))
        logits = x.new_empty(chunk, len(weight))
        del logits
        return losses.sum(), dx

    @staticmethod
    def linear_cross_entropy_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        losses = torch.empty(len(x))
        logits = x.new_empty(chunk_rows_within(len(x), len(weight) * x.itemsize), len(weight))
        del logits
        return losses


@pytest.mark.parametrize(
    "recompute", ["none", pytest.param("gelu", marks=pytest.mark.slow), "block"]
)
@pytest.mark.parametrize(
    ("width", "inner", "vocabulary", "B", "T"),
    [(768, 3072, 50257, 2, 512), (256, 512, 4096, 16, 128), (256, 512, 65536, 16, 128)],
    ids=["MLP at the peak", "attention at the peak", "the loss at the peak"],
)
def test_memory_peak(
    width: int, inner: int, vocabulary: int, B: int, T: int, recompute: str
) -> None:
    """A step that allocates its results and nothing else, counted by PyTorch's profiler. 0.5%: the
    predicted sums leave out what is of the size of one row, or smaller."""
    shape = ModelConfig(
        d_model=width, n_blocks=3, n_heads=4, d_ffn=inner, max_seq_len=T, vocab_size=vocabulary
    )
    config = configured(shape, recompute=recompute, batch_size=B, compile_step=False)
    model = CustomTransformer(
        shape, ResultsOnly, dtype=torch.bfloat16, device=torch.device("cpu"), recompute=recompute
    )
    tokens = torch.zeros(B, T, dtype=torch.int64)
    starts = torch.zeros(B, T, dtype=torch.int32)

    peak = peak_on_cpu(
        [tokens, tokens.clone(), starts],
        lambda: model.forward_backward(tokens, tokens, torch.ones(()), starts),
    )
    predicted = memory.predict(config, torch.bfloat16, "cuda")
    work = max(predicted.backward_workspace, predicted.loss_workspace)
    assert peak == pytest.approx(predicted.activations + work, rel=0.005)


@pytest.mark.parametrize(("vocabulary", "rows"), [(64, 16), (4096, 16), (65536, 8)])
def test_memory_validation(vocabulary: int, rows: int) -> None:
    """Of a batch, whether its blocks or its logits take more. 0.5%: its double sums."""
    shape = ModelConfig(
        d_model=256, n_blocks=3, n_heads=4, d_ffn=512, max_seq_len=128, vocab_size=vocabulary
    )
    model = CustomTransformer(
        shape, ResultsOnly, dtype=torch.bfloat16, device=torch.device("cpu"), training=False
    )
    tokens = torch.zeros(rows, 128, dtype=torch.int64)

    def validate() -> None:
        starts = reference.document_starts(tokens, 1)
        model.losses(tokens, tokens, starts).double()

    peak = peak_on_cpu([tokens, tokens.clone()], validate)
    config = configured(shape, batch_size=rows)
    predicted = memory.predict_validation(config, torch.bfloat16, "cuda", None)
    assert peak == pytest.approx(predicted, rel=0.005)


def on_gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The checks' GPU has so much memory free."""
    monkeypatch.setattr(room, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(room, "resolve_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(room, "free_memory", lambda _: free)


def test_memory_beside_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes on top of a graph is in the peak, and the field that it depends on is named."""
    config = configured(GPT2, batch_size=16)
    run = memory.predict(config, torch.bfloat16, "cuda")
    assert run.validation > run.save_check > 0 == run.recheck
    assert run.total == run.step + run.validation == sum(run.by_kind().values())
    few = memory.predict(config, torch.bfloat16, "cuda", windows=1)
    assert few.validation < run.validation / 4 and few.step == run.step
    many = {"generation_prompts": ["a"] * 4096, "batch_size": 4096}
    sampling = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=many)})
    end = memory.predict(sampling, torch.bfloat16, "cuda", windows=1)
    assert end.total == end.state + end.library + end.samples
    assert end.samples > 4096 * 128 * 2 * 12 * 768 * 2, "keys and values of as many samples"
    at_once = configured(GPT2, batch_size=16, compile_step=False)
    eager = memory.predict(at_once, torch.bfloat16, "cuda")
    assert eager.total == eager.step and memory.predict(config, torch.bfloat16, "cpu").beside == 0

    def refusal(config: Config, free: int, windows: int = 10**6) -> str:
        on_gpu(monkeypatch, free)
        room.require_memory(config, 50257, None)
        with pytest.raises(ConfigError) as refused:
            room.require_evaluation_memory(config, 50257, windows)
        return str(refused.value)

    assert refusal(config, run.total - 1).startswith("evaluation.batch_size: expected validation ")
    on_gpu(monkeypatch, run.total)
    assert room.require_evaluation_memory(config, 50257, 10**6) == run
    on_gpu(monkeypatch, run.total - 1)
    assert room.require_evaluation_memory(config, 50257, 1).total < run.total - 1

    twice = configured(GPT2, batch_size=16, recheck_every=100)
    work = memory.predict(twice, torch.bfloat16, "cuda")
    assert work.recheck == work.activations + work.loss_workspace > run.validation
    on_gpu(monkeypatch, run.total)
    with pytest.raises(ConfigError, match=r"^training.recheck_every: expected null, or a second "):
        room.require_memory(twice, 50257, None)
    on_gpu(monkeypatch, run.step - 1)
    with pytest.raises(
        ConfigError, match=r"^model, training.batch_size: expected a step that fits"
    ):
        room.require_memory(twice, 50257, None)
    on_gpu(monkeypatch, run.step + 1)
    with pytest.raises(ConfigError, match=r"^training.batch_size: expected the check of a save "):
        room.require_memory(config, 50257, None)


# ----------------------------------------------------------------------------------- summary


def test_summary_shipped(capsys: Any) -> None:
    path = Path(__file__).parents[3] / "configs" / "gpt2-124m.yaml"
    assert main(["summary", str(path), "--set", "training.device=cpu"]) == 0
    shown = capsys.readouterr().out
    for expected in ("124,439,808", "524,288", "7.979e+08", "19,000", "unknown before", "peak"):
        assert expected in shown


def test_summary_epoch_and_wrong(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {vocab_size: 100}\ntraining: {num_epochs: 2}")
    assert main(["summary", str(path), "--tokens", str(4096 * 10)]) == 0
    assert re.search(r"steps +20\n", capsys.readouterr().out)
    assert main(["summary", str(path), "--set", "model.d_model=7"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    )


def test_memory_held_counts_as_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run asks again when its model is on the GPU: the answer stays the same."""
    config = configured(GPT2, batch_size=16, backend="triton")
    total = int(memory.predict(config, torch.bfloat16, "cuda").total * 1.05)
    monkeypatch.setattr(room, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(room, "resolve_dtype", lambda *_: torch.bfloat16)
    answers = []
    for held in (0, total // 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, h=held: (total - h, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, h=held: h)
        answers.append(room.require_memory(config, 50257, None).bytes)
    assert answers[0] == answers[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total // 2, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)  # another process holds it
    with pytest.raises(
        ConfigError, match=r"expected a step that fits into the .* GiB free of cuda"
    ):
        room.require_memory(config, 50257, None)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("shape", [{}, {"mlp": "swiglu", "n_kv_heads": 1, "tie_embeddings": False}])
def test_update_flops_counted(optimizer: str, shape: dict[str, Any]) -> None:
    """As PyTorch counts the products of an update."""
    sizes = {"vocab_size": 61, "d_model": 16, "n_blocks": 3, "n_heads": 2, "max_seq_len": 12}
    config = ModelConfig.complete({**sizes, **shape, "dtype": "float32"}, "test")
    wrapper = CustomTransformerWrapper.from_config(config, device="cpu", optimizer=optimizer)
    one = torch.tensor(1.0)
    with FlopCounterMode(display=False) as counter:
        wrapper.trainable().step(one, one)
    assert counter.get_total_flops() == flops.update_flops(config, optimizer)
    assert (counter.get_total_flops() > 0) == (optimizer == "muon")


def test_summary_of_muon() -> None:
    """Its update's operations, all steps' operations with them, and its memory."""
    settings = ["model.vocab_size=61", "training.max_steps=10", "training.device=cpu"]
    tables = {}
    for optimizer in ("adamw", "muon"):
        config = Config.from_dict({}, "test", [*settings, f"training.optimizer={optimizer}"])
        lines = [line.strip().split("  ", 1) for line in summary(config).splitlines()]
        tables[optimizer] = {line[0]: line[-1].strip() for line in lines}
    found, without = tables["muon"], tables["adamw"]
    update = flops.update_flops(config.model, "muon")
    step = float(without["FLOPs per step"])
    assert found["FLOPs per update"] == f"{update:.4g}, {update / (step + update):.1%} of a step"
    assert float(found["FLOPs in all"]) == pytest.approx(10 * (step + update), rel=1e-3)
    assert found.keys() - without.keys() == {"FLOPs per update", "update workspace"}
