"""The XLA paged backend against dense attention over contiguous caches of the same lengths, CPU.

`python benchmarks/attention_xla.py` writes benchmarks/results/attention_xla.json. A figure is the
time of one attention call inside one compiled chain of LAYERS calls, each with its own cache, so
that caches come from memory as in a model and dispatch is shared. All systems take turns in one
run; the pages are permuted.

Dense systems read a cache padded to the longest row: the einsum (head-major, the fairest rival)
and `jax.nn.dot_product_attention`. "ceiling" only sums the cache once.
"""

import os
import time
from dataclasses import dataclass

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from _result import spread, write_result

from paged_decode.kernels import paged_attention

LAYERS, ROUNDS = 12, 25
HEADS, KV_HEADS, DIM, PAGE_SIZE, COLUMNS = 9, 3, 64, 16, 64  # SmolLM2-135M, up to 1,024 tokens


@dataclass(frozen=True)
class Case:
    """Lengths of the rows, and how many new tokens each has."""

    name: str
    lens: tuple[int, ...]
    tokens: int = 1


CASES = (
    Case("B=1, 300 tokens", (300,)),
    Case("B=1, 1000 tokens", (1000,)),
    Case("B=8, 300 tokens each", (300,) * 8),
    Case("B=8, 1000 tokens each", (1000,) * 8),
    Case("B=8, ragged 10 to 700", (40, 100, 700, 300, 10, 250, 512, 90)),
    Case("B=1, 128 new of 512", (512,), 128),
)


def dense_einsum(q, k, v, lens):
    """q `[B, T, Hq, D]`, k and v `[B, Hk, S, D]`."""
    rows, tokens = q.shape[:2]
    q = q.reshape(rows, tokens, KV_HEADS, -1, DIM) * DIM**-0.5
    logits = jnp.einsum("bthgd,bhcd->bhgtc", q, k)
    position = lens[:, None] - tokens + jnp.arange(tokens)
    seen = jnp.arange(k.shape[2]) <= position[..., None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhgtc,bhcd->bthgd", weights, v).reshape(rows, tokens, HEADS, DIM)


def dense_jax_nn(q, k, v, lens):
    """q `[B, T, Hq, D]`, k and v `[B, S, Hk, D]`."""
    tokens = q.shape[1]
    position = lens[:, None] - tokens + jnp.arange(tokens)
    seen = jnp.arange(k.shape[1]) <= position[..., None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])


def caches(case):
    """`{system: (function, its caches)}` over the same random tokens, and the shared arrays."""
    rng = np.random.default_rng(0)
    rows, longest = len(case.lens), max(case.lens)
    shape = (2, rows, KV_HEADS, longest, DIM)
    dense = [rng.standard_normal(shape, dtype=np.float32) for _ in range(LAYERS)]
    need = [-(-n // PAGE_SIZE) for n in case.lens]
    pages = rng.permutation(np.arange(1, int(1.3 * sum(need)) + 2))
    table = np.zeros((rows, COLUMNS), np.int32)
    for row, count in enumerate(need):
        table[row, :count], pages = pages[:count], pages[count:]
    pools = [_paged(kv, table, case.lens, int(1.3 * sum(need)) + 2) for kv in dense]
    lens = jnp.asarray(case.lens, jnp.int32)
    table = jnp.asarray(table)
    device = [tuple(map(jnp.asarray, kv)) for kv in dense]
    token_major = [tuple(jnp.asarray(np.swapaxes(a, 1, 2)) for a in kv) for kv in dense]
    q = jnp.asarray(rng.standard_normal((rows, case.tokens, HEADS, DIM), dtype=np.float32))
    return q, {
        "paged-decode/xla": (lambda q, k, v: paged_attention(q, k, v, table, lens), pools),
        "dense einsum": (lambda q, k, v: dense_einsum(q, k, v, lens), device),
        "jax.nn.dot_product_attention": (lambda q, k, v: dense_jax_nn(q, k, v, lens), token_major),
        "ceiling": (lambda q, k, v: q + jnp.sum(k) + jnp.sum(v), device),
    }


def _paged(kv, table, lens, pages):
    pools = np.zeros((2, pages, KV_HEADS, PAGE_SIZE, DIM), np.float32)
    for row, length in enumerate(lens):
        for start in range(0, length, PAGE_SIZE):
            part = kv[:, row, :, start : min(start + PAGE_SIZE, length)]
            pools[:, table[row, start // PAGE_SIZE], :, : part.shape[2]] = part
    return tuple(map(jnp.asarray, pools))


def measure(case):
    """The records of one case: every system in turn, ROUNDS times."""
    q, systems = caches(case)

    def chain(attend):
        def run(q, layers):
            for k, v in layers:
                q = attend(q, k, v)
            return q

        return jax.jit(run)

    programs = {name: (chain(attend), layers) for name, (attend, layers) in systems.items()}
    results = {name: np.asarray(run(q, layers)) for name, (run, layers) in programs.items()}
    for name in ("dense einsum", "jax.nn.dot_product_attention"):
        np.testing.assert_allclose(results["paged-decode/xla"], results[name], atol=2e-5)
    seconds = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, (run, layers) in programs.items():
            begin = time.perf_counter()
            run(q, layers).block_until_ready()
            seconds[name].append((time.perf_counter() - begin) / LAYERS)
    kv_bytes = 2 * sum(case.lens) * KV_HEADS * DIM * 4
    shape = dict(B=len(case.lens), T=case.tokens, Hq=HEADS, Hk=KV_HEADS, D=DIM, S=PAGE_SIZE)
    shape |= dict(name=case.name, seq_lens=list(case.lens), P=COLUMNS, dtype="float32")
    for name, times in seconds.items():
        yield {"case": shape, "system": name, "bytes": kv_bytes, **spread(times)}


def main():
    records = []
    for case in CASES:
        for record in measure(case):
            records.append(record)
            figures = (record[key] * 1e6 for key in ("median_s", "min_s"))
            print("{:24s} {:32s} median {:6.0f} us  min {:6.0f} us".format(
                case.name, record["system"], *figures))  # fmt: skip
    path = write_result("attention_xla", records, command="python benchmarks/attention_xla.py")
    print(path)


if __name__ == "__main__":
    main()
