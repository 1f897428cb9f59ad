"""What a step returns is a sequence like a list, and extends one in one operation."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Sequence

import pytest

from paged_decode import Events, TokenEvent

PLAIN = [
    TokenEvent(i % 3, 0, i, None if i == 5 else i * i, "stop" if i == 5 else None) for i in range(6)
]
EVENTS = Events.of(PLAIN)


def test_it_reads_like_the_list_of_its_events():
    assert list(EVENTS) == list(EVENTS) == PLAIN and len(EVENTS) == 6 and EVENTS
    assert EVENTS == PLAIN and PLAIN == EVENTS and EVENTS == Events.of(PLAIN) != PLAIN[:5]
    assert EVENTS[0] == PLAIN[0] and EVENTS[-1] == PLAIN[-1] and EVENTS[1:4] == PLAIN[1:4]
    assert EVENTS[::-2] == PLAIN[::-2] and [*reversed(EVENTS)] == PLAIN[::-1]
    assert PLAIN[3] in EVENTS and EVENTS.index(PLAIN[3]) == 3 and EVENTS.count(PLAIN[3]) == 1
    assert (
        sorted(EVENTS) == sorted(PLAIN)
        and EVENTS + PLAIN == PLAIN * 2
        and isinstance(EVENTS, Sequence)
    )
    assert (
        repr(EVENTS) == repr(PLAIN)
        and not Events()
        and Events() == []
        and list(Events.of([])) == []
    )
    for twin in (copy.copy(EVENTS), copy.deepcopy(EVENTS)):
        assert twin == EVENTS and isinstance(twin, Events)
    assert EVENTS.only({1}) == PLAIN[1::3]
    assert EVENTS.only({1, 2}, others=True) == PLAIN[::3]
    assert Events.joined([EVENTS, Events(), EVENTS]) == PLAIN * 2
    with pytest.raises(IndexError):
        EVENTS[6]
    with pytest.raises(TypeError):
        hash(EVENTS)


def test_a_list_takes_it_in_place_without_a_line_of_ours_that_an_interrupt_could_tear():
    kept, waiting, lines = [], deque(), []
    same, line = kept, waiting

    def trace(frame, event, arg):
        if "paged_decode" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            lines.append(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        kept += EVENTS
        kept.extend(EVENTS)
        waiting += EVENTS
        for event in EVENTS:
            waiting.append(event)
    finally:
        sys.settrace(before)
    assert kept is same and waiting is line and kept == list(waiting) == PLAIN * 2
    assert not lines
