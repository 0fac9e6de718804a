"""A run's progress on screen: a bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from typing import Any, TextIO

from mantrans.terminal import Progress, duration

_WORDS = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_second": "{} tok/s",
    "tflops": "{:.2f} TFLOP/s",
    "share_of_peak": "{:.1%} of peak",
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
        self.first_step, self.begun = first_step, time.monotonic()
        self.progress = Progress(
            total_steps, unit="step", first=first_step, quiet=quiet, stream=stream
        )

    def update(self, step: int) -> None:
        """Move the bar to `step`, if there is one."""
        self.progress.update(step - self.progress.done)

    def show(self, step: int, scalars: dict[str, Any]) -> None:
        """Show the known values of one logged step; without a bar also the time, which it shows."""
        self.update(step)
        text = describe(scalars)
        if self.progress.bar is not None:
            self.progress.bar.set_postfix_str(text)
        else:
            total = self.progress.total
            of = f"/{total}" if total is not None else ""
            self.message(f"step {step}{of}  {text}, {self.time(step)}")

    def time(self, step: int) -> str:
        """The time since the run began or was resumed, and at the same pace until its end."""
        elapsed = time.monotonic() - self.begun
        text, done = f"{duration(elapsed)} elapsed", step - self.first_step
        if self.progress.total is not None and done > 0:
            text += f", {duration(elapsed / done * (self.progress.total - step))} left"
        return text

    def message(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        self.progress.message(text)

    def close(self) -> None:
        """Stop the bar where it is; plain lines follow."""
        self.progress.close()


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
