"""A run's progress on screen: a bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

_WORDS = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_second": "{} tok/s",
    "tflops": "{:.2f} TFLOP/s",
    "mfu": "MFU {:.1%}",
}


class Console:
    """Shows progress from `first_step` to `total_steps` on `stream` (standard error)."""

    def __init__(
        self,
        total_steps: int | None,
        first_step: int = 0,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.step = first_step
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self._bar: tqdm | None = None
        if not quiet and self.stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self.stream,
                unit="step",
                dynamic_ncols=True,
                leave=True,
            )

    def update(self, step: int) -> None:
        """Move the bar to `step`, if there is one."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def show(self, step: int, scalars: dict[str, Any]) -> None:
        """Show the known values of one logged step."""
        self.update(step)
        text = describe(scalars)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            of = f"/{self.total_steps}" if self.total_steps is not None else ""
            self.message(f"step {step}{of}  {text}")

    def message(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Stop the bar where it is; plain lines follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe(scalars: dict[str, Any]) -> str:
    """Return `loss 1.2345, lr 3.00e-04, …`; values that are None are left out."""
    parts = []
    for name, value in scalars.items():
        form = _WORDS.get(name, name + " {:.4g}")
        if value is None:
            continue
        if name == "tokens_per_second":
            parts.append(form.format(_thousands(value)))
        elif isinstance(value, int | float):
            parts.append(form.format(value))
        else:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _thousands(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k"
