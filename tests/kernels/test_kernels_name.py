"""The folder `kernels/` shares its name with a Hugging Face package that `transformers` imports.

Ours is imported as `mantrans.kernels`, so theirs must be found wherever this clone is on the path,
and installing or removing ours must not touch it.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installed import ROOT, Environment, build, copy_sources, run

# transformers 5.22 takes kernels 0.17; later ones want a version that is not published yet, and
# until it is they ignore theirs and ours alike.
THEIRS = ("kernels==0.17.2", "transformers==5.22.0")


def test_kernels_import_anywhere() -> None:
    """By a statement in Python, or by a line of text in the documentation and scripts."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    folders = ("benchmarks", "docs", "kernels", "mantrans", "tests", "tools", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.*"), ROOT / "Makefile"]
    python = [path for path in files if path.suffix == ".py"]
    for path in python:
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert "kernels" not in {name.split(".")[0] for name in names}, path
    for path in files:
        if path.suffix in (".md", ".sh", ".toml") or path.name in ("Makefile", "run"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\b(from|import) kernels\b", text), path
    assert len(python) > 100


# ------------------------------------------------------------------------------------- a stand-in

STAND_IN = '''
__version__ = "{version}"

def get_kernel(name):
    return "theirs"

def __getattr__(name):
    """Whatever transformers takes from it: decorators that decorate nothing, empty classes."""
    if name.startswith("__"):
        raise AttributeError(name)
    return (lambda *_, **__: lambda x: x) if name.startswith("use_") else type(name, (), {{}})
'''
WITH_STAND_IN = """
import sys
sys.path[:0] = sys.argv[1:]
import transformers.utils.import_utils as utils
assert utils.is_kernels_available()
import kernels
from kernels import get_kernel
assert get_kernel("x") == "theirs"
from transformers import GPT2LMHeadModel, LlamaForCausalLM
import torch
from mantrans import CustomTransformerWrapper
model = CustomTransformerWrapper(vocab_size=9, d_model=8, n_blocks=1, n_heads=1, max_seq_len=8)
ids = torch.arange(8).view(1, 8)
assert model.train_step(ids, ids)["status"] == "ok"
print(kernels.__file__)
"""


@pytest.mark.parametrize("ours_first", [True, False], ids=["clone first", "clone last"])
def test_kernels_package_found(tmp_path: Path, ours_first: bool) -> None:
    """A package is found before a folder without `__init__.py`, wherever they are on the path."""
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("")
    path = [str(ROOT), str(tmp_path)] if ours_first else [str(tmp_path), str(ROOT)]
    found = importlib.machinery.PathFinder.find_spec("kernels", path)
    assert found is not None and found.origin == str(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False], ids=["clone first", "clone last"])
def test_kernels_package_with_transformers(tmp_path: Path, ours_first: bool) -> None:
    """Another package `kernels` is found and used by transformers."""
    utils = pytest.importorskip("transformers.utils.import_utils")
    theirs = tmp_path / "kernels" / "__init__.py"
    mode = tmp_path / "kernels" / "layer" / "mode.py"
    mode.parent.mkdir(parents=True)
    theirs.write_text(STAND_IN.format(version=getattr(utils, "KERNELS_MIN_VERSION", "1.0")))
    mode.write_text("class Mode: pass")
    path = [ROOT, tmp_path] if ours_first else [tmp_path, ROOT]
    out = run(sys.executable, "-c", WITH_STAND_IN, *path, cwd=tmp_path / "kernels" / "layer")
    assert out.split() == [str(theirs)]


@pytest.mark.skipif(
    "kernels" in importlib.metadata.packages_distributions(), reason="theirs is installed"
)
def test_kernels_package_absent() -> None:
    """Where theirs is not installed, the folder kernels/ of a clone on the path is no package."""
    transformers = pytest.importorskip("transformers")
    assert str(ROOT) in sys.path
    assert transformers.GPT2LMHeadModel and not transformers.utils.is_kernels_available()


# ---------------------------------------------------------------------------------- the real one

EVERY_MODEL = """
import importlib, kernels, transformers
from pathlib import Path
assert transformers.utils.is_kernels_available()
files = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
failed = []
for file in files:
    try:
        importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    except ModuleNotFoundError as error:  # of an optional package, such as torchaudio
        failed.append(f"{file.stem} lacks {error.name}")
print(len(files), "model files;", ", ".join(failed) or "all import")
print(kernels.__file__)
"""
THEIRS_WORKS = """
import base64, hashlib, importlib.metadata, kernels, torch, transformers
assert transformers.utils.is_kernels_available()
files = [file for file in importlib.metadata.distribution("kernels").files if file.hash]
for file in files:
    digest = hashlib.sha256(file.locate().read_bytes()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=8)
model = transformers.GPT2LMHeadModel(config)
ids = torch.arange(8).view(1, 8)
model(ids, labels=ids).loss.backward()
kernels.get_kernel, kernels.LayerRepository
print(len(files), "files of theirs as installed;", kernels.__file__)
"""
OURS_WORKS = """
import torch, mantrans, mantrans.kernels.reference as reference
model = mantrans.CustomTransformerWrapper(vocab_size=9, d_model=8, n_blocks=1, n_heads=1)
ids = torch.arange(8).view(1, 8)
print(model.train_step(ids, ids)["status"], reference.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours. Tests that ask for it need an index, too: skips them where none is reached."""
    folder = tmp_path_factory.mktemp("index")
    download = ("download", "--no-deps", "--quiet", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", *download, *THEIRS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        pytest.skip(f"needs {' and '.join(THEIRS)} from a package index: {last}")
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    return build(sources, tmp_path_factory.mktemp("wheel"), "--wheel")


def install_theirs(environment: Environment) -> None:
    environment.pip("install", "--quiet", *THEIRS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_all_transformers_models(wheel: Path, tmp_path: Path) -> None:
    """With the clone first on the path every model of transformers imports."""
    environment = Environment(tmp_path / "environment")
    install_theirs(environment)
    command = (environment.python, "-c", EVERY_MODEL)
    without = run(*command, cwd=tmp_path)
    out = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    print(f"\nclone first: {out}")
    assert out == without
    assert out.split()[-1] == str(environment.packages / "kernels" / "__init__.py")
    assert int(out.split()[0]) > 400


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "theirs first"])
def test_kernels_package_ours_removed(wheel: Path, tmp_path: Path, ours_first: bool) -> None:
    """Both were installed; theirs stays."""
    environment = Environment(tmp_path / "environment")
    if ours_first:
        environment.install_ours(wheel)
    install_theirs(environment)
    if not ours_first:
        environment.install_ours(wheel)
    both = run(environment.python, "-c", THEIRS_WORKS, cwd=tmp_path)
    print(f"\nboth installed: {both}{run(environment.python, '-c', OURS_WORKS, cwd=tmp_path)}")
    environment.pip("uninstall", "--yes", "mantrans")
    after = run(environment.python, "-c", THEIRS_WORKS, cwd=tmp_path)
    print(f"ours uninstalled: {after}")
    assert after == both
    assert not (environment.packages / "mantrans").exists()
