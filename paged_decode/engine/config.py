"""The engine's shapes and limits, and its counters."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocator.arguments import as_count, as_counts
from ..allocator.view import AllocatorView
from ..policies import GroupPages

__all__ = ["EngineConfig", "EngineStats", "groups_of", "sequence_limit"]

_LEAST = dict(
    max_rows=1,
    decode_steps=1,
    prefill_chunk=1,
    prefill_rows=1,
    prefill_tokens=1,
    max_sequence_tokens=2,
    top_logits=0,
    named_tokens=0,
    logits_args=0,
    score_chunk=0,
    shared_prefix=0,
    vocab_size=1,
    max_preemptions=0,
    priority_ageing=1,
)
_OPTIONAL = ("prefill_tokens", "max_sequence_tokens", "vocab_size")  # may be None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The few shapes that the engine compiles for, and its limits.

    Integers may be Python's or NumPy's; they are kept as Python ints.

    Attributes:
      max_rows: samples that decode or prefill at once.
      decode_steps: tokens per row and visit (k).
      prefill_chunk: tokens per row and prefill program.
      prefill_rows: rows per prefill program. One chunk of one row keeps a CPU busy; a large
        accelerator wants several.
      prefill_tokens: prompt tokens that one visit computes at most, the padding of its programs
        included, but for one program that always runs; so it bounds how long running rows wait for
        their next tokens. Prompts take turns. None: one chunk of every prompt.
      row_buckets: rows of the compiled decode programs, ascending to max_rows; empty:
        (1, max_rows).
      chunk_buckets: chunks of the compiled prefill programs, ascending to prefill_chunk; empty:
        (prefill_chunk,).
      max_sequence_tokens: longest sequence, prompt and output; sets the width of the page table.
        None: all that the pool can hold.
      top_logits: how many of the largest logits to report with every token, and alternatives that
        `SamplingParams.logprobs` may ask for.
      named_tokens: how many tokens a request may name at most in `logit_bias`, `allowed_tokens`,
        `bad_tokens`, and as stop tokens with `min_new_tokens`; 12 bytes each for every row.
      logits_args: how many numbers a request may give to `process_logits`.
      score_chunk: tokens of the program that computes `SamplingParams.prompt_logprobs`, one prompt
        at a time, at most prefill_chunk; it holds so many rows of logits. 0: there is none.
      shared_prefix: decode steps read the pages that samples begin with in common once for up to 16
        of them, where that saves so many tokens of reading, such as 512 (elsewhere: cascade
        attention). The device finds them in the page tables, once a visit: of forks, of samples of
        one prompt, of prefix hits. It changes logits by rounding, and where nothing is shared it
        costs some small kernels in every layer. Layers with a window, and steps of several tokens
        (drafts), do as without it. 0: every row reads its own.
      batch_invariant: every token's logits have the same bits whatever else is in the batch, and
        whether what is in front of it was found, computed at once, in chunks or step by step. All
        programs run the model over as many rows of one token as the largest has tokens, so prompts
        are computed as if they were decoded: docs/training.md tells what it needs of a model, and
        what it costs. Not with drafts or shared_prefix.
      token_masks: whether requests may have a `mask`; needs `vocab_size`, a bit of it for each row.
      stop_tokens: those of every request that has not `ignore_eos`, such as the end of a text.
      vocab_size: prompts with ids from here on are refused; None: not checked.
      max_preemptions: how often a sample may lose its pages; after that it waits until all that
        it can grow to is free, and keeps them.
      priority_ageing: how many requests later one may come for each priority that it is above
        another, and be admitted before it: a request of priority p overtakes one of q < p if it is
        fewer than `priority_ageing * (p - q)` requests behind. So nobody waits for ever.
      collect_at_once: wait for every visit before the host goes on. Plans, tokens and events are
        the same; it shows what the waiting costs, and in which visit a program failed.
    """

    max_rows: int = 8
    decode_steps: int = 8
    prefill_chunk: int = 128
    prefill_rows: int = 1
    prefill_tokens: int | None = None
    row_buckets: tuple[int, ...] = ()
    chunk_buckets: tuple[int, ...] = ()
    max_sequence_tokens: int | None = None
    top_logits: int = 0
    named_tokens: int = 64
    logits_args: int = 0
    score_chunk: int = 0
    shared_prefix: int = 0
    batch_invariant: bool = False
    token_masks: bool = False
    stop_tokens: tuple[int, ...] = ()
    vocab_size: int | None = None
    max_preemptions: int = 8
    priority_ageing: int = 64
    collect_at_once: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                value = as_count(name, getattr(self, name), least, 2**31 - 1)
                object.__setattr__(self, name, value)
        rows = (self.max_rows,) if self.batch_invariant else (1, self.max_rows)
        for name, last, least in (
            ("row_buckets", self.max_rows, rows),
            ("chunk_buckets", self.prefill_chunk, (self.prefill_chunk,)),
        ):
            sizes = tuple(sorted(set(as_counts(name, getattr(self, name)) or least)))
            if sizes[0] < 1 or sizes[-1] != last:
                raise ValueError(f"{name} must be positive and end with {last}, got {sizes}")
            object.__setattr__(self, name, sizes)
        stops = tuple(as_counts("stop_tokens", self.stop_tokens, 0, 2**31 - 1))
        object.__setattr__(self, "stop_tokens", stops)
        for name in ("collect_at_once", "batch_invariant", "token_masks"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        if self.score_chunk > self.prefill_chunk:
            raise ValueError(
                f"score_chunk must be at most prefill_chunk {self.prefill_chunk}, got "
                f"{self.score_chunk}"
            )
        if self.batch_invariant and len(self.row_buckets) > 1:
            raise ValueError(
                f"batch_invariant draws over one number of rows: row_buckets must be "
                f"({self.max_rows},), got {self.row_buckets}"
            )
        if self.batch_invariant and self.shared_prefix:
            raise ValueError(
                "batch_invariant and shared_prefix exclude each other: what is merged of a row "
                "follows from which rows share its prefix"
            )
        if self.token_masks and self.vocab_size is None:
            raise ValueError("token_masks needs vocab_size: a mask has a bit for each of its ids")

    @property
    def mask_words(self) -> int:
        """int32 words of a mask; 0 without masks."""
        return -(-(self.vocab_size or 0) // 32) if self.token_masks else 0

    @property
    def rows_apart(self) -> int:
        """Rows of one token of every program's model call in each shard, if bits are not to follow
        from the batch; 0: programs have batches of their own."""
        largest = max(self.max_rows, self.prefill_rows * self.prefill_chunk)
        return largest if self.batch_invariant else 0

    @property
    def tokens_ahead(self) -> int:
        """For how many tokens behind the computed ones a row may have pages in a window: those of
        the chunks of one visit, or of one visit in flight and the next."""
        return max(self.prefill_rows * self.prefill_chunk, 2 * self.decode_steps)


@dataclass(slots=True)
class EngineStats:
    """What the engine has done so far.

    Attributes:
      visits: turns of the host: calls of `step`, whoever makes them.
      prefill_tokens: tokens computed by prefill; recomputed_tokens of them again: their sample, or
        another of its prompt, had them in the cache before.
      prefix_hit_tokens: prompt tokens found in the prefix cache at first admission.
      decode_tokens: tokens generated; draft_tokens of them were drafts, and took no step.
      preemptions: times that a sample lost its pages to another one.
      swaps: preemptions whose pages went to the host tier.
      swapped_out_pages, swapped_in_pages: pages that the tier held for them then, and that came
        back from it.
      programs: program shapes used so far, which stops growing after `warmup`.
      peak_used_pages: most pages referenced at once.
      visit_seconds: time in visits, callbacks left out; wait_seconds of it the host waited for
        the device, and did nothing.
    """

    visits: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_hit_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    swapped_out_pages: int = 0
    swapped_in_pages: int = 0
    programs: int = 0
    peak_used_pages: int = 0
    visit_seconds: float = 0.0
    wait_seconds: float = 0.0

    def note_usage(self, num_pages: int) -> None:
        """So many pages are referenced now."""
        self.peak_used_pages = max(self.peak_used_pages, num_pages)


def groups_of(config: EngineConfig, allocator: AllocatorView) -> tuple[GroupPages, ...]:
    """The pools of every group of layers, for one sequence: those of one shard."""
    size, shards = allocator.page_size, allocator.num_shards
    chunk, ahead = config.prefill_chunk, config.tokens_ahead
    return tuple(
        GroupPages(size, num_pages // shards - 1, window, chunk, ahead)
        for num_pages, window in allocator.pools
    )


def sequence_limit(config: EngineConfig, allocator: AllocatorView) -> int:
    """Tokens that a sequence may have.

    Raises:
      ValueError: a pool cannot hold so many, or not even two; or not what a window needs of them.
    """
    groups = groups_of(config, allocator)
    usable = min(group.usable for group in groups if group.window is None)
    capacity = usable * allocator.page_size
    limit = config.max_sequence_tokens or capacity
    if not 2 <= limit <= capacity:
        raise ValueError(
            f"max_sequence_tokens must be in [2, {capacity}] for a pool of "
            f"{usable} usable pages of {allocator.page_size}, got {limit}"
        )
    for number, group in enumerate(groups):
        if group.usable < (needed := group.pages_for(limit)):
            raise ValueError(
                f"group {number} needs {needed} usable pages of {allocator.page_size} for one "
                f"sequence, with a window of {group.window} tokens and {config.tokens_ahead} ahead "
                f"of it (prefill_rows * prefill_chunk, or 2 * decode_steps), got {group.usable}"
            )
    return limit
