"""Continuous batching: a scheduler on the host, a runner on the device, and what users call.

```
engine.py     Engine: submit, fork, cancel, step, stream, generate
weights.py    its update_params, sleep, wake
keeping.py    and its pin, save, restore
aio.py        AsyncEngine: the same for asyncio
calls.py      what other threads ask of it
loop.py       one visit: schedule, launch, read the one before
scheduler.py  who runs, on which pages, who gives them up          host only
  queue.py      who waits, and who waits for whose prefix
  seats.py      who has a row on the device
  room.py       the policies, and what the pool has left
  limits.py     who has to begin or end by when
  pins.py       prefixes that stay
  forking.py    samples that share a text
  taking_up.py  those of another engine
  renewal.py    those of other weights
  journal.py    what has become of samples
  plans.py      from samples to the records of a plan
params.py     what a request asks for
requests.py   and what is known of it
events.py     what it is told
records.py    what goes between the two: plans, tickets, results; the Runner protocol
runner.py     launches, their shapes, warm-up                      device
  launching.py  the thread that gives programs to the device
  resting.py    pools whose memory is given back
  rows.py       the state of the rows, and messages to it
  packing.py    from plans to the messages of programs
  programs.py   what is compiled
  model.py      what is asked of a model
  sampling.py   the choice of a token
  drafting.py   tokens that are guessed, for a step to check
  processing.py the user's own change of the logits
masks.py      which tokens may come next, as the host says
figures.py    how long samples took, and the gauges of an engine
text.py       the text of samples, and the stop strings in it
swapping.py   the host tier of an engine
saving.py     requests to a file and back
scores.py     log-probabilities of prompts
outbox.py     events on their way to callbacks and callers
```
"""

from .aio import AsyncEngine
from .config import EngineConfig, EngineStats
from .drafting import Drafter, PromptLookup
from .engine import Engine
from .events import Completion, Events, TokenEvent
from .figures import Figures
from .masks import TokenMask
from .model import Model
from .processing import LogitsRows, ProcessLogits
from .text import Detokenizer

__all__ = [
    "AsyncEngine",
    "Completion",
    "Detokenizer",
    "Drafter",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Events",
    "Figures",
    "LogitsRows",
    "Model",
    "ProcessLogits",
    "PromptLookup",
    "TokenEvent",
    "TokenMask",
]
