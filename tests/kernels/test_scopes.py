"""A profile says which operations of a step write new tokens, attend, and copy pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_decode.kernels import append_and_attend, append_kv, copy_pages, paged_attention

PAGES, Q, NEW = jnp.zeros((3, 1, 4, 8)), jnp.ones((1, 2, 8)), jnp.ones((1, 1, 8))
TABLE, LENS, IDS = np.array([[2, 1]], np.int32), np.array([5], np.int32), np.array([1], np.int32)

STEPS = {
    "append_kv": (lambda k, v: append_kv(k, v, NEW, NEW, LENS), {"append"}),
    "paged_attention": (lambda k, v: paged_attention(Q, k, v, TABLE, LENS), {"attend"}),
    "append_and_attend": (
        lambda k, v: append_and_attend(k, v, Q, NEW, NEW, TABLE, LENS),
        {"append", "attend"},
    ),
    "copy_pages": (lambda k, v: copy_pages(k, v, IDS, IDS + 1), {"copy_pages"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_operations_of_a_step_carry_the_scope_of_what_they_do(name):
    step, scopes = STEPS[name]
    text = jax.jit(step).lower(PAGES, PAGES).as_text(debug_info=True)
    every = ("append", "attend", "append_and_attend", "copy_pages")
    assert {s for s in every if f'"paged_decode.{s}/' in text} == scopes


def test_scopes_are_in_what_is_compiled_and_cost_no_trace_of_their_own():
    step, _ = STEPS["append_and_attend"]
    traces = []

    def twice(k, v):
        traces.append(1)
        _, k, v = step(k, v)
        return step(k, v)

    compiled = jax.jit(twice)
    text = compiled.lower(PAGES, PAGES).compile().as_text()
    assert "/paged_decode.append/" in text and "/paged_decode.attend/" in text
    for _ in range(2):
        with jax.named_scope("caller"):
            compiled(PAGES, PAGES)
    assert len(traces) == 1
