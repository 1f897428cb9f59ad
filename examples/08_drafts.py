"""Speculative decoding by hand: drafts are looked up in the text, and one step checks them all."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp

loop = import_module("01_custom_loop")  # its weights, its prompts, and so its tokens


@partial(jax.jit, donate_argnums=1)
def check(params, cache, batch):
    """int32 [B, T]: what the model says after each of the T tokens."""
    x = params["embed"][batch.tokens] + params["place"][batch.positions]
    q, k, v = ((x @ params[n]).reshape(*batch.tokens.shape, -1, loop.DIM) for n in "qkv")
    seen, cache = cache.append_and_attend(0, q, k, v, batch)
    return jnp.argmax(seen.reshape(*x.shape[:2], -1) @ params["out"], axis=-1), cache


def look_up(text, k):
    """Up to k tokens that followed when the newest three were last seen, or else the newest two."""
    ends = ((n, end) for n in (3, 2) for end in range(len(text) - 1, n - 1, -1))
    found = next((end for n, end in ends if text[end - n : end] == text[-n:]), len(text))
    return (text[found:] * k)[:k]  # as if it went round


def speculate(check, params, cache, allocator, handles, texts, goals, k, columns, draft=look_up):
    """Grow texts to their goals; all but the newest token of each must be in the cache."""
    steps = 0
    while any(left := [max(g - len(t), 0) for t, g in zip(texts, goals, strict=True)]):
        asked = [(t[-1:] + draft(t, k)[:k])[:n] for t, n in zip(texts, left, strict=True)]
        width = 1 + k * any(a[1:] for a in asked)  # one of two, so two programs are compiled
        tokens, counts = [a + [0] * (width - len(a)) for a in asked], [len(a) for a in asked]
        cache, batch = cache.extend(allocator, handles, tokens, counts, columns=columns)
        chosen, cache = check(params, cache, batch)
        for text, a, row in zip(texts, asked, chosen.tolist(), strict=True):
            said = row[width - len(a) :]  # rows are right-aligned, with padding in front
            same = [*map(int.__eq__, a[1:], said), False]
            text += said[: same.index(False) + 1]  # the drafts that were right, and what follows
        allocator.truncate(handles, [len(text) - 1 for text in texts])  # before `extend` commits
        steps += 1
    return cache, steps


def main(new=32):
    params, cache, allocator = loop.make()
    handles, lengths = [allocator.allocate(p) for p in loop.PROMPTS], [*map(len, loop.PROMPTS)]
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=max(lengths), columns=8)
    first, cache = loop.step(loop.toy_model, params, cache, batch)
    texts = [[*p, t] for p, t in zip(loop.PROMPTS, first.tolist(), strict=True)]
    goals = [length + new for length in lengths]
    cache, steps = speculate(check, params, cache, allocator, handles, texts, goals, 3, 16)
    for text in texts:
        print(f"{new - 1} tokens in {steps} steps:", *text)


if __name__ == "__main__":
    main()
