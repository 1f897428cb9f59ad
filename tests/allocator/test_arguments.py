"""Integers as callers write them: every kind of integer works, whatever else is told what it is."""

from __future__ import annotations

from array import array
from collections import UserList, deque

import numpy as np
import pytest

from paged_decode.allocator.arguments import (
    as_count,
    as_counts,
    as_int,
    as_ints,
    as_prompt,
    as_tokens,
)

from .test_scenarios import make, refuses

pytestmark = pytest.mark.usefixtures("unchecked")

MANY = list(range(2, 300))


def kind(value) -> str:
    """A name for a case: text as it is, else the type, because some values show an address."""
    return value if isinstance(value, str) else type(value).__name__


HIDDEN_BOOLS = {
    "a list": [True, 2],
    "a tuple": (2, False),
    "numpy's bool": [np.True_, 2],
    "beside numpy's integers": [np.int64(5), True],
    "beside unsigned integers": [True, np.uint64(5)],
    "a nested list": [[1, 2], [3, True]],
    "a nested tuple": ([1, 2], (3, True)),
    "three axes": [[[7, 8]], [[9, False]]],
    "an array of one bool": [np.array(True), 2],
    "an array of bools": [np.array([1, 2]), np.array([True, False])],
    "an array beside a list": [np.array([1, 2]), [3, True]],
    "a deque": deque([2, True]),
    "a user's list": UserList([2, True]),
    "the last of many": [*MANY, True],
    "the first of many": (False, *MANY),
    "behind ones of many": [1, 0, 1, *MANY, True],
    "many rows": [*([t] for t in MANY), [True]],
}


@pytest.mark.parametrize("value", HIDDEN_BOOLS.values(), ids=HIDDEN_BOOLS)
def test_a_bool_among_integers_is_refused_wherever_it_hides(value):
    with pytest.raises(TypeError, match="^x must be integers, got a bool among them"):
        as_ints("x", value)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, h: a.allocate([True, 2]),
        lambda a, h: a.append(h, [[True, 2], [3, 4]]),
        lambda a, h: a.append(h, [[3], [4]], [1, True]),
        lambda a, h: a.advance(h, [2, True]),
        lambda a, h: a.reserve(h, [2, True]),
        lambda a, h: a.batch(h, [0, False], [1, 1]),
        lambda a, h: a.commit(h, [1, True]),
        lambda a, h: a.free([True, h[0]]),
        lambda a, h: a.free_pages([3, True]),
        lambda a, h: a.page_stamps([3, True]),
    ],
)
def test_no_call_of_the_allocator_takes_a_bool_for_an_integer(call):
    allocator = make()
    handles = [allocator.allocate([1, 2]) for _ in range(2)]
    refuses(allocator, TypeError, call, allocator, handles)


@pytest.mark.parametrize(
    "value, want",
    [
        ([0, 1], [0, 1]),
        ((1, 0), [1, 0]),
        ([np.int32(1), 0], [1, 0]),
        ([1, *MANY], [1, *MANY]),
        ([[1], [0]], [[1], [0]]),
        ([np.array([1, 2]), [3, 4]], [[1, 2], [3, 4]]),
        ([range(2), range(2)], [[0, 1], [0, 1]]),
        (range(3), [0, 1, 2]),
        (deque([1, 2]), [1, 2]),
        (array("q", [1, 2]), [1, 2]),
        (memoryview(np.arange(4).reshape(2, 2)), [[0, 1], [2, 3]]),
        ([], []),
        ([[]], [[]]),
        ((), []),
        (np.uint8(3), 3),
        (7, 7),
        (np.zeros(0, np.int8), []),
        (np.array([1, 2], ">i4"), [1, 2]),
    ],
    ids=kind,
)
def test_integers_of_every_kind_are_taken(value, want):
    got = as_ints("x", value)
    assert got.dtype == np.int64 and got.tolist() == want


@pytest.mark.parametrize(
    "value, error, message",
    [
        (2**70, ValueError, "does not fit 64 bits"),
        ([2**70], ValueError, "holds an integer that does not fit 64 bits"),
        ([2**63], ValueError, "holds 9223372036854775808, which does not fit 64 bits"),
        ([2**63, 1], ValueError, "does not fit 64 bits"),  # float64 to NumPy
        ([2**63, -1], ValueError, "does not fit 64 bits"),
        ([-(2**63) - 1], ValueError, "does not fit 64 bits"),
        (np.array([1, 2**70], object), ValueError, "does not fit 64 bits"),
        (np.array([1, 2], object), TypeError, "got dtype object; convert it first"),
        (np.zeros(0, object), TypeError, "got dtype object"),
        ([np.array([1, 2], object)], TypeError, "got dtype object"),
        ([2**63, 1.5], TypeError, "got dtype float64"),
        ([1, 1.5], TypeError, "got dtype float64"),
        ([1, None], TypeError, "got dtype object"),
        ([1, "a"], TypeError, "got dtype <U"),
        ([[1], [1, 2]], ValueError, "without ragged rows"),
        ([1, [2]], ValueError, "without ragged rows"),
        (np.zeros(0), TypeError, "got dtype float64"),
        (np.array([True]), TypeError, "got dtype bool"),
        (np.array(1.5), TypeError, "got dtype float64"),
        (1.5, TypeError, "got a float"),
        (True, TypeError, "got a bool"),
        (None, TypeError, "got a NoneType"),
        ("12", TypeError, "got a str"),
        ("", TypeError, "got a str"),
        (b"12", TypeError, "got a bytes"),
        ({1, 2}, TypeError, "got a set"),
        ({1: 2}, TypeError, "got a dict"),
        ((t for t in (1, 2)), TypeError, "got a generator"),
    ],
    ids=kind,
)
def test_what_is_no_integer_is_called_what_it_is(value, error, message):
    with pytest.raises(error, match=message):
        as_ints("x", value)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)], ids=kind)
def test_one_integer_of_every_kind_becomes_a_python_int(value):
    for got in (as_int("n", value), as_count("n", value, 3, 3), *as_counts("n", [value])):
        assert type(got) is int and got == 3


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), 1.0, np.float32(1), np.array(1.0), np.array([1]), "1", None],
    ids=kind,
)
def test_one_integer_is_no_bool_float_or_array_of_them(value):
    for call in (as_int, as_count):
        with pytest.raises(TypeError, match="^n must be an integer, got"):
            call("n", value)
    with pytest.raises(TypeError, match="^n must be an integer, got"):
        as_counts("n", [value])


def test_a_count_lies_between_its_bounds():
    with pytest.raises(ValueError, match="n must be from 1 to 4, got 5"):
        as_count("n", 5, 1, 4)
    with pytest.raises(ValueError, match="n must be from 1 to 4, got 0"):
        as_count("n", 0, 1, 4)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        as_count("n", 0, 1)


@pytest.mark.parametrize(
    "values",
    [[4, 5], (4, 5), {4, 5}, iter([4, 5]), range(4, 6), np.array([4, 5], np.uint8)],
    ids=kind,
)
def test_several_integers_may_come_in_any_container(values):
    assert sorted(as_counts("n", values)) == [4, 5]


@pytest.mark.parametrize(
    "values", [5, np.int64(5), np.array(5), np.array([[5]]), "12", b"12", {5: 5}, None], ids=kind
)
def test_several_integers_are_no_text_and_not_one(values):
    with pytest.raises(TypeError, match=r"^n must be a sequence of integers, such as \[5\]"):
        as_counts("n", values)


def test_tokens_are_a_new_array_and_a_prompt_is_one_row():
    source = np.array([1, 2], np.int32)
    assert not np.shares_memory(as_tokens("x", source), source)
    for bad in ([], [[1]], 5):
        with pytest.raises(ValueError, match=r"prompt must have shape \[T\] with T >= 1"):
            as_prompt("prompt", bad)
