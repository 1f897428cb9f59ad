"""The Triton backend under Triton's interpreter, as backends that the common suite can name.

Everything is the library's own, from the refusal to the plan of the launch; only the last step,
the custom call, becomes a call back into Python, which asks another process to interpret it.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import numpy as np

from paged_decode.kernels.dispatch import Backend

from . import worker

__all__ = ["BACKENDS", "INSTALLED", "NAME", "as_on_a_gpu"]

INSTALLED = importlib.util.find_spec("triton") is not None
NAME = "triton-interpret"


@dataclass(frozen=True)
class Variant:
    """One way to run the kernel.

    Attributes:
      tokens: of a tile of every config, with work for many programs; None: as shipped.
      generation: the card that the config is chosen for, 10 * major + minor.
      order: seed of the order in which the programs run.
      processors: multiprocessors of the card.
    """

    tokens: int | None = None
    generation: int = 90
    order: int = 0
    processors: int = 132


# The small tiles cut even the short rows of the common suite into several programs; the aims that
# come with them are as uneven as they can be, so that both the even and the ragged plan are used.
# The common suite has a small card: on a large one most programs have no work, and take as long.
VARIANTS = {
    NAME: Variant(processors=16),
    f"{NAME}-other-order": Variant(order=1, processors=16),
    f"{NAME}-other-card": Variant(generation=89),
    f"{NAME}-split": Variant(tokens=16),
    f"{NAME}-split-other-order": Variant(tokens=16, order=1),
}


def _config(call: Any, card: Any, variant: Variant, chosen: Callable[..., Any]) -> Any:
    config = chosen(call, replace(card, generation=variant.generation))
    if variant.tokens is None:
        return config
    from paged_decode.kernels.triton.config import DecodeConfig

    lanes = call.rows * call.kv_heads
    if call.batch_invariant:
        from paged_decode.kernels.triton import config as configs

        with mock.patch.object(configs, "SPLIT_TOKENS", 2 * variant.tokens):
            return configs.of_row_alone(call, replace(config, tokens=variant.tokens))
    if isinstance(config, DecodeConfig):
        return replace(config, tokens=variant.tokens, even=3 * lanes, ragged=7 * lanes)
    queries = min(config.queries, 32)
    return replace(config, queries=queries, tokens=variant.tokens, aim=5 * lanes)


def _module(name: str, variant: Variant) -> ModuleType:
    from paged_decode.kernels import cards
    from paged_decode.kernels.triton import call as library
    from paged_decode.kernels.triton import launch as launching
    from paged_decode.kernels.triton import plan

    chosen = plan.choose_config

    def refusal(call: Any) -> str | None:
        with mock.patch.object(launching, "problem", lambda: None):
            return library.refusal(replace(call, platform="gpu"))

    def launch(kernel: Any, inputs: Sequence[Any], outputs: Sequence[Any], **options: Any):
        return _launch(kernel, inputs, outputs, variant.order, **options)

    def config(call: Any, card: Any) -> Any:
        return _config(call, card, variant, chosen)

    def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with (
                mock.patch.object(launching, "launch", launch),
                mock.patch.object(plan, "choose_config", config),
                mock.patch.object(cards, "processors", lambda: variant.processors),
            ):
                return function(*args)

        return call

    module = ModuleType(name)
    vars(module)["refusal"] = refusal
    for served in {"attend", *library.__all__} - {"refusal"}:
        vars(module)[served] = interpreted(getattr(library, served))
    return module


def _launch(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    order: int,
    *,
    grid: int,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    name: str,
    rewritten: Sequence[str] = (),
    aliases: Sequence[int] = (),
) -> list[jax.Array]:
    """What `launch.launch` promises, interpreted; `warps` and `stages` mean nothing here."""
    made = [(out.shape, out.dtype.name) for out in outputs]
    again = [jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in aliases]

    def interpret(*arrays: Any) -> list[np.ndarray]:
        given = [np.asarray(array) for array in arrays]
        what = (kernel.__module__, kernel.__name__, given, made, grid, constants, order)
        return _worker().submit(worker.run, *what, rewritten, aliases).result()

    results = [*outputs, *again]
    return jax.pure_callback(interpret, results, *inputs, vmap_method="sequential")


def as_on_a_gpu(patch: Any) -> None:
    """Calls of kernels that are no backend reach them as on a GPU, and these are interpreted."""
    from paged_decode.kernels import dispatch
    from paged_decode.kernels.triton import launch

    patch.setattr(dispatch, "default_platform", lambda: "gpu")
    patch.setattr(launch, "launch", partial(_launch, order=1))
    patch.setattr(launch, "problem", lambda: None)


@cache
def _worker() -> ProcessPoolExecutor:
    # A fresh process, not a fork: this one may have imported triton as a compiler.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), worker.start)


BACKENDS = tuple(
    Backend(name, lambda name=name, variant=variant: _module(name, variant), ())
    for name, variant in VARIANTS.items()
)
