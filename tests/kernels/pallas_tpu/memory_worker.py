"""A process that runs kernels under the interpreter that models DMA, semaphores and races.

    python -m tests.kernels.pallas_tpu.memory_worker '{"mode": "eager", "names": [...]}'

It is a process of its own because a semaphore that nobody signals makes that interpreter wait for
ever: whoever started this process can kill it. Its last line is a JSON object, one answer a name.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "16")  # the interpreter's callbacks wait for each other in a pool

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paged_decode.kernels import append_and_attend as append_and_attend_op
from paged_decode.kernels import dispatch
from paged_decode.kernels.dispatch import Backend
from paged_decode.kernels.pallas_tpu import decode_tail
from paged_decode.kernels.pallas_tpu import pages as library_pages
from paged_decode.kernels.pallas_tpu.write import write_tokens

from ..oracle import Case, Inputs, build, expected, same_bits
from ..test_append_and_attend import run as append_and_attend
from ..test_append_and_attend import take_newest
from .interpret import Variant, module

RAGGED = Case((9, 0, 33, 16), 2, 2, 64, 8, 5, starts=(0, 0, 3, 0))
TAIL = Case((9, 0, 33, 2), 2, 2, 64, 8, 5, tokens=3, starts=(0, 0, 3, 0))
INT8 = Case((130, 0, 256, 300), 2, 2, 64, 128, 3, starts=(0, 0, 140, 0), pages="int8")
FLOAT8 = Case((130, 0, 200), 1, 2, 128, 128, 2, tokens=3, sinks=(2, 1), pages="float8_e4m3fn")
WINDOW = Case((40, 0, 7, 25), 1, 3, 128, 8, 5, sinks=(3, 1), options=dict(sliding_window=9))


def attend(interpret: Any, case: Case, cores: int = 1, inputs: Inputs | None = None) -> float:
    """The largest error over all outputs; poison in every slot that nobody may read."""
    inputs = build(case, fill=np.nan) if inputs is None else inputs
    with _named(interpret, cores):
        out, _ = inputs.call("tpu")
    return float(np.abs(out - expected(inputs)[0]).max())


def write_eight_bits(interpret: Any) -> float:
    """Tokens of one tile of scales in several of numbers, and of several of both."""
    slots = np.array([131, 132, 170, 250, 128, 300, 383, 0, 500], np.int32)
    rng = np.random.default_rng(0)
    pools = [rng.integers(-127, 128, (2, 2, 4, 2, 128, 128)).astype(np.int8)]
    pools = [*pools[0], *rng.random((2, 2, 4, 2, 128)).astype(np.float32)]
    new = [*rng.integers(-127, 128, (2, len(slots), 2, 128)).astype(np.int8)]
    new += [*rng.random((2, len(slots), 2)).astype(np.float32)]
    args = jax.tree.map(jnp.asarray, (tuple(pools), tuple(new), slots, np.int32(1)))
    got = write_tokens(*args, interpret=interpret)
    worst = 0.0
    for pool, each, mine in zip(pools, new, got, strict=True):
        pool[1, slots // 128, :, slots % 128] = each
        worst = max(worst, float(np.abs(np.asarray(mine, np.float64) - pool).max()))
    return worst


def append_eight_bits(interpret: Any) -> float:
    """The newest tokens, by the kernel and by XLA, to the last bit; and what is attended to."""
    inputs = build(replace(INT8, starts=None))
    k, v = np.random.default_rng(5).standard_normal((2, len(inputs.q), 2, 64)).astype(np.float32)
    both = dict(k_pages=inputs.k_pages, v_pages=inputs.v_pages, **inputs.scales)
    given = dict(q=inputs.q, k=k, v=v, page_table=inputs.page_table, seq_lens=inputs.seq_lens)
    with _named(interpret, 1):
        out, *got = append_and_attend_op(implementation="tpu", **given, **_copied(both))
        want, *pools = append_and_attend_op(implementation="xla", **given, **_copied(both))
    same_bits(got, pools)
    return float(np.abs(np.asarray(out) - want).max())


def _copied(pools: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.array(pool) for name, pool in pools.items()}


def append(interpret: Any) -> float:
    whole = build(RAGGED, fill=np.nan)
    k, v, hollow = take_newest(whole)
    with _named(interpret, 1):
        out, _, k_pages, v_pages = append_and_attend("tpu", k, v, hollow)
    np.testing.assert_array_equal(k_pages, whole.k_pages)
    np.testing.assert_array_equal(v_pages, whole.v_pages)
    return float(np.abs(out - expected(whole)[0]).max())


def write(interpret: Any) -> float:
    slots = np.array([9, 10, 11, 16, 17, 40, 33, 25, 0, 60, 70, 90], np.int32)
    rng = np.random.default_rng(0)
    k_pages, v_pages = rng.standard_normal((2, 2, 12, 2, 8, 128)).astype(np.float32)
    k, v = rng.standard_normal((2, len(slots), 2, 128)).astype(np.float32)
    args = jax.tree.map(jnp.asarray, ((k_pages, v_pages), (k, v), slots, np.int32(1)))
    got = write_tokens(*args, interpret=interpret)
    worst = 0.0
    for pages, new, mine in zip((k_pages, v_pages), (k, v), got, strict=True):
        pages[1, slots // 8, :, slots % 8] = new
        worst = max(worst, float(np.abs(np.asarray(mine) - pages).max()))
    return worst


def without_waits(interpret: Any) -> float:
    with mock.patch.object(decode_tail, "wait", lambda *_: None):
        return attend(interpret, RAGGED)


def without_bounds(interpret: Any) -> float:
    inputs = build(RAGGED)
    inputs.page_table[2, 1] = len(inputs.k_pages)
    with mock.patch.object(library_pages, "_known", lambda page, plan: page):
        # Traced values cannot be checked before.
        with _named(interpret, 1):
            call = jax.jit(lambda table: replace_table(inputs, table).call_traced("tpu"))
            jax.block_until_ready(call(inputs.page_table))
    return 0.0


def replace_table(inputs: Inputs, table: Any) -> Any:
    class Traced:
        def call_traced(self, backend: str) -> Any:
            from paged_decode.kernels import paged_attention

            return paged_attention(
                inputs.q, inputs.k_pages, inputs.v_pages, table, inputs.seq_lens,
                implementation=backend, **inputs.options,
            )  # fmt: skip

    return Traced()


RUNS: dict[str, Callable[[Any], float]] = {
    "ragged": lambda interpret: attend(interpret, RAGGED),
    "window": lambda interpret: attend(interpret, WINDOW),
    "tail": lambda interpret: attend(interpret, TAIL),
    "append": append,
    "write": write,
    "int8": lambda interpret: attend(interpret, INT8),
    "float8, tail": lambda interpret: attend(interpret, FLOAT8),
    "append int8": append_eight_bits,
    "write int8": write_eight_bits,
    "without waits": without_waits,
    "without bounds": without_bounds,
}


def _named(interpret: Any, cores: int) -> Any:
    variant = Variant(fetch=2, tile=1, unroll=2, cores=cores, interpret=interpret)
    backends = (*dispatch.BACKENDS, Backend("tpu", lambda: module("tpu", variant), ()))
    names = ("attend", "append_and_attend")
    wider = {name: partial(getattr(dispatch, name), backends=backends) for name in names}
    jax.clear_caches()  # a mutated kernel must not meet the trace of the sound one
    return mock.patch.multiple(dispatch, **wider)


def _races() -> bool:
    name = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
    found = getattr(importlib.import_module(name), "races", None)
    return bool(getattr(found, "races_found", False))


def main() -> None:
    request = json.loads(sys.argv[1])
    interpret = pltpu.InterpretParams(
        detect_races=True, vector_clock_size=64, dma_execution_mode=request["mode"]
    )
    answers = {}
    for name in request["names"]:
        try:
            answers[name] = dict(error=RUNS[name](interpret), races=_races())
        except Exception as error:
            answers[name] = dict(raised=f"{type(error).__name__}: {error}", races=_races())
            pltpu.reset_tpu_interpret_mode_state()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
