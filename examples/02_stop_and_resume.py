"""Stop a chat in mid-answer, start a new process, and go on to the same words."""

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import jax

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

toy = import_module("01_custom_loop")  # its one-layer model; put your own here


def make_engine():
    shapes = dict(embed=(toy.VOCAB, 64), place=(64, 64), out=(64, toy.VOCAB))
    shapes |= dict(q=(64, toy.HEADS * toy.DIM), k=(64, toy.KV_HEADS * toy.DIM))
    shapes |= dict(v=(64, toy.KV_HEADS * toy.DIM))
    keys = iter(jax.random.split(jax.random.key(0), len(shapes)))
    params = {name: jax.random.normal(next(keys), s) / 4 for name, s in shapes.items()}
    cache = KVCache.create(
        num_layers=1, num_pages=32, num_kv_heads=toy.KV_HEADS, page_size=toy.PAGE, head_dim=toy.DIM
    )
    allocator = BlockAllocator(32, toy.PAGE, fingerprint=b"toy weights, seed 0")
    config = EngineConfig(max_rows=2, decode_steps=4, max_sequence_tokens=64)
    return Engine(toy.toy_model, params, cache, allocator, config)


def main():
    if len(sys.argv) > 1:  # the new process: take up the request and finish it
        engine = make_engine()
        engine.restore(sys.argv[1])
        print(*(event.token for event in engine.stream()))
        return
    prompt, params = [3, 1, 4, 1, 5], SamplingParams(max_new_tokens=40, temperature=0.8, seed=7)
    whole = list(make_engine().generate([prompt], params)[0].tokens)

    engine = make_engine()
    engine.submit(prompt, params)
    begun = [event.token for _ in range(4) for event in engine.step()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.pgd"
        engine.save(path)
        command = [sys.executable, __file__, path]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resumed = [int(token) for token in output.split()]
    print("before the stop:  ", *begun)
    print("in a new process: ", *resumed)
    print("without a stop:   ", *whole)
    if begun + resumed != whole:
        sys.exit("the words differ")


if __name__ == "__main__":
    main()
