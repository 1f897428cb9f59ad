"""Trace readers, generators, and the hit-rate curve against a plain dictionary."""

from collections import OrderedDict
from pathlib import Path

import pytest

from paged_decode.policies import FIFO, Ranked
from paged_decode.pressure import chats, hit_rate, poisson, read_azure, read_mooncake

DATA = Path(__file__).parent / "data"
TRACE = list(read_mooncake(DATA / "mooncake_250.jsonl"))


def plain_hit_rate(capacity: int, touch: bool) -> float:
    cache, asked, found = OrderedDict(), 0, 0
    for request in TRACE:
        asked += len(request.blocks)
        if len(request.blocks) > capacity:
            continue
        for block in request.blocks:
            if block not in cache:
                break
            found += 1
        for block in reversed(request.blocks):
            cache[block] = None
            if touch:
                cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return found / asked


# Below, FIFO depends on whether a prompt of a third of the cache evicts while it is entered.
@pytest.mark.parametrize("capacity", [300, 1000, 3000, 10_000])
@pytest.mark.parametrize("name", ["lru", "fifo"])
def test_the_hit_rate_curve_is_that_of_a_plain_dictionary(capacity, name):
    eviction = Ranked(FIFO()) if name == "fifo" else None
    wanted = plain_hit_rate(capacity, touch=name == "lru")
    assert hit_rate(TRACE, capacity, eviction) == pytest.approx(wanted, abs=0.003)


def test_mooncake_prompts_are_equal_where_their_blocks_are():
    first, second = TRACE[0].prompt(), TRACE[1].prompt()
    assert (len(first), len(second)) == (6758, 7322)
    assert (first[:512] == second[:512]).all() and (first[512:1024] != second[512:1024]).all()


def test_azure_prompts_share_nothing_and_start_at_zero():
    requests = list(read_azure(DATA / "azure_19.csv"))
    assert (requests[0].prompt_tokens, requests[0].output_tokens) == (374, 44)
    assert [round(r.arrival_seconds, 3) for r in requests[:2]] == [0.0, 4.315]
    assert len({r.blocks for r in requests}) == 19


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"input_length": 600, "hash_ids": [1]}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "trace"
    path.write_text(line)
    with pytest.raises(ValueError, match="line 1: no Mooncake request"):
        list(read_mooncake(path))


def test_a_generator_repeats_itself_under_its_seed_only():
    assert poisson(50, 2.0, seed=1) == poisson(50, 2.0, seed=1) != poisson(50, 2.0, seed=2)
    assert chats(9, 2.0, seed=1) == chats(9, 2.0, seed=1) != chats(9, 2.0, seed=2)


def test_a_turn_of_a_chat_begins_with_the_turn_before():
    turns = sorted(chats(1, 1.0, turns=3), key=lambda r: r.prompt_tokens)
    for early, late in zip(turns, turns[1:], strict=False):
        assert late.blocks[: len(early.blocks)] == early.blocks
