"""Random programs against a model of plain dicts, the content of every page re-read each step."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_decode.allocator import BlockAllocator, OutOfPages, SequenceTooLong

from .device import Device, contents, freeze

DIGESTS = {
    "blake2b": None,
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


class Programs(RuleBasedStateMachine):
    """Rows are chosen by number among the live ones, so that programs shrink well."""

    @initialize(
        usable=st.sampled_from([40, 20, 10, 5, 2]),
        page_size=st.sampled_from([1, 2, 4]),
        cache=st.sampled_from([True, True, True, False]),
        digest=st.sampled_from(sorted(DIGESTS)),
        prompts=st.lists(TOKENS, min_size=1, max_size=4),
    )
    def create(self, usable, page_size, cache, digest, prompts):
        self.allocator = BlockAllocator(
            usable + 1, page_size, prefix_cache=cache, hash_key=b"k", digest=DIGESTS[digest]
        )
        self.device = Device(self.allocator)
        self.model: dict[int, list[int]] = {}
        self.salts: dict[int, object] = {}
        self.computed: dict[int, int] = {}
        self.pinned: list[int] = []
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
        before = freeze(self.allocator)
        try:
            return call(*args, **kwargs)
        except OutOfPages as error:
            assert error.needed > error.free + error.evictable
        except SequenceTooLong:
            pass
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
            assert self.allocator.sequence(handle).cached == expected < len(tokens)
            self.adopt(handle, tokens, salt, expected)

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
        self.allocator.commit(handles, end)
        self.computed |= dict(zip(handles, end, strict=True))

    @precondition(has_sequences)
    @rule(mask=MASK, tokens=st.lists(TOKEN, min_size=16, max_size=16))
    def advance(self, mask, tokens):
        handles = self.some(mask)
        tokens = [tokens[i % 16] for i in range(len(handles))]
        done = self.attempt(
            self.allocator.advance, handles, tokens, rows=len(handles) + 2, columns=40
        )
        if done is None:
            return
        batch, copies = done
        self.device.copy(copies)
        self.device.step(batch, [[t] for t in tokens], [self.salts[h] for h in handles])
        self.grow(handles, [[t] for t in tokens])
        ready = [h for h in handles if self.computed[h] == len(self.model[h]) - 1]
        self.computed |= {h: len(self.model[h]) for h in ready}
        self.allocator.commit(ready, [len(self.model[h]) for h in ready])

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
        self.allocator.commit(handles, start + steps)
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
        given = self.allocator.trim(self.some(mask))
        assert self.allocator.num_free == before + given

    @precondition(has_sequences)
    @rule(choice=st.integers(0, 99), n=st.sampled_from([1, 2, 3, 0]))
    def fork(self, choice, n):
        parent = self.pick(choice)
        before = self.allocator.num_free, self.allocator.num_evictable, self.allocator.num_used
        children = self.allocator.fork(parent, n)
        assert before == (
            self.allocator.num_free,
            self.allocator.num_evictable,
            self.allocator.num_used,
        )
        assert len(children) == n
        for child in children:
            self.adopt(child, self.model[parent], self.salts[parent], self.computed[parent])

    @precondition(has_sequences)
    @rule(choice=st.integers(0, 99), percent=st.integers(0, 100))
    def truncate(self, choice, percent):
        handle = self.pick(choice)
        length = len(self.model[handle]) * percent // 100
        self.allocator.truncate(handle, length)
        del self.model[handle][length:]
        self.computed[handle] = min(length, self.computed[handle])

    @precondition(has_sequences)
    @rule(mask=MASK, withdraw=st.booleans())
    def free(self, mask, withdraw):
        handles = self.some(mask)[:2]
        if withdraw:
            self.allocator.withdraw(handles)
        self.allocator.free(handles)
        for handle in handles:
            del self.model[handle], self.salts[handle], self.computed[handle]
        self.dead += handles

    @rule()
    def reset(self):
        used = self.allocator.num_used
        assert self.allocator.reset_prefix_cache() is (used == 0)
        if used == 0:
            assert self.allocator.num_free == self.allocator.usable_pages

    @rule(k=st.integers(0, 2))
    def pin(self, k):
        self.pinned += self.attempt(self.allocator.allocate_pages, k) or []

    @rule(k=st.integers(0, 2))
    def unpin(self, k):
        self.allocator.free_pages(self.pinned[:k])
        del self.pinned[:k]

    @invariant()
    def bookkeeping_is_consistent(self):
        if hasattr(self, "allocator"):
            self.allocator.check_invariants()

    @invariant()
    def every_sequence_reads_its_own_history(self):
        if not hasattr(self, "allocator"):
            return
        self.device.poison(self.allocator)
        owners: dict[int, int] = {page: 1 for page in self.pinned}
        for handle, tokens in self.model.items():
            info = self.allocator.sequence(handle)
            assert self.allocator.tokens(handle).tolist() == tokens
            assert (info.length, info.computed) == (len(tokens), self.computed[handle])
            expected = contents(tokens, self.salts[handle])[: info.computed]
            assert self.device.read(self.allocator, handle) == expected
            for page in info.pages:
                owners[page] = owners.get(page, 0) + 1
        for page in range(1, self.allocator.num_pages):
            assert self.allocator.ref_count(page) == owners.get(page, 0)
        assert self.allocator.num_used == len(owners)


class TestPrograms(Programs.TestCase):
    """The same programs every time, so that a red run can be repeated."""

    settings = settings(COMMON, max_examples=40, derandomize=True)


@pytest.mark.slow
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
        "advance": dict(mask=mask, tokens=rng.integers(0, 2, 16).tolist()),
        "append": dict(mask=mask, new=[tokens() for _ in range(16)]),
        "device_loop": dict(mask=mask, steps=n, token=int(rng.integers(2))),
        "reserve": dict(mask=mask, num_tokens=n),
        "trim": dict(mask=mask),
        "fork": dict(choice=choice, n=n % 4),
        "truncate": dict(choice=choice, percent=choice),
        "free": dict(mask=mask, withdraw=choice < 30),
        "reset": dict(),
        "pin": dict(k=n % 3),
        "unpin": dict(k=n % 3),
    }[rule]


OFTEN = ["allocate", "prefill", "prefill", "advance", "advance", "append", "fork", "device_loop"]
SELDOM = ["reserve", "trim", "truncate", "free", "free", "reset", "pin", "unpin"]


@pytest.mark.parametrize("seed", range(40))
def test_dense_random_programs_read_their_own_history(seed):
    """The same machine driven evenly: far more forks and copies than hypothesis comes to."""
    rng = np.random.default_rng(seed)
    machine = Programs()
    machine.create(
        usable=int(rng.choice([12, 24, 48, 96])),
        page_size=int(rng.choice([1, 2, 4])),
        cache=bool(seed % 5),
        digest=sorted(DIGESTS)[seed % 3],
        prompts=[[0, 1, 1, 0, 1]],
    )
    for _ in range(80):
        name = str(rng.choice(OFTEN + SELDOM))
        if machine.model or name in ("allocate", "reset", "pin", "unpin"):
            getattr(machine, name)(**draw(rng, name))
        machine.bookkeeping_is_consistent()
        machine.every_sequence_reads_its_own_history()
