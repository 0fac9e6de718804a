"""What the sections of a configuration have in common: how a field is declared and checked."""

from __future__ import annotations

import ctypes
import os
import re
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from mantrans.config.messages import NO_NAMES, Names, refusal

NUMERIC_TEXT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
SMALLEST_NORMAL = 2.0**-126  # of float32; a GPU may read a smaller number as 0


def _at_home(path: str) -> str:
    """The path with a leading ~ as the user's home folder, as a shell would have it."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise PydanticCustomError("home", "a known user after ~ (a file of that name is ./~...)")
    return expanded


Count = Annotated[int, Field(ge=1, le=10**12)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
FilePath = Annotated[Text, AfterValidator(_at_home)]
Prompt = Annotated[str, Field(min_length=1, pattern=r"^[^\0]*$")]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
ZScore = Annotated[float, Field(gt=0.0, le=1e6)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


def setting(default: Any, meaning: str, form: str = "", **limits: Any) -> Any:
    """A field: its default, its meaning in a line, its limits; `form` describes a pattern."""
    extra: Any = {"patternErrorMessage": form} if form else None  # by the name that editors know
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def kinds(field: FieldInfo) -> set[Any]:
    """The plain types of a field: {float, NoneType} for a number or null."""
    parts = {field.annotation, *get_args(field.annotation)}
    return {getattr(part, "__origin__", part) for part in parts}


def as_float32(number: float) -> float:
    """What float32 makes of `number`, on a processor that reads subnormal numbers as 0."""
    used = ctypes.c_float(number).value
    return used if abs(used) >= SMALLEST_NORMAL else 0.0


class Section(BaseModel):
    """How every section is checked: exact types, no unknown field, finite numbers."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_assignment=True,
        regex_engine="python-re",
        defer_build=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert a text such as 1e-3 if the field is a number."""
        is_number = isinstance(value, str) and len(value) < 64 and NUMERIC_TEXT.fullmatch(value)
        wants_number = is_number and float in kinds(cls.model_fields[str(info.field_name)])
        return float(value) if wants_number else value

    @field_validator("*", mode="wrap")
    @classmethod
    def _fit_float32(cls, value: Any, accept: ValidatorFunctionWrapHandler) -> Any:
        """A number is used in float32: what that makes of it must be accepted too, and no 0."""
        number = accept(value)
        if type(number) is float:
            used = as_float32(number)
            try:
                accept(used)
            except ValidationError:
                used = 0.0
            if number and not used:
                raise PydanticCustomError("float32", "not a number in float32")
        return number

    @field_validator("*")
    @classmethod
    def _refuse_unprintable(cls, value: Any) -> Any:
        """Texts are names and paths, so a line break or NUL in one is a mistake or an attack."""
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("not printable")
        return value

    @classmethod
    def checked(
        cls, values: Any, source: str, names: Names = NO_NAMES, sources: Names = NO_NAMES
    ) -> Self:
        """Check plain data. `source`: the file or argument that an error message starts with.

        names: the user's name of a field, if it differs from ours.
        sources: the source of single fields, by their path such as "model.d_model".

        Raises:
            ConfigError: a field is unknown, or a value is not accepted.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as wrong:
            raise refusal(wrong, cls, source, names, sources) from None
