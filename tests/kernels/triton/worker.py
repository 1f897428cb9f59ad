"""A process that runs kernels under Triton's interpreter, one launch at a time.

Triton decides when a function is decorated whether it will be compiled or interpreted, and its own
library is decorated on import. So the choice belongs to a process: this one, which `start` alone
turns into an interpreter. The tests' own process can still compile, or launch on a real GPU.
"""

import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

__all__ = ["run", "start"]


def start() -> None:
    """Make this process an interpreter; before anything in it imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")  # NumPy's, about the infinities that the kernels work with
    np.seterr(all="ignore")
    import triton.runtime.interpreter as interpreter

    _repair_small_floats(interpreter)
    _repair_scalars(interpreter)
    _patch_once(interpreter)


def run(
    module: str,
    kernel: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    grid: int,
    constants: dict[str, Any],
    order: int,
    rewritten: Sequence[str] = (),
    aliases: Sequence[int] = (),
) -> list[np.ndarray]:
    """The outputs of one launch, whose programs run one after the other in a seeded order.

    Outputs hold NaN before the launch. Inputs that are not in `aliases` must hold after it what
    they held before, which for counters means zeros; the others come back after the outputs, and
    the pointers named in `rewritten` are theirs. Reads and writes outside all the arrays raise.
    """
    # Memory from JAX may be read-only, and an array that is not contiguous would be misread.
    given = [np.array(array, order="C") for array in inputs]
    made = [np.full(shape, np.nan, np.dtype(dtype)) for shape, dtype in outputs]
    function = getattr(importlib.import_module(module), kernel)
    places = np.random.default_rng(order).permutation(grid)
    again = [given[i] for i in aliases] or [np.zeros(1, np.int8) for _ in rewritten]
    named = {name: _Pointer(array) for name, array in zip(rewritten, again, strict=True)}
    with _fenced([*given, *made]), _shuffled(places):
        function[(grid,)](*map(_Pointer, (*given, *made)), **named, **constants)
    for index, (before, after) in enumerate(zip(inputs, given, strict=True)):
        if index not in aliases and np.asarray(before).tobytes() != after.tobytes():
            raise AssertionError(f"input {index} of {kernel} was changed by the launch")
    return made + [given[i] for i in aliases]


class _Pointer:
    """What the interpreter asks of a torch tensor, on the memory of a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype, self.shape = array, str(array.dtype), array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def untyped_storage(self) -> "_Pointer":
        return self

    cpu = copy_ = set_ = lambda self, *_: self

    def new_empty(self, *_: Any, **__: Any) -> "_Pointer":
        return _Pointer(self.array)

    def storage_offset(self) -> int:
        return 0


@contextmanager
def _fenced(arrays: Sequence[np.ndarray]) -> Iterator[None]:
    """Let loads, stores and atomics through only where every address lies in one of `arrays`."""
    import triton.runtime.interpreter as interpreter

    spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    begins, ends = np.array(spans, np.uint64).T

    def check(pointers: Any, mask: np.ndarray) -> None:
        at = np.broadcast_to(pointers.data, mask.shape)[mask.astype(bool)]  # it may hold ints
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        span = np.maximum(np.searchsorted(begins, at, side="right") - 1, 0)
        wrong = (at < begins[span]) | (at + np.uint64(size) > ends[span])
        if wrong.any():
            raise IndexError(f"{wrong.sum()} of {at.size} addresses lie outside all the arrays")

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask.data)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask.data)
        return atomic(self, op, pointers, value, mask, *rest)

    with mock.patch.multiple(
        builder,
        create_masked_load=checked_load,
        create_masked_store=checked_store,
        create_atomic_rmw=checked_atomic,
    ):
        yield


@contextmanager
def _shuffled(places: np.ndarray) -> Iterator[None]:
    """Give the programs of a grid of one axis the ids in `places`, in that order."""
    import triton.runtime.interpreter as interpreter

    original = interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        original(self, int(places[x]), y, z)

    with mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx):
        yield


def _repair_small_floats(interpreter: Any) -> None:
    """Take bfloat16 and float8 as numbers, not as bits, and round to the nearest, not down."""
    import triton.language as tl
    from ml_dtypes import bfloat16, float8_e4m3fn

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot
    small = {tl.bfloat16: (bfloat16, np.uint16), tl.float8e4nv: (float8_e4m3fn, np.uint8)}

    def wide(source: Any) -> Any:
        if source.dtype.scalar not in small:
            return source
        kind, _ = small[source.dtype.scalar]
        return handle(source.data.view(kind).astype(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        source = wide(source)
        if to.scalar in small:
            kind, bits = small[to.scalar]
            return handle(source.data.astype(np.float32).astype(kind).view(bits), to.scalar)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = lambda self, source, to, rounding: cast_impl(self, source, to)


def _repair_scalars(interpreter: Any) -> None:
    """Take the number out of an array of one: NumPy 2.4 no longer does so by itself."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        scope.set_attr(
            tensor,
            "__bool__",
            lambda self: bool(self.handle.data.item()) if self.handle.data.size == 1 else True,
        )

    interpreter._patch_lang_tensor = patch_lang_tensor


def _patch_once(interpreter: Any) -> None:
    """Patch the language once a launch: every call of a function within it did so again."""
    import triton.language as tl

    patch = interpreter._patch_lang

    def patch_lang(function: Any) -> Any:
        langs = [each for each in (tl, tl.core) if each in function.__globals__.values()]
        if any(tl.core.is_builtin(lang.load) for lang in langs):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang
