"""Eight prompts share a pool that is too small for them: watch pages being shared and taken.

Run by `make demo`. Fetches SmolLM2-135M-Instruct once, generates, prints a table and writes a
timeline of the pool to out/demo_timeline.png.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
import weights

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode._optional import needs

with needs("examples", or_exit=True):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from models import decoder, tokenizer
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

PAGE_SIZE, NUM_PAGES, MAX_NEW, MAX_ROWS = 16, 37, 64, 8
OUT = Path("out/demo_timeline.png")

SYSTEM = """\
You are the night librarian of a small coastal town. Your library holds nine thousand books, two
hundred sea charts and one cat, whose name is Ballast. You answer in one short paragraph. You
are friendly, precise and a little tired. You know the tides, the opening hours (from ten in the
evening until six in the morning, closed on the night of the new moon), and where every book
stands. Charts may be read at the long table but never leave the house. Readers may take three
books home, for as long as the moon needs to come back to the same shape. When somebody asks for
something that the library does not have, you say so plainly and name the nearest thing that it
does have. You never invent a title. You never quote prices. You do not speak about the
lighthouse.
"""

SHARED = [
    "When do you open tonight?",
    "May I take a sea chart home?",
    "How many books may I borrow, and for how long?",
    "What is the cat called?",
]
ALONE = [
    "Write one sentence about the sea.",
    "What is the capital of Portugal?",
    "Explain what a page table does.",
    "List three uses for an old newspaper.",
]


def make_engine(path: Path, longest_prompt: int) -> Engine:
    config, params = decoder.load(path)
    cache = KVCache.create(
        num_layers=config.num_layers,
        num_pages=NUM_PAGES,
        num_kv_heads=config.num_kv_heads,
        page_size=PAGE_SIZE,
        head_dim=config.head_dim,
    )
    shapes = EngineConfig(
        max_rows=MAX_ROWS,
        row_buckets=(MAX_ROWS,),
        chunk_buckets=(16, 64),
        decode_steps=4,
        prefill_chunk=64,
        max_sequence_tokens=longest_prompt + MAX_NEW,
    )
    return Engine(
        decoder.make_model(config), params, cache, BlockAllocator(NUM_PAGES, PAGE_SIZE), shapes
    )


class Screen:
    """What the terminal shows while the batch runs."""

    def __init__(self, questions: list[str], words: tokenizer.Tokenizer):
        self.questions, self.words = questions, words
        self.tokens: list[list[int]] = [[] for _ in questions]
        self.reasons: list[str] = ["" for _ in questions]
        self.bars = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(48),
            MofNCompleteColumn(),
        )
        self.done = self.bars.add_task("tokens", total=len(questions) * MAX_NEW)
        self.used = self.bars.add_task("pages used", total=NUM_PAGES - 1)

    def __rich__(self) -> Group:
        table = Table(expand=True, box=None, pad_edge=False)
        table.add_column("prompt", style="bold", width=34, no_wrap=True)
        table.add_column("tokens", justify="right", width=6)
        table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=1)
        for question, ids, reason in zip(self.questions, self.tokens, self.reasons, strict=True):
            text = self.words.decode(ids).replace("\n", " ")
            shown = text if reason else text[-90:]
            if reason == "invalid_logits":
                shown = f"[red]{reason}[/red] {text}"
            table.add_row(question, str(len(ids)), shown or "[dim]waiting[/dim]")
        return Group(table, self.bars)

    def update(self, events, used_pages: int) -> None:
        for event in events:
            if event.token is not None:
                self.tokens[event.request_id].append(event.token)
            if event.finish_reason:
                self.reasons[event.request_id] = event.finish_reason
        finished = sum(
            MAX_NEW if r else len(t) for t, r in zip(self.tokens, self.reasons, strict=True)
        )
        self.bars.update(self.done, completed=finished)
        self.bars.update(self.used, completed=used_pages)


def run(engine: Engine, prompts: list[list[int]], screen: Screen, stop: int, console: Console):
    """Generate and keep, per host visit, the page counts by state and the tail waste."""
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_new_tokens=MAX_NEW, stop_tokens=(stop,)))
    history, waste, preempted_at = [], [], []
    with Live(screen, console=console, refresh_per_second=8):
        while not engine.idle:
            before = engine.stats.preemptions
            screen.update(engine.step(), engine.allocator.num_used)
            history.append(np.bincount(engine.allocator.page_states(), minlength=5)[:4])
            waste.append(engine.allocator.stats().tail_waste)
            if engine.stats.preemptions > before:
                preempted_at.append(len(history) - 1)
    return np.array(history), [w for w in waste if w > 0], preempted_at


def count_compilations() -> list[float]:
    """A list that grows by the seconds of every program XLA compiles from now on."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def report(
    engine: Engine, warm: int, late: int, seconds: float, waste: list[float], console: Console
) -> None:
    stats = engine.stats
    table = Table(title="One continuous batch, one small pool", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in (
        ("prompt tokens computed", f"{stats.prefill_tokens}"),
        ("generated", f"{stats.decode_tokens / seconds:.1f} tokens/s"),
        ("prompt tokens found in the prefix cache", f"{stats.prefix_hit_tokens}"),
        ("most pages used / pages in the pool", f"{stats.peak_used_pages} / {NUM_PAGES - 1}"),
        ("tail waste, mean over visits", f"{100 * np.mean(waste):.1f} %"),
        ("preemptions", f"{stats.preemptions}"),
        ("tokens computed again after preemption", f"{stats.recomputed_tokens}"),
        ("compilations in warm-up, and after it", f"{warm}, {late}"),
        ("time after warm-up", f"{seconds:.1f} s"),
    ):
        table.add_row(name, value)
    console.print(table)


def plot(history: np.ndarray, preempted_at: list[int]) -> None:
    """Stack the pages by state over host visits."""
    free, cached, owned, shared = history.T
    names = ["shared by several sequences", "owned by one sequence", "cached, evictable", "free"]
    colours = ["#1b6ca8", "#6fb1e0", "#f2c879", "#eeeeee"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    visits = np.arange(len(history))
    axes.stackplot(visits, shared, owned, cached, free, labels=names, colors=colours, step="post")
    for i, visit in enumerate(preempted_at):
        label = "a sequence is preempted" if i == 0 else None
        axes.axvline(visit, color="#b3261e", linewidth=1.2, linestyle="--", label=label)
    axes.set(
        xlim=(0, len(history) - 1),
        ylim=(0, NUM_PAGES - 1),
        xlabel="host visit (one prefill chunk and up to 4 decode steps)",
        ylabel=f"pages of {PAGE_SIZE} tokens",
        title="Eight prompts, four with one system prompt, in a pool too small for all at once",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, frameon=False, fontsize=9)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=150)


def main() -> None:
    console = Console()
    console.print("Fetching and loading SmolLM2-135M-Instruct ...")
    path = weights.fetch()
    words = tokenizer.load(path)
    questions = [q for pair in zip(SHARED, ALONE, strict=True) for q in pair]
    system = dict(role="system", content=" ".join(SYSTEM.split()))
    chats = [[system] * (q in SHARED) + [dict(role="user", content=q)] for q in questions]
    prompts = [words.encode_chat(chat) for chat in chats]
    engine = make_engine(path, max(map(len, prompts)))
    console.print("Compiling ...")
    compiled = count_compilations()
    engine.warmup()
    warm = len(compiled)
    console.print(f"{warm} programs in {sum(compiled):.0f} s")
    start = time.perf_counter()
    screen = Screen(questions, words)
    history, waste, preempted_at = run(engine, prompts, screen, words.eos_id, console)
    seconds = time.perf_counter() - start
    for question, tokens in zip(questions, screen.tokens, strict=True):
        console.print(f"[bold]{question}[/bold]\n{words.decode(tokens).strip()}\n")
    report(engine, warm, len(compiled) - warm, seconds, waste, console)
    engine.allocator.check_invariants()
    plot(history, preempted_at)
    console.print(f"Timeline of the pool: {OUT}")


if __name__ == "__main__":
    sys.exit(main())
