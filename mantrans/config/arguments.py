"""Checks the arguments of public functions as if they were fields of a configuration.

@checked(temperature=field(EvaluationConfig, "temperature"), use_cache=bool)
def generate(self, input_ids, temperature=1.0, use_cache=True): ...

A value that is not accepted is a ConfigError (a ValueError): "temperature: expected X, got Y".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
)

from mantrans.config import MOST_TIMES, EvaluationConfig, ModelConfig, TrainingConfig
from mantrans.config.section import Section

F = TypeVar("F", bound=Callable[..., Any])

Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]  # what PyTorch's generators accept


def _path(value: Any) -> Path:
    if not isinstance(value, str | PathLike):
        raise ValueError("not a path")
    return Path(value)


FilePath = Annotated[
    Any, PlainValidator(_path), WithJsonSchema({"patternErrorMessage": "a file's path"})
]


class Arguments(Section):
    """Base of the checks of one function. A scalar of NumPy or PyTorch counts as its number."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_number(cls, value: Any, info: ValidationInfo) -> Any:
        return value.item() if getattr(value, "shape", None) == () else value


def field(section: type[Section], name: str) -> Any:
    """The type and the limits of a field, for `checked`."""
    info = section.model_fields[name]
    parts = (info.annotation, Field(), *info.metadata)
    return Annotated[parts]


def fields(section: type[Section], *names: str) -> dict[str, Any]:
    """{name: its type and limits}, for `checked`."""
    return {name: field(section, name) for name in names}


def checked(**rules: Any) -> Callable[[F], F]:
    """Decorate a function whose arguments must obey `rules`: {argument: type and limits}.

    Defaults are not checked, and arguments without a rule are passed on as they are.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        defaults: dict[str, Any] = {name: (rule, None) for name, rule in rules.items()}
        model = create_model(function.__qualname__, __base__=Arguments, **defaults)
        assert rules.keys() <= signature.parameters.keys()
        names = {name: name for name in rules}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            found = {name: given.arguments[name] for name in rules if name in given.arguments}
            good = model.checked(found, "", sources=names)
            given.arguments.update((name, getattr(good, name)) for name in found)
            return function(*given.args, **given.kwargs)

        return call  # type: ignore[return-value]

    return decorate


Steps = Annotated[int, Field(ge=0)]
Rate = field(TrainingConfig, "min_learning_rate")
GradNorm = field(TrainingConfig, "max_grad_norm") | Literal["configured"]
SHAPE = fields(ModelConfig, *(name for name in ModelConfig.model_fields if name != "dtype"))
BUILD = {
    **fields(TrainingConfig, "backend", "optimizer", "recompute", "stochastic_rounding"),
    "seed": Seed,
    "inference": bool,
}
OPTIMIZER = fields(TrainingConfig, "weight_decay", "max_grad_norm")
ADAMW = OPTIMIZER | fields(TrainingConfig, "beta1", "beta2", "epsilon")
MUON = ADAMW | {
    "momentum": field(TrainingConfig, "muon_momentum"),
    "scale": field(TrainingConfig, "muon_scale"),
    "rate_ratio": Annotated[float, Field(gt=0.0, le=MOST_TIMES)],
}
DRAWING = fields(EvaluationConfig, "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SAMPLING = DRAWING | {
    "max_length": field(EvaluationConfig, "max_generation_length"),
    "eos_token_id": Annotated[int, Field(ge=0, lt=2**24)] | None,
    "seed": Seed,
    "use_cache": bool,
}
STOP: Any = Annotated[
    field(EvaluationConfig, "stop"),
    BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value),
]
