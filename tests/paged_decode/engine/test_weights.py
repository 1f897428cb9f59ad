"""New weights: nothing that was computed with the old ones is found again, wherever it lies."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from paged_decode import (
    BlockAllocator,
    KVCache,
    SamplingParams,
    ShardedAllocator,
    inspect_snapshot,
    load_snapshot,
    save_snapshot,
)
from paged_decode.errors import SnapshotMismatch
from paged_decode.faults import FaultPlan, Faults
from paged_decode.tiers import DiskTier, HostTier

from ..tiny import PARAMS, dense_greedy, make_engine, make_params, prompts

OTHER = make_params(seed=7)
GREEDY = SamplingParams(max_new_tokens=6)
PROMPTS = prompts(3, low=9, high=20)
OLD = [dense_greedy(p, 6) for p in PROMPTS]
NEW = [dense_greedy(p, 6, OTHER) for p in PROMPTS]


def assign(engine, params):
    engine.params = params


def call(engine, params):
    engine.update_params(params)


def tokens(engine, **options):
    return [c.tokens for c in engine.generate(PROMPTS, GREEDY, **options)]


@pytest.mark.parametrize("update", [call, assign])
def test_requests_after_an_update_are_answered_by_the_new_weights_alone(update):
    assert OLD != NEW
    engine = make_engine()
    assert tokens(engine) == OLD and engine.allocator.num_evictable
    update(engine, OTHER)
    assert engine.params is OTHER and engine.allocator.num_evictable == 0
    assert tokens(engine) == NEW
    assert engine.stats.prefix_hit_tokens == 0
    update(engine, PARAMS)
    assert tokens(engine) == OLD and engine.idle
    assert tokens(engine, cache_salt="x") == OLD
    engine.allocator.check_invariants()


@pytest.mark.parametrize("update", [call, assign])
def test_requests_in_flight_go_on_with_the_new_weights_on_the_text_so_far(update, compiled):
    engine = make_engine(decode_steps=2)
    engine.warmup()
    ids = [engine.submit(p, GREEDY, n=2) for p in PROMPTS]  # the third waits for a row
    texts = {(r, i): [] for r in ids for i in range(2)}
    while not all(texts[ids[0], i] for i in range(2)):
        for event in engine.step():
            texts[event.request_id, event.sample].append(event.token)
    before = {key: len(text) for key, text in texts.items()}
    assert any(0 < n < 6 for n in before.values())
    compiled.clear()
    update(engine, OTHER)
    engine.allocator.check_invariants()
    for event in engine.stream():
        texts[event.request_id, event.sample].append(event.token)
    for (request, i), text in texts.items():
        prompt, begin = PROMPTS[ids.index(request)], before[request, i]
        assert tuple(text[begin:]) == dense_greedy(prompt + text[:begin], 6 - begin, OTHER)
    assert not compiled and engine.stats.preemptions == 0
    assert engine.allocator.num_used == 0


def test_weights_that_lie_otherwise_in_memory_are_weights():
    """A matrix by columns, as a checkpoint has it: the program is compiled for how it lies."""
    engine = make_engine()
    engine.params = jax.device_put(PARAMS)
    assert tokens(engine) == OLD

    def by_columns(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, Format(Layout(tuple(range(leaf.ndim))[::-1]), leaf.sharding))

    for weights, expected in ((PARAMS, OLD), (OTHER, NEW)):
        engine.params = jax.tree.map(by_columns, jax.device_put(weights))
        assert tokens(engine) == expected


def test_an_update_in_a_callback_holds_from_the_next_token_on():
    engine, seen = make_engine(decode_steps=1), []

    def on_token(event):
        seen.append(event.token)
        if len(seen) == 2:
            engine.params = OTHER

    engine.submit(PROMPTS[0], GREEDY, on_token=on_token)
    list(engine.stream())
    assert tuple(seen[2:]) == dense_greedy(PROMPTS[0] + seen[:2], 4, OTHER)


def test_what_is_kept_on_purpose_is_found():
    engine = make_engine()
    tokens(engine)
    same = {name: array.copy() for name, array in PARAMS.items()}
    engine.update_params(same, keep_cached=True)
    assert tokens(engine) == OLD and engine.stats.prefix_hit_tokens > 0


def swapping(folder):
    """An engine whose requests leave pages on the host and on the disk again and again."""
    tier = HostTier(2, disk=DiskTier(folder, 2**20))
    engine = make_engine(policies=dict(tier=tier), decode_steps=2)
    Faults(FaultPlan(preempt_every=2)).install(engine)
    return engine


def one_by_one(engine):
    return [engine.generate([prompt], GREEDY)[0].tokens for prompt in PROMPTS]


@pytest.mark.parametrize("update", [call, assign])
def test_host_tier_and_disk_tier_miss_as_the_pool_does(tmp_path, update):
    engine = swapping(tmp_path)
    assert one_by_one(engine) == OLD
    assert engine.tier.num_pages and engine.tier.stats.spilled and list(tmp_path.iterdir())
    update(engine, OTHER)
    assert engine.tier.num_pages == 0 and not list(tmp_path.iterdir())
    assert one_by_one(engine) == NEW
    assert list(tmp_path.iterdir())
    # A process that starts anew with the new weights, over the same folder.
    fresh = swapping(tmp_path)
    fresh.update_params(OTHER, keep_cached=True)
    assert one_by_one(fresh) == NEW


@pytest.mark.parametrize("how", ["reset", "new weights"])
def test_in_a_loop_of_ones_own_the_tiers_miss_too(tmp_path, how):
    sizes = dict(num_layers=1, num_kv_heads=1, page_size=4, head_dim=8)
    allocator = BlockAllocator(9, 4, hash_key=b"k")
    cache, prompt = KVCache.create(num_pages=9, **sizes), [5, 6, 7, 8, 9]
    tier = HostTier(4, disk=DiskTier(tmp_path, 2**20))
    handle = allocator.allocate(prompt)
    allocator.commit(handle, 5)
    assert tier.store(cache, allocator, handle) == 2
    tier.settle()
    allocator.free(handle)
    if how == "reset":
        assert allocator.reset_prefix_cache()
    else:
        allocator.new_weights()
    handle = allocator.allocate(prompt)
    cache = tier.load(cache, allocator, handle)
    assert allocator.sequence(handle).computed == 0
    allocator.commit(handle, 5)
    assert tier.store(cache, allocator, handle) == 2  # under other keys
    tier.settle()
    assert tier.num_pages == 4
    tier.clear()
    assert tier.num_pages == 0 and not list(tmp_path.iterdir())


def test_sequences_that_live_on_keep_their_pages_to_themselves():
    allocator = BlockAllocator(9, 4, hash_key=b"k")
    handle = allocator.allocate(range(6))
    allocator.commit(handle, 6)
    allocator.new_weights()
    assert allocator.sequence(handle).private and allocator.sequence(handle).computed == 6
    assert allocator.match_prefix(range(6)) == 0
    (child,) = allocator.fork(handle)
    allocator.append([handle, child], [[6, 7, 8], [1, 2, 3]])
    allocator.commit([handle, child], [9, 9])
    assert allocator.match_prefix(range(9)) == 0 and allocator.num_evictable == 0
    other = allocator.allocate(range(9))
    assert allocator.sequence(other).computed == 0
    allocator.commit(other, 9)
    allocator.free([handle, child, other])
    assert allocator.match_prefix(range(9)) == 8
    allocator.check_invariants()


@pytest.mark.parametrize("renew", ["new_weights", "reset_prefix_cache"])
def test_a_sequence_without_pages_begins_anew(renew):
    allocator = BlockAllocator(8, 2)
    handle = allocator.allocate([1, 2, 3])
    allocator.truncate(handle, 0)
    getattr(allocator, renew)()
    assert not allocator.sequence(handle).private
    allocator.append(handle, [1, 2, 3])
    allocator.commit(handle, 3)
    assert allocator.match_prefix([1, 2, 9]) == 2
    allocator.check_invariants()


@pytest.mark.parametrize("renew", ["new_weights", "reset_prefix_cache"])
def test_a_sequence_without_pages_begins_anew_on_every_shard(renew):
    allocator = ShardedAllocator(16, 2, num_shards=2)
    handles = [allocator.allocate([i, 2, 3]) for i in range(2)]
    assert [allocator.shard_of(handle) for handle in handles] == [0, 1]
    for handle in handles:
        allocator.truncate(handle, 0)
    getattr(allocator, renew)()
    for i, handle in enumerate(handles):
        allocator.append(handle, [i, 2, 3])
        allocator.commit(handle, 3)
        assert allocator.match_prefix([i, 2, 9]) == 2
    allocator.check_invariants()


def test_a_digest_that_is_empty_makes_nothing_private():
    allocator = BlockAllocator(8, 2, digest=lambda key, payload: b"")
    one = allocator.allocate([1, 2, 3])
    allocator.commit(one, 3)
    assert not allocator.sequence(one).private
    assert allocator.match_prefix([1, 2, 9]) == 2 and allocator.match_prefix([1, 3, 9]) == 0
    allocator.check_invariants()


def test_a_name_for_the_weights_makes_the_same_keys_in_every_process():
    plain, one, two = (BlockAllocator(9, 4, hash_key=b"k") for _ in range(3))
    keys = plain.page_digests(range(9))
    one.new_weights(b"step 100")
    two.new_weights(b"step 100")
    assert one.page_digests(range(9)) == two.page_digests(range(9)) != keys
    two.new_weights()
    assert len(two.generation) == 16 and two.page_digests(range(9)) != one.page_digests(range(9))


def test_a_generation_is_bytes(unchecked):
    for allocator in (BlockAllocator(9, 4), ShardedAllocator(16, 4, num_shards=2)):
        with pytest.raises(TypeError, match="generation must be bytes or None, got str"):
            allocator.new_weights("step 100")
        with pytest.raises(ValueError, match="generation must not be empty"):
            allocator.new_weights(b"")
        assert allocator.generation == allocator.weights == b""


@pytest.mark.parametrize("how", ["reset", "new weights"])
def test_shards_change_together(how):
    allocator = ShardedAllocator(16, 4, num_shards=2)
    for handle in [allocator.allocate([i] * 9) for i in range(2)]:
        allocator.commit(handle, 9)
        allocator.free(handle)
    before = allocator.page_digests(range(9))
    if how == "reset":
        assert allocator.reset_prefix_cache()
    else:
        allocator.new_weights()
    assert allocator.match_prefix([0] * 9) == allocator.match_prefix([1] * 9) == 0
    keys = [shard.page_digests(range(9)) for shard in allocator.shards]
    assert keys[0] == keys[1] == allocator.page_digests(range(9)) != before
    allocator.check_invariants()


def test_a_snapshot_of_before_is_refused_and_one_of_now_is_taken(tmp_path):
    before, now = tmp_path / "before", tmp_path / "now"
    engine = make_engine()
    tokens(engine)
    engine.save(before)
    engine.params = OTHER
    tokens(engine)
    engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    engine.save(now)
    with pytest.raises(SnapshotMismatch, match="from before new weights"):
        engine.restore(before)
    list(engine.stream())
    engine.restore(now)
    assert [e.token for e in engine.stream()] == list(NEW[0])  # the first four with the file
    fresh = make_engine()  # of a process that begins with the new weights
    fresh.update_params(OTHER, keep_cached=True)
    fresh.restore(now)
    list(fresh.stream())
    assert tokens(fresh) == NEW and fresh.stats.prefix_hit_tokens > 0


def test_a_fingerprint_may_be_what_a_file_says(tmp_path):
    """Even if it has the mark of replaced weights in it, as that of a file of such a time has."""
    sizes = dict(num_layers=1, num_pages=9, num_kv_heads=1, page_size=4, head_dim=8)
    allocator, path = BlockAllocator(9, 4, fingerprint=b"F"), tmp_path / "file"
    allocator.new_weights(b"w1")
    save_snapshot(path, KVCache.create(**sizes), allocator)
    named = BlockAllocator(9, 4, fingerprint=inspect_snapshot(path).fingerprint)
    load_snapshot(path, KVCache.create(**sizes), named)
    save_snapshot(path, KVCache.create(**sizes), named)
    load_snapshot(path, KVCache.create(**sizes), named)
    with pytest.raises(SnapshotMismatch, match="fingerprint"):
        load_snapshot(path, KVCache.create(**sizes), BlockAllocator(9, 4, fingerprint=b"G"))


def test_a_sequence_of_before_is_saved_as_not_computed(tmp_path):
    sizes = dict(num_layers=1, num_kv_heads=1, page_size=4, head_dim=8)
    allocator, cache = BlockAllocator(9, 4), KVCache.create(num_pages=9, **sizes)
    handle = allocator.allocate(range(6))
    allocator.commit(handle, 6)
    allocator.new_weights()
    save_snapshot(tmp_path / "file", cache, allocator)
    other = BlockAllocator(9, 4)
    restored = load_snapshot(tmp_path / "file", cache, other)
    assert other.sequence(restored.handles[0]).computed == 0
    np.testing.assert_array_equal(other.tokens(restored.handles[0]), range(6))
    assert other.match_prefix(range(6)) == 0
