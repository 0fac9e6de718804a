"""transformers' config.json: a model's shape in their fields, both ways.

Which fields, and what a family of models has in common, is data in `mantrans.models`. A field that
changes what the same weights compute is either expressed in ours or refused; a field that does not
is ignored. We have no dropout: its fields are ignored when reading and written as 0.

Source: the configs of transformers 4.57 and 5.24, whose RoPE fields differ: `rope_theta` and
`rope_scaling` of version 4 are `rope_parameters` in version 5, which reads both. We write those of
version 4.
"""

from __future__ import annotations

import json
from typing import Any

from mantrans.config import ModelConfig
from mantrans.errors import CheckpointError, ConfigError, show
from mantrans.models import FAMILIES, Family

# Fields of any model; the first value is that where the field is missing.
_ACCEPTED: dict[str, tuple] = {
    "is_causal": (True,),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model's own code, which may compute anything
    "transformers_weights": (None,),  # the name of another file
}
_ACCEPTED_WITH_ROPE: dict[str, tuple] = {
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "original_max_position_embeddings": (None,),  # its place is in the field of the scaling
}
_ACCEPTED_WITHOUT_WINDOW: dict[str, tuple] = {
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


class _Field(Exception):
    """(field, expected, got): becomes "FILE: FIELD: expected X, got Y"."""


def read(found: dict[str, Any], where: str) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and its shape as keywords of `ModelConfig`.

    Raises CheckpointError: "WHERE: FIELD: expected X, got Y".
    """
    try:
        family = _family(found)
        values = {**family.fixed, **_plain(found, family)}
        names = dict(family.fields)
        if family.rope:
            rope, rope_names = _rope(found, family)
            values, names = values | rope, names | rope_names
        window = _window(found, family, values["n_blocks"])
        if family.window:
            values["attention_window"], names["attention_window"] = window, "sliding_window"
        return family, ModelConfig.complete(values, where, names).model_dump(include=set(values))
    except _Field as wrong:
        field, expected, got = wrong.args
        raise CheckpointError(f"{where}: {field}: expected {expected}, got {got}") from None
    except ConfigError as wrong:
        raise CheckpointError(str(wrong)) from None


def _family(found: dict[str, Any]) -> Family:
    """The family of their model_type, if no field of it is one that we cannot compute."""
    by_type = {family.model_type: family for family in FAMILIES}
    kind = found.get("model_type")
    family = by_type.get(kind) if isinstance(kind, str) else None
    if family is None:
        got = show(kind) if "model_type" in found else "none"
        raise _Field("model_type", f"one of {', '.join(by_type)}", got)
    accepted = {**_ACCEPTED, **family.accepted}
    accepted |= _ACCEPTED_WITH_ROPE if family.rope else {}
    accepted |= {} if family.window else _ACCEPTED_WITHOUT_WINDOW
    for field, choices in accepted.items():
        if found.get(field, choices[0]) not in choices:
            expected = " or ".join(json.dumps(choice) for choice in choices)
            raise _Field(field, expected, show(found[field]))
    return family


def _plain(found: dict[str, Any], family: Family) -> dict[str, Any]:
    """Our fields that are theirs by another name."""
    values = {}
    for ours, theirs in family.fields.items():
        if theirs not in found and ours not in family.defaults:
            raise _Field(theirs, f"that of a {family.model_type} model", "none")
        values[ours] = found.get(theirs, family.defaults.get(ours))
        if values[ours] is None and ours not in family.defaults:
            raise _Field(theirs, "an integer at least 1", "null")
    return values


def _rope(found: dict[str, Any], family: Family) -> tuple[dict[str, Any], dict[str, str]]:
    """Our fields of RoPE, and theirs by name, with the place where they were found."""
    field, scaling = _rope_mapping(found)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise _Field(f"{field}.rope_type", "default or llama3", show(kind))
    for name, value in {"type": kind, "partial_rotary_factor": 1.0}.items():
        if scaling.get(name, value) not in (value, None):
            raise _Field(f"{field}.{name}", show(value), show(scaling[name]))
    known = {"rope_type", "type", "partial_rotary_factor", *family.rope.values()}
    for name in sorted(scaling.keys() - known):
        raise _Field(field, f"only {', '.join(sorted(known))}", show(name))
    theta = found.get("rope_theta", scaling.get("rope_theta", 10_000.0))
    if "rope_theta" in scaling and scaling["rope_theta"] != theta:
        raise _Field("rope_theta", f"that of {field}", show(theta))
    values = {"rope_theta": theta}
    for ours, theirs in family.rope.items():
        if kind == "llama3" and ours != "rope_theta":
            values[ours] = scaling.get(theirs)
            if values[ours] is None:  # a model without it would be one without scaling
                got = "null" if theirs in scaling else "none"
                raise _Field(f"{field}.{theirs}", "a number", got)
    names = {ours: f"{field}.{theirs}" for ours, theirs in family.rope.items()}
    return values, names | ({"rope_theta": "rope_theta"} if "rope_theta" in found else {})


def _rope_mapping(found: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The field that version 5 has for RoPE, or that of version 4, and what is in it."""
    given = [name for name in ("rope_parameters", "rope_scaling") if found.get(name) is not None]
    if len(given) == 2 and found[given[0]] != found[given[1]]:
        raise _Field("rope_scaling", "null, or the same as rope_parameters", "another")
    field = given[0] if given else "rope_scaling"
    scaling = found[field] if given else {}
    if not isinstance(scaling, dict):
        raise _Field(field, "a mapping, or null", show(scaling))
    return field, scaling


def _window(found: dict[str, Any], family: Family, n_blocks: Any) -> int | None:
    """The keys that each query of every block sees; None: all before it."""
    if type(n_blocks) is not int:
        return None  # and it is refused with the other fields
    kinds = found.get("layer_types")
    used = found.get("use_sliding_window", False) if family.window else False
    if used not in (True, False):
        raise _Field("use_sliding_window", "true or false", show(used))
    window = found.get("sliding_window", 4096) if used else None
    if kinds is None:
        first = found.get("max_window_layers", 28) if window is not None else n_blocks
        if type(first) is not int or 0 < first < n_blocks:
            raise _Field("max_window_layers", "0, or the number of all layers", show(first))
        return window if first < n_blocks else None
    if not isinstance(kinds, list) or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise _Field("layer_types", f"a list of {_FULL} or {_SLIDING}", show(kinds))
    if len(kinds) != n_blocks or len(set(kinds)) != 1:
        got = f"{len(kinds)} of {' and '.join(sorted(set(kinds)))}"
        raise _Field("layer_types", f"a list of {show(n_blocks)}, all the same", got)
    if kinds[0] == _SLIDING and window is None:
        raise _Field("layer_types", f"{_FULL}, since there is no sliding_window", kinds[0])
    return window if kinds[0] == _SLIDING else None


# --------------------------------------------------------------------------------------- writing


def family_of(config: ModelConfig) -> Family:
    """The family that a model of this shape belongs to.

    Raises ConfigError if there is none: it names a field in which it differs from the nearest.
    """
    misfits = [(family, family.misfits(config)) for family in FAMILIES]
    family, wrong = min(misfits, key=lambda found: len(found[1]))
    if not wrong:
        return family
    name, expected = next(iter(wrong.items()))
    raise ConfigError(
        f"{name}: expected {show(expected)}, as {family.architecture} has, which is nearest to "
        f"this model of all that can be written, got {show(config.resolved()[name])}"
    )


def write(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json for a model of the family, without ids of tokens and dtype."""
    own = config.resolved()
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: own[ours] for ours, theirs in family.fields.items()},
        **{field: choices[0] for field, choices in family.accepted.items()},
        **family.written,
        **{theirs: own[ours] for theirs, ours in family.repeated.items()},
    }
    if family.rope:
        inner = {theirs: own[ours] for ours, theirs in family.rope.items()}
        fields["rope_theta"] = inner.pop("rope_theta")
        scaled = config.rope_scaling_factor is not None
        fields["rope_scaling"] = {"rope_type": "llama3", **inner} if scaled else None
    if family.window:
        window, n = config.attention_window, config.n_blocks
        fields["use_sliding_window"], fields["sliding_window"] = window is not None, window
        fields["max_window_layers"] = n if window is None else 0
        fields["layer_types"] = [_FULL if window is None else _SLIDING] * n
    return fields
