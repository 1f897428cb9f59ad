"""What the built API page must hold, read from the package itself."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cached_property
from html import unescape
from typing import Any

PUBLIC = [
    "paged_decode",
    "paged_decode.allocator",
    "paged_decode.engine",
    "paged_decode.errors",
    "paged_decode.faults",
    "paged_decode.kernels",
    "paged_decode.planning",
    "paged_decode.policies",
    "paged_decode.pressure",
    "paged_decode.snapshot",
    "paged_decode.tiers",
]
SEAMS = {"paged_decode.snapshot.Files", "paged_decode.snapshot.OSFiles"}  # for failing disks
CALLABLE = (type(lambda: 0), classmethod, staticmethod, property, cached_property)


def anchors_of(html: str) -> set[str]:
    """What the page has a heading for, by path."""
    return set(re.findall(r'id="(paged_decode[\w.]*)"', html))


def found(path: str) -> Any:
    """The object at a dotted path; None if there is none."""
    parts = path.split(".")
    value = importlib.import_module(parts[0])
    for at, name in enumerate(parts[1:], 2):
        try:
            value = inspect.getattr_static(value, name)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(parts[:at]))
            except ImportError:
                return None
    return value


def members_of(cls: type) -> set[str]:
    """Public methods and properties that the project wrote, inherited ones too."""
    own = [c for c in cls.__mro__ if c.__module__.startswith("paged_decode")]
    names = {name for c in own for name, value in vars(c).items() if isinstance(value, CALLABLE)}
    return {name for name in names if not name.startswith("_")}


def missing_names(html: str, modules: list[str] = PUBLIC) -> set[str]:
    """Public names, and methods of public classes, for which the page has no heading.

    A name that several modules export needs one heading, under any of its paths.
    """
    anchors = anchors_of(html)
    documented = {id(value): path for path in sorted(anchors) if (value := found(path)) is not None}
    missing = set()
    for module in modules:
        public = importlib.import_module(module)
        for name in public.__all__:
            value = getattr(public, name)
            if name == "__version__":
                continue
            if (path := documented.get(id(value))) is None:
                missing.add(f"{module}.{name}")
            elif inspect.isclass(value):
                missing |= {f"{path}.{member}" for member in members_of(value)} - anchors
    return missing - SEAMS


def _text(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())


def examples_of(html: str) -> set[str]:
    """The first line of every example in the docstrings of what the page has."""
    lines = set()
    for path in anchors_of(html):
        doc = getattr(found(path), "__doc__", None) or ""
        lines |= {_text(line) for line in re.findall(r"^\s*(>>> .*)$", doc, re.MULTILINE)[:1]}
    return lines


def garbled_examples(html: str) -> set[str]:
    """Examples of docstrings that the page does not show as code, and prompts outside of code."""
    code = _text(" ".join(re.findall(r"<pre.*?</pre>", html, re.DOTALL)))
    prose = _text(re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL))
    lost = {line for line in examples_of(html) if line not in code}
    return lost | set(re.findall(r">>> .{0,40}", prose))
