"""Random programs against a model of plain dicts, the content of every page re-read each step.

Over one pool or two shards, and with objects of a user that raise: every call is tried with the
first, the second, ... k-th call of them failing, until it goes through; what fails changes nothing.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_decode.allocator import (
    BlockAllocator,
    OutOfPages,
    SequenceTooLong,
    ShardedAllocator,
)
from paged_decode.allocator.prefix import blake2b_digest

from .device import Device, contents, freeze

DIGESTS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "blake2b": blake2b_digest,
    "constant": lambda key, payload: b"",
    "two bits": lambda key, payload: bytes([zlib.crc32(payload) & 3]),
}
TOKEN = st.integers(0, 1)  # few different prompts, so that prefixes are shared all the time
TOKENS = st.lists(TOKEN, min_size=1, max_size=12)
MASK = st.integers(1, 2**8 - 1)
SALT = st.sampled_from([None, None, None, "", "a", b"a"])


def has_sequences(machine: Programs) -> bool:
    return bool(machine.model)


COMMON = settings(
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Boom(Exception):
    """What a user's object raises."""


class Fuse:
    """A digest and an eviction rank that raise at the call that they are set to."""

    def __init__(self, digest: Callable[[bytes, bytes], bytes]):
        self.left, self._digest = 0, digest

    def _burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Boom

    def digest(self, key: bytes, payload: bytes) -> bytes:
        self._burn()
        return self._digest(key, payload)

    def rank(self, page: Any) -> tuple[int, ...]:
        self._burn()
        return page.uses, page.last_used


class Programs(RuleBasedStateMachine):
    """Rows are chosen by number among the live ones, so that programs shrink well."""

    operations = 0

    @initialize(
        usable=st.sampled_from([40, 20, 10, 5, 2]),
        page_size=st.sampled_from([1, 2, 4]),
        cache=st.sampled_from([True, True, True, False]),
        digest=st.sampled_from(sorted(DIGESTS)),
        prompts=st.lists(TOKENS, min_size=1, max_size=4),
        shards=st.sampled_from([1, 2]),
        fused=st.booleans(),
    )
    def create(self, usable, page_size, cache, digest, prompts, shards, fused):
        self.fuse, self.fused = Fuse(DIGESTS[digest]), fused
        options: Any = dict(prefix_cache=cache, hash_key=b"k", digest=self.fuse.digest)
        options["eviction"] = self.fuse if fused else None
        if shards == 1:
            self.allocator = BlockAllocator(usable + 1, page_size, **options)
        else:
            self.allocator = ShardedAllocator(
                shards * (usable + 1), page_size, num_shards=shards, **options
            )
        self.device = Device(self.allocator)
        self.model: dict[int, list[int]] = {}
        self.salts: dict[int, object] = {}
        self.computed: dict[int, int] = {}
        self.raw: list[int] = []
        self.dead: list[int] = []
        for prompt in prompts:
            self.allocate(prompt, None, 0)

    def pick(self, choice: int) -> int:
        return sorted(self.model)[choice % len(self.model)]

    def some(self, mask: int) -> list[int]:
        """Some of the live handles, in an order of their own, often all and seldom none."""
        live = sorted(self.model, key=lambda h: (h * mask) % 7)
        return [h for i, h in enumerate(live) if mask == 255 or mask >> i % 8 & 1] or live[:1]

    def attempt(self, call, *args, **kwargs):
        """The result, or None if the pool is too small: then nothing may have changed."""
        Programs.operations += 1
        before = freeze(self.allocator)
        for k in itertools.count(1):
            self.fuse.left = k if self.fused else 0
            try:
                return call(*args, **kwargs)
            except Boom:
                assert freeze(self.allocator) == before
                self.allocator.check_invariants() if k == 1 else None
                continue
            except OutOfPages as error:
                assert error.needed > error.free + error.evictable
            except SequenceTooLong:
                pass
            finally:
                self.fuse.left = 0
            assert freeze(self.allocator) == before
            return None

    def adopt(self, handle: int, tokens: list[int], salt: object, computed: int) -> None:
        assert handle not in self.model and handle not in self.dead
        self.model[handle], self.salts[handle] = list(tokens), salt
        self.computed[handle] = computed

    def grow(self, handles: list[int], new: list[list[int]]) -> None:
        for handle, tokens in zip(handles, new, strict=True):
            self.model[handle] += tokens

    @rule(tokens=TOKENS, salt=SALT, keep_free=st.integers(0, 1))
    def allocate(self, tokens, salt, keep_free):
        expected = self.allocator.match_prefix(tokens, cache_salt=salt)
        handle = self.attempt(self.allocator.allocate, tokens, cache_salt=salt, keep_free=keep_free)
        if handle is not None:
            found = self.allocator.sequence(handle).cached
            assert found <= expected < len(tokens)
            assert found == expected or isinstance(self.allocator, ShardedAllocator)
            self.adopt(handle, tokens, salt, found)

    @precondition(has_sequences)
    @rule(mask=MASK, chunk=st.integers(1, 5))
    def prefill(self, mask, chunk):
        """One chunk for each, but of forks that share uncomputed pages only the first."""
        handles, seen = [], set()
        for handle in self.some(mask):
            pages = set(self.allocator.sequence(handle).pages)
            if self.computed[handle] < len(self.model[handle]) and not pages & seen:
                handles.append(handle)
                seen |= pages
        begin = [self.computed[h] for h in handles]
        end = [min(b + chunk, len(self.model[h])) for b, h in zip(begin, handles, strict=True)]
        batch = self.allocator.batch(handles, begin, end, tokens_per_row=chunk)
        spans = [self.model[h][b:e] for h, b, e in zip(handles, begin, end, strict=True)]
        self.device.step(batch, spans, [self.salts[h] for h in handles])
        assert batch.tokens.tolist() == [[0] * (chunk - len(s)) + s for s in spans]
        self.attempt(self.allocator.commit, handles, end)
        self.computed |= dict(zip(handles, end, strict=True))

    @precondition(has_sequences)
    @rule(mask=MASK, tokens=st.lists(TOKEN, min_size=16, max_size=16), commit=st.booleans())
    def advance(self, mask, tokens, commit):
        """With `commit`, of those alone that have no position which nobody computes."""
        handles = self.some(mask)
        if commit:
            handles = [h for h in handles if self.computed[h] >= len(self.model[h]) - 1]
        tokens = [tokens[i % 16] for i in range(len(handles))]
        done = self.attempt(
            self.allocator.advance,
            handles,
            tokens,
            pad_to=len(handles) + 2,
            columns=40,
            commit=commit,
        )
        if done is None:
            return
        batch, copies = done
        self.device.copy(copies)
        self.device.step(batch, [[t] for t in tokens], [self.salts[h] for h in handles])
        if commit:
            self.computed |= {h: self.allocator.sequence(h).computed for h in handles}
        self.grow(handles, [[t] for t in tokens])
        ready = [h for h in handles if self.computed[h] == len(self.model[h]) - 1]
        self.computed |= {h: len(self.model[h]) for h in ready}
        self.attempt(self.allocator.commit, ready, [len(self.model[h]) for h in ready])

    @precondition(has_sequences)
    @rule(mask=MASK, new=st.lists(TOKENS, min_size=16, max_size=16))
    def append(self, mask, new):
        handles = self.some(mask)
        new = [new[i % 16][: 1 + i % 7] for i in range(len(handles))]
        width = max(map(len, new), default=0)
        padded = np.zeros((len(handles), width), np.int64)
        for row, tokens in zip(padded, new, strict=True):
            row[: len(tokens)] = tokens
        copies = self.attempt(self.allocator.append, handles, padded, [len(t) for t in new])
        if copies is not None:
            self.device.copy(copies)
            self.grow(handles, new)

    @precondition(has_sequences)
    @rule(mask=MASK, steps=st.integers(1, 4), token=TOKEN)
    def device_loop(self, mask, steps, token):
        """Reserve, run k steps without the host, then book what came out."""
        handles = [h for h in self.some(mask) if self.computed[h] == len(self.model[h])]
        copies = self.attempt(self.allocator.reserve, handles, steps)
        if copies is None:
            return
        self.device.copy(copies)
        start = np.array([len(self.model[h]) for h in handles], np.int64)
        for k in range(steps):
            batch = self.allocator.batch(handles, start + k, start + k + 1)
            self.device.step(batch, [[token]] * len(handles), [self.salts[h] for h in handles])
        before = self.allocator.num_free, self.allocator.num_evictable
        copies = self.allocator.append(handles, np.full((len(handles), steps), token))
        assert len(copies.src) == 0
        assert before == (self.allocator.num_free, self.allocator.num_evictable)
        self.grow(handles, [[token] * steps] * len(handles))
        self.attempt(self.allocator.commit, handles, start + steps)
        self.computed |= {h: len(self.model[h]) for h in handles}

    @precondition(has_sequences)
    @rule(mask=MASK, num_tokens=st.integers(0, 9))
    def reserve(self, mask, num_tokens):
        copies = self.attempt(self.allocator.reserve, self.some(mask), num_tokens)
        if copies is not None:
            self.device.copy(copies)

    @precondition(has_sequences)
    @rule(mask=MASK)
    def trim(self, mask):
        before = self.allocator.num_free
        given = self.attempt(self.allocator.trim, self.some(mask))
        assert self.allocator.num_free == before + given

    @precondition(has_sequences)
    @rule(choice=st.integers(0, 99), n=st.sampled_from([1, 2, 3, 0]))
    def fork(self, choice, n):
        parent = self.pick(choice)
        before = self.allocator.num_free, self.allocator.num_evictable, self.allocator.num_used
        children = self.attempt(self.allocator.fork, parent, n)
        assert before == (
            self.allocator.num_free,
            self.allocator.num_evictable,
            self.allocator.num_used,
        )
        assert len(children) == n
        for child in children:
            self.adopt(child, self.model[parent], self.salts[parent], self.computed[parent])

    @precondition(has_sequences)
    @rule(mask=MASK, percent=st.integers(0, 100))
    def truncate(self, mask, percent):
        handles = self.some(mask)
        lengths = [len(self.model[h]) * percent // 100 for h in handles]
        self.attempt(self.allocator.truncate, handles, lengths)
        for handle, length in zip(handles, lengths, strict=True):
            del self.model[handle][length:]
            self.computed[handle] = min(length, self.computed[handle])

    @precondition(has_sequences)
    @rule(mask=MASK, withdraw=st.booleans())
    def free(self, mask, withdraw):
        handles = self.some(mask)[:2]
        if withdraw:
            self.attempt(self.allocator.withdraw, handles)
        self.attempt(self.allocator.free, handles)
        for handle in handles:
            del self.model[handle], self.salts[handle], self.computed[handle]
        self.dead += handles

    @rule()
    def reset(self):
        used = self.allocator.num_used
        assert self.attempt(self.allocator.reset_prefix_cache) is (used == 0)
        if used == 0:
            assert self.allocator.num_free == self.allocator.usable_pages

    @rule(k=st.integers(0, 2))
    def take_raw(self, k):
        self.raw += self.attempt(self.allocator.allocate_pages, k) or []

    @rule(k=st.integers(0, 2))
    def free_raw(self, k):
        self.attempt(self.allocator.free_pages, self.raw[:k])
        del self.raw[:k]

    @rule(page=st.integers(0, 12), priority=st.integers(0, 3))
    def prioritize(self, page, priority):
        self.attempt(self.allocator.prioritize, [page, page + 1], priority)

    @invariant()
    def bookkeeping_is_consistent(self):
        if hasattr(self, "allocator"):
            self.allocator.check_invariants()

    @invariant()
    def every_sequence_reads_its_own_history(self):
        if not hasattr(self, "allocator"):
            return
        self.device.poison(self.allocator)
        owners: dict[int, int] = {page: 1 for page in self.raw}
        for handle, tokens in self.model.items():
            info = self.allocator.sequence(handle)
            assert self.allocator.tokens(handle).tolist() == tokens
            assert (info.length, info.computed) == (len(tokens), self.computed[handle])
            expected = contents(tokens, self.salts[handle])[: info.computed]
            assert self.device.read(self.allocator, handle) == expected
            for page in info.pages:
                owners[page] = owners.get(page, 0) + 1
        for page in range(self.allocator.num_pages):
            assert self.allocator.ref_count(page) == owners.get(page, 0)
        assert self.allocator.num_used == len(owners)


class TestPrograms(Programs.TestCase):
    """The same programs every time, so that a red run can be repeated."""

    settings = settings(COMMON, max_examples=40, derandomize=True)


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")  # TestPrograms checks shapes
class TestManyPrograms(Programs.TestCase):
    """Other programs every time."""

    settings = settings(COMMON, max_examples=300)


def draw(rng: np.random.Generator, rule: str) -> dict[str, object]:
    """Arguments for a rule, without the leaning of hypothesis to the smallest ones."""

    def tokens() -> list[int]:
        return rng.integers(0, 2, rng.integers(1, 13)).tolist()

    mask, choice, n = (int(x) for x in rng.integers(1, [256, 100, 5]))
    salt = [None, None, None, "", "a", b"a"][rng.integers(6)]
    return {
        "allocate": dict(tokens=tokens(), salt=salt, keep_free=int(rng.integers(2))),
        "prefill": dict(mask=mask, chunk=n),
        "advance": dict(mask=mask, tokens=rng.integers(0, 2, 16).tolist(), commit=choice > 50),
        "append": dict(mask=mask, new=[tokens() for _ in range(16)]),
        "device_loop": dict(mask=mask, steps=n, token=int(rng.integers(2))),
        "reserve": dict(mask=mask, num_tokens=n),
        "trim": dict(mask=mask),
        "fork": dict(choice=choice, n=n % 4),
        "truncate": dict(mask=mask, percent=choice),
        "free": dict(mask=mask, withdraw=choice < 30),
        "reset": dict(),
        "take_raw": dict(k=n % 3),
        "free_raw": dict(k=n % 3),
        "prioritize": dict(page=choice % 13, priority=n),
    }[rule]


OFTEN = ["allocate", "prefill", "prefill", "advance", "advance", "append", "fork", "device_loop"]
SELDOM = ["reserve", "trim", "truncate", "free", "free", "reset", "take_raw", "free_raw"]
SELDOM += ["prioritize"]


def run(seed: int, steps: int) -> None:
    """The same machine driven evenly: far more forks and copies than hypothesis comes to."""
    rng = np.random.default_rng(seed)
    machine = Programs()
    machine.create(
        usable=int(rng.choice([12, 24, 48, 96])),
        page_size=int(rng.choice([1, 2, 4])),
        cache=bool(seed % 5),
        digest=sorted(DIGESTS)[seed % 3],
        prompts=[[0, 1, 1, 0, 1]],
        shards=1 + seed // 2 % 2,
        fused=bool(seed % 2),
    )
    for _ in range(steps):
        name = str(rng.choice(OFTEN + SELDOM))
        if machine.model or name in ("allocate", "reset", "take_raw", "free_raw", "prioritize"):
            getattr(machine, name)(**draw(rng, name))
        machine.bookkeeping_is_consistent()
        machine.every_sequence_reads_its_own_history()


# The first twelve are every digest with one shard and two, with objects that raise and without.
@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(s, marks=pytest.mark.long) for s in range(12, 40))]
)
def test_dense_random_programs_read_their_own_history(seed):
    run(seed, 80)


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_a_hundred_thousand_calls_read_their_own_history():
    before, seed = Programs.operations, 1000
    while Programs.operations - before < 100_000:
        run(seed, 100)
        seed += 1
