"""What pages of 8 bits cost in accuracy: tokens of a real model, and a needle in a long text.

    python benchmarks/eight_bits.py [--model smollm2] [--parts agree needle]

`agree`: the model says 64 tokens to each of 8 prompts, greedily, over pages of float32. Then every
dtype of pages is given the same text, and how often its likeliest next token is the one that was
said is counted, with the mean difference of that token's log-probability.

`needle`: a sentence with a number lies somewhere in a text of as many tokens as the model was made
for, and the text ends by asking for it. What is said over pages of each dtype is kept beside what
bfloat16 says.

Weights and arithmetic are of float32 (`--dtype`), so that pages are all that differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _result import write_result

from paged_decode import BlockAllocator, KVCache
from paged_decode.cache import DecodeBatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import weights
from models import decoder, tokenizer

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
NEW, CHUNK, PAGE_SIZE = 64, 256, 16
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "Dear Sir or Madam, I am writing to",
    "To bake bread, first",
    "In 1969, people landed on the Moon. Since then,",
    "Question: Why is the sky blue? Answer:",
)
FILLER = (
    "The river bends twice before it meets the road. ",
    "A cart passed with apples, and nobody looked up. ",
    "In the evening the wind came from the north. ",
    "She counted the steps to the door and forgot the number. ",
    "There was bread on the table, and a letter beside it. ",
)
NEEDLE = "The secret code of the harbour is 70418. "
QUESTION = "What is the secret code of the harbour? The secret code of the harbour is"
DEPTHS = (0.1, 0.5, 0.9)


class Reader:
    """The model over one sequence and a cache of some dtype."""

    def __init__(self, config: Any, params: Any):
        self.config, self.params = config, params
        every = decoder.make_model(config, every_token=True)

        def step(params: Any, cache: KVCache, tokens: Any, batch: DecodeBatch) -> Any:
            logits, cache = every(params, cache, tokens, batch)
            return jax.nn.log_softmax(logits[0]), cache

        self._step = jax.jit(step, donate_argnums=1)

    def begin(self, dtype: str, most: int) -> None:
        """Forget all, and make room for so many tokens."""
        pages = -(-(most + CHUNK) // PAGE_SIZE) + 2
        layout = decoder.layout(
            self.config, page_size=PAGE_SIZE, num_pages=pages, dtype=dtype, window_pages=None
        )
        self.cache, self.allocator = KVCache.create(layout=layout), BlockAllocator(layout)
        self.columns, self.handle = pages, None

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities `[n, V]` behind each of these tokens, which follow what was read."""
        found = []
        for at in range(0, len(tokens), CHUNK):
            some = list(tokens[at : at + CHUNK])
            width = 1 if len(some) == 1 else CHUNK
            if self.handle is None:
                self.handle, begin = self.allocator.allocate(some), 0
            else:
                begin = self.allocator.sequence(self.handle).length
                self.allocator.append([self.handle], np.array([some]))
            batch = self.allocator.batch(
                [self.handle],
                [begin],
                [begin + len(some)],
                tokens_per_row=width,
                columns=self.columns,
            )
            logp, self.cache = self._step(self.params, self.cache, batch.tokens, batch)
            self.allocator.commit([self.handle], [begin + len(some)])
            found.append(np.asarray(logp[width - len(some) :]))
        return np.concatenate(found)

    def say(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens behind a prompt, which nothing was read before."""
        said = [int(self.read(prompt)[-1].argmax())]
        while len(said) < count:
            said.append(int(self.read(said[-1:])[-1].argmax()))
        return said


def agreement(reader: Reader, words: Any) -> list[dict[str, Any]]:
    def taught(dtype: str, prompt: list[int], tokens: list[int]) -> np.ndarray:
        """Log-probabilities behind a prompt and the tokens that were said to it."""
        reader.begin(dtype, len(prompt) + NEW)
        return reader.read([*prompt, *tokens[:-1]])[len(prompt) - 1 :]

    cases = []
    for prompt in map(words.encode, PROMPTS):
        reader.begin("float32", len(prompt) + NEW)
        tokens = reader.say(prompt, NEW)
        cases.append((prompt, tokens, taught("float32", prompt, tokens)))
    records = []
    for dtype in DTYPES:
        same, off = 0, []
        for prompt, tokens, theirs in cases:
            ours = taught(dtype, prompt, tokens)
            same += int((ours.argmax(axis=1) == tokens).sum())
            at = np.arange(NEW), np.array(tokens)
            off += np.abs(ours[at] - theirs[at]).tolist()
        record = dict(same=same, tokens=NEW * len(PROMPTS), mean_logprob_error=float(np.mean(off)))
        records.append(
            dict(case={"part": "agree", "pages": dtype}, system="paged-decode", **record)
        )
        print(records[-1], flush=True)
    return records


def haystack(words: Any, tokens: int, depth: float) -> list[int]:
    """A text of so many tokens with the needle at this part of it."""
    needle, question = words.encode(NEEDLE), words.encode(QUESTION)
    filler: list[int] = []
    rng = np.random.default_rng(0)
    while len(filler) < tokens:
        filler += words.encode(FILLER[rng.integers(len(FILLER))])
    room = tokens - len(needle) - len(question)
    begin = int(room * depth)
    return [*filler[:begin], *needle, *filler[begin:room], *question]


def needles(reader: Reader, words: Any, context: int) -> list[dict[str, Any]]:
    records = []
    for depth in DEPTHS:
        text = haystack(words, context - 8, depth)
        for dtype in DTYPES[1:]:
            reader.begin(dtype, context)
            answer = words.decode(reader.say(text, 8))
            case = {"part": "needle", "pages": dtype, "context": context, "depth": depth}
            records.append(
                dict(case=case, system="paged-decode", answer=answer, found="70418" in answer)
            )
            print(records[-1], flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=weights.RELEASES, default="smollm2")
    parser.add_argument("--gguf", type=Path, help="your own model file in place of --model")
    parser.add_argument("--parts", nargs="+", choices=("agree", "needle"), default=["agree"])
    parser.add_argument("--context", type=int, help="of the needle; default: the model's longest")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--name", default="eight_bits")
    args = parser.parse_args()
    path = args.gguf or weights.fetch(weights.RELEASES[args.model])
    config, params = decoder.load(path, dtype=args.dtype)
    words, reader = tokenizer.load(path), Reader(config, jax.tree.map(jnp.asarray, params))
    records = agreement(reader, words) if "agree" in args.parts else []
    if "needle" in args.parts:
        records += needles(reader, words, args.context or config.max_positions)
    command = " ".join(["python", *sys.argv])
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" else device.device_kind
    write_result(args.name, records, command=command, device=kind)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
