"""Carries out plans on a device: programs, their shapes, and the state of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from .._devices import put_beside, tied
from ..allocator import PageCopies
from ..cache import KVCache
from .config import EngineConfig, EngineStats
from .drafting import Drafter, check_drafter
from .launching import Launched, Launching
from .model import Model, check_alike, check_arrays
from .packing import Packing
from .params import Kind
from .plans import Taken
from .processing import ProcessLogits, check_process
from .programs import DecodeOut, Programs, detail, masks, update
from .records import Decode, Enter, Prefill, Result, TableDelta, Ticket
from .resting import Rested, empty_like, rest, woken
from .rows import (
    MessageSizes,
    RowSizes,
    RowState,
    empty_message,
    messages,
)
from .scores import Scored

__all__ = ["DeviceRunner", "Progress"]

Progress = Callable[[int, int], object]
_LAUNCHED_SOON = 0.02  # seconds; a launch that takes longer waits for the device
_KIND = ("shape", "dtype", "weak_type", "format")  # what a program is compiled for


class Placed(NamedTuple):
    """Weights on their devices, and what a program is compiled for: the tree, and of each leaf."""

    params: Any
    kind: tuple[Any, list[list[Any]]]


class DeviceRunner(Launching):
    """The device half of an engine. The host waits for the device in `wait` and `collect` alone.

    On a GPU XLA asks the host whether a loop goes on and which branch is taken, and each answer
    leaves the device idle for some hundred microseconds. So where some row will need every step,
    and none is narrowed by top_k or top_p, a program is launched that decides nothing: `straight`.

    Programs are launched by a thread, because a launch may block: of a loop that asks, or of a
    model that does. The thread launches the next visit at once, while the caller reads the last one
    and plans. What the thread owns, cache, tables and rows, is handed out when it has nothing left
    to do.

    Every transfer to the device is an explicit one: a small message of fixed shape for what changed
    in rows and tables, one for each prefill program, one for the decode program.

    Args:
      model: as `Engine` takes it.
      params: its weights.
      cache: the pool; it is donated.
      config: shapes.
      columns: width of the page table.
      stats: where program shapes are counted.
      check: called with every plan, in the order of the launches, before them.
      drafter: guesses tokens, of which a step checks several; None: a step is one token.
      process: the user's own change of the logits.
      score: as `Engine` takes it.

    Attributes:
      straight: whether programs that decide nothing are used where they can be.
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
        check: Callable[[Any], object] | None = None,
        drafter: Drafter | None = None,
        process: ProcessLogits | None = None,
        score: Model | None = None,
    ):
        self._cache, self._config, self._stats, self._check = cache, config, stats, check
        self._rested: Rested | None = None
        super().__init__()
        self._models = model, score  # kept alive: programs refer to them weakly
        self._programs = Programs.of(model)
        self._scoring = self._programs if score is None else Programs.of(score)
        self._scored: list[tuple[Launched, int, int]] = []  # where, and how many tokens
        self._executables: dict[tuple[str, Any], Any] = {}  # by kind and size
        self._known: set[tuple[str, Any]] = set()
        self._kind: Any = None  # shapes of the weights for which these are
        self.params: Any = None
        self.use(self.placed(params))
        self._pages = [pages // cache.data_shards for pages, _ in cache.pools]
        self._slots = cache.data_shards * config.max_rows
        self._shape = len(self._pages), self._slots, columns
        self._drafter, self._process = drafter, process
        self._text = columns * cache.page_size  # places for a row's text
        if process is not None:
            check_process(process)
        if drafter is not None:
            check_drafter(drafter, self._text)
        self._all_have_text = drafter is not None or process is not None
        sizes = RowSizes(self._text, config.named_tokens, config.logits_args, config.mask_words)
        self._pack = Packing(config, cache.data_shards, sizes)
        few = max(256, 2 * self._slots) * len(self._pages)
        self._sizes = (
            MessageSizes(min(8, self._slots), few),
            MessageSizes(self._slots, max(few, 8192)),
        )
        # With drafts the device alone knows how many steps it takes; and where bits must not follow
        # from the batch, all draw in the same program.
        on_gpu = next(iter(cache.k_pages[0].devices())).platform == "gpu"
        self.straight = on_gpu and drafter is None and not config.batch_invariant
        self._enter_nobody()

    @property
    def cache(self) -> KVCache:
        """The living cache, when everything is launched."""
        self._drain()
        return self._cache

    @cache.setter
    def cache(self, cache: KVCache) -> None:
        self._drain()
        self._cache = cache

    def placed(self, params: Any) -> Placed:
        """Weights as programs take them: what lies on the host is put on the device once, not at
        every launch.

        Raises:
          ValueError: they are not alike to those that are in use, or hold what is no array.
        """
        leaves, tree = jax.tree.flatten(params)
        check_arrays(leaves, params)
        leaves = [*map(self._on_device, leaves)]
        kind = tree, [[getattr(leaf, name, None) for name in _KIND] for leaf in leaves]
        placed = Placed(jax.tree.unflatten(tree, leaves), kind)
        if self._kind is not None and kind != self._kind:
            check_alike(self.params, placed.params)
        return placed

    def use(self, placed: Placed) -> None:
        """Launch with these weights from now on."""
        self._drain()
        if placed.kind != self._kind:
            self._kind, self._executables = placed.kind, {}
        self.params = placed.params

    def _on_device(self, leaf: Any) -> Any:
        """What lies on the host goes to the cache's devices; to the first one uncommitted, as an
        array of the caller's would be, so that programs are the same for both."""
        if not isinstance(leaf, np.ndarray | np.generic | int | float | complex):
            return leaf
        pages = self._cache.k_pages[0]
        if pages.sharding.device_set == {jax.local_devices()[0]}:  # of a deleted array, too
            return jax.device_put(leaf)
        return put_beside(pages, leaf)

    def _put(self, tree: Any) -> Any:
        return put_beside(self._cache.k_pages[0], tree)

    def _enter_nobody(self) -> None:
        table = np.zeros(self._shape, np.int32)
        self._table, self._state = self._put((table, self._nobody()))
        self._kinds = np.zeros(self._slots, np.int8)  # how each row is sampled

    def _nobody(self) -> RowState:
        return RowState.empty(self._slots, self._pack.sizes)

    # ---- programs

    def _executable(self, kind: str, size: Any) -> Any:
        """A program of some size; one that is new is traced and compiled by the caller's thread,
        in whose contexts the model may count on (a mesh, a precision)."""
        if (kind, size) not in self._executables:
            self._drain()
            self._compile([self._lowered(kind, size)])
        return self._executables[kind, size]

    def _lowered(self, kind: str, size: Any) -> tuple[tuple[str, Any], Any]:
        """A program, traced with the arguments that it will have."""
        config, pages = self._config, (self._cache, self._table, self.params)
        apart = config.rows_apart
        if kind == "update":
            message = self._put(empty_message(size, self._shape)[0])
            lowered = update.lower(self._table, self._state, message, size=size)
        elif kind == "detail":
            message = self._put(self._pack.no_detail())
            lowered = detail.lower(self._table, self._state, message)
        elif kind == "masks":
            lowered = masks.lower(self._table, self._state, self._put(self._pack.no_mask()))
        elif kind == "prefill":
            message = self._put(self._pack.prefill(size, (), config.prefill_rows))
            lowered = self._programs.prefill.lower(
                *pages, message, drafter=self._drafter, apart=apart
            )
        elif kind == "score":
            message = self._put(self._pack.score(()))
            lowered = self._scoring.score.lower(*pages, message, top=config.top_logits, apart=apart)
        else:
            rows, known = size
            message = self._put(self._pack.idle(rows))
            static = dict(steps=config.decode_steps, top=config.top_logits, known=known)
            args = self._cache, self._state, self._table, self.params, message
            share = config.shared_prefix if self._drafter is None else 0
            own = dict(drafter=self._drafter, process=self._process, share=share, apart=apart)
            lowered = self._programs.decode.lower(*args, **static, **own)
        return (kind, size), lowered

    def _compile(
        self, lowered: Sequence[tuple[tuple[str, Any], Any]], progress: Progress | None = None
    ) -> None:
        """Several at a time: compiling does not hold Python's lock.

        One by one where bits may not depend on the program: on a GPU XLA times several algorithms
        for a product and remembers the best, but two threads may take different ones.
        """
        done, most = 0, 1 if self._config.rows_apart else None
        with ThreadPoolExecutor(most, thread_name_prefix="paged-decode-compile") as pool:
            coming = {pool.submit(each.compile): key for key, each in lowered}
            for finished in as_completed(coming):
                self._executables[coming[finished]] = finished.result()
                done += 1
                if progress is not None:
                    progress(done, len(lowered))
        self._known |= self._executables.keys()
        self._stats.programs = len(self._known)

    # ---- plans

    def prefill(self, plan: Prefill) -> Launched:
        """Launch the program; nothing is read.

        Where the launching thread has nothing else to do, it returns when that is done, or blocks:
        the thread needs Python's lock, which it would get late while the caller plans what comes
        next, and the device would have nothing to do meanwhile.
        """
        told = self._told(plan.enter, plan.tables)
        program = self._executable("score" if plan.scored else "prefill", plan.width)
        if plan.scored:
            message = self._pack.score(plan.chunks)
        else:
            message = self._pack.prefill(plan.width, plan.chunks, self._config.prefill_rows)

        def job(launched: Launched) -> Any:
            self._checked(plan)
            self._cache = self._cache.copy_pages(plan.copies)
            self._tell(told)
            args = self._cache, self._table, self.params, self._put(message)
            launched.begun.set()
            self._cache, over = program(*args)
            return over

        idle = self._last is None or self._last.future.done()
        launched = self._launch(job)
        if idle:
            wait([launched.future], _LAUNCHED_SOON)
        if plan.scored:
            slots = np.array([chunk.slot for chunk in plan.chunks], np.int64)
            counts = [len(chunk.tokens) for chunk in plan.chunks]
            pairs = zip(self._pack.places(slots, 1).tolist(), counts, strict=True)
            self._scored += [(launched, *pair) for pair in pairs]
        return launched

    def decode(self, plan: Decode) -> Ticket:
        """Launch one program of up to k steps."""
        told = self._told(plan.enter, plan.tables) + self._masked(plan)
        size, message, places = self._pack.decode(plan.slots, plan.budgets)
        program = self._executable("decode", (size, self._known_kind(plan)))

        def job(launched: Launched) -> DecodeOut:
            self._checked(plan)
            self._cache = self._cache.copy_pages(plan.copies)
            self._tell(told)
            given = self._put(message)
            launched.begun.set()
            return self._run_decode(program, given)

        scored, self._scored = self._scored, []
        return Ticket(plan, (self._launch(job), places, scored))

    def _known_kind(self, plan: Decode) -> Kind | None:
        """For a program that decides nothing: how its rows are sampled. None: it must decide all,
        and with `Kind.NARROW` all but whether a row is shaped."""
        kind = Kind(self._kinds[plan.slots].max())
        if not self.straight or kind == Kind.SHAPED:
            return None
        all_steps = plan.budgets.max() == self._config.decode_steps
        return kind if all_steps and kind < Kind.NARROW else Kind.NARROW

    def enter(self, enter: Sequence[Enter], tables: Sequence[TableDelta]) -> None:
        """Launch what plans say of rows and tables, and no program that uses them."""
        told = self._told(enter, tables)
        self._launch(lambda _: self._tell(told))

    def exchange(self, change: Callable[[KVCache], KVCache]) -> None:
        """Let the cache be what `change` makes of it, and wait until it is launched.

        By the launching thread, which no interrupt reaches: between two lines of the caller's, a
        cache that was donated could be lost. What `change` raises is raised here.
        """

        def job(launched: Launched) -> Exception | None:
            try:
                self._cache = change(self._cache)
            except Exception as error:
                return error
            return None

        if (error := self._launch(job).future.result()) is not None:
            raise error

    @property
    def asleep(self) -> bool:
        """Whether the cache rests."""
        return self._rested is not None

    def sleep(self, *, copy: bool) -> None:
        """Give the memory of the pools back; `copy`: what they hold stays on the host."""

        def change(cache: KVCache) -> KVCache:
            self._rested = rest(tied(cache) if copy else cache, copy=copy)
            return self._rested.cache

        self.exchange(change)

    def wake(self) -> None:
        """Make the pools again, where they rest."""

        def change(cache: KVCache) -> KVCache:
            if self._rested is not None:
                cache, self._rested = woken(self._rested), None
            return cache

        self.exchange(change)

    def copy(self, copies: tuple[PageCopies, ...]) -> None:
        """Copy pages of every group, or of none, in the order of the programs around it."""
        if any(len(each.src) for each in copies):
            self.exchange(lambda cache: cache.copy_pages(copies))

    def launched(self, out: Any) -> Any:
        """Return when it has been launched; what the launch raised is raised here."""
        return (out if isinstance(out, Launched) else out[0]).future.result()

    def wait(self, out: Any) -> None:
        """Return when what was launched is over."""
        jax.block_until_ready(self.launched(out))

    def collect(self, ticket: Ticket) -> Result:
        """What came out of it; waits for it.

        And until the thread has begun to launch what was queued behind it, which is short: if the
        caller went on first, the thread would wait for Python's lock, and the device for both.
        """
        launched, places, scored = ticket.out
        out = launched.future.result()
        if self._last is not None:
            self._last.begun.wait()
        packed = jax.device_get(out.packed)[:, places]
        steps = (len(packed) - 3) // 4
        logprobs = packed[steps:-3].view(np.float32).reshape(3, steps, -1)
        result = Result(
            packed[:steps], packed[-3], packed[-2], drafted=packed[-1], logprobs=logprobs
        )
        if scored:
            result = result._replace(scores=tuple(_scored(*each) for each in scored))
        if not self._config.top_logits:
            return result
        ids, logits = jax.device_get((out.top_ids, out.top_logits))
        return result._replace(top_ids=ids[:, places], top_logits=logits[:, places])

    @property
    def is_lost(self) -> bool:
        """Whether pages may not hold what they should: a launch has failed, perhaps with the
        cache. Of one that rests nothing is lost."""
        return self._failure is not None or (self.cache.is_deleted and self._rested is None)

    def restart(self, *, lost: bool) -> None:
        """Begin without rows; with an empty cache, if what it held is lost."""
        self._drain()
        self._failure, self._scored = None, []
        if lost:
            self._cache = empty_like(self._cache)
        self._enter_nobody()

    # ---- what a launch takes

    def _checked(self, plan: Prefill | Decode) -> None:
        if self._check is not None:
            self._check(plan.shared)

    def _told(self, enter: Sequence[Enter], tables: Sequence[TableDelta]) -> list[tuple[Any, Any]]:
        """What the device is to know of rows and tables; nothing, if nothing changed."""
        for each in enter:
            self._kinds[each.slot] = each.kind
        own = [self._local(each, pages) for each, pages in zip(tables, self._pages, strict=True)]
        told = messages(enter, own, self._sizes, shape=self._shape)
        out = [(self._executable("update", size), message) for size, message in told]
        for each in enter:
            if self._all_have_text or each.sampling.is_shaped:
                out.append((self._executable("detail", self._text), self._pack.detail(each)))
        return out

    def _masked(self, plan: Decode) -> list[tuple[Any, Any]]:
        """The masks of this visit."""
        if not plan.masks:
            return []
        program = self._executable("masks", self._pack.sizes.words)
        return [(program, message) for message in self._pack.masks(plan)]

    def _tell(self, told: Sequence[tuple[Any, Any]]) -> None:
        for program, message in told:
            args = self._table, self._state, self._put(message)
            self._table, self._state = program(*args)

    def _local(self, delta: TableDelta, num_pages: int) -> TableDelta:
        """The page ids that the shard of each row, of so many pages, has for them."""
        if self._pack.shards == 1:
            return delta
        shard = delta.slots // self._config.max_rows
        return delta._replace(pages=delta.pages - shard * num_pages)

    def _run_decode(self, program: Any, message: Any) -> DecodeOut:
        args = self._cache, self._state, self._table, self.params, message
        self._cache, self._state, out = program(*args)
        return out

    # ---- warm-up

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every program, and run each once with nothing to do.

        What JAX's persistent compilation cache has is read from there.
        """
        self.exchange(tied)  # as it is after a swap or `restore`
        self._enter_nobody()
        config, self._executables = self._config, {}
        kinds = (None, Kind.GREEDY, Kind.WHOLE, Kind.NARROW) if self.straight else (None,)
        decode = [(rows, known) for rows in config.row_buckets for known in kinds]
        sizes = dict(update=self._sizes, prefill=config.chunk_buckets, decode=decode)
        sizes |= dict(score=(chunk,) if (chunk := config.score_chunk) else ())
        sizes |= dict(detail=(self._text,), masks=(words,) if (words := config.mask_words) else ())
        keys = [(kind, size) for kind, each in sizes.items() for size in each]
        self._compile([self._lowered(*key) for key in keys], progress)
        told = [
            (self._executable("update", size), empty_message(size, self._shape)[0])
            for size in self._sizes
        ]
        told += [
            (self._executable("detail", size), self._pack.no_detail()) for size in sizes["detail"]
        ]
        told += [(self._executable("masks", size), self._pack.no_mask()) for size in sizes["masks"]]
        self._launch(lambda _: self._tell(told))
        nothing = Taken.total([], len(self._pages))
        for width in config.chunk_buckets:
            self.wait(self.prefill(Prefill(*nothing, (), width, (), ())))
        if config.score_chunk:
            self.wait(self.prefill(Prefill(*nothing, (), config.score_chunk, (), (), True)))
        for size in decode:
            given = self._executable("decode", size), self._put(self._pack.idle(size[0]))
            self.wait(self._launch(lambda _, given=given: self._run_decode(*given)))
        width = 1
        while width < 2 * config.max_rows:
            self.copy((PageCopies(*np.zeros((2, width), np.int32)),) * len(self._pages))
            width *= 2


def _scored(launched: Launched, place: int, count: int) -> Scored:
    """What a program has found of the row at a place, which had so many tokens."""
    out = jax.device_get(launched.future.result())
    return Scored(*(each[place, each.shape[1] - count :] for each in out))
