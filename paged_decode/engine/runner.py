"""Carries out plans on a device: programs, their shapes, and the state of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._devices import put_beside, tied
from ..allocator import PageCopies
from ..cache import KVCache
from ..sampling import SamplingParams
from .config import EngineConfig, EngineStats
from .programs import DecodeOut, Model, Programs, update
from .records import Chunk, Decode, Enter, Prefill, Result, TableDelta, Ticket
from .rows import MessageSizes, RowState, messages

__all__ = ["DeviceRunner", "Progress"]

Progress = Callable[[int, int], object]
_NO_TABLES = (TableDelta(*np.zeros((3, 0), np.int32)),)
_GREEDY = SamplingParams()


class DeviceRunner:
    """The device half of an engine. Nothing here waits for the device but `wait` and `collect`.

    Every transfer to the device is an explicit one: a small message of fixed shape for what changed
    in rows and tables, one for each prefill program, one for the decode program.

    Args:
      model: as `Engine` takes it.
      params: its weights.
      cache: the pool; it is donated.
      config: shapes.
      columns: width of the page table.
      stats: where program shapes are counted.

    Attributes:
      cache: the living one.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        cache: KVCache,
        config: EngineConfig,
        *,
        columns: int,
        stats: EngineStats,
    ):
        self.cache, self._config, self._stats = cache, config, stats
        self.set_params(params)
        self._model, self._programs = model, Programs.of(model)
        self._shards, self._columns = cache.data_shards, columns
        self._pages = cache.num_pages // self._shards
        self._slots = self._shards * config.max_rows
        few = max(256, 2 * self._slots)
        self._sizes = (
            MessageSizes(min(8, self._slots), few),
            MessageSizes(self._slots, max(few, 8192)),
        )
        self._shapes: set[tuple[Any, ...]] = set()
        self._enter_nobody()

    def set_params(self, params: Any) -> None:
        """Take weights; what lies on the host is put on the device once, not at every launch."""
        self.params = jax.tree.map(self._on_device, params)

    def _on_device(self, leaf: Any) -> Any:
        """What lies on the host goes to the cache's devices; to the first one uncommitted, as an
        array of the caller's would be, so that programs are the same for both."""
        if not isinstance(leaf, np.ndarray | np.generic | int | float | complex):
            return leaf
        pages = self.cache.k_pages[0]
        if pages.devices() == {jax.local_devices()[0]}:
            return jax.device_put(leaf)
        return put_beside(pages, leaf)

    def _put(self, tree: Any) -> Any:
        return put_beside(self.cache.k_pages[0], tree)

    def _enter_nobody(self) -> None:
        table = np.zeros((self._slots, self._columns), np.int32)
        self._table, self._state = self._put((table, RowState.empty(self._slots)))

    # ---- plans

    def prefill(self, plan: Prefill) -> Any:
        """Launch the programs; nothing is read."""
        over = None
        self._update(plan.enter, plan.tables)
        for width, chunks in plan.programs:
            message = self._put(self._prefill_message(width, chunks))
            given = self.cache, self._table, self.params, message
            self.cache, over = self._programs.prefill(*given)
            self._note_program("prefill", len(message), width)
        return over

    def decode(self, plan: Decode) -> Ticket:
        """Launch one program of up to k steps; its tokens set out for the host by themselves."""
        self.copy(plan.copies)
        self._update(plan.enter, plan.tables)
        message, places = self._decode_message(plan.slots, plan.budgets)
        out = self._run_decode(message)
        for array in out if self._config.top_logits else out[:1]:
            array.copy_to_host_async()
        return Ticket(plan, (out, places))

    def copy(self, copies: PageCopies) -> None:
        """Copy pages, in the order of the programs around it."""
        self.cache = self.cache.copy_pages(copies)

    def wait(self, out: Any) -> None:
        """Return when what was launched is over."""
        jax.block_until_ready(out)

    def collect(self, ticket: Ticket) -> Result:
        """What came out of it; waits for it."""
        out, places = ticket.out
        packed = jax.device_get(out.packed)[:, places]
        result = Result(packed[:-2], packed[-2], packed[-1].astype(bool))
        if not self._config.top_logits:
            return result
        ids, logits = jax.device_get((out.top_ids, out.top_logits))
        return result._replace(top_ids=ids[:, places], top_logits=logits[:, places])

    @property
    def is_lost(self) -> bool:
        """Whether a program failed and took the cache with it."""
        return self.cache.is_deleted

    def restart(self) -> None:
        """Begin with an empty cache and no rows."""
        self.cache = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding if a.committed else None),
            self.cache,
        )
        self._enter_nobody()

    # ---- what a launch takes

    def _update(self, enter: Sequence[Enter], tables: Sequence[TableDelta]) -> None:
        """Tell the device what changed; nothing is launched if nothing did."""
        if self._table.is_deleted() or self._state.alive.is_deleted():
            self._enter_nobody()  # an interrupt came between a launch and its result
        (delta,) = (self._local(each) for each in tables)
        told = messages(enter, delta, self._sizes, slots=self._slots, columns=self._columns)
        for size, message in told:
            state = self._table, self._state
            self._table, self._state = update(*state, self._put(message), size=size)
            self._note_program("update", size.enters, size.entries)

    def _local(self, delta: TableDelta) -> TableDelta:
        """The page ids that the shard of each row has for them."""
        if self._shards == 1:
            return delta
        return delta._replace(
            pages=delta.pages - delta.slots // self._config.max_rows * self._pages
        )

    def _places(self, slots: np.ndarray, size: int) -> np.ndarray:
        """Where rows lie among those of a program, which has `size` of every shard."""
        if self._shards == 1:
            return np.arange(len(slots))
        shard = slots // self._config.max_rows
        order = np.argsort(shard, kind="stable")
        rank = np.empty(len(slots), np.int64)
        rank[order] = np.arange(len(slots)) - np.searchsorted(shard[order], shard[order])
        return shard * size + rank

    def _prefill_message(self, width: int, chunks: Sequence[Chunk]) -> np.ndarray:
        size = self._config.prefill_rows
        out = np.zeros((self._shards * size, 3 + width), np.int32)
        out[:, 0] = self._slots
        slots = np.array([chunk.slot for chunk in chunks], np.int64)
        for place, chunk in zip(self._places(slots, size), chunks, strict=True):
            count = len(chunk.tokens)
            out[place, :3] = chunk.slot, chunk.begin, chunk.begin + count
            out[place, 3 + width - count :] = chunk.tokens
        return out

    def _decode_message(
        self, slots: np.ndarray, budgets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        shard = slots // self._config.max_rows
        most = int(np.bincount(shard).max()) if len(slots) else self._config.max_rows
        size = next(size for size in self._config.row_buckets if size >= most)
        out = self._idle_rows(size)
        places = self._places(slots, size)
        out[0, places], out[1, places] = slots, budgets
        return out, places

    def _idle_rows(self, size: int) -> np.ndarray:
        """The message of a program in which no row does anything."""
        out = np.zeros((2, self._shards * size), np.int32)
        out[0] = self._slots
        return out

    def _run_decode(self, message: np.ndarray) -> DecodeOut:
        options = dict(steps=self._config.decode_steps, top=self._config.top_logits)
        self.cache, self._state, out = self._programs.decode(
            self.cache, self._state, self._table, self.params, self._put(message), **options
        )
        self._note_program("decode", message.shape[1])
        return out

    def _note_program(self, *shape: Any) -> None:
        self._shapes.add(shape)
        self._stats.programs = len(self._shapes)

    # ---- warm-up

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every program, several at a time, and run each once with nothing to do.

        Tracing holds Python's lock, compiling does not. What the persistent compilation cache has
        is read from there.
        """
        self.cache = tied(self.cache)  # as it is after a swap or `restore`
        self._enter_nobody()
        jobs = self._jobs()
        done = 0
        with ThreadPoolExecutor(thread_name_prefix="paged-decode-warmup") as pool:
            for finished in as_completed([pool.submit(job) for job in jobs]):
                finished.result()
                done += 1
                if progress is not None:
                    progress(done, len(jobs))
        self._run_all()

    def _jobs(self) -> list[Callable[[], object]]:
        """One for each program, which compiles it with the arguments that it will have."""
        config, programs = self._config, self._programs
        steps = dict(steps=config.decode_steps, top=config.top_logits)
        jobs: list[Callable[[], object]] = []

        def job(program: Any, *args: Any, **options: Any) -> None:
            jobs.append(lambda: program.lower(*args, **options).compile())

        for size in self._sizes:
            message = self._put(np.zeros(size.length, np.int32))
            job(update, self._table, self._state, message, size=size)
        for width in config.chunk_buckets:
            message = self._put(self._prefill_message(width, ()))
            job(programs.prefill, self.cache, self._table, self.params, message)
        for size in config.row_buckets:
            message = self._put(self._idle_rows(size))
            job(
                programs.decode, self.cache, self._state, self._table, self.params, message, **steps
            )
        return jobs

    def _run_all(self) -> None:
        config = self._config
        for size in self._sizes:
            nobody = [Enter(self._slots, 0, 0, 0, _GREEDY)] * size.enters
            self._update(nobody, _NO_TABLES)
        for width in config.chunk_buckets:
            self.prefill(Prefill(_NO_TABLES, (), ((width, ()),), ()))
        for size in config.row_buckets:
            jax.block_until_ready(self._run_decode(self._idle_rows(size)))
        width = 1
        while width < 2 * config.max_rows:
            self.cache = self.cache.copy_pages(PageCopies(*np.zeros((2, width), np.int32)))
            width *= 2
