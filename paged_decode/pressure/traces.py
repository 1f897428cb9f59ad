"""Requests from public traces: every line is checked, and named if it is none."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .._text import printable, shown
from ._values import as_number, as_whole
from .workload import Request

__all__ = ["read_azure", "read_mooncake"]

_LONGEST_LINE = 2**24  # bytes: what has no line ends is no trace, however long it goes on
_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_mooncake(path: str | Path) -> Iterator[Request]:
    """Requests of a Mooncake trace: JSON lines with `hash_ids` of 512-token blocks.

    Each line is an object with `timestamp` in milliseconds, `input_length`, `output_length` and
    `hash_ids`; empty lines are passed over, and an output of 0 tokens counts as one of 1. Times
    count from the first request. The file is read as it is needed, so a bad line is an error when
    its turn comes.

    Args:
      path: a regular file in UTF-8 without a byte order mark.

    Raises:
      OSError: it cannot be read.
      ValueError: a line that is no such request, or comes before an earlier one in time; no line at
        all. The message has the file and the line.

    Source: Qin et al., "Mooncake", FAST 2025.
    """
    last = 0.0
    begin: float | None = None
    for number, line in _lines(path):
        if not line.strip():
            continue
        with _named(path, number, "Mooncake"):
            request = _mooncake(line)
            _check_order(request.arrival_seconds, last)
        last = request.arrival_seconds
        begin = last if begin is None else begin
        yield replace(request, arrival_seconds=last - begin)
    if begin is None:
        raise ValueError(
            f"{_shown(path)}, line 1: expected requests of Mooncake, got an empty file"
        )


def _mooncake(line: str) -> Request:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {', '.join(_MOONCAKE)}, got {shown(row)}")
    if missing := [name for name in _MOONCAKE if name not in row]:
        raise ValueError(f"{', '.join(missing)} missing; expected {', '.join(_MOONCAKE)}")
    when = as_number("timestamp", row["timestamp"], zero=True)
    length = as_whole("input_length", row["input_length"], 1)
    output = as_whole("output_length", row["output_length"])
    if not isinstance(row["hash_ids"], list):
        raise ValueError(f"hash_ids must be a list of integers, got {shown(row['hash_ids'])}")
    return Request(when / 1000, tuple(row["hash_ids"]), 512, length, max(1, output))


def read_azure(path: str | Path) -> Iterator[Request]:
    """Requests of an Azure LLM inference trace: CSV of arrival, prompt and output lengths.

    The first line names the columns: `TIMESTAMP` (ISO 8601), `ContextTokens`, `GeneratedTokens`,
    and others, which are left alone. Times count from the first request. The trace says nothing of
    contents, so no two prompts are alike. The file is read as it is needed, so a bad line is an
    error when its turn comes.

    Args:
      path: a regular file in UTF-8 without a byte order mark.

    Raises:
      OSError: it cannot be read.
      ValueError: no header, a line that is no such request, or comes before an earlier one in time;
        no line at all. The message has the file and the line.
    """
    rows = _table(path)
    number, header = next(rows, (1, []))
    with _named(path, number, "Azure"):
        if any(header.count(name) != 1 for name in _AZURE):
            got = shown(",".join(header)) if header else "an empty file"
            raise ValueError(f"expected a header with {','.join(_AZURE)}, got {got}")
    start: datetime | None = None
    last, found = 0.0, 0
    for number, cells in rows:
        with _named(path, number, "Azure"):
            if len(cells) != len(header):
                raise ValueError(
                    f"expected {len(header)} fields as in the header, got {len(cells)}"
                )
            row = dict(zip(header, cells, strict=True))
            when = datetime.fromisoformat(row["TIMESTAMP"].strip())
            start = start or when
            seconds = (when - start).total_seconds()
            _check_order(seconds, last)
            length = as_whole("ContextTokens", _digits(row["ContextTokens"]), 1)
            output = as_whole("GeneratedTokens", _digits(row["GeneratedTokens"]))
            request = Request(seconds, (found,), length, length, max(1, output))
        last, found = seconds, found + 1
        yield request
    if not found:
        raise ValueError(
            f"{_shown(path)}, line {number}: expected requests behind the header, got none"
        )


def _digits(text: str) -> Any:
    """An int, or the text as it is, which is none then."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _check_order(seconds: float, last: float) -> None:
    if seconds < last:
        raise ValueError(
            f"the arrival is {last - seconds:g} s before that of the request in front of it: sort "
            "the lines by time"
        )


def _table(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV that are not empty, and the lines where they end."""
    number = 1

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path):  # noqa: B007  # read below
            yield line

    reader = csv.reader(texts(), strict=True)
    try:
        for row in reader:
            if row:
                yield number, row
    except csv.Error as error:
        raise ValueError(f"{_shown(path)}, line {number}: no Azure request: {error}") from None


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1, and lines with their ends."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe nobody writes to never ends
        raise ValueError(f"{_shown(path)}: expected a regular file")
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            where = f"{_shown(path)}, line {number}"
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{where}: expected lines of less than {_LONGEST_LINE} bytes")
            if number == 1 and line.startswith(b"\x1f\x8b"):
                raise ValueError(f"{where}: expected UTF-8, got gzip; unpack it")
            if number == 1 and line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(
                    f"{where}: expected UTF-8 without a byte order mark, got one; convert it"
                )
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8, got {error}; convert it") from None


@contextmanager
def _named(path: str | Path, number: int, kind: str) -> Iterator[None]:
    """What is wrong with a line has its place in front."""
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        why = printable(str(error), 400)
        raise ValueError(f"{_shown(path)}, line {number}: no {kind} request: {why}") from None


def _shown(path: str | Path) -> str:
    return printable(str(path))
