"""A second reader, made of docs/snapshot_format.md alone: it shares no code with the library."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches NumPy the names of the small floats)
import msgpack
import numpy as np


def read(path: Path) -> tuple[dict, dict[str, np.ndarray], bytes]:
    """Header, arrays and id."""
    data = path.read_bytes()
    magic, version, header_bytes, file_bytes, checksum = struct.unpack_from("<8sIQQI", data)
    assert magic == bytes.fromhex("89504744 0d0a1a0a") and version in (1, 2, 3, 4, 5)
    assert file_bytes == len(data) and 1 <= header_bytes <= 1048576
    header = data[32 : 32 + header_bytes]
    assert zlib.crc32(data[:28] + header) == checksum
    fields = msgpack.unpackb(header)
    keys = ["arrays", "fingerprint", "metadata", "page_size", "pages", "parent"]
    grouped = version == 2 or (version > 2 and "groups" in fields)
    assert list(fields) == ([*keys[:2], "groups", *keys[2:]] if grouped else keys)
    names = [name for name, *_ in fields["arrays"]]
    own = any(name.startswith("extra/") for name in names)
    assert version >= 4 or own == (version == 3)
    assert [name in names for name in ASKED] == [version >= 4] * len(ASKED)
    assert [name in names for name in RENEWED] == [version == 5] * len(RENEWED)
    arrays, offset = {}, up(32 + header_bytes)
    assert not any(data[32 + header_bytes : offset])
    for name, dtype, shape, checksums in fields["arrays"]:
        own = name.startswith("extra/")
        assert len(shape) <= 32 if own else 1 <= len(shape) <= 8
        assert dtype != "bool" or own
        assert not own or name[6:] not in ("", ".", "..") and not set(name[6:]) & set("/\\:\0")
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        row = math.prod(shape[1:]) * kind.itemsize
        chunk = max(1, 4194304 // max(1, row)) * row
        raw = data[offset : offset + size]
        found = [zlib.crc32(raw[i : i + chunk]) for i in range(0, size, max(1, chunk))]
        assert struct.unpack(f"<{len(found)}I", checksums) == tuple(found)
        arrays[name] = np.frombuffer(raw, kind).reshape(shape)
        if dtype == "bool":
            arrays[name] = np.frombuffer(raw, np.uint8).reshape(shape) != 0
        assert not any(data[offset + size : up(offset + size)])
        offset = up(offset + size)
    assert offset == len(data)
    return fields, arrays, hashlib.blake2b(data[: 32 + header_bytes], digest_size=16).digest()


ASKED = ["engine/asked_length", "engine/asked_bytes", "engine/event_logprob"]
ASKED += [f"engine/event_likely_{name}" for name in ("length", "ids", "logprobs")]
ASKED += [f"engine/event_{name}" for name in ("text_length", "text_bytes", "figures")]
ASKED += [f"engine/event_prompt_{n}" for n in ("length", "top", "logprobs", "ids", "likely")]
RENEWED = ["engine/version", "engine/event_version"]
DEFAULTS = {
    "allowed_tokens": None,
    "bad_tokens": [],
    "detokenize": True,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "logit_bias": [],
    "logits_args": [],
    "logprobs": None,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "prompt_logprobs": None,
    "repetition_penalty": 1.0,
    "stop": [],
    "stop_sequences": [],
}
OWN = {"masked": False, "max_wait": math.inf, "pinned": False, "place": 0}
OWN |= {"priority": 0, "timeout": math.inf}
REASONS = [None, "stop", "length", "capacity", "cancelled", "invalid_logits", "no_allowed_token"]
REASONS += ["waited_too_long", "timeout", "detokenizer_failed", "mask_failed", "new_weights"]


def up(size: int) -> int:
    return (size + 63) // 64 * 64


def pages(path: Path, name: str) -> np.ndarray:
    """One array of keys or values, all pages of its group, through the parents."""
    fields, arrays, _ = read(path)
    if fields["parent"] is None:
        return arrays[name]
    ident, parent, count = fields["parent"]
    older = pages(path.parent / parent, name)
    of_parent, _, id_of_parent = read(path.parent / parent)
    assert id_of_parent == ident and of_parent["pages"] == count
    group = group_of(fields, name)
    source = arrays[f"group/{group}/source" if group else "pages/source"]
    return np.stack([arrays[name][r] if r >= 0 else older[-1 - r] for r in source])


def group_of(fields: dict, name: str) -> int:
    """The group of an array of keys or values: its last part is the layer."""
    layer = int(name.rsplit("/", 1)[1])
    groups = fields.get("groups", [[0, fields["pages"], [layer]]])
    return next(i for i, (_, _, layers) in enumerate(groups) if layer in layers)


def held(path: Path, group: int) -> list[tuple[int, list[int]]]:
    """For every sequence its first column in a group, and its pages from there on."""
    _, arrays, _ = read(path)
    if group == 0:
        return [(0, table) for _, _, table in sequences(path)]
    found, begin = [], 0
    names = [f"group/{group}/{name}" for name in ("first", "end")]
    for first, end in zip(*(arrays[name].tolist() for name in names), strict=True):
        found.append((first, arrays[f"group/{group}/pages"][begin:][: end - first].tolist()))
        begin += end - first
    return found


def sequences(path: Path) -> list[tuple[list[int], bytes, list[int]]]:
    """Tokens, salt and pages of every sequence."""
    fields, arrays, _ = read(path)
    size, begin, out = fields["page_size"], 0, []
    ends = np.cumsum(arrays["salt/length"])
    salts = [
        arrays["salt/bytes"][e - n : e].tobytes()
        for e, n in zip(ends, arrays["salt/length"], strict=True)
    ]
    for length, salt in zip(arrays["sequence/length"], arrays["sequence/salt"], strict=True):
        held = arrays["sequence/pages"][begin : begin + -(-length // size)]
        begin += len(held)
        tokens = arrays["page/tokens"][held].reshape(-1)[:length]
        out.append((tokens.tolist(), salts[salt], held.tolist()))
    return out


def split(lengths: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """One behind the other, each of its length."""
    assert sum(lengths) == len(values)
    ends = np.cumsum(lengths)
    return [values[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def asked_of(arrays: dict[str, np.ndarray]) -> list[dict]:
    """The map of every sample."""
    count = len(arrays["engine/request"])
    none = {"asked_length": np.zeros(count, np.int64), "asked_bytes": np.zeros(0, np.uint8)}
    asked = split(*(arrays.get(f"engine/{name}", array) for name, array in none.items()))
    maps = [msgpack.unpackb(each.tobytes()) if len(each) else {} for each in asked]
    assert all(sorted(each) == list(each) for each in maps)
    return maps


def beside(path: Path) -> list[dict]:
    """What every sample has beside its parameters."""
    maps = asked_of(read(path)[1])
    found = [OWN | {n: v for n, v in each.items() if n in OWN} for each in maps]
    assert any(own["priority"] for own in found) or not any(own["place"] for own in found)
    assert min((own["place"] for own in found), default=0) == 0
    return found


def requests(path: Path) -> list[tuple[int, int, list[int], dict]]:
    """Request, sample, tokens and parameters of every sample."""
    _, arrays, _ = read(path)
    own = {n.removeprefix("engine/"): a for n, a in arrays.items() if n.startswith("engine/")}
    count, asked = len(own["request"]), asked_of(arrays)
    tokens, out = split(own["length"], own["tokens"]), []
    for row in range(count):
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        params = DEFAULTS | {name: own[name][row].item() for name in names}
        params["stop_tokens"] = [t for t in own["stop_tokens"][row].tolist() if t >= 0]
        more = {n: v for n, v in asked[row].items() if n not in OWN}
        assert more.keys() <= params.keys()
        assert more.get("stop_tokens", params["stop_tokens"])[:8] == params["stop_tokens"]
        params |= more
        out.append((own["request"][row], own["sample"][row], tokens[row].tolist(), params))
    return out


def prompts_of(own: dict[str, np.ndarray]) -> list[tuple | None]:
    """Numbers of a prompt's tokens, and the pairs beside each, of every event."""
    out, numbers, pairs = [], 0, 0
    for length, top in zip(own["prompt_length"].tolist(), own["prompt_top"].tolist(), strict=True):
        if length == -1:
            out.append(None)
            continue
        logprobs = own["prompt_logprobs"][numbers : numbers + length].tolist()
        ids, likely = (own[f"prompt_{n}"][pairs : pairs + length * top] for n in ("ids", "likely"))
        both = list(zip(ids.tolist(), likely.tolist(), strict=True))
        rows = [tuple(both[at : at + top]) for at in range(0, len(both), max(top, 1))]
        out.append((tuple(logprobs), tuple(rows)))
        numbers, pairs = numbers + length, pairs + length * top
    assert numbers == len(own["prompt_logprobs"]) and pairs == len(own["prompt_ids"])
    return out


def events(path: Path) -> list[tuple]:
    """Request, sample, index, token, reason, largest logits, both log-probabilities, the likeliest
    tokens, the prompt's log-probabilities, the text and the figures of every event; and whether
    its callback has seen it."""
    _, arrays, _ = read(path)
    own = {n.removeprefix("engine/event_"): a for n, a in arrays.items() if "/event_" in n}
    count = len(own["token"])
    if "logprob" not in own:
        assert not (own["reason"] > 5).any()
        own |= {"logprob": np.full((count, 2), np.nan), "likely_length": np.zeros(count, int)}
        own |= {"likely_ids": np.zeros(0, int), "likely_logprobs": np.zeros(0)}
        own |= {"text_length": np.zeros(count, int), "text_bytes": np.zeros(0, np.uint8)}
        own |= {"figures": np.full((count, 8), np.nan), "prompt_length": np.full(count, -1)}
        own |= {f"prompt_{n}": np.zeros(0, int) for n in ("logprobs", "ids", "likely")}
        own |= {"prompt_top": np.zeros(count, int)}
    if "version" not in own:
        assert not (own["reason"] > 10).any()
        own |= {"version": np.zeros(count, int)}
    pairs = []
    for length, *columns in (
        ("top_length", "top_ids", "top_logits"),
        ("likely_length", "likely_ids", "likely_logprobs"),
    ):
        ids, values = (split(own[length], own[name]) for name in columns)
        both = zip(ids, values, strict=True)
        pairs.append([tuple(zip(i.tolist(), x.tolist(), strict=True)) for i, x in both])
    texts = split(own["text_length"], own["text_bytes"])
    prompts, out = prompts_of(own), []
    for row in range(count):
        where = [own[name][row].item() for name in ("request", "sample", "index")]
        token, reason = own["token"][row].item(), REASONS[own["reason"][row]]
        numbers = [None if np.isnan(x) else x.item() for x in own["logprob"][row]]
        token = None if token == -1 else token
        tops, likely = (each[row] for each in pairs)
        text = texts[row].tobytes().decode("utf-8", "surrogatepass")
        figures = tuple(None if np.isnan(x) else x.item() for x in own["figures"][row])
        told = (*numbers, likely, prompts[row], text, figures if figures[0] is not None else None)
        told = (*told, own["version"][row].item())
        out.append((*where, token, reason, tops, *told, bool(own["shown"][row])))
    return out
