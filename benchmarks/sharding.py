"""What a mesh costs: the wrapper on one device, scaling over CPU devices, talk per step.

`python benchmarks/sharding.py` writes benchmarks/results/sharding.json.

- overhead: one decode step of a Llama with its cache on a mesh of one device, against the same
  step without a mesh; the two take turns.
- scaling: CPU devices of one machine share its cores, so equal work in equal time is the most that
  can be seen: strong scaling splits one model, weak scaling gives every device the same work. A
  smoke of what the split adds, no speedup.
- talk: the collectives of a compiled step, counted in its HLO for 1 to 256 devices. Nothing runs:
  the step is lowered for shapes only. The model has one layer and three, so that what a layer adds
  and what a step adds come apart, and any depth follows.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result
from jax.sharding import NamedSharding

from examples.models import decoder, parallel
from paged_decode import DecodeBatch, KVCache
from paged_decode.kernels import Placement

ROUNDS, COLUMNS, PAGE = 60, 32, 16
SMALL = decoder.ModelConfig(
    vocab_size=8192,
    num_layers=8,
    width=512,
    inner_width=1536,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_positions=512,
)
# Sizes of the 70B and 405B models of the Llama 3 family (Grattafiori et al., 2024).
LARGE = {
    "70B": replace(
        SMALL, vocab_size=128256, num_layers=80, width=8192, inner_width=28672,
        num_heads=64, num_kv_heads=8, head_dim=128,
    ),
    "405B": replace(
        SMALL, vocab_size=128256, num_layers=126, width=16384, inner_width=53248,
        num_heads=128, num_kv_heads=8, head_dim=128,
    ),
}  # fmt: skip


def shapes(config, dtype):
    """Shapes of the weights, as `decoder.load` lays them out."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = dict(
        attention_norm=(c.width,),
        inner_norm=(c.width,),
        qkv=(c.width, q + 2 * kv),
        out=(q, c.width),
        gate_up=(c.width, 2 * c.inner_width),
        down=(c.inner_width, c.width),
    )
    tree = dict(embed=(c.width, c.vocab_size), head=(c.width, c.vocab_size), norm=(c.width,))
    tree |= dict(layers=[layer] * c.num_layers)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=is_shape)


def step_inputs(rows):
    table = 1 + np.arange(rows * COLUMNS, dtype=np.int32).reshape(rows, COLUMNS)
    lens = np.full(rows, COLUMNS * PAGE, np.int32)
    slots = (table[:, -1] * PAGE + PAGE - 1)[:, None]
    return np.zeros((rows, 1), np.int32), DecodeBatch.of(table, lens, lens[:, None] - 1, slots)


class Timed:
    """One compiled decode step and its arrays."""

    def __init__(self, config, rows, devices):
        rng = np.random.default_rng(0)
        scale = config.width**-0.5
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32) * scale),
            shapes(config, jnp.float32),
        )
        where, model = {}, decoder.make_model(config)
        if devices is not None:
            mesh = parallel.make_mesh(devices)
            where = dict(mesh=mesh, head_axis=parallel.AXIS)
            model = decoder.make_model(config, mesh=mesh)
            params = parallel.split_params(config, params, mesh)
        self.params = params
        self.cache = self.make_cache(config, rows, where)
        self.inputs = step_inputs(rows)
        self.step = jax.jit(model, donate_argnums=1)
        self.seconds = []

    @staticmethod
    def make_cache(config, rows, where):
        return KVCache.create(
            num_layers=config.num_layers,
            num_pages=1 + rows * COLUMNS,
            num_kv_heads=config.num_kv_heads,
            page_size=PAGE,
            head_dim=config.head_dim,
            **where,
        )

    def run(self):
        begin = time.perf_counter()
        logits, self.cache = self.step(self.params, self.cache, *self.inputs)
        logits.block_until_ready()
        self.seconds.append(time.perf_counter() - begin)


class Wrapped(Timed):
    """The model of one device, whose cache lies on a mesh of one: every op is wrapped by itself."""

    def __init__(self, config, rows):
        super().__init__(config, rows, None)
        mesh = parallel.make_mesh(1)
        self.cache = self.make_cache(config, rows, dict(mesh=mesh, head_axis=parallel.AXIS))


def take_turns(systems, rounds=ROUNDS):
    """Time all systems once a round, each round in another order: neighbours share caches."""
    for system in systems.values():
        system.run()
        system.seconds.clear()
    order = list(systems.values())
    for _ in range(rounds):
        order = [*order[1:], order[0]]
        for system in order:
            system.run()


def overhead():
    """The wrapper on one device, around every op and around the whole model."""
    for rows in (1, 8):
        systems = {
            "paged-decode, no mesh": Timed(SMALL, rows, None),
            "paged-decode, ops wrapped": Wrapped(SMALL, rows),
            "paged-decode, model wrapped": Timed(SMALL, rows, 1),
        }
        take_turns(systems, 3 * ROUNDS)
        plain = np.array(systems["paged-decode, no mesh"].seconds)
        for name, system in systems.items():
            ratio = float(np.median(np.array(system.seconds) / plain))
            case = dict(measure="overhead", B=rows, devices=1)
            yield dict(case=case, system=name, ratio=ratio, **spread(system.seconds))


def scaling():
    """Strong: one model over n devices. Weak: n times the heads, width within and vocabulary."""
    for kind in ("strong", "weak"):
        for devices in (1, 2, 4, 8):
            config = SMALL
            if kind == "weak":
                config = replace(
                    SMALL,
                    num_layers=4,
                    num_heads=devices,
                    num_kv_heads=devices,
                    inner_width=192 * devices,
                    vocab_size=1024 * devices,
                )
            plain, split = Timed(config, 8, None), Timed(config, 8, devices)
            take_turns({"plain": plain, "split": split})
            case = dict(measure=f"{kind} scaling", B=8, devices=devices)
            ratio = float(np.median(np.array(split.seconds) / np.array(plain.seconds)))
            yield dict(case=case, system="paged-decode, no mesh", **spread(plain.seconds))
            yield dict(case=case, system="paged-decode", ratio=ratio, **spread(split.seconds))


def compiled(config, rows, mesh, dtype=jnp.float32):
    """One step on the devices of a mesh, `rows` rows a data shard, compiled from shapes alone."""
    data, devices = mesh.shape[parallel.DATA], mesh.shape[parallel.AXIS]
    copies = max(devices // config.num_kv_heads, 1)
    widened = replace(config, num_kv_heads=config.num_kv_heads * copies)  # as `split_params` does
    params = shapes(widened, dtype)
    pages = data * (1 + rows * COLUMNS)
    placement = Placement.create(
        mesh,
        num_kv_heads=config.num_kv_heads,
        num_pages=pages,
        head_axis=parallel.AXIS,
        data_axis=parallel.DATA,
    )

    def put(array, spec):
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    pool = jax.ShapeDtypeStruct((pages, widened.num_kv_heads, PAGE, config.head_dim), dtype)
    layers = (put(pool, placement.spec("N, Hk, S, D")),) * config.num_layers
    split = jax.tree.map(put, params, parallel.param_specs(config, params, devices))
    inputs = jax.tree.map(lambda a: put(a, placement.spec("B")), step_inputs(rows * data))
    model = decoder.make_model(config, mesh=mesh)
    lowered = jax.jit(model, donate_argnums=1).lower(
        split, KVCache(layers, layers, placement), *inputs
    )
    return lowered.compile()


def count(hlo):
    """Collectives in the HLO: how many of each kind, and the bytes of their results."""
    found = re.findall(
        r"= \(?(\w+)\[([\d,]*)\][^=\n]*? (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
        hlo,
    )
    numbers = {}
    for dtype, dims, kind in found:
        size = int(re.sub(r"\D", "", dtype)) // 8 * int(np.prod([int(d) for d in dims.split(",")]))
        calls, total = numbers.get(kind, (0, 0))
        numbers[kind] = (calls + 1, total + size)
    return numbers


def talk(counts):
    for name, large in LARGE.items():
        for devices in counts:
            heads = min(devices, large.num_heads)  # beyond Hq only a data axis can grow
            data = devices // heads
            mesh = parallel.make_mesh(heads, data=data)
            for rows in (1, 64):
                one, three = (
                    count(compiled(replace(large, num_layers=n), rows, mesh).as_text())
                    for n in (1, 3)
                )
                kinds = sorted(set(one) | set(three))
                calls, total = {}, {}
                for kind in kinds:
                    (c1, b1), (c3, b3) = one.get(kind, (0, 0)), three.get(kind, (0, 0))
                    more = large.num_layers - 1
                    calls[kind] = c1 + (c3 - c1) // 2 * more
                    total[kind] = b1 + (b3 - b1) // 2 * more
                case = dict(measure="talk", model=name, devices=devices, dtype="float32")
                case |= dict(rows_per_shard=rows, head_shards=heads, data_shards=data)
                yield dict(case=case, system="paged-decode", calls=calls, bytes_per_step=total)


def arithmetic():
    """What lies on one of 8 to 64 GPUs of 80 GB in bfloat16, and the bytes it must read a step."""
    gpu_bytes, rows, length = 0.9 * 80e9, 64, 4096
    for name, large in LARGE.items():
        weights = 2 * sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes(large, jnp.int8)))
        for devices in (8, 16, 32, 64):
            heads = max(large.num_kv_heads / devices, 1)
            token = int(2 * large.num_layers * heads * large.head_dim * 2)
            room = gpu_bytes - weights / devices
            case = dict(measure="arithmetic", model=name, devices=devices, dtype="bfloat16")
            yield dict(
                case=case,
                system="paged-decode",
                weight_bytes_per_device=weights // devices,
                kv_bytes_per_token_per_device=token,
                tokens_that_fit=max(int(room // token), 0),
                read_bytes_per_step=weights // devices + rows * length * token,
                read_case=dict(B=rows, tokens=length),
                all_reduce_bytes_per_step=2 * rows * large.width * (2 * large.num_layers + 1),
            )


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--most-devices", type=int, default=256, help="for the count of talk")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.most_devices)
    counts = [2**i for i in range(9) if 2**i <= args.most_devices]
    records = []
    for part in (overhead(), scaling(), talk(counts), arithmetic()):
        for record in part:
            records.append(record)
            print({k: v for k, v in record.items() if k not in ("min_s", "max_s")}, flush=True)
    print(write_result("sharding", records, command="python benchmarks/sharding.py"))


if __name__ == "__main__":
    main()
