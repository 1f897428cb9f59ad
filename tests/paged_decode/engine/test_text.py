"""The text of requests: whole characters, stop strings that end them, whatever runs beside."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from paged_decode import AsyncEngine, SamplingParams, SnapshotMismatch
from paged_decode.engine.events import gather
from paged_decode.engine.requests import Sample
from paged_decode.engine.text import Texts

from ..tiny import Wrapped, make_engine, preempt, prompts
from ..toy_text import PIECES, added, decode

HALF = "\ufffd"
LETTERS = ["a", "b", "c", " ", "\n", "é", "e\u0301", "ß", "中", "😀", "👩\u200d👩", "\u0301"]


class Toy:
    """Ids 0 to 255 are bytes; further ones are pieces of several bytes, or of none."""

    def __init__(self, seed: int):
        self.rng, self.pieces = random.Random(seed), [bytes([i]) for i in range(256)]

    def text(self, most: int) -> str:
        return "".join(self.rng.choices(LETTERS, k=self.rng.randrange(most)))

    def encode(self, data: bytes) -> list[int]:
        """Cut anywhere."""
        ids, rng = [], self.rng
        while data:
            size = rng.choice([0, 1, 1, 1, 2, 3, 5])
            piece, data = data[:size], data[size:]
            if piece not in self.pieces:
                self.pieces.append(piece)
            ids.append(self.pieces.index(piece))
        return ids

    def decode(self, ids) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def stops(self, text: str) -> tuple[str, ...]:
        """Some that are nowhere, for the most part, and some that are in the text."""
        rng = self.rng
        found = [
            "".join(rng.choices(LETTERS, k=rng.randint(1, 5))) for _ in range(rng.randrange(3))
        ]
        if text and rng.random() < 0.6:
            begin = rng.randrange(len(text))
            found.append(text[begin : begin + rng.randint(1, 6)])
        return tuple(found)


def cut(text: str, stops, include: bool, ignored: int = 0) -> tuple[str, int | None]:
    """The text up to the stop that ends first behind so many characters, and where it ends."""
    for end in range(ignored + 1, len(text) + 1):
        if begins := [end - len(s) for s in stops if text[:end].endswith(s)]:
            return text[: end if include else min(begins)], end
    return text, None


def read(texts: Texts, sample: Sample, ids: list[int], rng: random.Random) -> tuple[list[str], str]:
    """What the events of a sample say that gets these ids in visits of any size."""
    pieces, reason = [], None
    while ids and reason is None:
        visit, ids = ids[: (k := rng.randint(1, 8))], ids[k:]
        if rng.random() < 0.1:
            sample.reading = None  # as after a restore
        told = texts.told(sample, visit, "length" if not ids and rng.random() < 0.5 else None)
        assert told is not None and told.reading is not None and told.failure is None
        pieces += told.pieces
        sample.tokens += visit[: len(told.pieces)]
        sample.reading, reason = told.reading, told.reason
        if not sample.sampling.min_new_tokens:
            assert not any(s in told.reading.held for s in sample.sampling.stop)
    if reason is None and (told := texts.rest(sample)):
        pieces += told.pieces
    return pieces, reason or ""


def one_life(seed: int) -> None:
    toy = Toy(seed)
    text, include = toy.text(60), toy.rng.random() < 0.5
    prompt, ids = toy.encode((toy.text(9) + "x").encode()), toy.encode(text.encode())
    stops, least = toy.stops(text), toy.rng.choice([0, 0, 3, 9])
    params = SamplingParams(
        max_new_tokens=10**6,
        stop=stops,
        include_stop_str_in_output=include,
        min_new_tokens=least,
    )
    sample = Sample(0, 0, len(prompt), [*prompt], params, None)
    pieces, reason = read(Texts(toy.decode), sample, ids, toy.rng)
    whole = [toy.decode(ids[:n]).rstrip(HALF) for n in range(len(ids) + 1)]
    want, end = cut(text, stops, include, len(whole[min(least, len(ids))]))
    assert "".join(pieces) == want, seed
    assert HALF not in want and (end is None or reason == "stop"), seed
    if end is not None:  # at the token that completes it
        assert sample.generated == next(n for n, t in enumerate(whole) if len(t) >= end), seed


def test_text_is_pythons_own_decode_cut_at_the_first_stop_string():
    for seed in range(600):
        one_life(seed)


def broken_life(seed: int) -> None:
    """Bytes that are no text."""
    toy = Toy(seed)
    data = bytes(toy.rng.choices([0xFF, 0xF0, 0x9F, 0x98, 0x80, 0xE4, 97], k=150))
    data = toy.rng.choice([data, b"\xff" * 200, b"\xef\xbf\xbd" * 99, b"\xf0" * 90 + data])
    ids = toy.encode(data)
    sample = Sample(0, 0, 1, [98], SamplingParams(max_new_tokens=10**6), None)
    pieces, _ = read(Texts(toy.decode), sample, ids, toy.rng)
    assert "".join(pieces) == toy.decode(ids), seed


def test_bytes_that_are_no_text_come_through_as_they_are_decoded():
    for seed in range(100):
        broken_life(seed)


@pytest.mark.parametrize("data", [b"\xff", b"\xef\xbf\xbd", "é".encode(), b"a", b"", b"\xf0\x9f"])
def test_what_is_decoded_for_a_token_and_what_is_held_back_are_bounded(data):
    """Also where the text is never complete, and where tokens have none."""
    sizes, held = [], []

    def counted(ids):
        sizes.append(len(ids))
        return (b"\xe4" + data * (len(ids) - 1)).decode("utf-8", errors="replace")

    texts, sample = Texts(counted), Sample(0, 0, 1, [1], SamplingParams(max_new_tokens=999), None)
    for token in range(600):
        told = texts.told(sample, [token], None)
        assert told is not None and told.reading is not None
        sample.tokens.append(token)
        sample.reading = told.reading
        held.append(len(told.reading.held + told.reading.unsure))
    assert max(sizes) <= 49 and sum(sizes) < 600 * 50 and max(held) <= 3


def test_a_space_in_front_of_a_word_is_there_though_a_decode_drops_the_first():
    words = ["▁one", "▁two", "▁three", "s"]

    def pieced(ids):  # as SentencePiece does
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    sample = Sample(0, 0, 2, [0, 1], SamplingParams(max_new_tokens=99), None)
    told = Texts(pieced).told(sample, [2, 3, 0] * 30, None)
    assert told is not None and told.pieces == (" three", "s", " one") * 30


def test_a_character_that_the_prompt_begins_belongs_to_the_text():
    toy = Toy(0)
    data = "a😀b".encode()
    for at in range(1, 5):
        sample = Sample(0, 0, at, list(data[:at]), SamplingParams(max_new_tokens=99), None)
        told = Texts(toy.decode).told(sample, list(data[at:]), "length")
        assert told is not None
        assert "".join(told.pieces) == "😀b" and told.pieces[-2:] == ("😀", "b")


def test_of_stop_strings_the_earliest_end_counts_and_then_the_earliest_beginning():
    def text(data: str, *stop: str, include: bool = False) -> str:
        params = SamplingParams(stop=stop, include_stop_str_in_output=include)
        sample = Sample(0, 0, 1, [97], params, None)
        told = Texts(lambda ids: bytes(ids).decode()).told(sample, list(data.encode()), "length")
        assert told is not None and told.reason == "stop"
        return "".join(told.pieces)

    assert text("xabcdy", "bcd", "abcd", "cd") == "x"
    assert text("xabcdy", "abcd", "bc") == "xa"
    assert text("xabcdy", "abcd", "bc", include=True) == "xabc"
    assert text("aab", "ab") == "a" and text("aaab", "aab", "aaac") == "a"


LENGTHS = dict(zip(range(6), (12, 5, 9, 14, 1, 7), strict=True))
P = [[*p, 0] for p in prompts(6, seed=5, low=3, high=12)]


def engine_with(decoder=decode, **options):
    return make_engine(policies=dict(detokenize=decoder), **options)


def params_of(at: int, **asked) -> SamplingParams:
    heated = dict(temperature=1.5, seed=at) if at % 2 else {}
    return SamplingParams(**dict(max_new_tokens=3 * LENGTHS[at]) | heated | asked)


@pytest.fixture(scope="module")
def tokens() -> list[tuple[int, ...]]:
    """What the model says, without text."""
    engine = make_engine()
    each = engine.generate(P, [params_of(at) for at in range(6)])
    assert all(c.text == "" for c in each)
    return [c.tokens for c in each]


def stops_of(tokens, at: int) -> tuple[str, ...]:
    """One in the middle of the text, over the border of two tokens, and others beside."""
    text, places = added(P[at], tokens[at]), range(len(tokens[at]) // 3, len(tokens[at]))
    borders = [len(added(P[at], tokens[at][:n])) for n in places]
    middle = [text[max(b - 1, 0) : b + 2] for b in borders]
    return (next((m for m in middle if HALF not in m), "zzz"), "nowhere", text[-2:-1] + "!")


def wanted(tokens, at: int, stops=(), include: bool = False) -> tuple[str, int]:
    """The text, and how many tokens there are."""
    text, end = cut(added(P[at], tokens[at]), stops, include)
    if end is None:
        return text, len(tokens[at])
    whole = [added(P[at], tokens[at][:n]) for n in range(len(tokens[at]) + 1)]
    sure = [len(a.rstrip(HALF)) if a.endswith(HALF) else len(a) for a in whole]
    return text, next(n for n, length in enumerate(sure) if length >= end)


def plain_stops(tokens, at: int) -> tuple[str, ...]:
    return tuple(s for s in stops_of(tokens, at) if HALF not in s)


def check(events, tokens, ids) -> None:
    """Requests without and with stops, in turn, as `submit_all` makes them."""
    found = {c.request_id: c for c in gather(events)}
    for place, request in enumerate(ids):
        at, stops = place % 6, plain_stops(tokens, place % 6) if place >= 6 else ()
        text, count = wanted(tokens, at, stops, include=at % 3 == 0)
        assert found[request].tokens == tokens[at][:count]
        assert found[request].text == text
        ended = count < len(tokens[at]) or (stops and text != added(P[at], tokens[at]))
        assert found[request].finish_reason == ("stop" if ended else "length")
        assert not any(s in text for s in stops) or at % 3 == 0


def submit_all(engine, tokens) -> list[int]:
    ids = [engine.submit(P[at], params_of(at)) for at in range(6)]
    for at in range(6):
        asked = dict(stop=plain_stops(tokens, at), include_stop_str_in_output=at % 3 == 0)
        ids.append(engine.submit(P[at], params_of(at, **asked)))
    return ids


@pytest.mark.parametrize(("steps", "pages", "forced"), [(1, 64, 0), (4, 64, 3), (4, 16, 0)])
def test_requests_have_the_text_of_their_tokens_and_end_at_stop_strings(
    tokens, steps, pages, forced
):
    engine = engine_with(num_pages=pages, decode_steps=steps)
    ids, events, visits = submit_all(engine, tokens), [], 0
    while not engine.idle:
        events += engine.step()
        visits += 1
        if forced and visits % forced == 0:
            preempt(engine)
    check(events, tokens, ids)
    assert engine.stats.preemptions or (pages, forced) == (64, 0)
    assert engine.allocator.num_used == 0
    reasons = Counter(e.finish_reason for e in events if e.finish_reason)
    assert reasons["stop"] >= 3 and reasons["length"] >= 6


@pytest.mark.parametrize("visit", [2, 4])
def test_text_goes_on_after_a_restore_in_the_middle_of_a_character_or_a_stop(
    tokens, visit, tmp_path
):
    engine = engine_with()
    ids, before = submit_all(engine, tokens), []
    for _ in range(visit):
        before += engine.step()
    engine.save(tmp_path / "s")
    again = engine_with()
    again.restore(tmp_path / "s")
    check([*before, *again.stream()], tokens, ids)
    other = make_engine()
    with pytest.raises(SnapshotMismatch, match=r"cannot be served here: .*Engine\(detokenize=\)"):
        other.restore(tmp_path / "s")
    assert other.idle


def test_a_fork_has_the_text_behind_what_its_own_stop_strings_let_through(tokens):
    alone = engine_with()
    other = params_of(3, stop=plain_stops(tokens, 3))
    whole = {}
    for params in (params_of(3), other):
        alone.submit(P[3], params)
        whole[params] = [(e.index, e.token, e.text) for e in alone.stream()]
    assert len(whole[other]) < len(whole[params_of(3)])
    for visits, params in ((2, other), (3, other), (3, params_of(3))):
        engine = engine_with()
        parent = engine.submit(P[3], params_of(3), n=2)
        before = [e for _ in range(visits) for e in engine.step()]
        child = engine.fork(parent, params, sample=0)
        events = [*before, *engine.stream()]
        count = sum((e.request_id, e.sample) == (parent, 0) for e in before)
        found = [(e.index, e.token, e.text) for e in events if e.request_id == child]
        assert 0 < count and found == whole[params][count:]
        for c in gather(e for e in events if e.request_id == parent):
            assert c.text == added(P[3], c.tokens)


def test_an_end_without_a_token_has_the_text_that_was_held():
    every = tuple(piece.decode() + "\0" for piece in PIECES[:24]) + (f"{HALF}\0",)
    engine = engine_with(decode_steps=2)
    ids = [engine.submit(p, SamplingParams(max_new_tokens=30, stop=every)) for p in P[:3]]
    events = [e for _ in range(4) for e in engine.step()]
    held = {s.request_id: s.reading.held + s.reading.unsure for s in engine.scheduler.running}
    assert any(held.values())
    for request in ids:
        engine.cancel(request)
    events += engine.stream()
    for c in gather(events):
        assert c.finish_reason == "cancelled" and c.text == added(P[c.request_id], c.tokens)
    assert {e.request_id: e.text for e in events if e.token is None} == held


def test_a_decode_that_raises_ends_its_own_request_and_no_other(tokens):
    bad = tokens[2][7]
    own = [at for at in range(6) if bad not in (*P[at], *tokens[at])]

    def picky(ids):
        if bad in ids:
            raise ValueError(f"no piece {bad}")
        return decode(ids)

    engine = engine_with(picky)
    ids = [engine.submit(p, params_of(at)) for at, p in enumerate(P) if at in (*own, 2)]
    events = list(engine.stream())
    found = {c.request_id: c for c in gather(events)}
    for request, at in zip(ids, sorted((*own, 2)), strict=True):
        if at == 2 and bad not in P[2]:
            first = tokens[2].index(bad)
            end = next(e for e in events if e.request_id == request and e.finish_reason)
            assert (end.token, end.index, end.finish_reason) == (None, first, "detokenizer_failed")
            assert end.detail == f"ValueError: no piece {bad}"
            assert found[request].tokens == tokens[2][:first]
            assert found[request].text == added(P[2], tokens[2][:first])
        elif at != 2:
            assert found[request].tokens == tokens[at]
            assert found[request].text == added(P[at], tokens[at])
    assert own and bad not in P[2] and engine.allocator.num_used == 0


def test_what_is_no_text_is_named(unchecked):
    engine = engine_with(lambda ids: b"".join(PIECES[i] for i in ids))
    engine.submit(P[0], SamplingParams(max_new_tokens=3))
    (end,) = list(engine.stream())
    assert end.detail == "TypeError: detokenize must return a str, got bytes"
    with pytest.raises(TypeError, match="detokenize must be a function of ids, got int"):
        engine_with(5)


def test_stop_strings_without_text_are_refused_before_anything_is_queued():
    engine = make_engine()
    for call in (engine.submit, lambda *a: engine.generate([a[0]], a[1])):
        with pytest.raises(ValueError, match=r"stop strings .* use Engine\(detokenize=\)"):
            call(P[0], SamplingParams(stop="a"))
    assert engine.idle


def test_a_request_may_do_without_text():
    engine = engine_with()
    quiet, told = engine.generate(
        [P[0]] * 2,
        [SamplingParams(max_new_tokens=9, detokenize=d) for d in (False, True)],
    )
    assert quiet.tokens == told.tokens and (quiet.text, told.text) == ("", added(P[0], told.tokens))


def test_stop_takes_one_string_or_several(unchecked):
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")
    assert hash(SamplingParams(stop=["ab"])) == hash(SamplingParams(stop="ab"))
    for bad, error in (
        ("", ValueError),
        (["a", ""], ValueError),
        (b"a", TypeError),
        (5, TypeError),
    ):
        with pytest.raises(error, match="stop must"):
            SamplingParams(stop=bad)
    with pytest.raises(ValueError, match="detokenize must be True"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(TypeError, match="include_stop_str_in_output must be a bool"):
        SamplingParams(include_stop_str_in_output=1)


def test_an_interrupt_while_text_is_entered_loses_none_and_doubles_none(tokens):
    for at in range(4, 40, 7):
        calls = iter(range(10**6))

        def torn(ids, at=at, calls=calls):
            if next(calls) == at:
                raise KeyboardInterrupt
            return decode(ids)

        engine = engine_with(torn)
        ids, events = [engine.submit(P[i], params_of(i)) for i in range(3)], []
        for _ in range(200):
            try:
                events += engine.step()
            except KeyboardInterrupt:
                continue
        check(events, tokens, ids)


def test_a_journal_that_is_cut_off_enters_tokens_and_text_together(tokens):
    engine = engine_with(num_pages=64)
    ids, events, cuts = [engine.submit(P[i], params_of(i)) for i in range(3)], [], iter(range(999))
    journal = engine.scheduler._journal
    put = journal._outcomes.put

    def tearing(serial, outcomes):
        if next(cuts) % 3 == 0:
            raise KeyboardInterrupt
        put(serial, outcomes)

    journal._outcomes = Wrapped(journal._outcomes, put=tearing)
    for _ in range(200):
        try:
            events += engine.step()
        except KeyboardInterrupt:
            continue
    check(events, tokens, ids)


async def texts_of(engine, tokens) -> None:
    async with AsyncEngine(engine) as server:
        stream = server.submit(P[0], params_of(0))
        assert "".join([e.text async for e in stream]) == added(P[0], tokens[0])


def test_streams_of_asyncio_have_the_text(tokens):
    asyncio.run(texts_of(engine_with(), tokens))
