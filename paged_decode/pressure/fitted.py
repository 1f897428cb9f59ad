"""A cost model of few terms for every program of an engine, fitted to measured ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._text import printable, shown
from ..engine import EngineConfig
from ._values import as_number, as_whole
from .costs import Program
from .report import as_json

__all__ = ["HOST_WORK", "Fit", "Fitted", "Line", "fit_line", "fit_program", "shape_of"]

HOST_WORK = ("submit", "prefill", "decode", "launch", "read")
"""What the host does, as `HostCosts` names it."""

_FORM = "paged-decode costs 1"
_SIZES = ("page_size", "max_rows", "decode_steps", "prefill_chunk", "prefill_rows")
_BUCKETS = ("row_buckets", "chunk_buckets")
Shape = tuple[str, int, int]


def shape_of(program: Program, decode_steps: int) -> Shape:
    """Kind, rows and width of the compiled program: for decode, the width is `decode_steps` if all
    steps are run, and otherwise 0; for copies, rows are 0."""
    kind, rows, width = program.kind, program.rows, program.width
    if kind == "decode":
        return kind, rows, width if width == decode_steps else 0
    return (kind, rows, width) if kind == "prefill" else (kind, 0, 1)


def _terms(program: Program) -> list[float]:
    """What the seconds of a program are a sum of, each with a factor of its own."""
    if program.kind in ("copy", "store", "load"):
        return [1.0, float(program.rows)]
    work = program.width if program.kind == "decode" else program.tokens
    return [1.0, *map(float, (work, program.pairs, program.longest, *program.window_tokens))]


class Fit(NamedTuple):
    """Seconds of one compiled shape: the sum of its terms times their factors.

    Attributes:
      kind, rows, width: as `shape_of` says.
      factors: of 1; of the steps, or for a chunk its tokens, or for copies the pages; of pairs of
        query and token; of `Program.longest`; of the tokens read in each group with a window.
      points: how many programs it was fitted to.
      mean_residual, max_residual: how far they are from it, as parts of what was measured.
    """

    kind: str
    rows: int
    width: int
    factors: tuple[float, ...]
    points: int
    mean_residual: float
    max_residual: float

    def seconds(self, program: Program) -> float:
        """By the terms that it has."""
        pairs = zip(_terms(program), self.factors, strict=False)
        return float(sum(term * factor for term, factor in pairs))


class Line(NamedTuple):
    """Seconds of the host's work: `base + each * size`."""

    base: float
    each: float
    points: int
    mean_residual: float
    max_residual: float


def fit_program(timings: Sequence[tuple[Program, float]], decode_steps: int) -> Fit:
    """The terms of one shape, none negative, with the least sum of squared relative errors.

    Raises:
      ValueError: there are none, they are not of one shape, or a time is not above 0.
    """
    shapes = {shape_of(program, decode_steps) for program, _ in timings}
    if len(shapes) != 1:
        raise ValueError(f"expected timings of one shape, got {sorted(shapes)}")
    times = np.array([as_number("time", seconds) for _, seconds in timings])
    terms = np.array([_terms(program) for program, _ in timings], float)
    factors, errors = _least(terms, times)
    (shape,) = shapes
    return Fit(*shape, tuple(factors.tolist()), len(times), *_sizes(errors))


def fit_line(points: Sequence[tuple[int, float]]) -> Line:
    """The line through points (size, seconds), with the least sum of absolute errors in effect: the
    median at every size counts, as a host has slow moments. Residuals are those of all points.

    Raises:
      ValueError: there are none.
    """
    if not points:
        raise ValueError("expected points, got none")
    sizes = sorted({size for size, _ in points})
    middle = [float(np.median([s for size, s in points if size == each])) for each in sizes]
    times = np.maximum(middle, 1e-9)
    terms = np.stack([np.ones(len(sizes)), np.array(sizes, float)], axis=1)
    factors, _ = _least(terms, times)
    base, each = factors.tolist()
    errors = [(base + each * size) / max(seconds, 1e-9) - 1 for size, seconds in points]
    return Line(base, each, len(points), *_sizes(np.array(errors)))


def _sizes(errors: np.ndarray) -> tuple[float, float]:
    sizes = np.abs(errors)
    return float(sizes.mean()), float(sizes.max())


def _least(terms: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of 0 or more, and the relative errors. A term that does not vary is left to the
    first."""
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-300)
    rows = terms / scale / times[:, None]
    kept = [i for i in range(terms.shape[1]) if i == 0 or np.ptp(terms[:, i]) > 0]
    factors = np.zeros(terms.shape[1])
    while kept:
        found = np.linalg.lstsq(rows[:, kept], np.ones(len(times)), rcond=None)[0]
        if found.min() >= 0:
            factors[kept] = found
            break
        kept.pop(int(found.argmin()))
    return factors / scale, rows @ factors - 1


@dataclass(frozen=True)
class Fitted:
    """What `calibrate` has found: a `CostModel` with `HostCosts`.

    Attributes:
      programs: of every shape, by kind, rows and width.
      host: of every kind of work of the host.
      sizes: page_size, and those of the engine's config that say which programs there are.
      about: card, model, versions, date, for whoever reads.
    """

    programs: Mapping[Shape, Fit]
    host: Mapping[str, Line]
    sizes: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, program: Program) -> float:
        """The sum of its terms.

        Raises:
          ValueError: no program of this shape was measured.
        """
        shape = shape_of(program, self.sizes["decode_steps"])
        if (fit := self.programs.get(shape)) is not None:
            return fit.seconds(program)
        what = f"{shape[0]} of {shape[1]} rows and width {shape[2]}"
        if shape[0] in ("store", "load"):
            what = "copies to and from a host tier"
        raise ValueError(
            f"{printable(what)}: not among the calibrated programs; calibrate an engine that has "
            "it (the same EngineConfig, and a tier if there is one)"
        )

    def host_seconds(self, work: str, size: int) -> float:
        """On the line of that work."""
        line = self.host[work]
        return line.base + line.each * size

    def recompute_seconds(self, tokens: int) -> float:
        """Prefilling that many tokens, chunk by chunk, in programs with nothing else."""
        rows, total, begin = self.sizes["prefill_rows"], 0.0, 0
        most = self.sizes["prefill_chunk"]
        while begin < tokens:
            count = pairs = end = 0
            for _ in range(rows):
                size = min(most, tokens - begin)
                count, pairs = count + size, pairs + size * begin + size * (size + 1) // 2
                begin = end = begin + size
            width = next(w for w in self.sizes["chunk_buckets"] if w >= min(most, count))
            total += self.seconds(Program("prefill", rows, width, count, 0, (), pairs, end))
        return total

    def swap_seconds(self, tokens: int) -> float:
        """Copying the pages of that many tokens to the host and back."""
        pages = -(-tokens // self.sizes["page_size"])
        return sum(self.seconds(Program(kind, pages, 1, 0, 0)) for kind in ("store", "load"))

    @property
    def config(self) -> EngineConfig:
        """One with the measured programs; limits are those of its defaults."""
        names = (*_SIZES[1:], *_BUCKETS, "prefill_tokens")
        return EngineConfig(**{name: self.sizes[name] for name in names})

    def _check(self, count: int) -> None:
        """Raise ValueError unless it has every program of its engine, once, with all its terms."""
        config = self.config  # which refuses sizes that contradict each other
        if len(self.programs) != count:
            raise ValueError("expected every shape of a program once")
        steps = {config.decode_steps, 0 if config.decode_steps > 1 else 1}
        needed = {("decode", rows, width) for rows in config.row_buckets for width in steps}
        needed |= {("prefill", config.prefill_rows, width) for width in config.chunk_buckets}
        if missing := sorted(needed - {*self.programs}):
            kind, rows, width = missing[0]
            raise ValueError(f"no {kind} program of {rows} rows and width {width}")
        fits = self.programs.values()
        of_models = {len(fit.factors) for fit in fits if fit.kind in ("prefill", "decode")}
        of_copies = {len(fit.factors) for fit in fits if fit.kind not in ("prefill", "decode")}
        if len(of_models) != 1 or min(of_models) < 4 or of_copies - {2}:
            raise ValueError(
                "expected 2 factors of every copy, and 4 of other programs, with one more for each "
                f"window; got {sorted(of_models | of_copies)}"
            )

    def write(self, path: str | Path) -> None:
        """Write it as JSON."""
        value = {
            "form": _FORM,
            **self.about,
            "engine": dict(self.sizes),
            "programs": [fit._asdict() for fit in self.programs.values()],
            "host": {work: line._asdict() for work, line in self.host.items()},
        }
        Path(path).write_text(as_json(value), "utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Fitted:
        """Read what `write` has written.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is no such file; with its name, and what is wrong.
        """
        try:
            value = json.loads(Path(path).read_text("utf-8"))
            if not isinstance(value, dict) or value.get("form") != _FORM:
                raise ValueError(f"expected an object with form {_FORM!r}")
            known = ("form", "engine", "programs", "host")
            about = {name: each for name, each in value.items() if name not in known}
            fits = [_fit(each) for each in value["programs"]]
            host = {work: _line(work, value["host"]) for work in HOST_WORK}
            found = cls({fit[:3]: fit for fit in fits}, host, _engine_sizes(value["engine"]), about)
            found._check(len(fits))
            return found
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{printable(path)} has no calibrated costs: {why}") from None


def _fit(value: Any) -> Fit:
    kind = value["kind"]
    if kind not in ("prefill", "decode", "copy", "store", "load"):
        raise ValueError(f"unknown kind of program {shown(kind)}")
    rows, width = (as_whole(name, value[name]) for name in ("rows", "width"))
    factors = tuple(as_number("a factor", each, zero=True) for each in value["factors"])
    return Fit(kind, rows, width, factors, *_quality(value))


def _line(work: str, values: Mapping[str, Any]) -> Line:
    value = values[work]
    base, each = (
        as_number(f"{name} of {work}", value[name], zero=True) for name in Line._fields[:2]
    )
    return Line(base, each, *_quality(value))


def _quality(value: Mapping[str, Any]) -> tuple[int, float, float]:
    mean, most = (as_number(n, value[n], zero=True) for n in ("mean_residual", "max_residual"))
    if mean > most * (1 + 1e-9):
        raise ValueError(f"mean_residual must not be above max_residual, got {mean} and {most}")
    return as_whole("points", value["points"], 1), mean, most


def _engine_sizes(value: Mapping[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {name: as_whole(name, value[name], 1) for name in _SIZES}
    sizes |= {name: tuple(as_whole(name, each, 1) for each in value[name]) for name in _BUCKETS}
    most = value["prefill_tokens"]
    return sizes | {"prefill_tokens": None if most is None else as_whole("prefill_tokens", most, 1)}
