"""Trace readers, generators, and the hit-rate curve against a plain dictionary."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from paged_decode.policies import FIFO
from paged_decode.pressure import (
    Request,
    chats,
    hit_rate,
    poisson,
    prefix_tree,
    read_azure,
    read_mooncake,
)

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
    eviction = FIFO() if name == "fifo" else None
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


def test_a_generator_repeats_itself_under_its_seed_only():
    assert poisson(50, 2.0, seed=1) == poisson(50, 2.0, seed=1) != poisson(50, 2.0, seed=2)
    assert chats(9, 2.0, seed=1) == chats(9, 2.0, seed=1) != chats(9, 2.0, seed=2)
    assert prefix_tree(9, 2.0, seed=1) == prefix_tree(9, 2.0, seed=1) != prefix_tree(9, 2.0, seed=2)


def test_a_turn_of_a_chat_begins_with_the_turn_before():
    turns = sorted(chats(1, 1.0, turns=3), key=lambda r: r.prompt_tokens)
    for early, late in zip(turns, turns[1:], strict=False):
        assert late.blocks[: len(early.blocks)] == early.blocks


def test_prompts_of_a_tree_share_a_path_from_the_root_and_end_alone():
    requests = prefix_tree(200, 2.0, depth=2, branching=3, node_blocks=2, own_blocks=1)
    assert len({r.blocks[:2] for r in requests}) == 1  # the root
    assert len({r.blocks[:4] for r in requests}) == 3
    assert len({r.blocks[:6] for r in requests}) == 9
    assert len({r.blocks[6:] for r in requests}) == 200
    children = {}
    for r in requests:
        children.setdefault(r.blocks[2:4], set()).add(r.blocks[4:6])
    assert not set.intersection(*children.values())  # a node has one place in the tree


def test_bursts_keep_the_rate_and_spread_the_gaps():
    def gaps(burst):
        arrivals = np.array([r.arrival_seconds for r in poisson(4000, 5.0, seed=1, burst=burst)])
        return np.diff(arrivals, prepend=0.0)

    for burst in (1.0, 8.0):
        assert gaps(burst).mean() == pytest.approx(1 / 5, rel=0.15)
        assert gaps(burst).var() / gaps(burst).mean() ** 2 == pytest.approx(burst, rel=0.25)


def test_text_for_a_model_is_equal_exactly_where_blocks_are():
    request = TRACE[0]
    text = request.text(1000)
    assert len(text) == request.prompt_tokens and 0 <= text.min() and text.max() < 1000
    other = TRACE[1].text(1000)
    assert (text[:512] == other[:512]).all() and (text[512:1024] != other[512:1024]).any()


@pytest.mark.parametrize(
    "change",
    [dict(arrival_seconds=bad) for bad in (float("nan"), float("inf"), -1.0, "0", True, None, 1e10)]
    + [dict(blocks=bad) for bad in ((), (1,), (1, 2, 3), (1, -1), (1, 2**30), (1, 2.0), "ab", 5)]
    + [
        {name: bad}
        for name in ("block_tokens", "prompt_tokens", "output_tokens", "samples")
        for bad in (0, -1, 1.5, "8", True, None, 2**40)
    ]
    + [dict(priority="high")],
)
def test_a_request_of_wrong_values_is_refused(change, unchecked):
    right = dict(arrival_seconds=0, blocks=(1, 2), block_tokens=4, prompt_tokens=8, output_tokens=1)
    assert Request(**right).prompt().tolist() == [1] * 4 + [2] * 4
    with pytest.raises(ValueError, match=r"must (be|have)"):
        Request(**right | change)


@pytest.mark.parametrize("make", [poisson, chats, prefix_tree])
@pytest.mark.parametrize(
    "arguments",
    [(count, 1.0) for count in (0, -1, 2.5, True)]
    + [(4, rate) for rate in (0, -1.0, float("nan"), float("inf"), "2", 1e-300)]
    + [(4, 1.0, seed) for seed in (-1, 0.5, None)],
)
def test_a_generator_refuses_what_makes_no_requests(make, arguments, unchecked):
    count, rate, *seed = arguments
    with pytest.raises(ValueError, match="must be"):
        make(count, rate, **dict(seed=seed[0]) if seed else {})


@pytest.mark.parametrize(
    "make, wrong",
    [
        (poisson, dict(sigma=-1.0)),
        (poisson, dict(sigma=1e3)),
        (poisson, dict(prompt_median=0)),
        (poisson, dict(output_median=float("inf"))),
        (poisson, dict(burst=0.0)),
        (poisson, dict(samples=0)),
        (chats, dict(turns=0)),
        (chats, dict(system_prompts=0)),
        (chats, dict(think_seconds=float("nan"))),
        (chats, dict(turn_blocks=-1)),
        (chats, dict(output_tokens=0)),
        (prefix_tree, dict(depth=-1)),
        (prefix_tree, dict(branching=0)),
        (prefix_tree, dict(skew=float("inf"))),
        (prefix_tree, dict(own_blocks=-1)),
        (prefix_tree, dict(node_blocks=0)),
        (prefix_tree, dict(block_tokens=0)),
    ],
)
def test_a_generator_refuses_a_wrong_option(make, wrong, unchecked):
    with pytest.raises(ValueError):
        make(20, 1.0, **wrong)


def test_a_vocabulary_and_a_capacity_are_counts(unchecked):
    for bad in (0, -1, 2.5, None, True):
        with pytest.raises(ValueError, match="vocab_size"):
            TRACE[0].text(bad)
        with pytest.raises(ValueError, match="capacity_pages"):
            hit_rate(TRACE, bad)
    with pytest.raises(ValueError, match="request 1 must be a Request"):
        hit_rate([TRACE[0], "another"], 100)
