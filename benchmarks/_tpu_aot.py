"""Kernels compiled for TPUs that are not here: memory, spills, and the bundles of their inner loop.

A process of its own for each generation: libtpu reads its flags once, from the environment.

    python benchmarks/_tpu_aot.py < cases.json      # {"generation": "v5e", "cases": [{...}, ...]}

answers with one JSON object for each case on the last line of its output. It needs the `tpu-aot`
extra, which is libtpu in the version that belongs to the installed jax; no TPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["GENERATIONS", "INSTALLED", "Case", "compile_all"]

INSTALLED = importlib.util.find_spec("libtpu") is not None
GENERATIONS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@dataclass(frozen=True)
class Case:
    """One call of a system: `ours`, `ours/append`, `ours/write`, `jax/paged` or `jax/ragged`.

    `ours/scan` is a step of a model that scans over its layers: each one is written, then read;
    `xla/scan` is the same with XLA's scatter.
    """

    system: str = "ours"
    rows: int = 32
    kv_heads: int = 8
    group: int = 4
    dim: int = 128
    page_size: int = 16
    columns: int = 256
    layers: int = 1  # 0: pages without an axis of layers
    pages: int = 4096
    dtype: str = "bfloat16"
    q_dtype: str | None = None  # None: that of the pages, or bfloat16 over pages of 8 bits
    tokens: int = 1
    window: int | None = None
    soft_cap: float | None = None
    starts: bool = False
    sinks: bool = False
    shards: int = 1  # devices over which the heads are split
    block: dict[str, int] = field(default_factory=dict)  # block sizes of the peers

    @property
    def scaled(self) -> bool:
        """Whether pages have 8 bits, and scales."""
        return self.dtype in ("int8", "float8_e4m3fn")


def compile_all(generation: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Compile `cases` for one generation, in a process of their own.

    Each answer has `error`, or: `temp_bytes`, `alias_bytes`, `argument_bytes` of the whole program;
    `bundles`, `spills` and `bundles_per_page` of the kernel; and `collectives`, how many there are.
    """
    request = dict(generation=generation, cases=[asdict(case) for case in cases])
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | dict(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=flags,
            TPU_AOT_DUMP=folder,
        )
        command = [sys.executable, __file__]
        done = subprocess.run(
            command, env=environment, input=json.dumps(request), capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"the compiler for {generation} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in that process --------------------------------------------------------------------------


def main() -> None:
    request = json.loads(sys.stdin.read())
    folder, answers = Path(os.environ["TPU_AOT_DUMP"]), []
    for given in request["cases"]:
        before = set(folder.iterdir())
        try:
            answer = _answer(request["generation"], Case(**given))
        except Exception as error:  # what a compiler refuses is an answer too
            reasons = getattr(error, "exceptions", (error,))
            answers.append(dict(error="; ".join(f"{type(e).__name__}: {e}" for e in reasons)))
            continue
        new = set(folder.iterdir()) - before
        answers.append(answer | _listing(new, Case(**given), answer))
        for path in new:
            path.unlink()
    print(json.dumps(answers))


def _answer(generation: str, case: Case) -> dict[str, Any]:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation])
    build = {"jax/paged": _paged, "jax/ragged": _ragged}.get(case.system, _ours)
    executable, block, passes = build(topology.devices, case)
    memory = executable.memory_analysis()
    text = executable.as_text()
    return dict(
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        collectives=len(re.findall(r"all-(?:gather|reduce|to-all)|collective-permute", text)),
        block=block,
        passes=passes,
    )


# Pages of a block, pages of a tile, copies of a page, loops over the heads of a tile, and queries.
Block = tuple[int, int, int, int, int]
# The program, its block, and passes over a row's pages.
Built = tuple[Any, Block | None, int]


@contextlib.contextmanager
def _target(devices: Any) -> Iterator[None]:
    """Let what asks for the chip while it is lowered see the one that is compiled for."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    chip = AbstractDevice(
        device_kind=devices[0].device_kind, num_cores=devices[0].num_cores, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
        yield


def _ours(devices: Any, case: Case) -> Built:
    """The public operations, over a stacked pool whose heads are split over the devices."""
    import jax

    from paged_decode.kernels.placement import Placement

    given = _arguments(devices, case)
    placement = Placement.create(
        given.mesh, num_kv_heads=case.kv_heads, num_pages=case.pages, head_axis="heads"
    )
    program, names = _program(case, placement)
    args = [getattr(given, name) for name in names]
    if case.system == "ours":
        exact = "float32" in (case.dtype, case.q_dtype)  # those loop over the heads of a tile
        return jax.jit(program).lower(*args).compile(), None if exact else _block(case), 1
    out = (tuple(pool.format for pool in given.pools), None)
    jitted = jax.jit(program, donate_argnums=0, out_shardings=out)
    return jitted.lower(*args).compile(), None, 1


def _arguments(devices: Any, case: Case) -> SimpleNamespace:
    """The shapes of the arguments and where they lie."""
    import jax
    import numpy as np
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices[: case.shards]), ("heads",))
    heads, rows, local = case.kv_heads * case.group, case.rows, case.kv_heads // case.shards
    pool = (case.pages, case.kv_heads, case.page_size, case.dim)
    pool = (case.layers, *pool) if case.layers else pool
    scales, split = pool[:-1], len(pool) - 3

    def array(shape: tuple[int, ...], dtype: str, heads: int | None = None) -> Any:
        spec = ["heads" if axis == heads else None for axis in range(len(shape))]
        sharding: Any = NamedSharding(mesh, PartitionSpec(*spec))
        # XLA's own order would put pages into the lanes, and those of scales into the sublanes.
        if (shape == pool and case.dim % 128) or (shape == scales and local & (local - 1)):
            sharding = Format(Layout(tuple(range(len(shape)))), sharding)
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)

    q_dtype = case.q_dtype or ("bfloat16" if case.scaled else case.dtype)
    new_dtype = q_dtype if case.scaled else case.dtype
    pools = (array(pool, case.dtype, split),) * 2
    if case.scaled:
        pools += (array(scales, "float32", split),) * 2
    more = dict(starts=array((rows,), "int32")) if case.starts else {}
    more |= dict(sinks=array((heads, 1), "float32", 0)) if case.sinks else {}
    return SimpleNamespace(
        mesh=mesh,
        pools=pools,
        q=array((rows, case.tokens, heads, case.dim), q_dtype, 2),
        chunk=array((rows, case.tokens, case.kv_heads, case.dim), new_dtype, 2),
        slots=array((rows, case.tokens), "int32"),
        table=array((rows, case.columns), "int32"),
        lens=array((rows,), "int32"),
        layer=array((), "int32") if case.layers else None,
        more=more,
    )


def _program(case: Case, placement: Any) -> tuple[Callable[..., Any], list[str]]:
    """A function, and which arguments it takes; it returns the pages first, where it writes."""
    import jax
    import numpy as np

    from paged_decode.kernels import append_and_attend, append_kv, paged_attention
    from paged_decode.kernels.record import POOLS
    from paged_decode.kernels.write import write_tokens

    options: Any = dict(placement=placement, sliding_window=case.window, soft_cap=case.soft_cap)
    options |= dict(implementation="pallas_tpu", return_lse=True)
    count = 4 if case.scaled else 2

    def named(pools: Any) -> dict[str, Any]:
        return dict(zip(POOLS, pools, strict=False))

    def read(q: Any, pools: Any, table: Any, lens: Any, layer: Any, more: Any) -> Any:
        tables = dict(page_table=table, seq_lens=lens, layer=layer)
        return paged_attention(q, **named(pools), **tables, **more, **options)

    def append(pools: Any, q: Any, new: Any, table: Any, lens: Any, layer: Any, more: Any) -> Any:
        tables = dict(page_table=table, seq_lens=lens, slots="all", layer=layer)
        results = append_and_attend(**named(pools), q=q, k=new, v=new, **tables, **more, **options)
        return results[-count:], results[:-count]

    def write(pools: Any, new: Any, slots: Any, layer: Any) -> Any:
        if case.system == "xla/scan":
            return write_tokens(pools, new, new, slots, layer, platform="gpu"), None  # scatters
        tokens = dict(k=new, v=new, slots=slots, layer=layer)
        return append_kv(**named(pools), **tokens, placement=placement), None

    def scan(pools: Any, q: Any, new: Any, slots: Any, table: Any, lens: Any) -> Any:
        def one(carry: Any, layer: Any) -> Any:
            pools, q = carry
            pools, _ = write(pools, new, slots, layer)
            return (pools, read(q, pools, table, lens, layer, {})[0]), None

        return jax.lax.scan(one, (pools, q), np.arange(case.layers, dtype=np.int32))[0]

    scanned = (scan, "pools q chunk slots table lens")
    program, names = {
        "ours": (read, "q pools table lens layer more"),
        "ours/append": (append, "pools q chunk table lens layer more"),
        "ours/write": (write, "pools chunk slots layer"),
    }.get(case.system, scanned)
    return program, names.split()


def _block(case: Case) -> Block | None:
    """That of ours on one core; None where heads are multiplied in loops within loops."""
    from paged_decode.kernels.pallas_tpu.config import choose_config
    from paged_decode.kernels.record import AttentionCall

    sizes = "rows group dim page_size columns tokens dtype q_dtype".split()
    kv_heads = case.kv_heads // case.shards
    call = AttentionCall.of_sizes(
        kv_heads=kv_heads, **{name: getattr(case, name) for name in sizes}
    )
    config = choose_config(call, 1)
    if case.scaled and 1 < config.heads < kv_heads:
        return None
    loops = kv_heads if case.scaled else kv_heads // config.heads
    return config.fetch, config.tile, 4 if case.scaled else 2, loops, config.queries


def _paged(devices: Any, case: Case) -> Built:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = case.block["pages"]
    pool = (case.kv_heads, case.pages, case.page_size, case.dim)
    shapes = [
        ((case.rows, case.kv_heads * case.group, case.dim), case.dtype),
        (pool, case.dtype),
        (pool, case.dtype),
        ((case.rows,), "int32"),
        ((case.rows, case.columns), "int32"),
    ]

    def call(*args: Any) -> Any:
        return paged_attention(*args, pages_per_compute_block=pages)

    return _compile(devices, call, shapes), (pages, pages, 2, 1, 1), case.kv_heads  # head by head


def _ragged(devices: Any, case: Case) -> Built:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    shapes = [
        ((case.rows * case.tokens, case.kv_heads * case.group, case.dim), case.dtype),
        ((case.pages, case.page_size, 2 * case.kv_heads, case.dim), case.dtype),
        ((case.rows,), "int32"),
        ((case.rows, case.columns), "int32"),
        ((case.rows + 1,), "int32"),
        ((1,), "int32"),
    ]

    def call(*args: Any) -> Any:
        return ragged_paged_attention(
            *args,
            sm_scale=case.dim**-0.5,
            num_kv_pages_per_block=case.block["pages"],
            num_queries_per_block=case.block["queries"],
            vmem_limit_bytes=64 << 20,
        )

    block = (case.block["pages"], case.block["pages"], 1, 1, case.block["queries"])
    return _compile(devices, call, shapes), block, max(case.kv_heads // 8, 1)


def _compile(devices: Any, call: Any, shapes: list[tuple[tuple[int, ...], str]]) -> Any:
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    here = SingleDeviceSharding(devices[0])
    with _target(devices):
        args = [jax.ShapeDtypeStruct(s, np.dtype(d), sharding=here) for s, d in shapes]
        return jax.jit(call).lower(*args).compile()


# --- what the compiler wrote down -------------------------------------------------------------

KERNELS = {
    "ours": "paged_decode",
    "ours/append": "paged_decode",
    "ours/write": "paged_write",
    "jax/paged": "paged_attention",
    "jax/ragged": "ragged",
}


def _listing(files: set[Path], case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """What the final bundles of the kernel say of it."""

    if case.system not in KERNELS:
        return {}

    def only(ending: str) -> str:
        named = f"-{KERNELS[case.system]}"
        found = [p for p in files if p.name.endswith(ending) and named in p.name]
        found = [p for p in found if "schedule" not in p.name]
        if len(found) != 1:
            raise RuntimeError(f"expected one {ending} of {named}; got {sorted(found)}")
        return found[0].read_text()

    table = only("-final_hlo-static-per-bundle-utilization.txt").splitlines()
    names = [name.strip() for name in table[1].split(",")]
    used = [list(map(int, line.split())) for line in table if re.fullmatch(r"[\d ]+", line)]
    spills = sum(
        row[names.index(name)] for row in used[1:] for name in ("VLOAD:FILL", "VSTORE:SPILL")
    )
    found = dict(bundles=len(used) - 1, spills=spills)
    if answer["block"]:
        listing = Listing(only("-final_bundles.txt"))
        per_block = listing.steady(*answer["block"][:4])
        if per_block is not None:
            found["bundles_per_page"] = per_block * answer["passes"] / answer["block"][0]
    return found


DELAY_SLOTS = 4  # bundles behind a branch that are executed whether it is taken or not


@dataclass(frozen=True)
class Part:
    """A stretch of bundles that a branch repeats (`loop`) or skips."""

    begin: int
    end: int
    loop: bool


def _nested(parts: list[Part]) -> list[Part]:
    """The parts, one within another or apart.

    What comes first in a region may move up into the delay slots of the branch before it, and with
    it the mark of where the region begins: such a mark goes back to where the slots end.
    """
    while crossing := next(
        ((a, b) for a in parts for b in parts if a.begin < b.begin < a.end < b.end), None
    ):
        a, b = crossing
        if a.loop and b.begin - a.begin < DELAY_SLOTS:
            old, new = a, replace(a, begin=b.begin)
        elif b.end - a.end < DELAY_SLOTS:
            old, new = a, replace(a, end=b.end)
        elif a.end - b.begin < DELAY_SLOTS:
            old, new = b, replace(b, begin=a.end)
        else:
            raise RuntimeError(f"branches that do not nest: {a}, {b}")
        parts = [new if part == old else part for part in parts]
    return parts


class Listing:
    """The bundles of one kernel in the order of their addresses, and the branches between them."""

    def __init__(self, text: str):
        self.bundles: list[str] = []
        for line in text.splitlines():
            if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*>*\s*\{", line):
                self.bundles.append(line)
            elif self.bundles:
                self.bundles[-1] += line
        starts: dict[str, int] = {}
        for at, bundle in enumerate(self.bundles):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
                starts.setdefault(region, at)
        parts = []
        for at, bundle in enumerate(self.bundles):
            for region in re.findall(r"sbr\.rel (?:\(!?%\w+\) )?target = \$region(\d+)", bundle):
                if region not in starts:  # a branch of the frame around the kernel
                    continue
                to, behind = starts[region], at + DELAY_SLOTS + 1
                loop = to <= at
                if loop or behind < to:
                    parts.append(Part(to, behind, True) if loop else Part(behind, to, False))
        self.parts = _nested(parts)

    def count(self, pattern: str, begin: int, end: int) -> int:
        return sum(bool(re.search(pattern, bundle)) for bundle in self.bundles[begin:end])

    def copies(self, begin: int, end: int) -> int:
        return self.count(r"%?\d+ = dma\.hbm_to_vmem", begin, end)

    def products(self, begin: int, end: int) -> int:
        return self.count(r"vmatmul|vmatpush|vmatprep|matmul", begin, end)

    def steady(self, pages: int, tile: int, copies: int, heads: int = 1) -> float | None:
        """Bundles for a block of `pages` pages, in the middle of a row.

        The loop over blocks is the innermost one that both starts copies and multiplies. What it
        skips in the middle of a row is not counted: whatever neither starts copies nor multiplies
        (waits for single pages, masks of a row's ends). Of alternative starts, and of alternative
        products (with a mask and without), the cheapest counts. Inner loops count as often as they
        run: once for `tile` pages where they multiply, a loop in that one `heads` times, and once
        for the pages that they start, of `copies` copies each.
        """
        both = [
            p
            for p in self.parts
            if p.loop and self.copies(p.begin, p.end) and self.products(p.begin, p.end)
        ]
        if not both:  # a kernel in which branches cannot be told apart from the listing
            return None
        block = min(both, key=lambda part: part.end - part.begin)
        return self._cost(block, frozenset([block]), (pages / tile, heads), pages * copies)

    def _cost(
        self, part: Part, done: frozenset[Part], times: tuple[float, ...], copies: int
    ) -> float:
        """Bundles of one pass through a part; loops that multiply run `times`, outer ones first."""
        total, starts, products = float(part.end - part.begin), [], []
        for inner in self._outermost(part, done):
            total -= inner.end - inner.begin
            started = self.copies(inner.begin, inner.end)
            if self.products(inner.begin, inner.end):
                deeper = times[1:] if inner.loop else times
                once = self._cost(inner, done | {inner}, deeper, copies)
                products.append(once * times[0] if inner.loop else once)
            elif started:
                once = self._cost(inner, done | {inner}, times, copies)
                starts.append(once * copies / started if inner.loop else once)
        return total + min(starts, default=0.0) + min(products, default=0.0)

    def _outermost(self, part: Part, done: frozenset[Part]) -> list[Part]:
        inside = [p for p in self.parts if part.begin <= p.begin and p.end <= part.end]
        found: list[Part] = []
        for inner in sorted(set(inside) - done, key=lambda p: (p.begin, -p.end, not p.loop)):
            if not found or inner.begin >= found[-1].end:
                found.append(inner)
        return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
