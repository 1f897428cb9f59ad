"""The check of several processes, played by one; tests/examples/test_processes.py starts two."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import BlockAllocator, ReplicaCheck, ReplicaMismatch, ShardedAllocator

GATHER = "paged_decode.replicas.multihost_utils.process_allgather"


class Pair(NamedTuple):
    a: object
    b: object


@dataclass(frozen=True)
class Plan:
    tables: np.ndarray
    steps: int


def digest(value, monkeypatch) -> bytes:
    sent = []
    monkeypatch.setattr(GATHER, lambda own: sent.append(own.tobytes()) or own[None])
    assert ReplicaCheck()(value) is value
    return sent[0]


@pytest.mark.parametrize("make", [BlockAllocator, lambda *n: ShardedAllocator(*n, num_shards=2)])
def test_the_same_calls_pass_with_every_allocator(make, monkeypatch):
    seen = []
    for _ in range(2):
        allocator, check, sent = make(18, 4), ReplicaCheck(every=2), []
        monkeypatch.setattr(GATHER, lambda own, sent=sent: sent.append(own.tobytes()) or own[None])
        handles = [allocator.allocate([1, 2, 3 + i]) for i in range(2)]
        for token in range(5):
            batch, copies = allocator.advance(handles, [token, token])
            checked = check((batch, copies))
            assert checked[0] is batch and checked[1] is copies
        seen.append(sent)
    assert seen[0] == seen[1] and len(set(seen[0])) == 2


def test_another_value_shape_dtype_or_place_is_another_digest(monkeypatch):
    zeros = np.zeros((2, 3), np.int32)
    values = [
        zeros, zeros.T, zeros.astype(np.int64), zeros.astype(np.float32), zeros[:, :2], zeros + 1,
        (zeros,), [zeros], (zeros, zeros), Pair(zeros, 0), Pair(zeros, 1), Pair(1, zeros),
        Pair(zeros, None), Plan(zeros, 0), Plan(zeros, 1), (), ((), ()), ((()),) * 3, 0, 1, True,
        None, "0", b"0", 0.0, -0.0, ("a", "bc"), ("ab", "c"), np.int32(0), np.int64(0),
    ]  # fmt: skip
    assert len({digest(value, monkeypatch) for value in values}) == len(values)
    assert digest(zeros.T, monkeypatch) == digest(np.zeros((3, 2), np.int32), monkeypatch)


def test_a_difference_between_two_comparisons_is_not_forgotten(monkeypatch):
    twin, calls = {}, []

    def gather(own):
        calls.append(own)
        return np.stack([own, twin.get("digest", own)])

    monkeypatch.setattr(GATHER, gather)
    other = ReplicaCheck(every=3)
    for value in (0, 9, 2):
        other(value)
    twin["digest"] = calls[0]
    check = ReplicaCheck(every=3)
    check(0), check(1)
    with pytest.raises(ReplicaMismatch, match="differ at check 3: digests .* same order") as caught:
        check(2)
    assert caught.value.step == 3
    assert caught.value.digests == (calls[1].tobytes().hex(), calls[0].tobytes().hex())
    again = copy.copy(caught.value)  # by what pickle asks, too
    assert str(again) == str(caught.value) and again.digests == caught.value.digests


@pytest.mark.parametrize(
    "value", [jnp.zeros(3), (np.zeros(2), {1: 2}), np.array([object()]), object(), Plan]
)
def test_what_cannot_be_compared_by_its_bytes_is_refused(value):
    with pytest.raises(TypeError, match="NumPy arrays and numbers, got"):
        ReplicaCheck()(value)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_every_is_a_count(every, error, unchecked):
    with pytest.raises(error, match="every"):
        ReplicaCheck(every)
