"""The text of samples: what is certain after each token, and where a stop string ends it.

```
ids     ... prompt | generated ...            | next
window         [ ................. known ..... | next ]        what a decode of a few ids sees
text    told ................. | held | unsure |               certain, but it may become a stop;
                                                               half a character, as U+FFFD
```
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple, Protocol, runtime_checkable

from .params import SamplingParams
from .requests import Sample

__all__ = ["Detokenizer", "Reading", "Texts", "Told", "check_detokenizer"]

_HALF = "\ufffd"  # what a decode gives for bytes that are no character, or not yet
_UNSURE = 3  # a character has up to 4 bytes; a decode may give one of these for each that is there
_CONTEXT = 6  # ids of the prompt in the first window: some decodes drop the space in front of one
_WIDE = 16  # ids of a window that it is time to narrow
_WIDEST = 48  # of one that is, though its text is not complete


@runtime_checkable
class Detokenizer(Protocol):
    """A tokenizer's own decode of a run of ids, such as `tokenizer.decode`.

    What it gives for bytes of an incomplete character ends in U+FFFD. It is called with a few ids
    at a time, by the thread that steps; what it raises ends the request that it was called for.
    """

    def __call__(self, ids: list[int], /) -> str:
        """The text of these ids."""
        ...


class Reading(NamedTuple):
    """How far the text of one sample has been read: derived from its tokens.

    Attributes:
      length: tokens that were read, those of the prompt included.
      window: the newest of them, which the next one is decoded with.
      complete: how many of the window's ids are known to end with a character.
      known: characters of the window's text that are certain.
      held: certain text that may become a stop string, and was not told.
      unsure: text behind it that the next token may change.
      prompt: the prompt's text in the window while the end of it is not certain.
    """

    length: int
    window: tuple[int, ...]
    complete: int
    known: int
    held: str = ""
    unsure: str = ""
    prompt: str = ""


class Told(NamedTuple):
    """The text that comes with the tokens of one sample, or with its end without one.

    Attributes:
      pieces: one for each token that it gets.
      reading: how far it was read with them.
      reason: why it ends with the last one, if it does.
      failure: what the decode of the next token raised, if it did.
    """

    pieces: tuple[str, ...]
    reading: Reading | None = None
    reason: str | None = None
    failure: str | None = None


class Texts:
    """Reads the text of samples; changes none.

    Args:
      decode: the tokenizer's.
    """

    def __init__(self, decode: Detokenizer):
        self._decode = decode

    def told(self, sample: Sample, tokens: Sequence[int], reason: str | None) -> Told | None:
        """The text of these new tokens, up to the first stop string; None: it wants none.

        Args:
          sample: who gets them; it has not yet.
          tokens: at least one.
          reason: why it ends with the last of them, if it does.
        """
        params, pieces = sample.sampling, []
        if not params.detokenize:
            return None
        reading, missing = sample.reading, params.min_new_tokens - sample.generated
        try:
            if reading is None or reading.length != len(sample.tokens):
                reading = self._replayed(sample)
            for count, token in enumerate(tokens, 1):
                seen, reading = len(reading.held), self._further(reading, token)
                over = reason is not None and count == len(tokens)
                reading, piece, stopped = _cut(
                    reading, seen, params, over=over, searching=count > missing
                )
                pieces.append(piece)
                if stopped:
                    return Told(tuple(pieces), reading, "stop")
        except Exception as error:  # a user's: it is this sample's alone
            return Told(tuple(pieces), reading, None, f"{type(error).__name__}: {error}")
        return Told(tuple(pieces), reading, reason)

    def rest(self, sample: Sample, reading: Reading | None = None) -> Told | None:
        """What was held, for an end without a token; None if there is none.

        Args:
          sample: who ends.
          reading: how far it was read, if that was with tokens that it has not got yet.
        """
        if not (sample.sampling.detokenize and (reading or sample.generated)):
            return None
        try:
            reading = reading or sample.reading
            if reading is None or reading.length < len(sample.tokens):
                reading = self._replayed(sample)
        except Exception:  # it ends as it is
            return None
        searching = reading.length - sample.prompt_len > sample.sampling.min_new_tokens
        _, piece, _ = _cut(
            reading, len(reading.held), sample.sampling, over=True, searching=searching
        )
        return Told((piece,)) if piece else None

    def _replayed(self, sample: Sample) -> Reading:
        """How far it was read with the tokens that it has: what came out is dropped."""
        window = sample.tokens[max(sample.prompt_len - _CONTEXT, 0) : sample.prompt_len]
        text = self._text(window)
        prompt = text if text.endswith(_HALF) else ""
        reading = Reading(sample.prompt_len, tuple(window), len(window), len(text), prompt=prompt)
        for token in sample.tokens[sample.prompt_len :]:
            reading = self._further(reading, token)
            reading, _, _ = _cut(reading, 0, sample.sampling, over=False, searching=False)
        return reading

    def _further(self, old: Reading, token: int) -> Reading:
        """With one token more; all that has become certain is held."""
        window = (*old.window, token)
        text = self._text(window)
        known = len(commonprefix((old.prompt, text))) if old.prompt else old.known
        halves = len(text) - len(text.rstrip(_HALF))
        sure = max(len(text) - min(halves, _UNSURE), known)
        new = Reading(
            old.length + 1,
            window,
            old.complete,
            sure,
            old.held + text[known:sure],
            text[sure:],
            old.prompt if halves and sure == known else "",
        )
        return self._narrowed(new, complete=not halves) if len(window) > _WIDE else new

    def _narrowed(self, reading: Reading, *, complete: bool) -> Reading:
        """The same with a window of the newest tokens, if one can begin there."""
        window, late = reading.window, len(reading.window) > _WIDEST
        rest = window[reading.complete :] if complete else ()
        text = self._text(rest) if rest else ""  # some decodes drop the space in front of the first
        if not text:
            if not late:
                return reading
            rest = window[-_WIDE:]
            text = self._text(rest)
        let_through = "" if text.endswith(reading.unsure) else reading.unsure
        unsure = "" if let_through else reading.unsure
        return reading._replace(
            window=rest,
            complete=len(rest),
            known=len(text) - len(unsure),
            held=reading.held + let_through,
            unsure=unsure,
            prompt="",
        )

    def _text(self, ids: Sequence[int]) -> str:
        text = self._decode(list(ids))
        if not isinstance(text, str):
            raise TypeError(f"detokenize must return a str, got {type(text).__name__}")
        return text


def check_detokenizer(decode: Detokenizer | None) -> Texts | None:
    """What reads with it; nothing with None.

    Raises:
      TypeError: it cannot be called.
    """
    if decode is None:
        return None
    if not callable(decode):
        raise TypeError(f"detokenize must be a function of ids, got {type(decode).__name__}")
    return Texts(decode)


def _cut(
    reading: Reading, seen: int, params: SamplingParams, *, over: bool, searching: bool
) -> tuple[Reading, str, bool]:
    """Take what can be told out of what is held, and say whether a stop string ends it.

    Args:
      reading: with the newest token.
      seen: characters that were held without it: what ends within them is no stop.
      params: what is asked for.
      over: no token comes, so all is certain.
      searching: whether a stop string counts yet.
    """
    text, stops = reading.held + (reading.unsure if over else ""), params.stop
    if searching and (ends := [end for stop in stops if (end := _end_of(stop, text, seen))]):
        end, begin = min(ends)
        told = text[: end if params.include_stop_str_in_output else begin]
        return reading._replace(held="", unsure=""), told, True
    told = len(text) if over else len(text) - _beginning(text, stops)
    return reading._replace(held=text[told:]), text[:told], False


def _end_of(stop: str, text: str, seen: int) -> tuple[int, int] | None:
    """Where its first occurrence that ends behind `seen` ends, and where it begins."""
    begin = text.find(stop, max(seen - len(stop) + 1, 0))
    return None if begin < 0 else (begin + len(stop), begin)


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may become a stop string."""
    for size in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(len(stop) > size and stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
