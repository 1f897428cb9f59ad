from typing import TypeAlias

from jax import Array

__all__ = ["BatchArray"]

BatchArray: TypeAlias = Array
