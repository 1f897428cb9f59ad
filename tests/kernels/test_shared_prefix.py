"""Rows that share a prefix: which do is found from the tables, and their pages are read once."""

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import (
    Placement,
    SharedPrefix,
    append_and_attend,
    dispatch,
    paged_attention,
    shared_prefix_plan,
)

from ..devices import first_devices
from ..selection import for_ci
from .oracle import (
    LSE_TOLERANCE,
    NAMES,
    TOLERANCE,
    Inputs,
    attend,
    build,
    expected,
    same_bits,
)
from .oracle import Case as Shape
from .triton.interpret import INSTALLED
from .triton.interpret import NAME as INTERPRETED

Case = partial(Shape, columns=10)
every_backend = pytest.mark.parametrize("backend", NAMES)


def together(inputs: Inputs, *groups: tuple[tuple[int, ...], int]) -> Inputs:
    """The same, in which the rows of each group begin with the first so many pages of its first."""
    for (first, *others), pages in groups:
        inputs.page_table[others, :pages] = inputs.page_table[first, :pages]
    return inputs


def plan_of(inputs: Inputs, **options) -> SharedPrefix:
    """All of it counts, however little it saves."""
    size = inputs.k_pages.shape[2]
    sizes: dict[str, Any] = dict(min_tokens=1, parts=len(inputs.seq_lens)) | options
    return shared_prefix_plan(inputs.page_table, inputs.seq_lens, page_size=size, **sizes)


def check(backend: str, inputs: Inputs, dtype: str, plan: SharedPrefix) -> None:
    inputs.options["shared"] = plan
    out, lse = inputs.call(backend)
    want, want_lse = expected(inputs)
    assert out.dtype == inputs.q.dtype and lse.dtype == np.float32
    np.testing.assert_allclose(out.astype(np.float64), want, *TOLERANCE[dtype])
    np.testing.assert_allclose(lse, want_lse, *LSE_TOLERANCE)


# --- the values -------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "a scale, a soft cap and sinks": dict(options=dict(scale=0.7, soft_cap=1.5), sinks=(6, 2)),
    "one head a KV head": dict(group=1),
    "more heads than a tile": dict(group=12, kv_heads=1),
    "bfloat16": dict(dtype="bfloat16"),
    "a tile of bfloat16": dict(dtype="bfloat16", group=6, kv_heads=2),
    "float16": dict(dtype="float16"),
    "int8": dict(dtype="bfloat16", pages="int8", dim=32),
    "e4m3": dict(dtype="bfloat16", pages="float8_e4m3fn", dim=32),
    # Nothing is shared in these, and all is as without a plan.
    "a window": dict(options=dict(sliding_window=7)),
    "starts": dict(starts=(0, 1, 9, 0, 3, 0, 20, 2)),
    "T = 3": dict(tokens=3),
}
FOR_CI = ("float16", "e4m3", "one head a KV head")  # where others are like them


@every_backend
@pytest.mark.parametrize("kind", for_ci(KINDS, FOR_CI))
def test_random_batches_that_share_prefixes_match_the_oracle(backend, kind):
    rng = np.random.default_rng(list(KINDS).index(kind))
    lens = tuple(int(n) for n in rng.integers(0, 37, 8))
    case = Case(lens, seed=7, **KINDS[kind])
    inputs = build(case, fill=np.nan)
    rows, pages = rng.permutation(8), np.array(lens) // 4
    for some in (rows[:2], rows[2:5]):  # as far as the shortest has whole pages
        together(inputs, (tuple(some), int(pages[some].min())))
    together(inputs, (tuple(rows[2:4]), int(pages[rows[2:4]].min())))  # and deeper
    check(backend, inputs, case.dtype, plan_of(inputs, members=int(rng.integers(2, 9))))


@every_backend
def test_many_rows_of_one_prompt_and_one_that_has_no_tail_of_its_own_match_the_oracle(backend):
    case = Case((32,) * 5 + (35, 33, 3))
    inputs = together(build(case), (tuple(range(7)), 8))
    plan = plan_of(inputs, members=4)
    assert plan.seq_lens[:2].tolist() == [28, 28]  # of 32 tokens, the newest is not shared
    check(backend, inputs, case.dtype, plan)


@every_backend
def test_a_row_that_shares_nothing_has_the_bits_of_a_plan_without_parts(backend):
    inputs = build(Case((20, 9, 33, 0, 17)))
    plan = plan_of(inputs)
    assert not np.any(plan.seq_lens)
    inputs.options["starts"] = np.zeros(5, np.int32)
    alone = inputs.call(backend)
    inputs.options = dict(shared=plan)
    same_bits(inputs.call(backend), alone)


@every_backend
def test_a_row_that_has_ended_since_the_plan_sees_nothing_and_others_see_what_they_did(backend):
    inputs = together(build(Case((20, 21, 22, 6, 0)), fill=np.nan), ((0, 1, 2), 4))
    inputs.options["shared"] = plan_of(inputs)
    out, lse = inputs.call(backend)
    inputs.seq_lens[1] = 0
    after, lse_after = inputs.call(backend)
    assert (after[1] == 0).all() and (lse_after[1] == -np.inf).all()
    np.testing.assert_allclose(after[[0, 2, 3]], out[[0, 2, 3]], *TOLERANCE["float32"])
    np.testing.assert_allclose(lse_after[[0, 2, 3]], lse[[0, 2, 3]], *LSE_TOLERANCE)


def unchecked_call(backend: str, inputs: Inputs, plan: SharedPrefix) -> Any:
    """Under `jit`, which sees no values."""
    args = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    options: dict[str, Any] = dict(return_lse=True, implementation=backend)
    return jax.jit(lambda *a: paged_attention(*a, shared=plan, **options))(*args)


@every_backend
@pytest.mark.parametrize("kind", ["plain", "a tile of bfloat16"])
def test_a_broken_page_of_a_shared_prefix_breaks_its_rows_alone(backend, kind):
    case = Case((36, 37, 18, 6, 0, 3, 3, 3), **KINDS[kind])
    inputs = together(build(case), ((0, 1), 8))
    inputs.page_table[:2, 1] = len(inputs.k_pages)
    plan = plan_of(inputs)
    assert plan.seq_lens[0] == 32
    call = partial(attend, backend, shared=plan)
    out, lse = unchecked_call(backend, inputs, plan)
    assert np.isnan(out[:2]).all() and np.isnan(lse[:2]).all()
    inputs.page_table[:2, 1] = 1
    same = call(inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens)
    np.testing.assert_allclose(out[2:], same[0][2:], *TOLERANCE[case.dtype])


@pytest.mark.skipif(not INSTALLED, reason="triton has no wheel for this platform")
@pytest.mark.parametrize("page", [None, -1], ids=["sound", "broken"])
def test_tokens_of_a_prefix_that_programs_deal_out_and_leave_unmerged_match_the_oracle(page):
    case = Case((39, 40, 38, 6, 0, 20, 21, 0), sinks=(12, 2), **KINDS["a tile of bfloat16"])
    inputs = together(build(case, fill=np.nan), ((0, 1, 2), 9), ((5, 6), 5))
    plan = plan_of(inputs, members=8)
    assert sorted(plan.seq_lens.tolist())[-2:] == [16, 36]  # of 3 sets, 16 tokens at a time
    if page is None:
        check(f"{INTERPRETED}-split", inputs, case.dtype, plan)
        return
    inputs.page_table[:3, 5] = page
    found = unchecked_call(f"{INTERPRETED}-split", inputs, plan_of(inputs, members=8))
    assert all(np.isnan(x[:3]).all() and not np.isnan(x[3:]).any() for x in found)


@every_backend
def test_the_newest_token_is_written_and_seen_with_a_plan_as_without(backend):
    case = Case((18, 21, 17, 5, 0), columns=6)
    inputs = together(build(case), ((0, 1, 2), 4))
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 5, case.kv_heads, case.dim)).astype(np.float32)

    def run(**options):
        return append_and_attend(
            jnp.array(inputs.k_pages), jnp.array(inputs.v_pages), jnp.array(inputs.q),
            jnp.array(k), jnp.array(v), jnp.array(inputs.page_table), jnp.array(inputs.seq_lens),
            return_lse=True, implementation=backend, **options,
        )  # fmt: skip

    (out, lse, *pools), want = run(shared=plan_of(inputs)), run()
    same_bits(pools, want[2:])
    np.testing.assert_allclose(out, want[0], *TOLERANCE["float32"])
    np.testing.assert_allclose(lse, want[1], *LSE_TOLERANCE)


@every_backend
def test_the_same_call_with_a_plan_gives_the_same_bits(backend):
    inputs = together(build(Case((20, 21, 22, 26, 0))), ((0, 1, 3), 4))
    inputs.options["shared"] = plan_of(inputs)
    same_bits(inputs.call(backend), inputs.call(backend))


@every_backend
def test_seats_of_a_part_that_are_empty_may_be_anywhere(backend):
    """`shared_prefix_plan` fills them from the front; a part of so many heads is cut in two."""
    case = Case((20, 22, 25, 9), group=16, kv_heads=1)
    inputs = together(build(case), ((0, 1, 2), 4))
    plan = plan_of(inputs, members=4, parts=1)
    seats, place = [[4, 0, 4, 1, 4, 4, 4, 2]], [1, 3, 7, 8]
    members = jnp.array(seats, jnp.int32), jnp.array(place, jnp.int32)
    check(backend, inputs, case.dtype, replace(plan, members=members[0], place=members[1]))


# --- what is read -----------------------------------------------------------------------------


@every_backend
def test_the_pages_of_a_shared_prefix_are_read_through_one_row_of_each_part_alone(backend):
    inputs = together(build(Case((20, 21, 22, 26, 9))), ((0, 1, 2, 3), 4))
    plan = plan_of(inputs, members=2)
    inputs.options["shared"] = plan
    want = inputs.call(backend)
    poison = len(inputs.k_pages) - 1  # a free page
    assert poison not in inputs.page_table
    for name in ("k_pages", "v_pages"):
        getattr(inputs, name)[poison] = np.nan
    inputs.page_table[:4, :4] = poison  # a read of any of these would come out as NaN
    same_bits(inputs.call(backend), want)


def tokens_read(call: Inputs, plan: SharedPrefix | None) -> int:
    """Tokens of all rows of the calls that backends get, from what these are told to see."""
    total = 0

    def count(record, *_):
        nonlocal total
        starts = jnp.zeros_like(record.seq_lens) if record.starts is None else record.starts
        total += int(jnp.sum(jnp.maximum(record.seq_lens - starts, 0)))
        lse = jnp.zeros(record.q.shape[:-1], jnp.float32)
        return record.q, lse

    arrays = (call.q, call.k_pages, call.v_pages, call.page_table, call.seq_lens)

    def count_parts(record, *_, tails, **__):
        count(record)
        return tails

    counted: dict[str, Any] = dict(attend=count, attend_joined=count_parts)
    with jax.disable_jit(), mock.patch.multiple(dispatch, **counted):
        paged_attention(*map(jnp.asarray, arrays), shared=plan)
    return total


def test_sixteen_samples_read_their_prompt_once_and_sixty_four_four_times():
    def read(rows: int) -> tuple[int, int]:
        case = Case((70,) * rows, kv_heads=1, group=4, columns=18, spare_pages=0)
        inputs = together(build(case), (tuple(range(rows)), 16))
        return tokens_read(inputs, plan_of(inputs)), tokens_read(inputs, None)

    assert read(16) == (64 + 16 * 6, 16 * 70)
    assert read(64) == (4 * 64 + 64 * 6, 64 * 70)


def test_more_heads_than_a_tile_takes_cut_a_part_and_nothing_else():
    case = Case((70,) * 8, kv_heads=1, group=16, columns=18, spare_pages=0)
    inputs = together(build(case), (tuple(range(8)), 16))
    assert tokens_read(inputs, plan_of(inputs)) == 2 * 64 + 8 * 6


# --- who shares -------------------------------------------------------------------------------


def brute_force(table, lens, size: int) -> dict[int, tuple[int, frozenset[int]]]:
    """What a row shares at best, by trying all classes; of two that are equal, the deeper one."""
    rows, found = range(len(lens)), {}
    whole = [max(int(n) - 1, 0) // size for n in lens]
    for row in rows:
        choices = []
        for pages in range(1, whole[row] + 1):
            alike = [r for r in rows if whole[r] >= pages]
            alike = [r for r in alike if (table[r, :pages] == table[row, :pages]).all()]
            choices.append((np.float32(pages) * (1 - 1 / np.float32(len(alike))), pages))
        saved, pages = max(choices, default=(0, 0))
        found[row] = pages if saved > 0 else 0
    return {
        row: (pages, frozenset(
            r for r in rows
            if found[r] == pages and (table[r, :pages] == table[row, :pages]).all()
        ))
        for row, pages in found.items() if pages
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_is_that_of_trying_every_class(seed):
    rng = np.random.default_rng(seed)
    rows, columns, size = 12, 8, 4
    lens = rng.integers(0, columns * size + 1, rows).astype(np.int32)
    table = rng.permutation(np.arange(1, 1 + rows * columns)).reshape(rows, columns)
    for _ in range(8):
        a, b = rng.choice(rows, 2, replace=False)
        pages = rng.integers(1, columns)
        table[a, :pages] = table[b, :pages]
    table = table.astype(np.int32)
    members = int(rng.integers(2, 6))
    plan = shared_prefix_plan(
        table, lens, page_size=size, members=members, parts=rows, min_tokens=1
    )
    want = brute_force(table, lens, size)
    seated = {}
    for part, pages in enumerate(np.asarray(plan.seq_lens) // size):
        own = [int(row) for row in plan.members[part] if row < rows]
        assert (pages > 0) == (len(own) > 0)
        for place, row in enumerate(own):
            assert plan.place[row] == part * members + place
            assert plan.starts[row] == pages * size < lens[row]
            assert (plan.page_table[part, :pages] == table[row, :pages]).all()
            assert want[row][0] == pages and set(own) <= want[row][1]
            seated[row] = part
    for row in range(rows):
        group = sorted(want.get(row, (0, frozenset()))[1])
        left_over = group and group.index(row) // members * members == len(group) - 1
        assert (row in seated) == (len(group) > 1 and not left_over)
        if row not in seated:
            assert plan.starts[row] == 0 and plan.place[row] == plan.members.size


def test_a_part_is_formed_where_it_saves_enough_and_the_best_where_there_are_too_many():
    inputs = together(build(Case((20,) * 7 + (36,) * 2)), ((0, 1), 2), ((2, 3, 4), 4), ((7, 8), 8))
    every = plan_of(inputs)
    assert sorted(np.asarray(every.seq_lens)[:4].tolist()) == [0, 8, 16, 32]
    assert sorted(np.asarray(plan_of(inputs, min_tokens=9).seq_lens)[:3].tolist()) == [0, 16, 32]
    few = plan_of(inputs, parts=2)
    assert few.seq_lens.tolist() == [16, 32] or few.seq_lens.tolist() == [32, 16]
    assert few.starts[:2].tolist() == [0, 0]
    assert plan_of(inputs, parts=None).seq_lens.shape == (9 // 4,)


def test_empty_rows_share_nothing_though_their_tables_are_alike():
    table, lens = np.zeros((6, 4), np.int32), np.zeros(6, np.int32)
    assert not np.any(shared_prefix_plan(table, lens, page_size=4, min_tokens=1).seq_lens)
    empty = shared_prefix_plan(table[:0], lens[:0], page_size=4)
    assert empty.place.shape == (0,)


def test_every_shard_of_a_data_axis_has_a_plan_of_its_own():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=first_devices(4))
    placement = Placement.create(
        mesh, num_kv_heads=2, num_pages=64, head_axis="tensor", data_axis="data"
    )
    whole = build(Case((20, 21, 22, 26), columns=8, spare_pages=1))  # 32 pages hold them
    table = together(whole, ((0, 1), 4), ((2, 3), 3)).page_table
    pools = [np.zeros((64, *p.shape[1:]), p.dtype) for p in (whole.k_pages, whole.v_pages)]
    for pool, pages in zip(pools, (whole.k_pages, whole.v_pages), strict=True):
        pool[: len(pages)] = pool[32 : 32 + len(pages)] = pages
    # Both shards have the same ids, of pages of their own: rows of different shards share none.
    rows = [0, 1, 2, 3, 0, 1, 2, 3]
    args = [whole.q[rows], *pools, table[rows], whole.seq_lens[rows]]
    placed = [
        jax.device_put(a, placement.sharding(axes))
        for a, axes in zip(
            args, ("B, Hq, D", "N, Hk, S, D", "N, Hk, S, D", "B, P", "B"), strict=True
        )
    ]
    plan = shared_prefix_plan(
        *placed[3:], page_size=4, members=4, parts=2, min_tokens=1, placement=placement
    )
    assert plan.seq_lens.tolist() == [16, 12, 16, 12]
    got = paged_attention(*placed, shared=plan, placement=placement)
    want = paged_attention(*(a[rows] if len(a) == 4 else a for a in (
        whole.q, whole.k_pages, whole.v_pages, table, whole.seq_lens)))  # fmt: skip
    np.testing.assert_allclose(got, want, *TOLERANCE["float32"])


# --- what is refused --------------------------------------------------------------------------


def test_a_plan_of_other_tables_and_wrong_sizes_are_refused(unchecked):
    inputs = build(Case((20, 21, 22, 26)))
    plan, args = plan_of(inputs), (inputs.q, inputs.k_pages, inputs.v_pages)
    with pytest.raises(TypeError, match="shared must be a SharedPrefix; got tuple"):
        paged_attention(*args, inputs.page_table, inputs.seq_lens, shared=())  # type: ignore
    with pytest.raises(ValueError, match=r"shared.page_table must be .* make the plan of this"):
        paged_attention(*args, inputs.page_table[:, :7], inputs.seq_lens, shared=plan)
    with pytest.raises(TypeError, match="shared.place"):
        wrong = replace(plan, place=plan.place.astype(jnp.float32))
        paged_attention(*args, inputs.page_table, inputs.seq_lens, shared=wrong)
    for sizes in (dict(members=1), dict(parts=0), dict(min_tokens=0), dict(members=2.0)):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be an int >="):
            plan_of(inputs, **sizes)
    with pytest.raises(TypeError, match="page_table must be an array of int32"):
        shared_prefix_plan(inputs.page_table.astype(np.int8), inputs.seq_lens, page_size=4)


def test_no_two_rows_have_the_same_seat():
    inputs = together(build(Case((30,) * 9, columns=8)), ((0, 3, 5, 8), 6), ((1, 2, 4), 3))
    plan = plan_of(inputs, members=3)
    places = [int(p) for p in plan.place if p < plan.members.size]
    assert all(a != b for a, b in combinations(places, 2)) and len(places) == 6
