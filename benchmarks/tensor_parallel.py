"""What a second GPU brings to a decode step: heads and weights split over two, against one.

    python benchmarks/tensor_parallel.py [--name tensor_parallel] [--models 8B 70B] [--small]

Random bfloat16 weights of Llama-3.1-8B's shapes, and some layers of those of 70B; rows of 2,048
tokens; the engine's own decode program, greedy. Systems: one GPU, two with `jax.lax.psum`, and two
with `DeviceSum`. Of each: seconds of a step (wall time of a launch of 16, over 16), of it what the
host needs to launch, and from a trace of the first card how long it was busy, with the time of
attention in a layer, of a `DeviceSum`, and of XLA's own collectives.

- `sum` is a chain of 1,280 sums with the residual and the norm behind them, on the devices alone.
- `check` compares with one device: the logits of a step, attention's output bit by bit, and the
  collectives that the compiled program has inside attention.
- `long` runs 1,000 steps of one row, in launches of 16 and of one.

`--small` is a small model on two CPU devices, which times nothing of interest.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from _llama_shapes import LARGE, SMALL
from _result import spread, write_result
from jax.sharding import NamedSharding, PartitionSpec
from models import parallel
from models.config import ModelConfig
from models.decoder import make_model

from paged_decode import DecodeBatch, DeviceSum, KVCache, Placement, SamplingParams
from paged_decode.engine.params import Kind
from paged_decode.engine.programs import Programs
from paged_decode.engine.rows import RowSizes, RowState
from paged_decode.engine.sampling import SamplingRows

PAGE, STEPS, ROUNDS, TRACED = 16, 16, 7, 2
SYSTEMS = {"one": 1, "two, psum": 2, "two, DeviceSum": 2}
MODELS = {
    "8B": LARGE,
    "70B": replace(LARGE, num_layers=16, width=8192, inner_width=28672, num_heads=64),
}
KINDS = (
    ("attention", re.compile("decode_kernel|paged")),
    ("sum", re.compile("device_sum")),
    ("collective", re.compile("nccl|all.?reduce|psum", re.IGNORECASE)),
)
COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-\w+)(-start)?\(")


@dataclass
class System:
    """A model on some devices, its weights, and the decode program."""

    config: ModelConfig
    devices: int
    mesh: Any
    params: Any
    model: Any
    programs: Programs
    dtype: Any
    sums: DeviceSum | None

    @classmethod
    def of(cls, config: ModelConfig, devices: int, params: Any, label: str, dtype: Any) -> System:
        mesh = parallel.make_mesh(devices)
        told = None
        if label.endswith("DeviceSum"):
            told = DeviceSum(mesh, parallel.AXIS, width=config.width, dtype=dtype)
            if told.refusal and jax.default_backend() == "gpu":
                raise RuntimeError(told.refusal)
        model = make_model(config, mesh=mesh, sums=told)
        return cls(config, devices, mesh, params, model, Programs.of(model), dtype, told)

    def sizes(self, rows: int, tokens: int) -> dict[str, Any]:
        """What the pool for so many rows of `tokens` tokens needs."""
        c = self.config
        return dict(
            num_layers=c.num_layers,
            num_pages=1 + rows * -(-tokens // PAGE),
            num_kv_heads=c.num_kv_heads,
            page_size=PAGE,
            head_dim=c.head_dim,
            dtype=self.dtype,
            mesh=self.mesh,
            head_axis=parallel.AXIS,
        )

    def cache(self, rows: int, tokens: int) -> tuple[KVCache, np.ndarray]:
        """A pool of random keys and values, the same on any mesh, and a shuffled table `[B, P]`."""
        sizes = self.sizes(rows, tokens)
        leaves, tree = jax.tree.flatten(KVCache.create(**sizes))
        keys = jax.random.split(jax.random.key(7), len(leaves))
        filled = [
            _normal(leaf.shape, leaf.dtype, leaf.sharding)(key)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        ids = np.random.default_rng(0).permutation(np.arange(1, sizes["num_pages"]))
        return jax.tree.unflatten(tree, filled), ids.astype(np.int32).reshape(rows, -1)

    def inputs(self, table: np.ndarray, context: int, steps: int) -> list[Any]:
        """On the devices: the state of rows of `context` tokens, their table, the message."""
        rows = len(table)
        state = RowState.empty(rows, RowSizes(0, 0, 0, 0))
        sampling = SamplingRows.create([SamplingParams(max_new_tokens=64)] * rows, [0] * rows, rows)
        state = replace(
            state,
            newest=np.arange(1, rows + 1, dtype=np.int32),
            length=np.full(rows, context, np.int32),
            alive=np.ones(rows, bool),
            sampling=sampling,
        )
        message = np.stack([np.arange(rows), np.full(rows, steps)]).astype(np.int32)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        put = jax.device_put([state, table[None], message], everywhere)
        return jax.block_until_ready(put)

    def program(self, rows: int, context: int, steps: int) -> Any:
        """The decode program for such rows; compiled one at a time, as XLA times what it tries."""
        sizes = self.sizes(rows, context + STEPS)
        placement = Placement.create(
            self.mesh,
            num_kv_heads=sizes["num_kv_heads"],
            num_pages=sizes["num_pages"],
            head_axis=parallel.AXIS,
        )
        shape = sizes["num_pages"], sizes["num_kv_heads"], PAGE, sizes["head_dim"]
        pool = jax.ShapeDtypeStruct(shape, self.dtype, sharding=placement.sharding("N, Hk, S, D"))
        pools, none = ((each,) * sizes["num_layers"] for each in (pool, None))
        table = np.zeros((rows, -(-(context + STEPS) // PAGE)), np.int32)
        state, table, message = self.inputs(table, context, steps)
        lowered = self.programs.decode.lower(
            *(
                KVCache(pools, pools, placement, k_scales=none, v_scales=none),
                state,
                table,
                self.params,
                message,
            ),
            steps=steps,
            top=0,
            known=Kind.GREEDY,
        )
        with _compiling:
            return lowered.compile()

    def launch(self, program: Any, cache: KVCache, inputs: list[Any]) -> tuple[KVCache, Any]:
        """One launch of `program`; donates the cache and the state."""
        state, table, message = inputs
        cache, _, out = program(cache, state, table, self.params, message)
        return cache, out

    def batch(self, table: np.ndarray, context: int) -> DecodeBatch:
        """One token more for every row, the last of `context`."""
        rows = len(table)
        lens = np.full(rows, context, np.int32)
        at = lens - 1
        slots = table[np.arange(rows), at // PAGE] * PAGE + at % PAGE
        return DecodeBatch.of(table, lens, at[:, None], slots[:, None])


_compiling = threading.Lock()


@cache
def _normal(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A function that draws an array there; XLA compiles it once for each shape."""
    draw = partial(jax.random.normal, shape=shape, dtype=dtype)
    return jax.jit(draw, out_shardings=sharding)


def weights(config: ModelConfig, devices: int, dtype: Any) -> dict[str, Any]:
    """The same random model on any number of devices: columns lie as `split_params` puts them."""
    c, mesh = config, parallel.make_mesh(devices)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = dict(
        qkv=(c.width, (q, kv, kv)),
        out=(q, (c.width,)),
        gate_up=(c.width, (c.inner_width,) * 2),
        down=(c.inner_width, (c.width,)),
        embed=(c.width, (c.vocab_size,)),
        head=(c.width, (c.vocab_size,)),
    )
    ends: dict[str, Any] = dict.fromkeys(("out", "down"), PartitionSpec(parallel.AXIS, None))
    made: dict[str, Any] = {}

    def matrix(name: str, key: Any) -> Any:
        if name not in made:
            rows, columns = parts[name]

            def draw(key: Any) -> Any:
                keys = jax.random.split(key, len(columns))
                found = [
                    jax.random.normal(k, (rows, n), dtype) * jnp.asarray(0.02, dtype)
                    for k, n in zip(keys, columns, strict=True)
                ]
                if len(found) == 1:
                    return found[0]
                split = [each.reshape(rows, devices, -1) for each in found]
                return jnp.concatenate(split, axis=2).reshape(rows, -1)

            spec = ends.get(name, PartitionSpec(None, parallel.AXIS))
            made[name] = jax.jit(draw, out_shardings=NamedSharding(mesh, spec))
        return made[name](key)

    key = jax.random.key(0)
    ones = jax.device_put(np.ones(c.width, np.float32), NamedSharding(mesh, PartitionSpec()))
    layers = []
    for i in range(c.num_layers):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        names = ("qkv", "out", "gate_up", "down")
        layer = {name: matrix(name, k) for name, k in zip(names, keys, strict=True)}
        layers.append(layer | dict(attention_norm=ones, inner_norm=ones))
    return dict(
        embed=matrix("embed", jax.random.fold_in(key, 1000)),
        head=matrix("head", jax.random.fold_in(key, 1001)),
        norm=ones,
        layers=layers,
    )


def timed(system: System, program: Any, rows: int, context: int) -> dict[str, Any]:
    """Seconds of a step, and of the host for it; on a GPU what a trace says beside."""
    cache, table = system.cache(rows, context + STEPS)

    def run() -> tuple[float, float]:
        nonlocal cache
        inputs = system.inputs(table, context, STEPS)
        begin = time.perf_counter()
        cache, out = system.launch(program, cache, inputs)
        launched = time.perf_counter() - begin
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / STEPS, launched / STEPS

    run()
    steps, hosts = zip(*(run() for _ in range(ROUNDS)), strict=True)
    found = spread(steps) | dict(host_s=float(np.median(hosts)))
    if jax.default_backend() != "gpu":
        return found
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                run()
        return found | traced(folder, system.config.num_layers)


def traced(folder: str, layers: int) -> dict[str, Any]:
    """What the first card did in a step, by kind, and its longest kernels."""
    (path,) = Path(folder).glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    card = min(name for name in names.values() if "/device:GPU" in name)
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("ph") == "X" and names.get(e["pid"]) == card
    )
    steps, kinds, each, busy, end = TRACED * STEPS, {}, {}, 0.0, 0.0
    for begin, after, name in spans:
        busy += max(after - max(begin, end), 0.0)
        end = max(end, after)
        kind = next((kind for kind, names in KINDS if names.search(name)), "rest")
        for key, into in ((kind, kinds), (name[:60], each)):
            count, total, times = into.setdefault(key, [0, 0.0, []])
            into[key] = [count + 1, total + after - begin, [*times[-4999:], after - begin]]
    found: dict[str, Any] = dict(busy_s=busy * 1e-6 / steps, kernels=len(spans) / steps)
    for kind, (count, total, times) in kinds.items():
        found[f"{kind}_s"] = total * 1e-6 / steps
        found[f"{kind}_count"] = count / steps
        found[f"{kind}_median_s"] = float(np.median(times)) * 1e-6
    found["attention_layer_s"] = found.get("attention_s", 0.0) / layers
    longest = sorted(each.items(), key=lambda item: -item[1][1])[:14]
    found["longest"] = [
        dict(name=name, count=count / steps, median_s=float(np.median(times)) * 1e-6)
        for name, (count, _, times) in longest
    ]
    return found


def check(one: System, two: System, rows: int, context: int) -> dict[str, Any]:
    """How far two devices are from one: logits of a step, attention, and the program's text."""
    found: dict[str, Any] = {}
    logits, attended = [], []
    for system in (one, two):
        cache, table = system.cache(rows, context + STEPS)
        batch, tokens = (
            system.batch(table, context),
            np.arange(1, rows + 1, dtype=np.int32)[:, None],
        )
        q = (rows, 1, system.config.num_heads, system.config.head_dim)
        where = NamedSharding(system.mesh, PartitionSpec(None, None, parallel.AXIS))
        q = _normal(q, jnp.dtype(system.dtype), where)(jax.random.key(3))
        attend = jax.jit(lambda q, cache, batch: cache.attend(0, q, batch))
        attended.append(np.asarray(attend(q, cache, batch).astype(jnp.float32)))
        if system is two:
            text = attend.lower(q, cache, batch).compile().as_text() or ""
            found["collectives_of_attend"] = len(COLLECTIVE.findall(text))
        step = jax.jit(system.model, donate_argnums=1)
        if system is two:
            text = step.lower(system.params, cache, tokens, batch).compile().as_text() or ""
            lines = [
                line for line in text.splitlines() if COLLECTIVE.search(line.split("metadata")[0])
            ]
            found["collectives_of_step"] = len(lines)
            found["collectives_inside_attention"] = sum("attend" in line for line in lines)
        out, cache = step(system.params, cache, tokens, batch)
        logits.append(np.asarray(out))
    scale = float(np.std(logits[0]))
    best = np.argmax(logits[0], 1)
    row = np.arange(rows)
    margin = logits[0].max(1) - logits[0][row, np.argmax(logits[1], 1)]
    return found | dict(
        logit_rms_difference=float(np.sqrt(np.mean((logits[0] - logits[1]) ** 2)) / scale),
        tokens_equal=int((best == np.argmax(logits[1], 1)).sum()),
        worst_margin=float(margin.max() / scale),
        rows=rows,
        attention_bits_equal=bool(np.array_equal(*attended)),
        attention_most_difference=float(np.abs(attended[0] - attended[1]).max()),
    )


def chained(system: System, rows: int, sums: DeviceSum) -> dict[str, Any]:
    """Seconds of a sum over the devices, with its residual and norm, behind another."""
    width, unrolled, loops = system.config.width, 32, 40
    rng = np.random.default_rng(rows)
    shapes = (system.devices, rows, width), (rows, width), (width,)
    parts, x, weight = (rng.standard_normal(shape).astype(system.dtype) for shape in shapes)
    split, whole = PartitionSpec(parallel.AXIS), PartitionSpec()

    def chain(parts: Any, x: Any, weight: Any) -> Any:
        def body(_: Any, carried: Any) -> Any:
            x, part = carried
            for _ in range(unrolled):
                x, part = sums.add_and_norm(part, x, weight, 1e-5)
            return x, part

        return jax.lax.fori_loop(0, loops, body, (x, parts[0]))

    run = jax.jit(
        jax.shard_map(
            chain,
            mesh=system.mesh,
            in_specs=(split, whole, whole),
            out_specs=(whole, whole),
            check_vma=False,
        )
    )
    placed = [
        jax.device_put(array, NamedSharding(system.mesh, spec))
        for array, spec in ((parts, split), (x, whole), (weight, whole))
    ]
    jax.block_until_ready(run(*placed))
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(run(*placed))
        times.append((time.perf_counter() - begin) / (unrolled * loops))
    return spread(times)


def long_run(system: System, steps: int, program: Any, context: int) -> dict[str, Any]:
    """1,000 steps in launches of so many; the last launch says what the first said."""
    cache, table = system.cache(1, context + STEPS)
    launches, said = -(-1000 // steps), []
    begin = time.perf_counter()
    for _ in range(launches):
        cache, out = system.launch(program, cache, system.inputs(table, context, steps))
        said.append(out.packed)
        if jax.default_backend() == "cpu":  # whose devices share too few threads to be ahead
            jax.block_until_ready(out)
    jax.block_until_ready(said)
    seconds = time.perf_counter() - begin
    same = bool(np.array_equal(np.asarray(said[0]), np.asarray(said[-1])))
    return dict(steps=launches * steps, seconds=seconds, last_equals_first=same)


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    small = args.small
    dtype = jnp.float32 if small else jnp.bfloat16
    configs = {"small": SMALL} if small else {name: MODELS[name] for name in args.models}
    context = 32 if small else args.context
    all_rows = [1, 2] if small else args.rows
    for name, config in configs.items():
        yield from _of_model(name, config, dtype, all_rows, context, args)


def _of_model(
    name: str,
    config: ModelConfig,
    dtype: Any,
    all_rows: list[int],
    context: int,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The records of one model; what can be drawn or traced side by side is."""
    with ThreadPoolExecutor() as pool:
        counts = sorted({SYSTEMS[system] for system in args.systems})
        drawn = pool.map(partial(weights, config, dtype=dtype), counts)
        params = dict(zip(counts, drawn, strict=True))
        systems = {
            label: System.of(config, SYSTEMS[label], params[SYSTEMS[label]], label, dtype)
            for label in args.systems
        }
        last = list(systems)[-1]
        for rows in all_rows:
            case = dict(model=name, layers=config.num_layers, B=rows, tokens=context)
            made = {
                label: pool.submit(system.program, rows, context, STEPS)
                for label, system in systems.items()
            }
            programs = {label: program.result() for label, program in made.items()}
            single = None
            for label, system in systems.items():
                found = timed(system, programs[label], rows, context)
                single = found["median_s"] if system.devices == 1 else single
                if single is not None:
                    found["of_one"] = found["median_s"] / single
                step = case | dict(part="step", devices=system.devices)
                yield dict(case=step, system=label, **found)
            for steps in args.long if rows == 1 else ():
                program = programs[last] if steps == STEPS else None
                program = program or systems[last].program(rows, context, steps)
                found = long_run(systems[last], steps, program, context)
                yield dict(case=case | dict(part="long", a_launch=steps), system=last, **found)
    one, *_, two = (*systems.values(), *systems.values())
    if args.no_check or two.sums is None:
        return
    of_other_width = DeviceSum(two.mesh, parallel.AXIS, width=1, rows=1)  # so that it is psum
    for rows in all_rows:
        case = dict(model=name, part="sum", B=rows, width=config.width, devices=two.devices)
        for label, sums in (("psum", of_other_width), ("DeviceSum", two.sums)):
            yield dict(case=case, system=label, **chained(two, rows, sums))
    if len(systems) > 1:
        for rows in sorted({min(all_rows), min(max(all_rows), 64)}):
            case = dict(model=name, part="check", B=rows, tokens=context)
            yield dict(case=case, system=last, **check(one, two, rows, context))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", default="tensor_parallel", help="of the results' file")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 128])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--no-check", action="store_true", help="only the times")
    parser.add_argument(
        "--long", nargs="*", type=int, default=[STEPS, 1], help="steps of a launch, 1,000 in all"
    )
    parser.add_argument("--small", action="store_true", help="a small model on two CPU devices")
    args = parser.parse_args()
    if args.small:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
    found = []
    for record in records(args):
        found.append(record)
        print({k: v for k, v in record.items() if k not in ("min_s", "max_s")}, flush=True)
        write_result(
            args.name,
            found,
            command=shlex.join(["python", "benchmarks/tensor_parallel.py", *sys.argv[1:]]),
            device=None if args.small else f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            packages=("jax", "jaxlib", "triton", "jax-triton"),
        )


if __name__ == "__main__":
    main()
