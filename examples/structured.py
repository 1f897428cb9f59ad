"""Answers that are JSON of a schema, every time, by a grammar of llguidance.

    python examples/structured.py
    python examples/structured.py --schema my.json --temperature 1.2 "Describe a lighthouse."

Before each token the engine asks the grammar which ones may come. Rows without a grammar go on
beside it, several tokens a visit.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import weights

from paged_decode import BlockAllocator, Engine, EngineConfig, KVCache, SamplingParams
from paged_decode._optional import needs

with needs("grammar", or_exit=True):
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance.numpy import fill_next_token_bitmask

with needs("examples", or_exit=True):
    from models import decoder, tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "kind": {"enum": ["animal", "plant", "place", "thing"]},
        "size_in_metres": {"type": "number", "minimum": 0, "maximum": 9999},
        "words": {
            "type": "array",
            "items": {"type": "string", "maxLength": 20},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "kind", "size_in_metres", "words"],
    "additionalProperties": False,
}
PROMPTS = [
    "Describe a lighthouse as JSON.",
    "Describe an oak as JSON.",
    "What is a whale? In JSON.",
]


class Vocabulary:
    """The tokens of a model as llguidance wants them."""

    bos_token_id = None

    def __init__(self, own: tokenizer.Tokenizer):
        spelt = [own.token_bytes(i) for i in range(len(own.tokens))]
        self.special_token_ids = [i for i, piece in enumerate(spelt) if not piece]
        names = (own.tokens[i].encode() for i in self.special_token_ids)
        special = dict(zip(self.special_token_ids, names, strict=True))
        self.tokens = [special.get(i, piece) for i, piece in enumerate(spelt)]
        self.eos_token_id, self._encode = own.eos_id, own.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


class Grammar:
    """A `TokenMask`: what may come next by a grammar, and the end of the text behind it."""

    def __init__(self, vocabulary: LLTokenizer, grammar: str):
        self._matcher = LLMatcher(vocabulary, grammar)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())

    def fill(self, bits: np.ndarray) -> None:
        """Sets the bits of what may come."""
        fill_next_token_bitmask(self._matcher, bits[None])

    def accept(self, token: int) -> bool:
        """Whether the grammar takes it."""
        return self._matcher.consume_token(token)


def json_grammar(own: tokenizer.Tokenizer, vocab_size: int, schema: dict[str, Any]) -> Any:
    """What makes a mask for every answer, for `submit(..., mask=...)`."""
    vocabulary = LLTokenizer(TokenizerWrapper(Vocabulary(own)), n_vocab=vocab_size)
    compact = json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
    return partial(Grammar, vocabulary, LLMatcher.grammar_from_json_schema(compact))


def make(path: Path, rows: int, tokens: int = 512) -> tuple[Engine, tokenizer.Tokenizer]:
    """An engine for so many answers at once, and the tokenizer."""
    config, params = decoder.load(path, dtype="float32")
    own = tokenizer.load(path)
    pages = rows * tokens // 16 + 1
    layout = decoder.layout(config, page_size=16, num_pages=pages, dtype=jnp.float32)
    allocator = BlockAllocator(layout)
    shapes = EngineConfig(
        max_rows=rows,
        row_buckets=(rows,),
        max_sequence_tokens=tokens,
        vocab_size=config.vocab_size,
        stop_tokens=(own.eos_id,),
        token_masks=True,
    )
    cache = KVCache.create(layout=layout)
    return Engine(decoder.make_model(config), params, cache, allocator, shapes), own


def main() -> None:
    """Answer each prompt with JSON, and one without beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", default=PROMPTS)
    parser.add_argument("--schema", type=Path, help="a JSON schema of your own")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new", type=int, default=256, help="tokens of an answer at most")
    args = parser.parse_args()
    schema = json.loads(args.schema.read_text()) if args.schema else SCHEMA
    engine, own = make(weights.fetch(weights.SMOLLM2), len(args.prompt) + 1)
    mask = json_grammar(own, engine.config.vocab_size or 0, schema)
    sampling = SamplingParams(args.max_new, args.temperature, seed=args.seed)
    free = engine.submit(own.encode_chat(args.prompt[0]), sampling)
    asked = {
        engine.submit(own.encode_chat(text), sampling, mask=mask): text for text in args.prompt
    }
    said: dict[int, list[int]] = {request: [] for request in (free, *asked)}
    for event in engine.stream():
        if event.token is not None:
            said[event.request_id].append(event.token)
    print(f"{args.prompt[0]} (no grammar)\n  {own.decode(said[free])!r}")
    for request, text in asked.items():
        answer = own.decode(said[request])
        is_whole = said[request][-1:] == [own.eos_id]
        print(f"{text}\n  {json.loads(answer) if is_whole else answer + ' ... (--max-new)'}")


if __name__ == "__main__":
    main()
