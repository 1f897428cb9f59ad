"""Speculative decoding of a real model beside plain decoding: the same tokens in fewer steps.

    python examples/speculative.py
    python examples/speculative.py --drafts 7 "Say this again: the sea is wide and the sea is deep."

Drafts come from the text itself, by the loop of `08_drafts.py`, and cost nothing: no second model.
They pay where an answer repeats what is there: a correction, a quotation, code that is changed.
Each prompt is answered twice, with and without drafts; both answers stop at the model's end token.

The tokens are the argmax of the logits of the check. A program for T = k + 1 tokens rounds a little
differently from one for T = 1, so the two may part where two logits are equal but for rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import weights

from paged_decode import BlockAllocator, DecodeBatch, KVCache
from paged_decode._optional import needs

with needs("examples", or_exit=True):
    from models import decoder, tokenizer

drafts = import_module("08_drafts")

PAGE_SIZE = 16
CODE = """\
def total_price(items, tax_rate):
    total = 0
    for item in items:
        total = total + item.price * item.quantity
    total = total + total * tax_rate
    return total
"""
NEWS = (
    "The harbour of Lund was closed on Monday after a storm broke the northern wall. Nobody was "
    "hurt. The harbour master, Ida Holm, said that the wall will be repaired before the winter, "
    "and that fishing boats can use the southern quay until then."
)
PROMPTS = {
    "edit code": f"Rename the variable `total` to `amount` in this function:\n\n{CODE}",
    "correct": f"Repeat this text and correct its errors:\n\n{NEWS.replace('closed', 'closd')}",
    "quote": f"{NEWS}\n\nQuote the sentence in which Ida Holm speaks.",
    "summarise": f"Summarise this text in two sentences:\n\n{NEWS}",
    "tell": "Write a short story about a cat that lives in a library.",
}


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to some prompts, and what they took behind the prompts.

    Attributes:
      tokens: of each answer.
      steps: programs that were run.
      seconds: of these steps, those of the host included.
      offered: drafts that were checked.
      accepted: drafts that were right.
    """

    tokens: list[list[int]]
    steps: int
    seconds: float
    offered: int
    accepted: int

    @property
    def total(self) -> int:
        return sum(map(len, self.tokens))


class Speaker:
    """A model that answers some prompts at once, from a pool with room for them alone."""

    def __init__(self, path: Path, prompts: Sequence[Sequence[int]], new: int):
        config, self.params = decoder.load(path)
        self.prompts, self.new = [list(prompt) for prompt in prompts], new
        self.columns = -(-(max(map(len, self.prompts)) + new) // PAGE_SIZE)
        pages = 1 + self.columns * len(self.prompts)
        layout = decoder.layout(config, page_size=PAGE_SIZE, num_pages=pages)
        self.cache, self.allocator = KVCache.create(layout=layout), BlockAllocator(layout)
        model = decoder.make_model(config, every_token=True)

        @partial(jax.jit, donate_argnums=1)
        def check(params: Any, cache: KVCache, batch: DecodeBatch):
            logits, cache = model(params, cache, batch.tokens, batch)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        @partial(jax.jit, donate_argnums=1)
        def fill(params: Any, cache: KVCache, batch: DecodeBatch):
            return model(params, cache, batch.tokens, batch)[1]  # nobody computes the logits

        self.check, self.fill = check, fill

    def answer(self, which: Sequence[int], news: Sequence[int], k: int) -> Run:
        """Answers of so many tokens to the prompts of these numbers, with up to k drafts a step."""
        texts, allocator = [list(self.prompts[i]) for i in which], self.allocator
        handles = [allocator.allocate(text) for text in texts]
        filled = [len(text) - 1 for text in texts]
        allocator.truncate(handles, filled)  # the newest token comes with the first step
        found = [allocator.sequence(handle).cached for handle in handles]
        width = max(end - begin for begin, end in zip(found, filled, strict=True))
        if width:
            batch = allocator.batch(
                handles, found, filled, tokens_per_row=width, columns=self.columns
            )
            self.cache = self.fill(self.params, self.cache, batch)
        checked = np.zeros(len(texts), int), np.zeros(len(texts), int)  # steps and tokens of a row

        def check(params: Any, cache: KVCache, batch: DecodeBatch):
            counts = np.count_nonzero(batch.groups[0].slots, axis=1)
            checked[0][:] += counts > 0
            checked[1][:] += counts
            return self.check(params, cache, batch)

        goals = [len(text) + new for text, new in zip(texts, news, strict=True)]
        given = self.params, jax.block_until_ready(self.cache), allocator, handles, texts, goals
        start = time.perf_counter()
        self.cache, steps = drafts.speculate(check, *given, k, self.columns)
        seconds = time.perf_counter() - start
        allocator.free(handles)
        said = [text[end + 1 :] for text, end in zip(texts, filled, strict=True)]
        of_rows, tokens = (int(counts.sum()) for counts in checked)
        return Run(said, steps, seconds, tokens - of_rows, sum(map(len, said)) - of_rows)

    def lengths(self, stop: int | None) -> list[int]:
        """How many tokens each answer has, up to the first `stop`, or `new`."""
        found = []
        for number in range(len(self.prompts)):
            (said,) = self.answer([number], [self.new], 0).tokens
            found.append(said.index(stop) + 1 if stop in said else self.new)
        return found


def compare(
    speaker: Speaker, which: Sequence[int], news: Sequence[int], k: int, rounds: int = 1
) -> tuple[list[Run], list[Run]]:
    """Runs without and with drafts, in turns, after one of each that compiles."""
    plain, drafted = [], []
    for number in range(rounds + 1):
        pair = speaker.answer(which, news, 0), speaker.answer(which, news, k)
        if number:
            plain.append(pair[0])
            drafted.append(pair[1])
    return plain, drafted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", help="texts to answer; a few of its own without")
    parser.add_argument("--model", choices=weights.RELEASES, default="smollm2")
    parser.add_argument("--accept-terms", action="store_true", help="of use, of --model")
    parser.add_argument("--gguf", type=Path, help="your own model file in place of --model")
    parser.add_argument("--max-new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--drafts", type=int, default=4, help="tokens that are guessed each step")
    parser.add_argument("--show", action="store_true", help="print the answers, too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    release = weights.RELEASES[args.model]
    path = args.gguf or weights.fetch(release, accept_terms=args.accept_terms)
    words = tokenizer.load(path)
    asked = {text: text for text in args.prompt} or PROMPTS
    encode = words.encode_chat if words.chats else words.encode
    speaker = Speaker(path, [encode(text) for text in asked.values()], args.max_new)
    news = speaker.lengths(words.eos_id)
    for number, name in enumerate(asked):
        (plain,), (run,) = compare(speaker, [number], [news[number]], args.drafts)
        took, before = (1e3 * each.seconds / each.total for each in (run, plain))
        print(
            f"{name[:24]:24} {run.total:4} tokens, {run.total / run.steps:.2f} a step; "
            f"{run.accepted} of {run.offered} drafts right; {took:.1f} ms a token, without drafts "
            f"{before:.1f}: {before / took:.2f}x; "
            f"{'the same' if run.tokens == plain.tokens else 'OTHER'} tokens"
        )
        if args.show:
            print(words.decode(run.tokens[0]))


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        main()
    except (weights.WeightsError, NotImplementedError, ValueError, OSError) as error:
        sys.exit(f"speculative.py: {type(error).__name__}: {error}")
