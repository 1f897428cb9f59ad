"""The Hopper kernel under Pallas's GPU interpreter, as a backend that tests can name.

Refusals, plan and kernel are the library's own; the interpreter has no atomics, so the parts of a
row are merged by a launch of their own, and blocks run one after the other.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax

from paged_decode.kernels.cards import Card
from paged_decode.kernels.dispatch import Backend

__all__ = ["BACKENDS", "NAME", "PROBLEM", "Variant"]

NAME = "pallas-gpu-interpret"
PROBLEM = (
    None
    if jax.__version_info__ >= (0, 11)
    else f"the GPU interpreter comes with jax 0.11; this is jax {jax.__version__}"
)


@dataclass(frozen=True)
class Variant:
    """One way to interpret: how many blocks, and whether to look for races of warpgroups."""

    processors: int
    races: bool = False


VARIANTS = {
    NAME: Variant(2),
    f"{NAME}-many": Variant(11),  # more blocks than most cases have tiles
    f"{NAME}-races": Variant(1, races=True),
}


def _module(name: str, variant: Variant) -> ModuleType:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from paged_decode.kernels.pallas_gpu import call as library
    from paged_decode.kernels.pallas_gpu.plan import Plan

    def attend(call: Any) -> Any:
        plan = Plan.of(call, Card(processors=variant.processors), interpreted=True)
        return library.run(call, plan, plgpu.InterpretGPUParams(detect_races=variant.races))

    module = ModuleType(name)
    refusal = library.refusal
    vars(module).update(refusal=lambda call: refusal(replace(call, platform="gpu")), attend=attend)
    return module


BACKENDS = tuple(
    Backend(name, lambda name=name, variant=variant: _module(name, variant), ())
    for name, variant in VARIANTS.items()
)
