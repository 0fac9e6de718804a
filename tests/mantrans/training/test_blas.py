"""cuBLAS's workspaces, by GPU and by what the user has set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mantrans.config import Config
from mantrans.training import memory
from mantrans.training.blas import stream_workspace
from mantrans.training.summary import summary

KIB, MIB = 2**10, 2**20
ASKED = ("_cuda_getCublasWorkspaceSize", "_cuda_getCublasLtWorkspaceSize")
Place = Callable[[tuple[int, int]], None]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Place:
    """A GPU of this capability, and a PyTorch that cannot be asked. No variable is set."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", raising=False)
    for name in ASKED:
        monkeypatch.delattr(torch._C, name, raising=False)

    def place(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return place


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 8320 * KIB), ((8, 6), 8320 * KIB), ((8, 9), 8320 * KIB), ((7, 5), 8320 * KIB),
     ((9, 0), 32 * MIB), ((10, 0), 32 * MIB), ((12, 0), 32 * MIB)],
)  # fmt: skip
def test_workspace_capability(on_gpu: Place, capability, expected: int) -> None:
    on_gpu(capability)
    assert stream_workspace("cuda") == (expected, 1 * MIB)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, (32 * MIB, MIB)),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, (128 * KIB, 128 * KIB)),  # not more than cuBLAS's
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8:1:1"}, (8321 * KIB, MIB)),
        ({"CUBLAS_WORKSPACE_CONFIG": "large"}, (8320 * KIB, MIB)),
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, (0, 0)),
        ({"CUBLASLT_WORKSPACE_SIZE": "4096"}, (8320 * KIB, 4 * MIB)),
        ({"CUBLASLT_WORKSPACE_SIZE": "65536"}, (8320 * KIB, 8320 * KIB)),
        ({"CUBLASLT_WORKSPACE_SIZE": "65536", "TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"},
         (8320 * KIB, 64 * MIB)),
        ({"CUBLASLT_WORKSPACE_SIZE": "none"}, (8320 * KIB, MIB)),
        ({"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "1"}, (8320 * KIB, 0)),
    ],
)  # fmt: skip
def test_workspace_variables(
    on_gpu: Place, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected
) -> None:
    on_gpu((8, 0))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert stream_workspace("cuda") == expected


@pytest.mark.parametrize(("unified", "lt"), [(None, 0), ("1", 0), ("0", 3 * MIB)])
def test_workspace_asked(
    on_gpu: Place, monkeypatch: pytest.MonkeyPatch, unified: str | None, lt: int
) -> None:
    """A PyTorch that knows its own is believed."""
    on_gpu((8, 0))
    for name, size in zip(ASKED, (12 * MIB, 3 * MIB), strict=True):
        monkeypatch.setattr(torch._C, name, lambda s=size: s, raising=False)
    if unified is not None:
        monkeypatch.setenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", unified)
    assert stream_workspace("cuda") == (12 * MIB, lt)


@pytest.mark.parametrize(("captured", "streams"), [(True, 3), (False, 1)])
def test_library_streams(on_gpu: Place, captured: bool, streams: int) -> None:
    """The main stream, and for graphs that of all warm-ups and that of all captures."""
    training = {"max_steps": 1, "compile_step": captured, "backend": "native"}
    config = Config.from_dict({"model": {"vocab_size": 300}, "training": training})
    for capability, size in (((8, 0), 8320 * KIB), ((9, 0), 32 * MIB)):
        on_gpu(capability)
        predicted = memory.predict(config, torch.bfloat16, "cuda")
        assert predicted.library == streams * (size + MIB)


def test_summary_names_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, which the summary is about")
    config = Config.from_dict({"model": {"vocab_size": 300}, "training": {"max_steps": 1}})
    gpu, cpu = summary(config).split("\n\n")[-2:]
    assert gpu.splitlines()[0].endswith(" on cuda, an H100 as none is here")
    assert "free now" in cpu and "free now" not in gpu
    assert " H100" not in cpu and "beside it" in gpu and "beside it" not in cpu
