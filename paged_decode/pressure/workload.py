"""Requests to simulate, and generators that make them from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._text import shown
from ._values import as_number, as_whole, as_wholes

__all__ = [
    "FIRST_GENERATED",
    "Request",
    "chats",
    "drawn_length",
    "in_order",
    "poisson",
    "prefix_tree",
]

FIRST_GENERATED = 2**30
"""Tokens from here on stand for generated ones, which no prompt has."""

_LONGEST_SECONDS = 1e9  # 30 years: a time since 1970 is none since the start of a workload
_MOST_SAMPLES = 2**16  # as in `Engine.submit`


@dataclass(frozen=True, slots=True)
class Request:
    """One request; a prompt is runs of equal tokens, so that a trace stays small in memory.

    Attributes:
      arrival_seconds: since the start of the workload, 0 to 1e9.
      blocks: content ids of consecutive runs of the prompt, 0 to 2**30 - 1: equal ids are equal
        tokens.
      block_tokens: length of each run but the last, in tokens, at least 1.
      prompt_tokens: length of the prompt; its last token lies in the last block.
      output_tokens: how many tokens each sample generates, at least 1.
      samples: answers to the one prompt, 1 to 2**16.
      priority: for policies that look at it.

    Raises:
      ValueError: a value is not of its kind or range, or the blocks do not make up the prompt.
    """

    arrival_seconds: float
    blocks: tuple[int, ...]
    block_tokens: int
    prompt_tokens: int
    output_tokens: int
    samples: int = 1
    priority: int = 0

    def __post_init__(self) -> None:
        blocks = as_wholes("blocks", self.blocks, 0, FIRST_GENERATED - 1)
        size = as_whole("block_tokens", self.block_tokens, 1)
        prompt = as_whole("prompt_tokens", self.prompt_tokens, 1)
        if len(blocks) != -(-prompt // size):
            raise ValueError(
                f"a prompt of {prompt} tokens in blocks of {size} must have {-(-prompt // size)} "
                f"of them, got {len(blocks)}"
            )
        for name, value in (
            ("blocks", blocks),
            ("block_tokens", size),
            ("prompt_tokens", prompt),
            ("arrival_seconds", _arrival(self.arrival_seconds)),
            ("output_tokens", as_whole("output_tokens", self.output_tokens, 1)),
            ("samples", as_whole("samples", self.samples, 1, _MOST_SAMPLES)),
            ("priority", as_whole("priority", self.priority, -(2**31))),
        ):
            object.__setattr__(self, name, value)

    def prompt(self) -> np.ndarray:
        """The prompt's tokens, int32 `[prompt_tokens]`."""
        runs = np.repeat(np.array(self.blocks, np.int32), self.block_tokens)
        return runs[: self.prompt_tokens]

    def text(self, vocab_size: int) -> np.ndarray:
        """Tokens below `vocab_size` for a real model, int32 `[prompt_tokens]`.

        Equal blocks are equal text, and different ones as good as never.

        Raises:
          ValueError: `vocab_size` is not 1 to 2**31 - 1.
        """
        vocab_size = as_whole("vocab_size", vocab_size, 1)
        place = np.arange(self.prompt_tokens, dtype=np.uint64)
        block, place = np.divmod(place, np.uint64(self.block_tokens))
        return _mixed(np.array(self.blocks, np.uint64)[block], place, vocab_size)


def _mixed(block: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """Numbers below `size`, int32, that only look random: of the splitmix64 generator."""
    x = (block << np.uint64(32)) + place + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(size)).astype(np.int32)


def in_order(requests: Iterable[Request]) -> Iterator[Request]:
    """The same requests; each is checked when its turn comes.

    Raises:
      ValueError: one is no `Request`, or arrives before the one in front of it.
    """
    last = 0.0
    for number, request in enumerate(requests):
        if not isinstance(request, Request):
            raise ValueError(f"request {number} must be a Request, got {shown(request)}")
        if request.arrival_seconds < last:
            raise ValueError(
                f"requests must be in order of arrival, but request {number} comes at "
                f"{request.arrival_seconds} s, after one at {last} s: sort them"
            )
        last = request.arrival_seconds
        yield request


def _arrival(value: Any) -> float:
    return as_number("arrival_seconds", value, zero=True, most=_LONGEST_SECONDS)


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
      count: how many, at least 1.
      rate: requests per second.
      seed: 0 or more; the same one gives the same requests.
      prompt_median: tokens.
      output_median: tokens.
      sigma: deviation of the logarithm of both; 0 makes all alike.
      burst: 1 is a Poisson process; more draws gaps from a gamma distribution, whose squared
        coefficient of variation it is.
      samples: answers per prompt.

    Raises:
      ValueError: a value is not of its kind or range, or makes a request that is none.
    """
    count, rate = as_whole("count", count, 1), as_number("rate", rate)
    rng = np.random.default_rng(as_whole("seed", seed, 0, 2**63 - 1))
    sigma, burst = as_number("sigma", sigma, zero=True), as_number("burst", burst)
    medians = as_number("prompt_median", prompt_median), as_number("output_median", output_median)
    with np.errstate(over="ignore"):  # a length without end is refused below
        arrivals = rng.gamma(1 / burst, burst / rate, count).cumsum().tolist()
        prompts, outputs = (
            np.ceil(rng.lognormal(np.log(median), sigma, count)).tolist() for median in medians
        )
    return [
        Request(
            arrivals[i],
            (i,),
            size := drawn_length(prompts[i]),
            size,
            drawn_length(outputs[i]),
            samples,
        )
        for i in range(count)
    ]


def drawn_length(tokens: float) -> int:
    """Of a text, from a draw; ValueError if it is too long to be one."""
    if tokens < 2**31:
        return max(1, int(tokens))
    raise ValueError(f"a drawn length of {tokens:g} tokens is too long: smaller median or sigma")


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
      sessions: how many, at least 1.
      rate: sessions per second, a Poisson process.
      seed: 0 or more; the same one gives the same requests.
      turns: requests of a session.
      system_prompts: how many there are to begin with.
      block_tokens: tokens per block.
      turn_blocks: blocks of new content per turn, and blocks of a system prompt.
      output_tokens: of every answer.
      think_seconds: mean time between two turns, exponential.

    Raises:
      ValueError: a value is not of its kind or range.
    """
    sessions, rate = as_whole("sessions", sessions, 1), as_number("rate", rate)
    rng = np.random.default_rng(as_whole("seed", seed, 0, 2**63 - 1))
    turns, system_prompts = (
        as_whole("turns", turns, 1),
        as_whole("system_prompts", system_prompts, 1),
    )
    block_tokens = as_whole("block_tokens", block_tokens, 1)
    turn_blocks = as_whole("turn_blocks", turn_blocks, 1)
    think_seconds = as_number("think_seconds", think_seconds, zero=True)
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
      count: how many, at least 1.
      rate: requests per second, a Poisson process.
      seed: 0 or more; the same one gives the same requests.
      depth: levels of the tree below its root, 0 or more.
      branching: children per node.
      skew: child i is taken with a weight of (i + 1) ** -skew; 0 takes all alike.
      block_tokens: tokens per block.
      node_blocks: blocks per node.
      own_blocks: blocks that only one request has, 0 or more.
      output_tokens: of every answer.

    Raises:
      ValueError: a value is not of its kind or range.
    """
    count, rate = as_whole("count", count, 1), as_number("rate", rate)
    rng = np.random.default_rng(as_whole("seed", seed, 0, 2**63 - 1))
    depth, branching = as_whole("depth", depth), as_whole("branching", branching, 1)
    skew = as_number("skew", skew, zero=True)
    block_tokens = as_whole("block_tokens", block_tokens, 1)
    node_blocks = as_whole("node_blocks", node_blocks, 1)
    own_blocks = as_whole("own_blocks", own_blocks)
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
