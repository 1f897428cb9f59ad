"""A function of the user's that makes an engine; what is wrong with it is told with its line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .._text import printable, shown
from ..engine import Engine

__all__ = ["FactoryError", "blamed", "load_factory", "make_engine"]

_PACKAGE = str(Path(__file__).parents[1])


class FactoryError(Exception):
    """What is wrong with the user's module or function, in one line with its place."""


def load_factory(name: str) -> Callable[..., Any]:
    """The function of `MODULE:FUNCTION` or `FILE.py:FUNCTION`.

    The folder of the file, or for a module the current one, is where it may import from.

    Raises:
      FactoryError: it is not there, or importing it fails; with the file and line.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise FactoryError(f"expected MODULE:FUNCTION or FILE.py:FUNCTION, got {shown(name)}")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    found = getattr(module, function, None)
    if callable(found):
        return found
    own = (f for f in vars(module).values() if inspect.isfunction(f))
    names = [f.__name__ for f in own if f.__module__ == module.__name__]  # none that it imported
    there = f"; it has {', '.join(names[:8])}" if names else ""
    if not hasattr(module, function):
        raise FactoryError(f"{where} has no function {shown(function)}{there}")
    kind = type(found).__name__
    raise FactoryError(f"{shown(function)} of {where} is no function, but of type {kind}{there}")


def _load_module(where: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all others: a folder hides no package
    with blamed():
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name and f"{where}.".startswith(f"{error.name}."):
                raise FactoryError(
                    f"no module {shown(error.name)} is installed, or lies in {os.getcwd()}"
                ) from None
            raise


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FactoryError(f"there is no file {shown(str(path))}")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"_engine_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{shown(str(path))} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        with blamed(_short(str(path))):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make_engine(factory: Callable[..., Any], **arguments: Any) -> Engine:
    """Call it.

    Raises:
      FactoryError: it does not take the arguments, raises, or returns something else.
    """
    with blamed():
        try:
            inspect.signature(factory).bind(**arguments)
        except TypeError as error:
            wanted = ", ".join(f"{name}=" for name in arguments)
            raise FactoryError(
                f"{_place(factory)}: it is called with {wanted}, and does not take that: {error}"
            ) from None
        except ValueError:  # it does not tell
            pass
        engine = factory(**arguments)
    if not isinstance(engine, Engine):
        kind = type(engine).__name__
        raise FactoryError(f"{_place(factory)}: expected a paged_decode.Engine, got a {kind}")
    return engine


@contextmanager
def blamed(place: str = "") -> Iterator[None]:
    """What is raised within becomes one line, with the last place in the user's own code.

    Args:
      place: what to say where there is none.

    Raises:
      FactoryError: that line.
    """
    try:
        yield
    except FactoryError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        kind = type(error).__name__
        try:
            text = " ".join(str(error).split())
        except Exception:  # an error that cannot even say what it is
            text = "its message cannot be read"
        said = f"{kind}: {text}" if text else kind
        raise FactoryError(printable(f"{_blame(error, place)}{said}", 1000)) from error


def _blame(error: BaseException, place: str) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if _is_users(frame.filename)]
    if mine:
        return f"{_short(mine[-1].filename)}:{mine[-1].lineno}: "
    return f"{place}: " if place else ""


def _is_users(file: str) -> bool:
    """Whether it is neither ours, nor Python's, nor of an installed package."""
    paths = sysconfig.get_paths()
    others = (_PACKAGE, *(paths[name] for name in ("stdlib", "purelib", "platlib")))
    for folder in others:  # as they are written, and where links lead
        for where, path in ((folder, file), (os.path.realpath(folder), os.path.realpath(file))):
            if path.startswith(f"{where}{os.sep}"):
                return False
    return os.path.isfile(file)


def _place(factory: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(factory), "__code__", None)
    name = getattr(factory, "__name__", type(factory).__name__)
    return f"{_short(code.co_filename)}:{code.co_firstlineno}: {name}" if code else name


def _short(file: str) -> str:
    """Relative to the current folder, if it lies there."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # another drive
        return file
    return file if relative.startswith("..") else relative
