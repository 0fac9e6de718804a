"""Makes Triton's interpreter faster, with the same results and errors.

As shipped it searches modules before each call of a function in a kernel, and describes each
tensor's shape anew.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def patch(interpreter: Any) -> None:
    patch_search(interpreter)
    patch_dtypes(interpreter)
    patch_shapes()


def patch_search(interpreter: Any) -> None:
    """Look for what to replace in Triton's language once a launch, among known names. As shipped
    the interpreter does so before each call of a function in a kernel, among all names."""
    import triton.language as tl

    built_in = {
        package: [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[tuple[bool, ...]] = set()  # in this launch: of which of the two modules

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in built_in[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not replaced by an earlier call
                interpreter._patch_attr(package, name, member, builder, scope)

    @functools.cache
    def modules_of(function: Any) -> tuple[bool, ...]:
        values = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        return tl in values, tl.core in values

    def patch_lang_once(function: Any) -> Any:
        if modules_of(function) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(modules_of(function))
        return patch_lang(function)

    def fresh_launch(self: Any, *arguments: Any, **named: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang_once
    interpreter.GridExecutor.__call__ = fresh_launch


def patch_dtypes(interpreter: Any) -> None:
    """numpy's dtype of a type, found once. As shipped it is looked for in a new table each time."""
    original, known = interpreter._get_np_dtype, dict[str, np.dtype[Any]]()

    def np_dtype(kind: Any) -> np.dtype[Any]:
        kind = kind.scalar
        if kind.name not in known:
            known[kind.name] = original(kind)
        return known[kind.name]

    interpreter._get_np_dtype = np_dtype


def patch_shapes() -> None:
    """What follows from a shape alone is made once, not for each type and tensor of it."""
    import triton.language as tl

    def once(kind: Any, given: Any) -> None:
        """Replace a constructor; `given(*arguments)`: the shape, and what else is the object's."""
        original, known = kind.__init__, dict[tuple[Any, ...], dict[str, Any]]()

        def initialize(self: Any, *arguments: Any) -> None:
            shape, own = given(*arguments)
            if shape not in known:
                original(self, *arguments)
                known[shape] = {name: x for name, x in vars(self).items() if name not in own}
            vars(self).update(known[shape], **own)

        kind.__init__ = initialize

    def of_tensor(handle: Any, type: Any) -> Any:
        shape = tuple(type.shape) if type.is_block() else ()
        return shape, {"handle": handle, "type": type, "dtype": type.scalar}

    once(tl.tensor, of_tensor)
    once(
        tl.block_type,
        lambda element_ty, shape: ((*shape, element_ty.name), {"element_ty": element_ty}),
    )
