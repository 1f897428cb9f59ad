"""The type of the arrays of a batch.

A type checker reads `arrays.pyi` in place of this file and takes them for JAX arrays, which they
are in a compiled step. An allocator makes them of NumPy, without importing jax; and a
transformation of the pytree may put anything there, such as shardings.
"""

from typing import Any, TypeAlias

__all__ = ["BatchArray"]

BatchArray: TypeAlias = Any
