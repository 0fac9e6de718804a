"""Wheels of this project, and throw-away environments that reuse the packages installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SOURCES = (
    "LICENSE", "README.md", "pyproject.toml", "assets", "benchmarks", "configs", "kernels",
    "mantrans", "tests", "tools",
)  # fmt: skip


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed. PYTHONPATH is what is given here, or nothing."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_sources(folder: Path) -> Path:
    """What is built, copied with its links: a build leaves files in the folder it runs in."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources: Path, output: Path, *options: str) -> Path:
    """The wheel that `python -m build` makes, without asking an index for anything."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, *options, cwd=sources)
    (wheel,) = output.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment that also sees what is installed here, but not this clone.

    A line in a .pth names the outer packages; .pth files among those, such as that of an editable
    install, are not read again.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.packages / "outer.pth").write_text("\n".join(sorted(outer)))

    def pip(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run pip, the outer one, for this environment."""
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        return run(self.python, "-m", "pip", *arguments, cwd=cwd or self.folder, **quiet)

    def install_ours(self, what: Path) -> None:
        """A wheel or a folder of sources; the outer environment may have the same version."""
        self.pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", what)

    def files(self) -> set[str]:
        """Every file of the environment except compiled bytecode, relative to its folder."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(f.relative_to(self.folder)) for f in found if "__pycache__" not in f.parts}
