"""Makes Triton's interpreter compute what a GPU computes: kernels are proven without one.

With TRITON_INTERPRET=1 Triton runs kernels as numpy, one program after the other. As shipped
(3.6.0 to 3.9.0) it keeps a bfloat16 as a `uint16` and then forgets that: products and sums are
formed of the raw bits, and a float32 is cut off instead of rounded. `patch()` repairs this, in
the methods of the interpreter's builder that every kernel operation passes through:

  * a bfloat16 operand is widened to float32, and the result rounded to nearest even;
  * `tl.sum` of bfloat16 rounds after each addition of a tree, as the hardware does: a kernel that
    forgot to accumulate in float32 shows the error it would have on a GPU;
  * `tl.dot` multiplies bfloat16 exactly and adds in float32. float32 operands are rounded to TF32
    unless the kernel asks for `input_precision="ieee"`: the tensor cores see no more bits;
  * a masked load without `other` returns NaN where the mask is False (the largest number for
    integers), where the interpreter returned 0 and a GPU returns anything;
  * a sum or product of signed integers that overflows is an error: an index wrapped. As shipped
    the interpreter computes this check, by seven operations more, and leaves its result unused.

It is made faster, too: `interpreter_speed`.

What stays unlike a GPU: programs never race, products below 16x16 are accepted, and the order of
the additions inside a product is numpy's.

TRITON_INTERPRET counts when Triton is imported, so `start()` comes before any such import.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import interpreter_speed

COMPILED_ALREADY = (
    "Triton was imported without TRITON_INTERPRET=1 before this process was to interpret, and one "
    "process cannot do both: nothing may import Triton before tests/conftest.py"
)


def start() -> None:
    """Put this process under the interpreter and repair it. RuntimeError if that is too late.

    The processes that it starts decide for themselves: the variable is not left to them.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise RuntimeError(COMPILED_ALREADY)
    knobs.runtime.interpret = True
    os.environ.pop("TRITON_INTERPRET", None)
    patch()


# --------------------------------------------------------------------- bfloat16 as numpy bits


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The bfloat16 bits nearest to x, ties to even; NaN stays NaN, too large becomes infinity."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + to_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def truncate(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The bfloat16 bits of x, rounded towards zero: what a cast with "rtz" asks for."""
    return (np.asarray(x, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def round_to_tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 with the 10 fraction bits that a TF32 product reads, the rest rounded away."""
    half = np.uint32(0x1000)
    rounded = ((x.view(np.uint32) + half) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def tree_sum(bits: NDArray[np.uint16], axis: int) -> NDArray[np.uint16]:
    """Sum of bfloat16 along an axis, halves added to halves and rounded at every level."""
    bits = np.moveaxis(bits, axis, 0)
    while len(bits) > 1:
        half = len(bits) // 2
        pairs = narrow(widen(bits[:half]) + widen(bits[half : 2 * half]))
        bits = np.concatenate([pairs, bits[2 * half :]])  # an odd one waits for the next level
    return bits[0]


# ------------------------------------------------------------------------------------ the patch


def patch() -> None:
    """Replace the interpreter's arithmetic by a faithful one. Harmless when called again."""
    from triton.runtime import interpreter

    if getattr(interpreter, "faithful", False):
        return
    interpreter.faithful = True
    patch_elementwise(interpreter)
    patch_casts(interpreter)
    patch_dot(interpreter)
    patch_reductions(interpreter)
    patch_memory(interpreter)
    patch_scalar_index(interpreter)
    patch_overflow()
    interpreter_speed.patch(interpreter)


def is_bfloat16(handle: Any) -> bool:
    """Whether a handle holds bfloat16 bits.

    The dtype alone does not say so: the interpreter labels the booleans of a comparison with the
    dtype of what was compared.
    """
    import triton.language as tl

    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def operand(handle: Any) -> NDArray[Any]:
    """The numbers in a handle, bfloat16 ones as float32."""
    return widen(handle.data) if is_bfloat16(handle) else handle.data


def patch_elementwise(interpreter: Any) -> None:
    """Operations on one, two or three tensors: widen, compute in float32, round once."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def result(data: NDArray[Any]) -> Any:
        if data.dtype == np.bool_:
            return handle(data, tl.int1)
        return handle(narrow(data), tl.bfloat16)

    def faithful(name: str, compute: Any) -> None:
        """Wrap a method: `compute(*numbers, op)` if any operand is bfloat16, else as it was."""
        original = getattr(builder, name)

        def method(self: Any, *arguments: Any) -> Any:
            handles = [a for a in arguments if isinstance(a, handle)]
            if not any(map(is_bfloat16, handles)):
                return original(self, *arguments)
            rest = arguments[len(handles) :]
            return result(np.asarray(compute(*map(operand, handles), *rest)))

        setattr(builder, name, method)

    faithful("unary_op", lambda x, op: op(x))
    faithful("binary_op", lambda x, y, op: op(x, y))
    faithful("ternary_op", lambda x, y, z, op: op(x, y, z))
    faithful("create_fma", lambda x, y, z: x.astype(np.float64) * y + z)
    faithful("create_rsqrt", lambda x: 1 / np.sqrt(x))
    # `maximum` passes a NaN on, `fmax` drops it: PROPAGATE_NAN says which is wanted
    faithful(
        "create_clampf",
        lambda x, low, high, nan: (
            np.fmin(np.fmax(x, low), high)
            if nan == interpreter._ir.PROPAGATE_NAN.NONE
            else np.clip(x, low, high)
        ),
    )


def patch_casts(interpreter: Any) -> None:
    """Casts from and to bfloat16, and its constants (which 3.6 lacks)."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original_cast, original_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if is_bfloat16(source) else handle(narrow(source.data), tl.bfloat16)
        if is_bfloat16(source):
            source = handle(widen(source.data), tl.float32)
            return source if target.scalar == tl.float32 else original_cast(self, source, target)
        return original_cast(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            towards_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
            return handle((truncate if towards_zero else narrow)(source.data), tl.bfloat16)
        if {source.dtype.scalar, target.scalar} <= {tl.float16, tl.bfloat16, tl.float32}:
            return cast(self, source, target)
        return original_fp_to_fp(self, source, target, rounding)

    def get_bf16(self: Any, value: float) -> Any:
        return handle(narrow(np.array([value])), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp, builder.get_bf16 = cast, fp_to_fp, get_bf16


def patch_dot(interpreter: Any) -> None:
    """Matrix products of bfloat16, and of float32 at the precision that was asked for."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a = handle(operand(a), tl.float32) if is_bfloat16(a) else a
        b = handle(operand(b), tl.float32) if is_bfloat16(b) else b
        # a bfloat16 widened to float32 passes through this unchanged
        if precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (
                handle(round_to_tf32(x.data), tl.float32) if x.data.dtype == np.float32 else x
                for x in (a, b)
            )
        return original(self, a, b, d, precision, *rest)

    builder.create_dot = create_dot


def patch_reductions(interpreter: Any) -> None:
    """`tl.sum`, `tl.max`, `tl.min` of bfloat16."""
    reduce = interpreter.ReduceOps
    original_sum, original_min_max = reduce.sum, reduce.min_max

    def total(self: Any, x: Any) -> Any:
        if not is_bfloat16(x.handle):
            return original_sum(self, x)
        bits, axis = x.handle.data, self.axis
        data = tree_sum(bits.reshape(-1), 0) if axis is None else tree_sum(bits, axis)
        if self.keep_dims:
            data = data.reshape([1] * bits.ndim) if axis is None else np.expand_dims(data, axis)
        return self.to_tensor(data, x.dtype)

    def min_max(self: Any, x: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        tensor = x[0] if isinstance(x, tuple) else x
        if not is_bfloat16(tensor.handle):
            return original_min_max(self, x, val_reduce_op, idx_reduce_op)
        options = {"axis": self.axis, "keepdims": self.keep_dims}
        values = widen(tensor.handle.data)
        best = self.to_tensor(narrow(val_reduce_op(values, **options)), tensor.dtype)
        if idx_reduce_op is None:
            return best
        return best, self.to_tensor(idx_reduce_op(values, **options), interpreter.tl.int32)

    reduce.sum, reduce.min_max = total, min_max


def patch_memory(interpreter: Any) -> None:
    """Masked loads without `other` return what nobody may rely on; bfloat16 atomics are refused."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original_load, original_rmw = builder.create_masked_load, builder.create_atomic_rmw

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if other is None and not mask.data.all():
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            other = handle(np.full(pointers.data.shape, garbage(element, dtype), dtype), element)
        return original_load(self, pointers, mask, other, *rest, **named)

    def atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if is_bfloat16(value):
            raise NotImplementedError("the interpreter has no atomics on bfloat16")
        return original_rmw(self, operation, pointer, value, *rest)

    builder.create_masked_load, builder.create_atomic_rmw = load, atomic_rmw


def garbage(element: Any, dtype: np.dtype[Any]) -> Any:
    """What a masked-off lane holds: NaN, or the largest integer."""
    if dtype == np.bool_:
        return True
    if np.issubdtype(dtype, np.floating):
        return np.nan
    return 0x7FC0 if element.is_bf16() else np.iinfo(dtype).max


def patch_scalar_index(interpreter: Any) -> None:
    """A run-time bound of `range()` under Triton 3.6 with numpy 2.4, which no longer takes `int()`
    of an array of one element."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def patch_overflow() -> None:
    """Signed integers that overflow are an error; unsigned ones wrap, as random numbers do."""
    from triton.language.semantic import TritonSemantic

    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(_: Any, x: Any, y: Any, operation: Any) -> None:
        kind, name = x.type.scalar, operation.__name__
        if kind.is_int_signed() and kind.int_bitwidth < 64:
            result = compute[name](*(side.handle.data.astype(np.int64) for side in (x, y)))
            least, most = kind.get_int_min_value(), kind.get_int_max_value()
            fits = least <= result.min() and result.max() <= most
            assert fits, f"int{kind.int_bitwidth} overflow detected for operation {name}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check
