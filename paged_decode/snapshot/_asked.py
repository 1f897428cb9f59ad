"""What a request asks for beyond the columns that every snapshot of an engine has, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import chain
from typing import Any

import msgpack

from .._text import shown
from ..engine.params import MAX_STOP_TOKENS, SamplingParams
from ..errors import SnapshotCorrupt

__all__ = ["OWN", "pack_asked", "require_one_form", "unpack_asked"]

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
_INF = float("inf")
OWN = {"masked": False, "max_wait": _INF, "pinned": False, "place": 0}
OWN |= {"priority": 0, "timeout": _INF}
"""What a sample has beside `SamplingParams`, and its defaults; of times, what is left."""


def pack_asked(params: SamplingParams, own: Mapping[str, Any] = OWN) -> bytes:
    """What is not at its default; no bytes if all of it is. `own` has what is in `OWN`."""
    found = {name: value for name, value in own.items() if value != OWN[name]}
    found |= {name: value + 0.0 for name, value in found.items() if type(value) is float}
    found |= {name: value for name in _KINDS if (value := _asked(params, name)) is not None}
    found = dict(sorted(found.items()))
    packed: Any = msgpack.packb(found)
    return packed if found else b""


def _asked(params: SamplingParams, name: str) -> Any:
    """As it is written; None at the default, and where the columns hold it, or the sample."""
    if name in OWN:
        return None
    value = getattr(params, name)
    if value == _DEFAULTS[name] or (name == "stop_tokens" and len(value) <= MAX_STOP_TOKENS):
        return None
    if name == "logit_bias":
        return [(token, bias + 0.0) for token, bias in value]  # -0.0 is 0.0: they are equal
    return value


def unpack_asked(request: int, data: bytes) -> dict[str, Any]:
    """What was written, with every type checked; the values are for `SamplingParams` to judge,
    and for whoever reads those of `OWN`.

    Raises:
      SnapshotCorrupt: it is no map of that kind, or not in its shortest form.
    """
    if not data:
        return {}
    title = f"what request {request} asks for"
    try:
        pairs = _pairs(data)
        again = msgpack.packb(dict(pairs))
    except Exception as error:  # msgpack raises a dozen unrelated classes
        kind = type(error).__name__
        raise SnapshotCorrupt(f"{title} is not a map in msgpack: {kind}: {error}") from None
    names = [name for name, _ in pairs]
    for name, value in pairs:
        if not (isinstance(name, str) and name in _KINDS):
            raise SnapshotCorrupt(f"{title} has a key that the format does not have: {shown(name)}")
        kind, holds = _KINDS[name]
        if not holds(value):
            raise SnapshotCorrupt(f"{title}: {name} is not {kind} but {shown(value)}")
    if again != data or names != sorted(set(names)):
        raise SnapshotCorrupt(f"{title} is not in msgpack's shortest form with sorted keys")
    return {name: _tuples(value) if type(value) is list else value for name, value in pairs}


def _tuples(value: list[Any]) -> tuple[Any, ...]:
    """Of a list whose items are all lists, or none."""
    return tuple(map(tuple, value)) if type(value[0]) is list else tuple(value)


def _pairs(data: bytes) -> list[tuple[Any, Any]]:
    """Keys and values of the map, of which none holds a map or nothing: both take a byte, and a
    hundred times that in memory."""

    def refuse(*what: Any) -> Any:
        raise ValueError("a map or an extension type in the map")

    def require(items: list[Any]) -> list[Any]:
        if not items:
            raise ValueError("an empty list")
        return items

    limit = len(data)
    reader = msgpack.Unpacker(
        raw=False,
        ext_hook=refuse,
        object_hook=refuse,
        list_hook=require,
        max_buffer_size=limit,
        max_str_len=limit,
        max_bin_len=0,
        max_array_len=limit,
        max_map_len=len(_KINDS),
        max_ext_len=0,
    )
    reader.feed(data)
    count = reader.read_map_header()
    if not 1 <= count <= len(_KINDS):
        raise ValueError(f"{count} keys")
    pairs = [(reader.unpack(), reader.unpack()) for _ in range(count)]
    if (end := reader.tell()) != limit:
        raise ValueError(f"the map ends at byte {end} of {limit}")
    return pairs


def require_one_form(
    request: int, asked: Mapping[str, Any], first: tuple[int, ...], params: SamplingParams
) -> None:
    """Raise SnapshotCorrupt unless these parameters are written as what they were made of.

    Args:
      request: its number in the file.
      asked: what `unpack_asked` gave.
      first: the stop tokens of the columns.
      params: made of the columns and `asked`.
    """
    title = f"what request {request} asks for"
    for name, value in asked.items():
        wanted = _asked(params, name)
        if wanted is None:
            raise SnapshotCorrupt(f"{title}: {name} is at its default, or in the columns alone")
        if msgpack.packb(wanted) != msgpack.packb(value):
            raise SnapshotCorrupt(f"{title}: {name} is not in the form in which it is kept")
    if first != params.stop_tokens[:MAX_STOP_TOKENS]:
        raise SnapshotCorrupt(f"{title}: stop_tokens does not begin with those of the columns")


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _is_list(value: Any, kind: type) -> bool:
    """Whether it is a list of that kind alone; a bool is no int here."""
    return type(value) is list and {*map(type, value)} == {kind}


def _is_ids(value: Any) -> bool:
    return _is_list(value, int)


def _is_strings(value: Any) -> bool:
    return _is_list(value, str)


def _is_floats(value: Any) -> bool:
    return _is_list(value, float)


def _is_runs(value: Any) -> bool:
    return _is_list(value, list) and {*map(type, chain.from_iterable(value))} == {int}


def _is_biases(value: Any) -> bool:
    if not (_is_list(value, list) and {*map(len, value)} == {2}):
        return False
    ids, numbers = zip(*value, strict=True)
    return {*map(type, ids)} == {int} and {*map(type, numbers)} == {float}


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "allowed_tokens": ("a list of integers", _is_ids),
    "bad_tokens": ("a list of integers", _is_ids),
    "detokenize": ("a truth value", _is(bool)),
    "frequency_penalty": ("a float", _is(float)),
    "ignore_eos": ("a truth value", _is(bool)),
    "include_stop_str_in_output": ("a truth value", _is(bool)),
    "logit_bias": ("a list of [integer, float]", _is_biases),
    "logits_args": ("a list of floats", _is_floats),
    "logprobs": ("an integer", _is(int)),
    "masked": ("a truth value", _is(bool)),
    "max_wait": ("a float", _is(float)),
    "min_new_tokens": ("an integer", _is(int)),
    "min_p": ("a float", _is(float)),
    "pinned": ("a truth value", _is(bool)),
    "place": ("an integer", _is(int)),
    "presence_penalty": ("a float", _is(float)),
    "priority": ("an integer", _is(int)),
    "prompt_logprobs": ("an integer", _is(int)),
    "repetition_penalty": ("a float", _is(float)),
    "stop": ("a list of strings", _is_strings),
    "stop_sequences": ("a list of lists of integers", _is_runs),
    "stop_tokens": ("a list of integers", _is_ids),
    "timeout": ("a float", _is(float)),
}
"""What may be asked for, in the order in which it is written."""
