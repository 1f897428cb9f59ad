"""Which layers of a model share pages, and how large these are. No jax."""

from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from .arguments import as_count, as_counts
from .pool import check_pool_size

__all__ = ["CacheLayout", "PageSpec", "pools_of", "small_of"]

SMALL = ("int8", "float8_e4m3fn")
"""The dtypes of pages that have scales beside them."""


@dataclass(frozen=True, slots=True)
class PageSpec:
    """A group of layers that see the same tokens, in a pool of pages of their own.

    Attributes:
      layers: their numbers in the model; none in a first group that only keeps the books.
      num_kv_heads: Hk.
      head_dim: D.
      num_pages: N, the null page included.
      dtype: of keys and values.
      window: W, the newest tokens that a query sees, itself included; None: all. Pages that have
        left the window go back to the pool.

    Raises:
      TypeError: a size is not an integer.
      ValueError: a size is less than 1, or a layer is named twice.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    num_pages: int
    dtype: Any = "float32"
    window: int | None = None

    def __post_init__(self) -> None:
        checked = dict(
            layers=as_counts("layers", self.layers),
            num_kv_heads=as_count("num_kv_heads", self.num_kv_heads, 1),
            head_dim=as_count("head_dim", self.head_dim, 1),
            num_pages=as_count("num_pages", self.num_pages, 2),
            window=None if self.window is None else as_count("window", self.window, 1),
            dtype=_name_of(self.dtype),
        )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must name each layer once, got {self.layers}")


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The groups of layers of a model. `KVCache.create` and `BlockAllocator` are made from one.

    The first group is full and keeps the books of all tokens: which ones a sequence has, and which
    pages can be found again. One page size serves all groups, so a token lies in the same column
    of every page table. Where all layers have windows the first group has none: its pages are on
    the host alone.

    Attributes:
      page_size: S, in tokens, a power of two.
      groups: the first one without a window; together they have layers 0 .. L-1, each once.

    Raises:
      TypeError: a size is not an integer, or a group no `PageSpec`.
      ValueError: the groups do not make up a model, or a pool is too large.

    Examples:
      >>> full = PageSpec(layers=(5,), num_kv_heads=1, head_dim=256, num_pages=2049)
      >>> window = PageSpec(
      ...     layers=(0, 1, 2, 3, 4), num_kv_heads=1, head_dim=256, num_pages=545, window=512)
      >>> CacheLayout(16, (full, window)).group_of[5]
      0
    """

    page_size: int
    groups: tuple[PageSpec, ...]

    def __post_init__(self) -> None:
        groups = tuple(self.groups)
        for group in groups:
            if not isinstance(group, PageSpec):
                raise TypeError(f"groups must be PageSpecs, got {type(group).__name__}")
        if not groups or groups[0].window is not None:
            raise ValueError("the first group must be one without a window: it has all tokens")
        for group in groups:
            _, size = check_pool_size(group.num_pages, self.page_size)
            object.__setattr__(self, "page_size", size)
        layers = sorted(layer for group in groups for layer in group.layers)
        if layers != list(range(len(layers))) or not layers:
            raise ValueError(f"the groups must have layers 0 to L-1, each once; got {layers}")
        object.__setattr__(self, "groups", groups)

    @classmethod
    def uniform(
        cls,
        *,
        num_layers: SupportsIndex,
        num_pages: SupportsIndex,
        num_kv_heads: SupportsIndex,
        page_size: SupportsIndex,
        head_dim: SupportsIndex,
        dtype: Any = "float32",
    ) -> "CacheLayout":
        """One full group of layers that are all alike."""
        layers = tuple(range(as_count("num_layers", num_layers, 1)))
        spec = PageSpec(layers, num_kv_heads, head_dim, num_pages, dtype)  # type: ignore[arg-type]
        return cls(page_size, (spec,))  # type: ignore[arg-type]

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def pools(self) -> tuple[tuple[int, int | None], ...]:
        """Pages and window of every group."""
        return tuple((group.num_pages, group.window) for group in self.groups)

    @property
    def group_of(self) -> tuple[int, ...]:
        """The group of every layer, by number."""
        found = {layer: i for i, group in enumerate(self.groups) for layer in group.layers}
        return tuple(found[layer] for layer in range(self.num_layers))


def pools_of(
    pages: SupportsIndex | CacheLayout, page_size: SupportsIndex | None
) -> tuple[tuple[tuple[int, int | None], ...], int]:
    """Pages and window of every group, and the page size: of a layout, or of one full group."""
    if isinstance(pages, CacheLayout):
        if page_size is not None:
            raise TypeError("page_size is part of the layout: leave it out")
        return pages.pools, pages.page_size
    if page_size is None:
        raise TypeError("page_size must be given, or a CacheLayout alone")
    num_pages, size = check_pool_size(pages, page_size)
    return ((num_pages, None),), size


def small_of(pages: SupportsIndex | CacheLayout) -> bytes:
    """Which groups of a layout have pages of 8 bits: what these hold is near the keys and values of
    others, and not the same, so digests must differ. Nothing for sizes alone."""
    groups = pages.groups if isinstance(pages, CacheLayout) else ()
    small = [(at, group.dtype) for at, group in enumerate(groups) if group.dtype in SMALL]
    return repr(small).encode() if small else b""


def _name_of(dtype: Any) -> str:
    """Its name, so that layouts compare; NumPy knows no bfloat16 by itself."""
    if isinstance(dtype, str):
        return dtype
    return getattr(dtype, "__name__", None) or np.dtype(dtype).name
