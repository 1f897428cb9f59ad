"""This checkout beside another one of itself: is anything slower than it was?

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before [--rounds 15] [--name before]

Two processes, one for each checkout, take turns case by case and round by round, so that a machine
that gets slower meanwhile is slow for both. The same script drives both: what it times is public.
Decode steps run on the default device; the allocator's calls and the checks of a traced call are
the host's.
"""

import argparse
import importlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
# rows, KV heads, group, head dim, page size, tokens a row, layers, steps in one program
SIZES = {"cpu": (8, 2, 4, 64, 16, 512, 4, 8), "gpu": (16, 8, 4, 128, 16, 1024, 32, 20)}


# --- what is timed, in a process of its own: each case is a function that returns its seconds -----


def step_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """Steps of a stack of attention layers: append and attend, fused and not, in both layouts."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from paged_decode.kernels import append_and_attend, append_kv, paged_attention

    platform = "gpu" if jax.default_backend() in ("gpu", "cuda") else "cpu"
    rows, heads, group, dim, size, context, layers, steps = SIZES[platform]
    dtype = jnp.bfloat16 if platform == "gpu" else jnp.float32
    columns, pages = context // size, rows * (context // size) + 1
    ids = np.random.default_rng(0).permutation(np.arange(1, pages)).astype(np.int32)
    table, lens = ids.reshape(rows, columns), np.full(rows, context, np.int32)
    last = lens - 1
    slots = table[np.arange(rows), last // size] * size + last % size

    def one(q: Any, k: Any, v: Any, how: str, layer: Any) -> Any:
        new = q[:, ::group]
        if how == "fused":
            # By name: the checkout that is compared may have the arguments in another order.
            arrays = dict(k_pages=k, v_pages=v, q=q, k=new, v=new, page_table=table, seq_lens=lens)
            out, k, v = append_and_attend(**arrays, layer=layer)
        else:
            if how == "append":
                k, v = append_kv(k, v, new, new, slots, layer=layer)
            out = paged_attention(q, k, v, table, lens, layer=layer)
        return (q + out * jnp.asarray(0.5, dtype)).astype(dtype), k, v

    def unrolled(q: Any, k: Any, v: Any, how: str) -> Any:
        k, v = list(k), list(v)
        for i in range(layers):
            q, k[i], v[i] = one(q, k[i], v[i], how, None)
        return q, tuple(k), tuple(v)

    def scanned(q: Any, k: Any, v: Any, how: str) -> Any:
        def body(carry: Any, layer: Any) -> Any:
            q, k, v = carry
            return one(q, k, v, how, layer), None

        return lax.scan(body, (q, k, v), jnp.arange(layers, dtype=jnp.int32))[0]

    def case(step: Any, how: str) -> Callable[[], float]:
        shape = (pages, heads, size, dim)
        pool = (
            jnp.ones((layers, *shape), dtype)
            if step is scanned
            else tuple(jnp.ones(shape, dtype) for _ in range(layers))
        )
        state = [jnp.ones((rows, heads * group, dim), dtype), pool]
        state.append(jax.tree.map(lambda a: a + 0, pool))

        def many(q: Any, k: Any, v: Any) -> Any:
            return lax.fori_loop(0, steps, lambda _, c: step(*c, how), (q, k, v))

        program = jax.jit(many, donate_argnums=(0, 1, 2)).lower(*state).compile()

        def run() -> float:
            nonlocal state
            start = time.perf_counter()
            state = list(jax.block_until_ready(program(*state)))
            return (time.perf_counter() - start) / steps

        return run

    for name, step in (("tuple, unrolled", unrolled), ("stacked, scan", scanned)):
        for how in ("fused", "append", "attend"):
            yield f"decode step: {name}, {how}", case(step, how)


def tracing_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """What a call costs on the host: eager, and while a program is traced."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from paged_decode.kernels import paged_attention

    q, pages = jnp.ones((4, 4, 16)), jnp.ones((9, 2, 4, 16))
    table, lens = np.arange(1, 9, dtype=np.int32).reshape(4, 2), np.full(4, 7, np.int32)
    call = lambda q: paged_attention(q, pages, pages, table, lens, implementation="xla")  # noqa: E731

    def eager() -> float:
        start = time.perf_counter()
        for _ in range(100):
            call(q)
        return (time.perf_counter() - start) / 100

    def traced() -> float:
        start = time.perf_counter()
        jax.make_jaxpr(lambda q: [call(q) for _ in range(100)])(q)
        return (time.perf_counter() - start) / 100

    yield "attention: one eager call", eager
    yield "attention: tracing one of many layers", traced


def sampling_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """`sample` of 64 rows of 32,000 logits, as in a loop of decode steps on the device."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from paged_decode.engine.sampling import SamplingParams, SamplingRows, sample

    logits = jax.device_put(np.random.default_rng(0).standard_normal((64, 32000), np.float32) * 3)
    steps = 4 if jax.default_backend() == "cpu" else 50

    @jax.jit
    def many(logits: Any, rows: Any) -> Any:
        def step(i: Any, chosen: Any) -> Any:  # depends on the token before, as in a model
            now = logits + chosen[:, None].astype(jnp.float32) * jnp.float32(1e-30)
            return sample(now, replace(rows, index=rows.index + i))

        return lax.fori_loop(0, steps, step, jnp.zeros(64, jnp.int32))

    for name, params in (
        ("greedy", SamplingParams()),
        ("temperature", SamplingParams(temperature=0.8)),
        ("top_p", SamplingParams(temperature=0.8, top_p=0.9)),
    ):
        rows = jax.device_put(SamplingRows.create([params] * 64, range(64), 64))

        def run(rows: Any = rows) -> float:
            start = time.perf_counter()
            jax.block_until_ready(many(logits, rows))
            return (time.perf_counter() - start) / steps

        yield f"sampling: {name}", run


def allocator_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """Calls for 256 sequences in pages of 16."""
    import numpy as np

    from paged_decode.allocator import BlockAllocator

    rng, rows = np.random.default_rng(0), 256
    prompts = [rng.integers(0, 1000, 160 + 3 * i).astype(np.int32) for i in range(rows)]
    allocator = BlockAllocator(40_000, 16, hash_key=b"k" * 32)
    handles = [allocator.allocate(prompt) for prompt in prompts]
    array, token = np.array(handles), rng.integers(0, 1000, rows).astype(np.int32)
    tokens, listed = token.tolist(), prompts[-1].tolist()

    def timed(call: Callable[[], Any], times: int) -> Callable[[], float]:
        def run() -> float:
            for handle in handles:  # the same work in every round
                allocator.truncate(handle, 160)
            start = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - start) / times

        return run

    def commit() -> None:
        length = allocator.sequence(handles[0]).length
        allocator.advance(array, token, columns=128)
        allocator.commit(array, length + 1)

    def whole() -> None:
        allocator.free(allocator.allocate(prompts[-1]))

    def steps(crossing: int) -> Callable[[], float]:
        """15 steps, in each of which that many of the rows begin a page."""

        def run() -> float:
            for at, handle in enumerate(handles):
                allocator.truncate(handle, 160)
                allocator.append([handle], [[7] * (1 + (at // crossing % 15 if crossing else 0))])
            start = time.perf_counter()
            for _ in range(14):
                allocator.advance(array, token)
            return (time.perf_counter() - start) / 14

        return run

    fresh = iter(range(10**9))

    def publish() -> float:
        seconds = 0.0
        for _ in range(32):
            handle = allocator.allocate(np.arange(256) + 1000 * next(fresh))
            start = time.perf_counter()
            allocator.commit([handle], [256])
            seconds += time.perf_counter() - start
            allocator.withdraw([handle])
            allocator.free([handle])
        return seconds / 32

    yield "allocator: advance, arrays", timed(lambda: allocator.advance(array, token), 64)
    yield "allocator: advance, lists", timed(lambda: allocator.advance(handles, tokens), 64)
    yield "allocator: advance and commit", timed(commit, 64)
    yield "allocator: advance, no new page", steps(0)
    yield "allocator: advance, 16 new pages", steps(16)
    yield "allocator: commit, 16 new pages", publish
    yield "allocator: allocate and free", timed(whole, 64)
    yield (
        "allocator: match_prefix, a list",
        timed(lambda: allocator.match_prefix(listed), 64),
    )


def engine_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """Runs of 32 requests that mostly decode or mostly prefill, over a small model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

    layers, width, heads, dim, vocab = 2, 128, 2, 64, 1000
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * layers))
    params = {
        name: jax.random.normal(next(keys), shape) / 8
        for name, shape in [("embed", (vocab, width)), ("head", (width, vocab))]
        + [(f"{each}{i}", (width, width)) for i in range(layers) for each in "qkvo"]
    }

    def model(params: Any, cache: Any, tokens: Any, batch: Any) -> Any:
        x = params["embed"][tokens]
        for i in range(layers):
            q, k, v = ((x @ params[f"{n}{i}"]).reshape(*tokens.shape, heads, dim) for n in "qkv")
            seen, cache = cache.append_and_attend(i, q, k, v, batch)
            x = x + jnp.tanh(seen.reshape(*tokens.shape, -1) @ params[f"o{i}"])
        return x[:, -1] @ params["head"], cache

    sizes: Any = dict(num_layers=layers, num_kv_heads=heads, page_size=16, head_dim=dim)
    cache = KVCache.create(num_pages=2049, **sizes)
    shapes = EngineConfig(
        max_rows=32,
        row_buckets=(32,),
        decode_steps=4,
        prefill_chunk=64,
        prefill_rows=4,
        max_sequence_tokens=512,
    )
    engine = Engine(model, params, cache, BlockAllocator(2049, 16, hash_key=b"k"), shapes)
    engine.warmup()
    rng = np.random.default_rng(0)

    def run(tokens: int, new: int) -> float:
        for _ in range(32):
            engine.submit(rng.integers(0, vocab, tokens), SamplingParams(max_new_tokens=new))
        start = time.perf_counter()
        while not engine.idle:
            engine.step()
        return time.perf_counter() - start

    yield "engine: 32 requests, mostly decode", lambda: run(17, 96)
    yield "engine: 32 requests, mostly prefill", lambda: run(250, 4)


def smollm2_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """SmolLM2-135M of the examples, which is fetched once: one request and eight."""
    sys.path.insert(0, str(HERE / "examples"))
    import weights
    from models import decoder

    from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams

    config, params = decoder.load(weights.fetch())
    sizes: Any = dict(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
    cache = KVCache.create(num_pages=257, page_size=16, head_dim=config.head_dim, **sizes)
    shapes = EngineConfig(max_rows=8, decode_steps=8, prefill_chunk=32, max_sequence_tokens=256)
    model = decoder.make_model(config)
    engine = Engine(model, params, cache, BlockAllocator(257, 16, hash_key=b"k"), shapes)
    engine.warmup()

    def run(rows: int) -> float:
        for row in range(rows):
            engine.submit([row + 1] * 16, SamplingParams(max_new_tokens=96))
        start = time.perf_counter()
        while not engine.idle:
            engine.step()
        return time.perf_counter() - start

    yield "SmolLM2, 1 row, 96 tokens", lambda: run(1)
    yield "SmolLM2, 8 rows, 96 tokens", lambda: run(8)


def llama_cases() -> Iterator[tuple[str, Callable[[], float]]]:
    """Llama-3.1-8B's shapes with random weights, on a CPU tiny ones: one request and 64."""
    importlib.import_module("paged_decode")  # before `_llama_shapes` puts this checkout in front
    import jax
    from _engine_runs import make_engine, prompts, submit
    from _llama_shapes import llama_shapes

    small = jax.default_backend() == "cpu"
    shapes = llama_shapes(small=small)
    sizes: Any = dict(tokens=64 * 128, longest=128, max_rows=64, row_buckets=(1, 64))
    seeds = itertools.count()
    engine = make_engine(shapes, decode_steps=8, prefill_chunk=64, prefill_rows=8, **sizes)

    def run(rows: int) -> float:
        for prompt in prompts(shapes, [33] * rows, seed=next(seeds)):
            submit(engine, prompt, 64)
        start = time.perf_counter()
        while not engine.idle:
            engine.step()
        return time.perf_counter() - start

    name = "small" if small else "8B"
    yield f"Llama {name}, 1 row, 64 tokens", lambda: run(1)
    yield f"Llama {name}, 64 rows, 64 tokens", lambda: run(64)


def work(kinds: list[str]) -> None:
    """Name the cases, then run the one whose number comes in, and print its seconds."""
    known = dict(
        step=step_cases,
        tracing=tracing_cases,
        sampling=sampling_cases,
        allocator=allocator_cases,
        engine=engine_cases,
        smollm2=smollm2_cases,
        llama=llama_cases,
    )
    cases = [case for kind in kinds for case in known[kind]()]
    print("\t".join(name for name, _ in cases), flush=True)
    for line in sys.stdin:
        print(cases[int(line)][1](), flush=True)


# --- two of them, by turns ------------------------------------------------------------------------


class Worker:
    """A process that runs the cases with the library of one checkout."""

    def __init__(self, checkout: Path, kinds: list[str]):
        paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", *kinds],
            env=os.environ
            | dict(PYTHONPATH=os.pathsep.join(paths), XLA_PYTHON_CLIENT_PREALLOCATE="false"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = self._line().split("\t")

    def run(self, case: int) -> float:
        stdin: Any = self._process.stdin
        stdin.write(f"{case}\n")
        stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        stdout: Any = self._process.stdout
        line = stdout.readline().rstrip("\n")
        if not line:
            raise RuntimeError("a worker ended early; its error is above")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(workers: dict[str, Worker], rounds: int) -> Iterator[dict[str, Any]]:
    """Two records for every case, the first with the median ratio of a round."""
    from _result import spread

    now, before = workers
    for case, name in enumerate(workers[now].names):
        times: dict[str, list[float]] = {system: [] for system in workers}
        for turn in range(rounds + 2):  # two to warm up; who begins changes
            for system in list(workers)[:: 1 if turn % 2 else -1]:
                times[system].append(workers[system].run(case))
        found = {system: spread(each[2:]) for system, each in times.items()}
        ratio = statistics.median(
            a / b for a, b in list(zip(times[now], times[before], strict=True))[2:]
        )
        print(
            f"{name:<42} {found[now]['median_s'] * 1e6:>10.1f} us, "
            f"before {found[before]['median_s'] * 1e6:>10.1f} us  {ratio:.3f}x",
            flush=True,
        )
        yield dict(case=dict(name=name), system=now, **found[now], median_ratio=ratio)
        yield dict(case=dict(name=name), system=before, **found[before])


def main() -> None:
    """Time every case in both checkouts and write them as two systems of one result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="before")
    parser.add_argument(
        "--kinds", nargs="+", default=["step", "tracing", "sampling", "allocator", "engine"]
    )
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    if args.before is None or not (args.before / "paged_decode").is_dir():
        parser.error("give another checkout of this repository")
    import jax
    from _result import write_result

    workers = {"paged-decode": Worker(HERE, args.kinds)}
    workers["paged-decode/before"] = Worker(args.before.resolve(), args.kinds)
    records = list(compare(workers, args.rounds))
    for worker in workers.values():
        worker.close()
    write_result(
        args.name,
        records,
        command=" ".join(["python", *sys.argv]),
        device=None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
    )


if __name__ == "__main__":
    main()
