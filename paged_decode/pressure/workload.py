"""Requests to simulate: read from traces, or generated from a seed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

__all__ = ["Request", "chats", "poisson", "prefix_tree", "read_azure", "read_mooncake"]

_LAST_TOKEN = 2**30  # ids from here on stand for generated tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One request; a prompt is runs of equal tokens, so that a trace stays small in memory.

    Attributes:
      arrival_seconds: since the start of the workload.
      blocks: content ids of consecutive runs of the prompt: equal ids are equal tokens.
      block_tokens: length of each run but the last, in tokens.
      prompt_tokens: length of the prompt.
      output_tokens: how many tokens each sample generates, at least 1.
      samples: answers to the one prompt.
      priority: for policies that look at it.
    """

    arrival_seconds: float
    blocks: tuple[int, ...]
    block_tokens: int
    prompt_tokens: int
    output_tokens: int
    samples: int = 1
    priority: int = 0

    def prompt(self) -> np.ndarray:
        """The prompt's tokens, int32 `[prompt_tokens]`."""
        runs = np.repeat(np.array(self.blocks, np.int32), self.block_tokens)
        return runs[: self.prompt_tokens]

    def text(self, vocab_size: int) -> np.ndarray:
        """Tokens below `vocab_size` for a real model, int32 `[prompt_tokens]`.

        Equal blocks are equal text, and different ones as good as never.
        """
        parts = [
            np.random.default_rng([7, block]).integers(0, vocab_size, self.block_tokens, np.int32)
            for block in self.blocks
        ]
        return np.concatenate(parts)[: self.prompt_tokens]


def read_mooncake(path: str | Path) -> Iterator[Request]:
    """Requests of a Mooncake trace: JSON lines with `hash_ids` of 512-token blocks.

    Raises:
      ValueError: a line that is no such request, with its number.

    Source: Qin et al., "Mooncake", FAST 2025.
    """
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                length, ids = int(row["input_length"]), tuple(map(int, row["hash_ids"]))
                known = ids and 0 <= min(ids) and max(ids) < _LAST_TOKEN
                if not known or len(ids) != -(-length // 512):
                    raise ValueError(f"{length} tokens need as many blocks of 512, got {len(ids)}")
                output = max(1, int(row["output_length"]))
                yield Request(float(row["timestamp"]) / 1000, ids, 512, length, output)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no Mooncake request: {error!r}") from None


def read_azure(path: str | Path) -> Iterator[Request]:
    """Requests of an Azure LLM inference trace: CSV of arrival, prompt and output lengths.

    The trace says nothing of contents, so no two prompts are alike.

    Raises:
      ValueError: a row that is no such request, with its number.
    """
    start: datetime | None = None
    with open(path, newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"][:26])
                start = start or when
                length, output = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
                if length < 1:
                    raise ValueError(f"ContextTokens must be at least 1, got {length}")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, row {number}: no Azure request: {error!r}") from None
            yield Request((when - start).total_seconds(), (number,), length, length, output)


def poisson(
    count: int,
    rate: float,
    *,
    seed: int = 0,
    prompt_median: float = 512.0,
    output_median: float = 128.0,
    sigma: float = 0.7,
    burst: float = 1.0,
    samples: int = 1,
) -> list[Request]:
    """Unrelated prompts of log-normal lengths, in a Poisson process or in bursts.

    Args:
      rate: requests per second.
      prompt_median: tokens.
      output_median: tokens.
      sigma: deviation of the logarithm of both.
      burst: 1 is a Poisson process; more draws gaps from a gamma distribution, whose squared
        coefficient of variation it is.
      samples: answers per prompt.
    """
    rng = np.random.default_rng(seed)
    arrivals = rng.gamma(1 / burst, burst / rate, count).cumsum()
    prompts = np.ceil(rng.lognormal(np.log(prompt_median), sigma, count)).astype(int)
    outputs = np.ceil(rng.lognormal(np.log(output_median), sigma, count)).astype(int)
    return [
        Request(
            float(arrivals[i]), (i,), int(prompts[i]), int(prompts[i]), int(outputs[i]), samples
        )
        for i in range(count)
    ]


def chats(
    sessions: int,
    rate: float,
    *,
    seed: int = 0,
    turns: int = 4,
    system_prompts: int = 4,
    block_tokens: int = 64,
    turn_blocks: int = 4,
    output_tokens: int = 64,
    think_seconds: float = 10.0,
) -> list[Request]:
    """Multi-turn chats over shared system prompts; each turn repeats all earlier ones.

    Args:
      rate: sessions per second, a Poisson process.
      turn_blocks: blocks of new content per turn, and blocks of a system prompt.
    """
    rng = np.random.default_rng(seed)
    starts = rng.exponential(1 / rate, sessions).cumsum()
    fresh = system_prompts * turn_blocks
    requests = []
    for start in starts:
        system = int(rng.integers(system_prompts))
        blocks = tuple(range(system * turn_blocks, (system + 1) * turn_blocks))
        when = float(start)
        for _ in range(turns):
            blocks += tuple(range(fresh, fresh + turn_blocks))
            fresh += turn_blocks
            length = len(blocks) * block_tokens
            requests.append(Request(when, blocks, block_tokens, length, output_tokens))
            when += float(rng.exponential(think_seconds))
    return sorted(requests, key=lambda request: request.arrival_seconds)


def prefix_tree(
    count: int,
    rate: float,
    *,
    seed: int = 0,
    depth: int = 3,
    branching: int = 4,
    skew: float = 1.0,
    block_tokens: int = 64,
    node_blocks: int = 4,
    own_blocks: int = 4,
    output_tokens: int = 64,
) -> list[Request]:
    """Prompts that begin with a path down a tree of shared text, and end with text of their own.

    Args:
      rate: requests per second, a Poisson process.
      depth: levels of the tree below its root.
      branching: children per node.
      skew: child i is taken with a weight of (i + 1) ** -skew; 0 takes all alike.
      block_tokens: tokens per block.
      node_blocks: blocks per node.
      own_blocks: blocks that only one request has.
    """
    rng = np.random.default_rng(seed)
    weights = np.arange(1, branching + 1, dtype=float) ** -skew
    nodes = {(): 0}  # path from the root to the node's number
    arrivals = rng.exponential(1 / rate, count).cumsum().tolist()
    paths = rng.choice(branching, (count, depth), p=weights / weights.sum()).tolist()
    for path in paths:
        for level in range(1, depth + 1):
            nodes.setdefault(tuple(path[:level]), len(nodes))
    own = len(nodes) * node_blocks  # ids from here on belong to one request each
    requests = []
    for at, path in enumerate(paths):
        places = [nodes[tuple(path[:level])] for level in range(depth + 1)]
        blocks = [n * node_blocks + i for n in places for i in range(node_blocks)]
        blocks += range(own + at * own_blocks, own + (at + 1) * own_blocks)
        length = len(blocks) * block_tokens
        requests.append(Request(arrivals[at], tuple(blocks), block_tokens, length, output_tokens))
    return requests
