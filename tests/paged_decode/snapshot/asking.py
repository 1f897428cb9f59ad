"""Requests that ask for all that `SamplingParams` has, and events that tell all they can."""

from __future__ import annotations

from paged_decode import Figures, SamplingParams
from paged_decode.engine.events import TokenEvent
from paged_decode.engine.scores import PromptLogprobs

from ..tiny import VOCAB, every_token
from ..toy_text import decode

INF = float("inf")
EVERYTHING = SamplingParams(
    max_new_tokens=14,
    temperature=0.8,
    seed=5,
    stop_tokens=(58, 3, *range(48, 56)),
    stop_sequences=((7, 8, 9), (VOCAB - 1,)),
    min_new_tokens=3,
    ignore_eos=True,
    min_p=0.01,
    presence_penalty=0.5,
    frequency_penalty=-0.25,
    repetition_penalty=1.25,
    logit_bias={9: -INF, 7: 1.5, 4: -3.0},
    allowed_tokens=tuple(range(0, VOCAB, 2)),
    bad_tokens=(12, 11),
    logits_args=(1.5, -0.25),
    logprobs=2,
    stop=("ab", "\u00e9\U0001f600 z"),
    include_stop_str_in_output=True,
)
ALONE = {
    "stop_tokens": tuple(range(9)),
    "stop_sequences": ((1, 2), (2,)),
    "min_new_tokens": 1,
    "ignore_eos": True,
    "min_p": 0.1,
    "presence_penalty": -2.0,
    "frequency_penalty": 1e-300,
    "repetition_penalty": 0.5,
    "logit_bias": ((2**31 - 1, 0.0),),
    "allowed_tokens": (0,),
    "bad_tokens": (5,),
    "logits_args": (-0.5, 2.0),
    "prompt_logprobs": 0,
    "logprobs": 0,
    "stop": ("\0", "\u00e9"),
    "include_stop_str_in_output": True,
    "detokenize": False,
}
"""A value of each new field."""
SERVING: dict = dict(
    top_logits=2,
    logits_args=2,
    score_chunk=4,
    policies=dict(detokenize=decode, score=every_token),
)
"""What an engine needs that serves all of it."""
NONE_ALLOWED = SamplingParams(max_new_tokens=9, bad_tokens=tuple(range(VOCAB)), logprobs=1)


NUMBERS = 2**32 - 1, 5, 4, 2, 0.25, 1.5, 0.0, 2.0
FEW = 0, 1, None, 0, None, None, None, 0.0


def ask(engine) -> None:
    """All of it at once, penalties alone, log-probabilities alone, nothing, nothing allowed."""
    engine.submit([1, 2, 3, 4, 5], EVERYTHING, n=2)
    engine.submit([3, 2, 1], NONE_ALLOWED)
    engine.submit([6, 7], SamplingParams(max_new_tokens=10, logprobs=1), cache_salt="s")
    heated = dict(max_new_tokens=10, temperature=1.0, seed=3)
    engine.submit(
        [8, 9, 1], SamplingParams(**heated, repetition_penalty=1.5, logprobs=0, detokenize=False)
    )
    engine.submit([8], SamplingParams(**heated, min_p=0.05, stop_sequences=((4,), (5, 6))))
    engine.submit([8, 7], SamplingParams(**heated))
    engine.submit([9, 1, 2, 3, 5, 8], SamplingParams(max_new_tokens=10, prompt_logprobs=1))


def events() -> list[TokenEvent]:
    """Of every kind, for requests 0 to 2."""
    prompts = (
        PromptLogprobs((-0.5, -INF), (((3, -0.25), (0, -2.0)), ((1, -0.125), (60, -3.0)))),
        PromptLogprobs((-1.5,), ()),
        PromptLogprobs((), ()),
    )
    likely = ((4, -0.25), (0, -INF), (60, -1.5))
    return [
        TokenEvent(
            0, 0, 0, 4, None, ((4, 1.5),), "", -0.25, 0.0, likely, prompts[2], "a\u00e9\U0001f600"
        ),
        TokenEvent(0, 1, 0, 5, "stop", (), "", -2.5, -0.5, (), prompts[0], "", Figures(*NUMBERS)),
        TokenEvent(1, 0, 0, None, "no_allowed_token", text="\ufffd\ud800"),
        TokenEvent(2, 0, 0, 7, None, prompt_logprobs=prompts[1]),
        TokenEvent(2, 0, 1, None, "detokenizer_failed", figures=Figures(*FEW)),
        TokenEvent(0, 0, 1, 9, "length", (), "", -INF, -0.125, ((1, -0.5),)),
    ]


def told(event: TokenEvent) -> tuple:
    """All of it but `detail`, which no file has, and figures, which begin anew with a restore."""
    return event._replace(detail="", figures=None)
