"""One of several processes: generate with SmolLM2 over a mesh that spans them all, or disagree.

`python one_process.py PORT NUM_PROCESSES ID CASES.json OUT.json GGUF`. Every process has three
devices. Each group of three that splits the model has devices of both processes, so that the sums
of a block cross over.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from models import decoder, parallel

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, ReplicaCheck, SamplingParams


def main(port, processes, process, cases, out, gguf):
    jax.config.update("jax_num_cpu_devices", 3)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    if gguf == "disagree":
        return disagree(int(process), Path(out))
    devices = np.array(jax.devices()).reshape(3, -1).T
    mesh = jax.sharding.Mesh(devices, ("copy", parallel.AXIS))
    config, params = decoder.load(gguf)
    model = decoder.make_model(config, mesh=mesh)
    params = parallel.split_params(config, params, mesh)
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=12,
        num_kv_heads=config.num_kv_heads,
        page_size=16,
        head_dim=config.head_dim,
        mesh=mesh,
        head_axis=parallel.AXIS,
    )
    shapes = EngineConfig(max_rows=2, row_buckets=(2,), prefill_chunk=16, max_sequence_tokens=128)
    engine = Engine(model, params, cache, BlockAllocator(12, 16), shapes, check=ReplicaCheck())
    prompts = [case["prompt_ids"] for case in json.loads(Path(cases).read_text())]
    done = engine.generate(prompts, SamplingParams(max_new_tokens=8))
    engine.allocator.check_invariants()
    Path(out).write_text(json.dumps([c.tokens for c in done]))


def disagree(process, out):
    """The second process has one more sequence: the third batch shows it, every=3."""
    allocator, check = BlockAllocator(9, 4), ReplicaCheck(every=3)
    if process == 1:
        allocator.allocate([1])
    handle = allocator.allocate([1, 2])
    try:
        for token in range(6):
            check(allocator.advance([handle], [token]))
    except Exception as error:
        out.write_text(json.dumps([type(error).__name__, str(error)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stdin.read()  # whoever serves jax.distributed leaves last, as this ends all others
    os._exit(0)  # leaving jax.distributed in order may wait for a process that has failed
