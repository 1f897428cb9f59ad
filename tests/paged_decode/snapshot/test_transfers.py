"""Saves, loads and the host tier move pages by explicit transfers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode import KVCache, load_snapshot, save_snapshot, save_snapshot_async
from paged_decode.tiers import HostTier

from .small import busy, content, make_allocator, make_cache


@contextmanager
def guarded() -> Iterator[None]:
    """Within it no thread may transfer anything by the way, in either direction."""
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        yield
    finally:
        jax.config.update("jax_transfer_guard", "allow")


def split(num_pages: int) -> KVCache:
    """A cache like that of `busy`, its heads on two devices."""
    sizes = dict(num_layers=2, num_kv_heads=2, page_size=4, head_dim=3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    return KVCache.create(num_pages=num_pages, mesh=mesh, head_axis="x", **sizes)


@pytest.mark.parametrize("kind", ["tuple", "stack", "split"])
def test_no_transfer_of_a_save_or_a_load_is_implicit(tmp_path, kind):
    cache, allocator, _ = busy()
    there, other = make_cache(40), make_allocator(40)
    if kind == "stack":
        cache, there = (
            {name: jnp.stack(getattr(c, name)) for name in ("k_pages", "v_pages")}
            for c in (cache, there)
        )
    if kind == "split":
        cache, there = split(24), split(40)
    extra = {"a": jnp.arange(3), "b": np.zeros(2)}
    with guarded():
        save_snapshot(tmp_path / "a", cache, allocator, extra=extra)
        save_snapshot_async(tmp_path / "b", cache, allocator, extra=extra).result(60)
        loaded = load_snapshot(tmp_path / "a", there, other)
    assert loaded.extra["a"].tolist() == [0, 1, 2]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_transfer_of_the_host_tier_is_implicit():
    cache, allocator, (handle, *_) = busy()
    was, tier = content(cache, allocator, handle), HostTier(16)
    with guarded():
        assert tier.store(cache, allocator, handle)
        tier.settle()
        other = make_allocator(24)
        again = other.allocate(allocator.tokens(handle).tolist())
        there = tier.load(cache, other, again)  # donates the cache
    assert other.sequence(again).computed == 10 and tier.stats.loaded
    for found, expected in zip(content(there, other, again), was, strict=True):
        np.testing.assert_array_equal(found, expected)
