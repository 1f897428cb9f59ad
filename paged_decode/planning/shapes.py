"""What a plan must know of a model: the keys and values of every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

from ..allocator.arguments import as_count

__all__ = ["LayerShape", "ModelShape", "alternating"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The keys and values of one layer.

    Attributes:
      num_kv_heads: Hk.
      head_dim: D, of keys and of values.
      window: W, the newest tokens that a query sees, itself included; None: all.

    Raises:
      TypeError, ValueError: one of them is no integer of at least 1.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if name != "window" or value is not None:
                object.__setattr__(self, name, as_count(name, value, 1))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The layers of a model, and what else a plan asks of it.

    Attributes:
      name: what messages and tables call it.
      layers: one for each layer, in their order.
      num_heads: Hq; None: not known.
      context: the most tokens that it was made for; None: not known.
      weights_bytes: of its file; None: not known.
      num_experts: of a mixture; 0: every step reads all weights.

    Raises:
      ValueError: there is no layer.

    Examples:
      >>> model = ModelShape.of_sizes(6, num_kv_heads=1, head_dim=256, window=512, full_every=6)
      >>> {shape.window: layers for shape, layers in model.groups.items()}
      {None: (5,), 512: (0, 1, 2, 3, 4)}
    """

    name: str
    layers: tuple[LayerShape, ...]
    num_heads: int | None = None
    context: int | None = None
    weights_bytes: int | None = None
    num_experts: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError(f"{self.name}: a model has at least one layer, got none")
        for heads in {layer.num_kv_heads for layer in self.layers}:
            if self.num_heads is not None and self.num_heads % heads:
                raise ValueError(
                    f"{self.name}: query heads must be a multiple of KV heads, got "
                    f"{self.num_heads} and {heads}"
                )

    @classmethod
    def of_sizes(
        cls,
        num_layers: SupportsIndex,
        *,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        full_every: SupportsIndex | None = None,
        num_heads: int | None = None,
        name: str = "model",
    ) -> ModelShape:
        """Layers that are alike but for the window, which the last of `full_every` does not have.

        Without `full_every` all have it. Gemma 3 is 6, gpt-oss 2.
        """
        windows = alternating(as_count("num_layers", num_layers, 1), window, full_every)
        shapes = (LayerShape(num_kv_heads, head_dim, each) for each in windows)
        return cls(name, tuple(shapes), num_heads)

    @property
    def groups(self) -> dict[LayerShape, tuple[int, ...]]:
        """The numbers of layers that are alike; those that see all tokens come first."""
        found: dict[LayerShape, list[int]] = {}
        for number, shape in enumerate(self.layers):
            found.setdefault(shape, []).append(number)
        ordered = sorted(found.items(), key=lambda item: item[0].window is not None)
        return {shape: tuple(numbers) for shape, numbers in ordered}


def alternating(
    num_layers: int, window: int | None, full_every: SupportsIndex | None
) -> Iterable[int | None]:
    """The window of each layer, of which the last of every `full_every` sees all tokens."""
    if full_every is None:
        return (window,) * num_layers
    if window is None:
        raise ValueError("full_every says which layers have no window: give the window, too")
    every = as_count("full_every", full_every, 1)
    return (window if (layer + 1) % every else None for layer in range(num_layers))
