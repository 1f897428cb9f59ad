"""Rollouts of a trainer: the engine beside google-tunix's vanilla sampler, on the same weights.

    python benchmarks/trainer_rollouts.py            # one GPU
    python benchmarks/trainer_rollouts.py --small    # tiny shapes on a CPU, about a minute

The model is tunix's own Llama 3 with the shapes of Llama-3.2-1B and random weights in bfloat16;
`examples/tunix_rollout.py` runs its modules over pages, and no weight is copied. P prompts of 512
random tokens have G samples each, drawn at temperature 1 with log-probabilities. Samples end at
lengths of their own: log-normal, median 300, sigma 1, cut to 1 .. 1024, drawn once from a seed.

`tunix/vanilla` computes all rows of a batch until the last one has ended: its loop knows which rows
are done, but has no way to leave them out, so where they end changes nothing of its time, and the
longest is run for all. Nothing ends earlier: the stop token is none of the vocabulary. If its cache
and activations do not fit, all rows go in batches of half as many, a quarter, ... (`--peer-rows`:
begin there). `paged-decode/plain` and `paged-decode/shared_prefix` get a request for each sample,
which ends by itself; the first of a prompt computes it, the others find its pages. Tokens per
second count tokens up to each sample's end, for all. `kv_bytes` are those of the peer's cache, and
of the pages that ours has used at once at most.

A system is warmed up by a round that is not counted, and then timed over prompts that nobody has
seen; before that, log-probabilities of greedy first tokens are compared with the peer's.

`paged-decode/update` is `engine.update_params` with other weights, the flush of the prefix cache
included, until weights and pages are ready: for each of the three words with all rows decoding and
the last visit over on the device, and for an idle engine behind a rollout, whose cached pages are
forgotten. `paged-decode/100 updates` counts what is held before and after 100 updates between
visits with requests in flight: bytes of arrays, pages, compiled programs, and the bytes that the
device has handed out. The command fails if anything is left (of the last, a MiB more than before),
or if the systems disagree.

XLA_PYTHON_CLIENT_MEM_FRACTION bounds the memory of all, such as to 80 GB on a larger card.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode.engine.weights import InFlight

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))

PAGE = 16
ENGINES: dict[str, dict[str, Any]] = {"plain": {}, "shared_prefix": dict(shared_prefix=512)}
SMALL = dict(
    num_layers=2, vocab_size=512, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16,
    num_kv_heads=2,
)  # fmt: skip
CLOSE = {"float32": 1e-4, "bfloat16": 0.05}  # log-probabilities; logits of 4 round to 1/64
SLACK = 1 << 20  # bytes that the device's allocator may hold more of, for itself
GREEDY = SamplingParams(max_new_tokens=8, logprobs=0)

Drawn = tuple[list[list[int]], list[list[float]]]


def make_net(*, small: bool) -> tuple[Any, list[Any]]:
    """tunix's Llama 3, and two states of it: the first is its own."""
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig

    config = ModelConfig.llama3p2_1b()
    config = replace(config, **SMALL) if small else config
    dtype = jnp.float32 if small else jnp.bfloat16
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Llama3(config, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(shapes)
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype),
        static_argnums=1,
    )

    def weights(seed: int) -> Any:
        """Deviation 0.02, but for the norms, which are 1."""
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        pairs = zip(keys, leaves, strict=True)
        arrays = [draw(k, a.shape) if a.ndim > 1 else jnp.ones(a.shape, dtype) for k, a in pairs]
        return jax.tree.unflatten(tree, arrays)

    states = [weights(seed) for seed in (0, 1)]
    return nnx.merge(graph, states[0]), states


def lengths_of(args: argparse.Namespace) -> np.ndarray:
    """Tokens of every sample, int64 `[P, G]`."""
    rng = np.random.default_rng(args.seed)
    drawn = rng.lognormal(np.log(args.median), args.sigma, (args.prompts, args.samples))
    return np.clip(np.rint(drawn), 1, args.longest).astype(np.int64)


def prompts_of(args: argparse.Namespace, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts that no other seed has; 0 is the peer's padding."""
    rng = np.random.default_rng([args.seed, seed])
    return rng.integers(1, vocabulary, (args.prompts, args.prompt)).tolist()


class Numbers:
    """What tunix takes for a tokenizer: a text is the number of a prompt, and output has none."""

    def __init__(self, vocabulary: int):
        self.prompts: list[list[int]] = []
        self._never = vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(self.prompts[int(text)])

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # for tunix: none

    def eos_id(self) -> int:
        return self._never

    def pad_id(self) -> int:
        return 0


class Vanilla:
    """tunix's sampler, over batches of so many rows."""

    def __init__(self, net: Any, args: argparse.Namespace):
        from tunix.generate.sampler import CacheConfig, Sampler

        config, self.args, self.rows = net.config, args, args.peer_rows
        self.size = args.prompt + args.longest
        cache = CacheConfig(self.size, config.num_layers, config.num_kv_heads, config.head_dim)
        self.tokenizer = Numbers(config.vocab_size)
        self.sampler = Sampler(net, self.tokenizer, cache)

    def __call__(self, texts: Sequence[str], steps: int, **sampling: Any) -> Any:
        own = dict(max_prompt_length=self.args.prompt, return_logprobs=True)
        return self.sampler(texts, max_generation_steps=steps, **own, **sampling)

    def rollout(self, asked: list[list[int]], lengths: np.ndarray) -> float:
        """Seconds of all samples."""
        self.tokenizer.prompts = asked
        each = lengths.reshape(-1)
        texts = [str(row // lengths.shape[1]) for row in range(each.size)]
        begin = time.perf_counter()
        for at in range(0, each.size, self.rows):
            batch = slice(at, at + self.rows)
            steps = int(each[batch].max())
            out = self(texts[batch], steps, temperature=1.0, top_p=1.0, seed=at)
            if {len(tokens) for tokens in out.tokens} != {steps}:
                raise SystemExit("tunix's sampler has ended before the longest sample")
        return time.perf_counter() - begin

    def fits(self, asked: list[list[int]], lengths: np.ndarray) -> bool:
        """Whether a round has run."""
        try:
            self.rollout(asked, lengths)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return False
        return True

    def greedy(self, asked: list[list[int]]) -> Drawn:
        """A few tokens of each, and their log-probabilities."""
        self.tokenizer.prompts = asked
        out = self([str(i) for i in range(len(asked))], GREEDY.max_new_tokens, temperature=0.0)
        return [tokens.tolist() for tokens in out.tokens], out.logprobs


def make_engine(net: Any, args: argparse.Namespace, own: dict[str, Any]) -> Engine:
    """A compiled engine that holds all samples at their longest, over the arrays of the model."""
    from flax import nnx
    from tunix_rollout import _state_of, layout_of, model_of

    rows, length = args.prompts * args.samples, args.prompt + args.longest
    layout = layout_of(net, rows, length, args.chunk, PAGE, None)
    config = EngineConfig(
        max_rows=rows,
        row_buckets=tuple({-(-rows * eighths // 8) for eighths in range(1, 9)}),
        prefill_chunk=args.chunk,
        chunk_buckets=tuple({min(PAGE, args.chunk), args.chunk}),
        prefill_rows=args.prefill_rows,
        max_sequence_tokens=length,
        **own,
    )
    pool = KVCache.create(layout=layout), BlockAllocator(layout)
    engine = Engine(model_of(nnx.graphdef(net)), _state_of(net), *pool, config)
    engine.warmup()
    return engine


def rollout(engine: Engine, asked: list[list[int]], lengths: np.ndarray) -> float:
    """Seconds until every sample has its tokens."""
    begin, read = time.perf_counter(), 0
    for number, (prompt, each) in enumerate(zip(asked, lengths.tolist(), strict=True)):
        for sample, length in enumerate(each):
            seed = number * len(each) + sample
            engine.submit(prompt, SamplingParams(length, temperature=1.0, seed=seed, logprobs=0))
    while not engine.idle:
        read += len(engine.step())
    seconds = time.perf_counter() - begin
    if read != lengths.sum():
        raise SystemExit(f"the engine has drawn {read} tokens of {lengths.sum()}")
    return seconds


def pages_of(engine: Engine) -> dict[str, int]:
    """Pages that are used, cached and free."""
    told = engine.gauges()
    return {name: int(told[f"pages_{name}"]) for name in ("used", "cached", "free")}


def ready(engine: Engine) -> None:
    """Return when the device has done all that was launched."""
    jax.block_until_ready((engine.params, engine.cache))


def decoding(engine: Engine, asked: Iterable[list[int]], samples: int, new: int) -> list[int]:
    """Step until every sample of these prompts has a token; returns the requests."""
    sampling = SamplingParams(new, temperature=1.0, seed=0, logprobs=0)
    ids = [engine.submit(prompt, sampling, n=samples) for prompt in asked]
    seen: set[tuple[int, int]] = set()
    while len(seen) < len(ids) * samples:
        seen |= {(event.request_id, event.sample) for event in engine.step()}
    return ids


def end(engine: Engine, ids: Iterable[int]) -> None:
    """Nothing of these requests is left."""
    for request_id in ids:
        with suppress(KeyError):  # it has ended by itself
            engine.cancel(request_id)
    for _ in engine.stream():
        pass


def update(engine: Engine, new: Any, in_flight: InFlight = "recompute") -> float:
    """Seconds of an update with nothing under way on the device, until all is ready."""
    ready(engine)
    begin = time.perf_counter()
    engine.update_params(new, in_flight=in_flight)
    ready(engine)
    return time.perf_counter() - begin


def updates(
    engine: Engine, states: Sequence[Any], asked: list[list[int]], args: argparse.Namespace
) -> Iterator[tuple[str, list[float]]]:
    """For each word, seconds of updates with all rows decoding."""
    for word in get_args(InFlight):
        times = []
        for turn in range(args.updates + 1):  # the first is not counted
            ids = decoding(engine, asked, args.samples, args.longest)
            times.append(update(engine, states[turn % 2], word))
            end(engine, () if word == "end" else ids)
        yield word, times[1:]


def held(engine: Engine) -> dict[str, int]:
    """What the device and the allocator hold, and the programs."""
    gc.collect()
    ready(engine)
    stats = jax.devices()[0].memory_stats() or {}
    arrays = sum(array.nbytes for array in jax.live_arrays())
    own = dict(array_bytes=arrays, programs=engine.stats.programs, **pages_of(engine))
    return own | dict(device_bytes=stats.get("bytes_in_use", arrays))


def kept(
    engine: Engine,
    states: Sequence[Any],
    asked: list[list[int]],
    samples: int,
    new: int,
    count: int = 100,
) -> tuple[dict[str, int], dict[str, int]]:
    """What is held before and after so many updates between visits with requests in flight."""

    def go(count: int) -> dict[str, int]:
        for at in range(count):
            if engine.idle:
                decoding(engine, asked, samples, new)
            engine.step()
            engine.update_params(states[at % 2], in_flight=get_args(InFlight)[at % 3])
            engine.step()
        for _ in engine.stream():
            pass
        engine.update_params(states[0])
        return held(engine)

    return go(3), go(count)


def disagreement(engine: Engine, asked: list[list[int]], want: Drawn) -> float:
    """Greatest difference of the log-probabilities of greedy first tokens; tells how many tokens
    are the same."""
    tokens, logprobs = want
    done = engine.generate(asked, GREEDY)
    same = sum(int(np.equal(a.tokens, b).sum()) for a, b in zip(done, tokens, strict=True))
    every = len(asked) * GREEDY.max_new_tokens
    print(f"{same} of {every} greedy tokens are the peer's", flush=True)
    firsts = [each.logprobs[0] for each in done if each.logprobs]
    return max(abs(a - b[0]) for a, b in zip(firsts, logprobs, strict=True))


class Run:
    """What all systems have in common, what was measured, and what is wrong."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lengths = args, lengths_of(args)
        self.net, self.states = make_net(small=args.small)
        config, embedding = self.net.config, self.net.embedder.input_embedding[...]
        self.dtype, self.vocabulary = embedding.dtype.name, config.vocab_size
        sizes = config.num_layers, config.num_kv_heads, config.head_dim
        self.token_bytes = 2 * int(np.prod(sizes)) * embedding.dtype.itemsize
        names = ("prompts", "samples", "prompt", "longest", "median", "sigma", "seed")
        self.case = {name: getattr(args, name) for name in names}
        self.case |= dict(weights=f"random, tunix Llama 3, width {config.embed_dim}")
        self.case |= dict(layers=config.num_layers, dtype=self.dtype)
        self.tokens = int(self.lengths.sum())
        self.records: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.first = prompts_of(args, self.vocabulary, 0)
        self.want: Drawn | None = None
        self.few = self.first[:4]

    def rounds(self) -> Iterator[list[list[int]]]:
        """The prompts of every round that counts."""
        return (prompts_of(self.args, self.vocabulary, 1 + i) for i in range(self.args.rounds))

    def note(self, system: str, case: dict[str, Any], times: Iterable[float], **own: Any) -> None:
        took = spread(times)
        self.records.append(dict(case=self.case | case, system=system, **took, **own))
        told = " ".join(f"{name}={value}" for name, value in (case | own).items())
        print(f"{system:26} {took['median_s'] * 1e3:10.2f} ms  {told}", flush=True)

    def note_rollouts(self, system: str, times: list[float], **own: Any) -> None:
        rate = round(self.tokens / spread(times)["median_s"], 1)
        self.note(system, {}, times, tokens=self.tokens, tokens_per_s=rate, **own)


def measure_peer(run: Run) -> None:
    """tunix's sampler."""
    peer = Vanilla(run.net, run.args)
    while not peer.fits(run.first, run.lengths):
        if peer.rows == 1:
            raise SystemExit("tunix's sampler has no memory for one row")
        peer.rows = -(-peer.rows // 2)
        gc.collect()
    times = [peer.rollout(asked, run.lengths) for asked in run.rounds()]
    held_bytes = peer.rows * peer.size * run.token_bytes
    run.note_rollouts("tunix/vanilla", times, rows_at_once=peer.rows, kv_bytes=held_bytes)
    run.want = peer.greedy(run.few)


def measure_engine(run: Run, name: str) -> None:
    """One of ours: rollouts, and updates behind them."""
    engine = make_engine(run.net, run.args, ENGINES[name])
    if run.want is not None:
        off = disagreement(engine, run.few, run.want)
        if off > CLOSE[run.dtype]:
            run.wrong.append(f"{name}: log-probabilities of first tokens differ by {off:.1e}")
    rollout(engine, run.first, run.lengths)
    times, idle, cached, before = [], [], 0, replace(engine.stats)
    for asked in run.rounds():
        engine.update_params(run.states[0])  # those of the peer
        before, engine.stats.peak_used_pages = replace(engine.stats), 0
        times.append(rollout(engine, asked, run.lengths))
        cached = pages_of(engine)["cached"]
        idle.append(update(engine, run.states[1]))
    counts = ("prefix_hit_tokens", "prefill_tokens", "recomputed_tokens", "preemptions")
    own = {each: getattr(engine.stats, each) - getattr(before, each) for each in counts}
    own["peak_pages"] = peak = engine.stats.peak_used_pages
    own["kv_bytes"] = peak * PAGE * run.token_bytes
    run.note_rollouts(f"paged-decode/{name}", times, **own)
    case = dict(engine=name, in_flight="nobody", cached_pages=cached)
    run.note("paged-decode/update", case, idle)
    measure_updates(run, name, engine)


def measure_updates(run: Run, name: str, engine: Engine) -> None:
    """With all rows decoding, and what a hundred of them leave."""
    for word, times in updates(engine, run.states, run.first, run.args):
        run.note("paged-decode/update", dict(engine=name, in_flight=word), times)
    begin = time.perf_counter()
    was, now = kept(engine, run.states, run.first[:8], run.args.samples, run.args.longest)
    took = time.perf_counter() - begin
    run.note("paged-decode/100 updates", dict(engine=name), [took], before=was, after=now)
    grown = now["device_bytes"] - was["device_bytes"]
    if grown > SLACK or now | dict(device_bytes=0) != was | dict(device_bytes=0):
        run.wrong.append(f"{name}: 100 updates leave {now}, where there was {was}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of an output at most")
    parser.add_argument("--median", type=float, default=300, help="tokens of an output")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of its length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens of a row at once")
    parser.add_argument("--prefill-rows", type=int, default=16)
    parser.add_argument("--peer-rows", type=int, help="of a batch of the peer at most; all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--name", default="trainer_rollouts", help="of the result file")
    args = parser.parse_args()
    if args.small:
        args.prompts, args.samples, args.prompt, args.longest, args.median = 8, 4, 64, 64, 20
        args.chunk, args.prefill_rows = 64, 4
    args.peer_rows = args.peer_rows or args.prompts * args.samples
    return args


def main() -> None:
    """Run the systems and store what they took."""
    args = arguments()
    run = Run(args)
    if not args.no_peers:
        measure_peer(run)
        jax.clear_caches()
        gc.collect()
    for name in args.engines:
        measure_engine(run, name)
        gc.collect()
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" else device.device_kind
    command = " ".join(["python", *sys.argv])
    packages = ["jax", "jaxlib", "flax", "google-tunix"]
    write_result(args.name, run.records, command=command, device=kind, packages=packages)
    if run.wrong:
        raise SystemExit("\n".join(run.wrong))


if __name__ == "__main__":
    main()
