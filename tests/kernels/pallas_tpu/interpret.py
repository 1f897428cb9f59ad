"""The TPU backend, interpreted on the CPU, as backends that the common suite can name.

Everything is the library's own, from the refusal to the launch; only `interpret=` differs. Here the
kernel runs as XLA operations, which is fast enough for the whole suite but models neither DMA nor
races: `test_memory.py` runs a few shapes under the interpreter that does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import jax

from paged_decode.kernels.dispatch import Backend

__all__ = ["BACKENDS", "NAME", "Variant", "module"]

NAME = "pallas-tpu-interpret"


@dataclass(frozen=True)
class Variant:
    """One way to run the kernel.

    Attributes:
      fetch, tile: pages of a block and of a tile; None: all as shipped.
      queries: new tokens of a tile, at most.
      heads: KV heads that are multiplied together.
      unroll: copies started in one go. More of them say nothing new, and take long to compile.
      cores: tensor cores of the chip.
      interpret: what `pallas_call` is given.
    """

    fetch: int | None = None
    tile: int = 1
    queries: int = 2
    heads: int = 1
    unroll: int = 1
    cores: int = 1
    interpret: Any = True


# Small blocks cut even the short rows of the common suite into several, with a rest of pages, and
# small tiles their new tokens.
VARIANTS = {
    NAME: Variant(),
    f"{NAME}-blocks": Variant(fetch=3, unroll=2),
    f"{NAME}-cores": Variant(fetch=2, tile=2, cores=2),
}


def module(name: str, variant: Variant) -> ModuleType:
    """A backend that serves what the library's serves on a TPU, in the way of `variant`."""
    from paged_decode.kernels.pallas_tpu import call as library
    from paged_decode.kernels.pallas_tpu import plan

    chosen = plan.choose_config

    def config(call: Any, cores: int) -> Any:
        config = replace(chosen(call, variant.cores), unroll=variant.unroll)
        if variant.fetch is None:
            return config
        return replace(
            config,
            queries=min(variant.queries, config.queries),
            fetch=variant.fetch,
            tile=variant.tile,
            heads=variant.heads,
        )

    def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with mock.patch.object(plan, "choose_config", config):
                return function(*args, interpret=variant.interpret)

        return call

    def refusal(call: Any) -> str | None:
        if jax.typeof(call.q).manual_axis_type.varying:
            return "the interpreter of Pallas needs shard_map(check_vma=False)"
        return library.refusal(replace(call, platform="tpu"))

    made = ModuleType(name)
    vars(made)["refusal"] = refusal
    for served in ("attend", "append_and_attend"):
        vars(made)[served] = interpreted(getattr(library, served))
    return made


BACKENDS = tuple(
    Backend(name, partial(module, name, variant), ()) for name, variant in VARIANTS.items()
)
