"""A split decode step compiled for slices of TPUs, on a machine without any.

`python benchmarks/sharding_tpu.py` writes benchmarks/results/sharding_tpu.json. It needs `libtpu`
(extra `tpu`), whose compiler works without a chip. Nothing runs: what is recorded is that the step
of a 70B-sized Llama compiles for the slice, its collectives, and what its memory analysis says.
Collectives are counted for one layer and three; those of 80 follow.
"""

import argparse
import os
import time
from dataclasses import replace

os.environ.update(  # before JAX is imported
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax.numpy as jnp
import numpy as np
from _result import write_result
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from sharding import LARGE, compiled, count

from examples.models import parallel

SLICES = {"v5e:2x4": 8, "v5p:2x2x2": 8, "v6e:4x4": 16}


def mesh_of(name, heads):
    """The chips of a slice; those that are not for heads form the data axis."""
    chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    axes = parallel.DATA, parallel.AXIS
    return Mesh(chips.reshape(-1, heads), axes, axis_types=(AxisType.Auto,) * 2)


def compile_for(name, heads, rows):
    """One record."""
    large, mesh = LARGE["70B"], mesh_of(name, heads)
    programs = {}
    for layers in (1, 3):
        begin = time.perf_counter()
        programs[layers] = compiled(replace(large, num_layers=layers), rows, mesh, jnp.bfloat16)
        seconds = time.perf_counter() - begin
    one, three = (count(program.as_text()) for program in programs.values())
    calls, total = {}, {}
    for kind in sorted(set(one) | set(three)):
        (c1, b1), (c3, b3) = one.get(kind, (0, 0)), three.get(kind, (0, 0))
        calls[kind] = c1 + (c3 - c1) // 2 * (large.num_layers - 1)
        total[kind] = b1 + (b3 - b1) // 2 * (large.num_layers - 1)
    memory = programs[3].memory_analysis()
    return dict(
        case=dict(slice=name, head_shards=heads, data_shards=mesh.size // heads, model="70B",
                  dtype="bfloat16", rows_per_shard=rows),
        system="paged-decode",
        compile_s=seconds,
        calls=calls,
        bytes_per_step=total,
        three_layers=dict(
            temp_bytes=memory.temp_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            argument_bytes=memory.argument_size_in_bytes,
        ),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slices", nargs="*", default=list(SLICES), choices=list(SLICES))
    args = parser.parse_args()
    records = []
    for name in args.slices:
        for heads in sorted({8, SLICES[name]}):
            for rows in (1, 64):
                records.append(compile_for(name, heads, rows))
                print(records[-1], flush=True)
    packages = ("jax", "jaxlib", "libtpu")
    command = "python benchmarks/sharding_tpu.py"
    print(write_result("sharding_tpu", records, command=command, packages=packages))


if __name__ == "__main__":
    main()
