"""Host time of the allocator's calls, beside a plain loop over sequence objects.

    python benchmarks/allocator_step.py [--rounds 40]

256 sequences of 160 to 975 tokens decode one token a step in pages of 16; the free pages lie in
random order, as in a pool that has worked for a while. Both systems see the same prompts and
tokens, hash with the same BLAKE2b, return the same arrays, and take turns round by round. Before
any time is taken, their answers are compared.
"""

import argparse
import gc
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from _result import spread, write_result

from paged_decode.allocator import BlockAllocator

ROWS, PAGE_SIZE, COLUMNS, NUM_PAGES = 256, 16, 128, 40_000
PROMPT = 1000
KEY = b"k" * 32
Arrays = tuple[Any, Any, Any, Any]  # table, seq_lens, positions, slots


@dataclass(slots=True)
class LoopSequence:
    """What the plain loop knows of one sequence."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    row: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS, np.int32))
    digests: list[bytes] = field(default_factory=list)


class PythonLoop:
    """The usual way: one object per sequence, a list of free pages, a loop in every call.

    It has what a fair comparison needs: reference counts, all-or-nothing growth, refusal of a
    repeated handle, a prefix cache with the check of the tokens. It leaves out copy-on-write,
    eviction and checks of arguments. The page table is made from the lists in every call.
    """

    name = "python-loop"

    def __init__(self) -> None:
        self.free_pages = list(range(1, NUM_PAGES))
        random.Random(0).shuffle(self.free_pages)
        self.refs = [0] * NUM_PAGES
        self.sequences: dict[int, LoopSequence] = {}
        self.cache: dict[bytes, tuple[int, list[int]]] = {}
        self.cached: set[int] = set()
        self.next_handle = 0

    def allocate(self, prompt: np.ndarray) -> int:
        sequence = LoopSequence(prompt.tolist())
        for digest, chunk in self._digests(b"", sequence.tokens[:-1]):
            page, tokens = self.cache.get(digest, (0, []))
            if tokens != chunk:
                break
            sequence.pages.append(page)
            sequence.digests.append(digest)
        needed = -(-len(sequence.tokens) // PAGE_SIZE) - len(sequence.pages)
        if needed > len(self.free_pages):
            raise MemoryError(f"{needed} pages needed, {len(self.free_pages)} free")
        sequence.pages += [self.free_pages.pop() for _ in range(needed)]
        for page in sequence.pages:
            self.refs[page] += 1
        sequence.row[: len(sequence.pages)] = sequence.pages
        self.next_handle += 1
        self.sequences[self.next_handle] = sequence
        return self.next_handle

    def advance(self, handles: list[int], tokens: np.ndarray) -> Arrays:
        sequences = [self.sequences[handle] for handle in handles]
        needed = sum(len(s.tokens) == len(s.pages) * PAGE_SIZE for s in sequences)
        if needed > len(self.free_pages):
            raise MemoryError(f"{needed} pages needed, {len(self.free_pages)} free")
        if len(set(handles)) != len(handles):
            raise ValueError("a handle is named twice")
        positions, slots = [], []
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            position = len(sequence.tokens)
            if position == len(sequence.pages) * PAGE_SIZE:
                page = self.free_pages.pop()
                self.refs[page] = 1
                sequence.row[len(sequence.pages)] = page
                sequence.pages.append(page)
            sequence.tokens.append(token)
            positions.append(position)
            slots.append(sequence.pages[-1] * PAGE_SIZE + position % PAGE_SIZE)
        place = np.array(positions, np.int32)[:, None]
        seq_lens = place[:, 0] + np.int32(1)
        return self.table(sequences), seq_lens, place, np.array(slots, np.int32)[:, None]

    def table(self, sequences: list[LoopSequence]) -> np.ndarray:
        padded = [s.pages + [0] * (COLUMNS - len(s.pages)) for s in sequences]
        return np.array(padded, np.int32)

    def commit(self, handles: list[int], computed: list[int]) -> None:
        for handle, end in zip(handles, computed, strict=True):
            sequence = self.sequences[handle]
            done = len(sequence.digests)
            if end // PAGE_SIZE > done:
                parent = sequence.digests[-1] if done else b""
                fresh = sequence.tokens[done * PAGE_SIZE : end // PAGE_SIZE * PAGE_SIZE]
                for digest, chunk in self._digests(parent, fresh):
                    page = sequence.pages[len(sequence.digests)]
                    if self.cache.setdefault(digest, (page, chunk))[0] == page:
                        self.cached.add(page)
                    sequence.digests.append(digest)

    def truncate(self, handle: int, length: int) -> None:
        sequence = self.sequences[handle]
        keep = -(-length // PAGE_SIZE)
        self._release(sequence.pages[keep:])
        del sequence.tokens[length:], sequence.pages[keep:]
        del sequence.digests[length // PAGE_SIZE :]
        sequence.row[keep:] = 0

    def free(self, handle: int) -> None:
        self._release(self.sequences.pop(handle).pages)

    def _release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.refs[page] -= 1
            if not self.refs[page] and page not in self.cached:
                self.free_pages.append(page)

    def _digests(self, parent: bytes, tokens: list[int]):
        for begin in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            chunk = tokens[begin : begin + PAGE_SIZE]
            data = parent + np.array(chunk, "<i4").tobytes()
            parent = hashlib.blake2b(data, digest_size=32, key=KEY).digest()
            yield parent, chunk


class PythonLoopRows(PythonLoop):
    """The same with a NumPy row kept per sequence: the fastest loop that we could write."""

    name = "python-loop/rows"

    def table(self, sequences: list[LoopSequence]) -> np.ndarray:
        table = np.empty((len(sequences), COLUMNS), np.int32)
        for b, sequence in enumerate(sequences):
            table[b] = sequence.row
        return table


class Paged:
    """`BlockAllocator`, with its free pages in random order."""

    name = "paged-decode"

    def __init__(self) -> None:
        self.allocator = BlockAllocator(NUM_PAGES, PAGE_SIZE, hash_key=KEY)
        pages = self.allocator.allocate_pages(NUM_PAGES - 1)
        random.Random(0).shuffle(pages)
        self.allocator.free_pages(pages)
        self.allocate, self.commit = self.allocator.allocate, self.allocator.commit
        self.truncate, self.free = self.allocator.truncate, self.allocator.free

    def advance(self, handles: Any, tokens: Any) -> Arrays:
        batch, _ = self.allocator.advance(handles, tokens, columns=COLUMNS)
        return batch.page_table, batch.seq_lens, batch.positions, batch.slots


SYSTEMS = (Paged, PythonLoop, PythonLoopRows)
Times = dict[str, list[float]]


def timed(call: Callable[[], Any], into: list[float]) -> Any:
    """Run the call and note its seconds."""
    start = time.perf_counter()
    result = call()
    into.append(time.perf_counter() - start)
    return result


def lengths(rng: np.random.Generator, crossing: bool) -> np.ndarray:
    """Prompt lengths so that 16 of 256 rows cross into a new page at every step, or none soon."""
    offset = np.arange(ROWS) % PAGE_SIZE if crossing else np.ones(ROWS, np.int64)
    return PAGE_SIZE * rng.integers(10, 60, ROWS) + offset


class Decode:
    """One system with 256 running sequences."""

    def __init__(self, system: Any, crossing: bool):
        rng = np.random.default_rng(1)
        self.system, self.rng = system, rng
        self.lengths = lengths(rng, crossing)
        self.handles = [system.allocate(rng.integers(0, 30_000, n)) for n in self.lengths]

    def step(self, as_array: bool, advance: list[float], commit: list[float]) -> Arrays:
        """One decode step; the form of the arguments is made outside the time."""
        tokens = self.rng.integers(0, 30_000, ROWS).astype(np.int32)
        handles = np.array(self.handles) if as_array else self.handles
        arrays = timed(lambda: self.system.advance(handles, tokens), advance)
        self.lengths = self.lengths + 1
        computed = self.lengths if as_array else self.lengths.tolist()
        timed(lambda: self.system.commit(handles, computed), commit)
        return arrays

    def back(self, steps: int) -> None:
        """Forget the newest tokens, outside the time."""
        self.lengths = self.lengths - steps
        for handle, length in zip(self.handles, self.lengths.tolist(), strict=True):
            self.system.truncate(handle, length)


def check() -> None:
    """Both systems must answer alike before they are compared."""
    runs = [Decode(system(), crossing=True) for system in SYSTEMS]
    for _ in range(3 * PAGE_SIZE):
        answers = [run.step(False, [], []) for run in runs]
        for table, seq_lens, position, slots in answers:
            page = np.take_along_axis(table, position // PAGE_SIZE, axis=1)
            np.testing.assert_array_equal(slots, page * PAGE_SIZE + position % PAGE_SIZE)
            held = table[np.arange(COLUMNS) < -(-seq_lens[:, None] // PAGE_SIZE)]
            assert held.all() and len(np.unique(held)) == held.size == np.count_nonzero(table)
            np.testing.assert_array_equal(seq_lens, answers[0][1])
            np.testing.assert_array_equal(position, answers[0][2])


def measure_steps(rounds: int) -> list[dict[str, Any]]:
    """advance and commit, per form of the handles, with 16 page crossings a step and with none."""
    records = []
    for crossing in (True, False):
        for as_array in (False, True):
            systems = [system for system in SYSTEMS if system is Paged or not as_array]
            runs = [Decode(system(), crossing) for system in systems]
            times: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]
            for _ in range(rounds):
                for run, (advance, commit) in zip(runs, times, strict=True):
                    for _ in range(PAGE_SIZE - 2):
                        run.step(as_array, advance, commit)
                    if not crossing:
                        run.back(PAGE_SIZE - 2)
            case = {"rows": ROWS, "handles": "array" if as_array else "list"}
            case["page_crossings"] = ROWS // PAGE_SIZE if crossing else 0
            for run, both in zip(runs, times, strict=True):
                records += [
                    {"case": {"call": call, **case}, "system": run.system.name, **spread(seconds)}
                    for call, seconds in zip(("advance", "commit"), both, strict=True)
                ]
    return records


def measure_prompts(rounds: int) -> list[dict[str, Any]]:
    """allocate for a prompt that is cached and for one that is not, and commit of all its pages."""
    systems = [Paged(), PythonLoop()]
    rng = np.random.default_rng(2)
    cached = rng.integers(0, 30_000, PROMPT).astype(np.int32)
    for system in systems:
        handle = system.allocate(cached)
        system.commit([handle], [PROMPT])
    cases = ("allocate, hit", "allocate, miss", "commit")
    times: dict[str, Times] = {s.name: {case: [] for case in cases} for s in systems}
    for _ in range(rounds * 4):
        fresh = rng.integers(0, 30_000, PROMPT).astype(np.int32)
        for system in systems:
            into = times[system.name]
            hit = timed(lambda s=system: s.allocate(cached), into["allocate, hit"])
            miss = timed(lambda s=system, p=fresh: s.allocate(p), into["allocate, miss"])
            timed(lambda s=system, h=miss: s.commit([h], [PROMPT]), into["commit"])
            system.free(hit)
            system.free(miss)
    return [
        {"case": {"call": case, "prompt_tokens": PROMPT}, "system": name, **spread(seconds)}
        for name, by_case in times.items()
        for case, seconds in by_case.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of the allocator's calls")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each system")
    rounds = parser.parse_args().rounds
    check()
    gc.disable()
    records = measure_steps(rounds) + measure_prompts(rounds)
    for record in records:
        case = ", ".join(f"{key} {value}" for key, value in record["case"].items())
        print(f"{record['median_s'] * 1e6:8.1f} us  {record['system']:13s} {case}")
    print(write_result("allocator_step", records, command="python benchmarks/allocator_step.py"))


if __name__ == "__main__":
    main()
