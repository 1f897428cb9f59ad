"""A loop of one's own: the cache's calls, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from paged_decode import (
    BlockAllocator,
    DecodeBatch,
    KVCache,
    OutOfPages,
    ShardedAllocator,
    StaleHandle,
    one_token_batch,
)

from ..tiny import DIM, KV_HEADS, LAYERS, PARAMS, dense_greedy, model, prompts

SIZES = dict(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM)


def make(num_pages=40, page_size=4):
    cache = KVCache.create(num_pages=num_pages, page_size=page_size, **SIZES)
    return cache, BlockAllocator(num_pages, page_size, hash_key=b"test")


@partial(jax.jit, donate_argnums=0)
def step(cache, batch):
    logits, cache = model(PARAMS, cache, batch.tokens, batch)
    return cache, jnp.argmax(logits, axis=-1)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def many_steps(cache, newest, batch, steps):
    def one(carry, _):
        cache, newest, lens = carry
        lens = jnp.where(lens > 0, lens + 1, 0)  # padding stays padding
        now = one_token_batch(batch, newest, lens)
        logits, cache = model(PARAMS, cache, now.tokens, now)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (cache, chosen, lens), chosen

    (cache, _, _), chosen = lax.scan(one, (cache, newest, batch.seq_lens), length=steps)
    return cache, chosen.T


def prefill(cache, allocator, asked, width=16):
    handles = [allocator.allocate(prompt) for prompt in asked]
    begin = [allocator.sequence(h).computed for h in handles]
    lengths = [len(prompt) for prompt in asked]
    batch = allocator.batch(handles, begin, lengths, tokens_per_row=width, pad_to=4, columns=16)
    cache, chosen = step(cache, batch)
    return cache, handles, np.asarray(chosen)[: len(asked)]


def test_the_plain_loop_gives_the_dense_tokens_and_later_prompts_find_its_pages():
    cache, allocator = make()
    asked = prompts(3, low=5, high=16)
    cache, handles, chosen = prefill(cache, allocator, asked)
    out = [chosen]
    for _ in range(8):
        cache, batch = cache.advance(allocator, handles, out[-1], pad_to=4, columns=16)
        cache, chosen = step(cache, batch)
        out.append(np.asarray(chosen)[:3])
    rows = np.stack(out, axis=1).tolist()
    assert [tuple(row) for row in rows] == [dense_greedy(p, 9) for p in asked]
    told = [*asked[0], *rows[0]]
    allocator.free(handles)
    # All but the last batch was committed: nobody has said that that one is done.
    assert allocator.match_prefix([*told, 0]) == (len(told) - 2) // 4 * 4
    cache, _, chosen = prefill(cache, allocator, [told])
    assert chosen[0] == dense_greedy(told, 1)[0]
    allocator.check_invariants()


def test_without_commit_nothing_is_published():
    cache, allocator = make()
    cache, handles, chosen = prefill(cache, allocator, prompts(2, low=9, high=12))
    cache, _ = cache.advance(allocator, handles, chosen, commit=False)
    assert [allocator.sequence(h).computed for h in handles] == [0, 0]


def test_forks_are_copied_before_they_are_written():
    cache, allocator = make()
    (prompt,) = prompts(1, low=6, high=6)
    cache, (handle,), chosen = prefill(cache, allocator, [prompt])
    cache, (child,) = cache.fork(allocator, handle)
    assert allocator.sequence(child).computed == 6
    other = (int(chosen[0]) + 1) % 50
    newest, told = [int(chosen[0]), other], [[*prompt, int(chosen[0])], [*prompt, other]]
    for _ in range(4):
        cache, batch = cache.advance(allocator, [handle, child], newest, pad_to=4, columns=16)
        cache, chosen = step(cache, batch)
        newest = np.asarray(chosen)[:2].tolist()
        for row, token in zip(told, newest, strict=True):
            row.append(token)
    assert allocator.stats().copies == 1
    assert [tuple(row[7:]) for row in told] == [dense_greedy(row[:7], 4) for row in told]


def test_drafts_and_steps_in_one_program_give_the_tokens_of_the_plain_loop():
    cache, allocator = make()
    asked = prompts(2, low=5, high=9)
    want = [dense_greedy(p, 10) for p in asked]
    cache, handles, chosen = prefill(cache, allocator, asked)
    draft = np.array([w[:3] for w in want])  # right ones: the check gives what follows
    cache, batch = cache.extend(allocator, handles, draft, pad_to=4, columns=16)
    assert batch.tokens.shape == (4, 3)
    cache, chosen = step(cache, batch)
    newest = np.asarray(chosen)
    assert newest[:2].tolist() == [w[3] for w in want]
    cache, batch = cache.reserve(allocator, handles, 6, pad_to=4, columns=16)
    lengths = np.array([len(p) + 3 for p in asked])
    assert [allocator.sequence(h).computed for h in handles] == lengths.tolist()
    cache, after = many_steps(cache, jnp.asarray(newest, jnp.int32), batch, 6)
    assert np.asarray(after)[:2].tolist() == [list(w[4:]) for w in want]
    written = np.concatenate([newest[:2, None], np.asarray(after)[:2, :-1]], axis=1)
    used = allocator.num_used
    allocator.append(handles, written)
    assert allocator.num_used == used
    allocator.commit(handles, lengths + 6)
    allocator.check_invariants()


def wrong_caches():
    return {"page_size 8": make(40, 8)[0], "num_pages 20": make(20, 4)[0]}


@pytest.mark.parametrize("which", ["page_size 8", "num_pages 20"])
@pytest.mark.parametrize("traced", [False, True])
def test_a_batch_for_another_pool_is_refused_while_tracing(which, traced):
    cache, (_, allocator) = wrong_caches()[which], make()
    handle = allocator.allocate([1, 2, 3])
    batch = allocator.batch([handle], 0, 3, tokens_per_row=3)
    q = np.zeros((1, 3, 4, DIM), np.float32)
    k = np.zeros((1, 3, KV_HEADS, DIM), np.float32)
    for call in (
        lambda cache, batch: cache.append(0, k, k, batch),
        lambda cache, batch: cache.attend(0, q, batch),
        lambda cache, batch: cache.append_and_attend(0, q, k, k, batch),
    ):
        name = which.split()[0]
        with pytest.raises(ValueError, match=f"batch is for a pool with {name}"):
            (jax.jit(call) if traced else call)(cache, batch)


def test_a_batch_made_by_hand_says_its_sizes_or_is_not_compared():
    cache, _ = make()
    ids = np.array([[1]], np.int32)
    plain = DecodeBatch.of(ids, np.array([1], np.int32), ids * 0, ids * 4)
    q, k = np.zeros((1, 1, 4, DIM), np.float32), np.ones((1, 1, KV_HEADS, DIM), np.float32)
    out, _ = cache.append_and_attend(0, q, k, k, plain)
    np.testing.assert_array_equal(np.asarray(out), 1.0)
    said = DecodeBatch.of(ids, np.array([1], np.int32), ids * 0, ids * 4, page_size=8)
    with pytest.raises(ValueError, match="page_size 8, but the cache has 4"):
        cache.append_and_attend(0, q, k, k, said)
    with pytest.raises(ValueError, match="must say its page_size"):
        one_token_batch(plain, jnp.array([1]), jnp.array([2]))
    several = DecodeBatch(None, plain.seq_lens, plain.positions, plain.groups * 2)
    with pytest.raises(ValueError, match="2 groups"):
        cache.attend(0, q, several)
    with pytest.raises(ValueError, match="2 groups"):
        _ = several.page_table


def test_what_a_batch_says_of_the_tokens_that_rows_see_is_obeyed():
    cache, allocator = make()
    cache = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), cache)
    handle = allocator.allocate(range(9))
    batch = allocator.batch([handle], 8, 9)
    q = np.ones((1, 1, 4, DIM), np.float32)
    (group,), starts = batch.groups, np.array([5], np.int32)
    for said, option in ((dict(starts=starts), "starts"), (dict(window=3), "sliding_window")):
        told = replace(batch, groups=(replace(group, **said),))
        want = cache.attend(0, q, batch, **{option: next(iter(said.values()))})
        np.testing.assert_array_equal(cache.attend(0, q, told), want)
        assert not np.array_equal(cache.attend(0, q, batch), want)


@pytest.mark.parametrize("call", ["advance", "extend", "reserve", "fork"])
def test_what_fails_changes_neither_cache_nor_allocator(call):
    cache, allocator = make(4, 4)
    handle = allocator.allocate(range(9))
    allocator.batch([handle], 0, 9, tokens_per_row=9)
    (child,) = allocator.fork(handle)
    before = allocator.sequence(handle), allocator.stats()
    both = dict(
        advance=lambda c, a: c.advance(a, [handle, child], [1, 2]),
        extend=lambda c, a: c.extend(a, [handle, child], [[1, 1], [2, 2]]),
        reserve=lambda c, a: c.reserve(a, [handle, child], 2),
        fork=lambda c, a: c.fork(a, 99),
    )[call]
    with pytest.raises(StaleHandle if call == "fork" else OutOfPages):
        both(cache, allocator)
    for other, name in ((BlockAllocator(4, 8), "page_size"), (BlockAllocator(8, 4), "num_pages")):
        with pytest.raises(ValueError, match=f"differ in {name}"):
            both(cache, other)
    assert (allocator.sequence(handle), allocator.stats()) == before and not cache.is_deleted
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda c: both(c, allocator))(cache)
    jax.tree.map(lambda a: a.delete(), cache)
    with pytest.raises(RuntimeError, match="donated"):
        both(cache, allocator)
    assert (allocator.sequence(handle), allocator.stats()) == before


def test_a_sharded_allocator_serves_the_same_calls():
    cache, _ = make()
    allocator = ShardedAllocator(40, 4, num_shards=2)
    asked = prompts(3, low=5, high=9)
    cache, handles, chosen = prefill(cache, allocator, asked)
    assert {allocator.shard_of(h) for h in handles} == {0, 1}
    out = [chosen]
    for _ in range(4):  # the whole pool's ids serve one device as they are
        cache, batch = cache.advance(allocator, handles, out[-1], pad_to=4, columns=16)
        cache, chosen = step(cache, batch)
        out.append(np.asarray(chosen)[:3])
    assert [tuple(r) for r in np.stack(out, axis=1).tolist()] == [dense_greedy(p, 5) for p in asked]
