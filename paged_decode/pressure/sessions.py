"""Generators of what grows from what came before: agents, branching conversations, rollouts."""

from __future__ import annotations

import numpy as np

from ._values import as_number, as_whole
from .workload import Request, drawn_length

__all__ = ["agents", "branches", "rollouts"]

_MOST_SEED = 2**63 - 1


def agents(
    sessions: int,
    rate: float,
    *,
    seed: int = 0,
    calls: float = 8.0,
    tool_sets: int = 4,
    block_tokens: int = 64,
    system_blocks: int = 32,
    task_blocks: int = 4,
    tool_median: float = 512.0,
    output_median: float = 64.0,
    sigma: float = 1.0,
    tool_seconds: float = 2.0,
    pause_chance: float = 0.1,
    pause_seconds: float = 60.0,
) -> list[Request]:
    """Agents that call tools: each request repeats the one before, and what the tool has said.

    A session begins with one of `tool_sets` system prompts, each as likely as the others, and a
    task of its own. It has a geometric number of requests. Between two of them the context grows by
    the output of a tool, log-normal and rounded up to whole blocks, which stands for the answer,
    too; and time passes: the tool's, log-normal, and with `pause_chance` a user's, exponential.
    Nobody waits for the answers here: times are from arrival to arrival.

    Args:
      sessions: how many, at least 1.
      rate: sessions per second, a Poisson process.
      seed: 0 or more; the same one gives the same requests.
      calls: mean requests of a session, at least 1.
      tool_sets: system prompts that there are.
      block_tokens: tokens per block.
      system_blocks: of a system prompt.
      task_blocks: of a task.
      tool_median: tokens that a tool adds.
      output_median: tokens of an answer, log-normal.
      sigma: deviation of the logarithm of all that is log-normal; 0 makes all alike.
      tool_seconds: median time of a tool.
      pause_chance: of a pause between two requests, 0 to 1.
      pause_seconds: mean length of a pause.

    Raises:
      ValueError: a value is not of its kind or range, or makes a request that is none.
    """
    sessions, rate = as_whole("sessions", sessions, 1), as_number("rate", rate)
    rng = np.random.default_rng(as_whole("seed", seed, 0, _MOST_SEED))
    tool_sets = as_whole("tool_sets", tool_sets, 1)
    block_tokens = as_whole("block_tokens", block_tokens, 1)
    system = as_whole("system_blocks", system_blocks, 1)
    task = as_whole("task_blocks", task_blocks, 1)
    if (calls := as_number("calls", calls)) < 1:
        raise ValueError(f"calls must be 1 or more, got {calls}")
    sigma = as_number("sigma", sigma, zero=True)
    chance = as_number("pause_chance", pause_chance, zero=True, most=1.0)
    log_tool = np.log(as_number("tool_median", tool_median))
    log_output = np.log(as_number("output_median", output_median))
    tool_seconds = as_number("tool_seconds", tool_seconds)
    pause_seconds = as_number("pause_seconds", pause_seconds, zero=True)
    fresh, requests = tool_sets * system, list[Request]()
    for start in rng.exponential(1 / rate, sessions).cumsum().tolist():
        first = int(rng.integers(tool_sets)) * system
        blocks = [*range(first, first + system), *range(fresh, fresh + task)]
        fresh += task
        when = start
        for _ in range(int(rng.geometric(1 / calls))):
            length = len(blocks) * block_tokens
            output = drawn_length(rng.lognormal(log_output, sigma))
            requests.append(Request(when, tuple(blocks), block_tokens, length, output))
            more = -(-drawn_length(rng.lognormal(log_tool, sigma)) // block_tokens)
            blocks += range(fresh, fresh + more)
            fresh += more
            when += tool_seconds * float(rng.lognormal(0.0, sigma))
            when += float(rng.random() < chance) * float(rng.exponential(pause_seconds))
    return sorted(requests, key=lambda request: request.arrival_seconds)


def branches(
    conversations: int,
    rate: float,
    *,
    seed: int = 0,
    turns: int = 8,
    fork_chance: float = 0.3,
    block_tokens: int = 64,
    turn_blocks: int = 4,
    output_tokens: int = 64,
    think_seconds: float = 10.0,
) -> list[Request]:
    """Conversations that fork: a turn goes on from the newest one, or from an earlier one.

    With `fork_chance` it goes on from any of the turns so far but the newest, each as likely as
    the others; the trunk up to there is shared, and what follows is new.

    Args:
      conversations: how many, at least 1; no two share anything.
      rate: conversations per second, a Poisson process.
      seed: 0 or more; the same one gives the same requests.
      turns: requests of a conversation.
      fork_chance: 0 to 1; 0 makes chats without branches.
      block_tokens: tokens per block.
      turn_blocks: blocks of new content per turn.
      output_tokens: of every answer.
      think_seconds: mean time between two turns, exponential.

    Raises:
      ValueError: a value is not of its kind or range.
    """
    conversations = as_whole("conversations", conversations, 1)
    rate = as_number("rate", rate)
    rng = np.random.default_rng(as_whole("seed", seed, 0, _MOST_SEED))
    turns, block_tokens = as_whole("turns", turns, 1), as_whole("block_tokens", block_tokens, 1)
    turn_blocks = as_whole("turn_blocks", turn_blocks, 1)
    chance = as_number("fork_chance", fork_chance, zero=True, most=1.0)
    think_seconds = as_number("think_seconds", think_seconds, zero=True)
    fresh, requests = 0, list[Request]()
    for when in rng.exponential(1 / rate, conversations).cumsum().tolist():
        texts: list[tuple[int, ...]] = []
        for turn in range(turns):
            forks = turn > 1 and rng.random() < chance
            before = texts[int(rng.integers(turn - 1)) if forks else -1] if texts else ()
            texts.append((*before, *range(fresh, fresh + turn_blocks)))
            fresh += turn_blocks
            length = len(texts[-1]) * block_tokens
            requests.append(Request(when, texts[-1], block_tokens, length, output_tokens))
            when += float(rng.exponential(think_seconds))
    return sorted(requests, key=lambda request: request.arrival_seconds)


def rollouts(
    prompts: int,
    *,
    seed: int = 0,
    samples: int = 8,
    prompt_median: float = 256.0,
    prompt_sigma: float = 0.5,
    output_median: float = 512.0,
    output_sigma: float = 1.0,
    longest: int = 16384,
) -> list[Request]:
    """What reinforcement learning generates: all prompts at once, each answered several times.

    Prompts and outputs are log-normal; outputs have a long tail, cut at `longest` as training does.
    Every sample is a request of its own, for it has a length of its own, and finds the prompt in
    the prefix cache. Those of one prompt follow each other.

    Args:
      prompts: how many, at least 1; no two are alike.
      seed: 0 or more; the same one gives the same requests.
      samples: requests of every prompt.
      prompt_median: tokens.
      output_median: tokens.
      prompt_sigma: deviation of the logarithm; 0 makes all alike.
      output_sigma: the same of outputs.
      longest: tokens of an output at most.

    Raises:
      ValueError: a value is not of its kind or range, or makes a request that is none.
    """
    prompts, samples = as_whole("prompts", prompts, 1), as_whole("samples", samples, 1)
    rng = np.random.default_rng(as_whole("seed", seed, 0, _MOST_SEED))
    longest = as_whole("longest", longest, 1)
    sigmas = [
        as_number("prompt_sigma", prompt_sigma, zero=True),
        as_number("output_sigma", output_sigma, zero=True),
    ]
    logs = np.log(
        [as_number("prompt_median", prompt_median), as_number("output_median", output_median)]
    )
    with np.errstate(over="ignore"):  # a length without end is refused
        sizes = np.ceil(rng.lognormal(logs[0], sigmas[0], prompts)).tolist()
        outputs = np.ceil(rng.lognormal(logs[1], sigmas[1], (prompts, samples)))
    ends = np.minimum(outputs, longest).tolist()
    return [
        Request(0.0, (i,), size := drawn_length(sizes[i]), size, drawn_length(end))
        for i in range(prompts)
        for end in ends[i]
    ]
