"""Annotations that are checked while the tests run: jaxtyping where one has a shape, else without.

It books the arguments of every call for the names of their axes, which takes longer than most
calls of an allocator do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.typing import SupportsIndex

with_shapes = jaxtyping.jaxtyped
check = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))  # a TypeError
FASTER = dict(SupportsIndex=SupportsIndex)  # that of `typing`, but it remembers classes


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """`jaxtyping.jaxtyped`, for functions and dataclasses."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    try:
        hints = get_type_hints(fn, localns=FASTER, include_extras=True)
    except NameError:  # of a class that is not there yet, or is there for type checkers alone
        return with_shapes(fn, typechecker=typechecker)
    if any(map(has_shape, hints.values())) or inspect.isgeneratorfunction(fn):
        return with_shapes(fn, typechecker=typechecker)
    twin = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__, twin.__annotations__ = fn.__kwdefaults__, hints
    twin.__module__, twin.__qualname__ = fn.__module__, fn.__qualname__
    checking = typechecker(twin)

    @wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        off = jaxtyping.config.jaxtyping_disable
        return fn(*args, **kwargs) if off else checking(*args, **kwargs)

    return checked


def has_shape(hint: Any) -> bool:
    """Whether it is one of arrays, or holds one."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, get_args(hint)))
