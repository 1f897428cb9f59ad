"""Speculative decoding by hand: T tokens checked in one step, and `truncate` drops the wrong."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np

loop = import_module("01_custom_loop")  # its weights, its prompts, and so its tokens
T, NEW = 4, 24  # the newest token and three drafts; tokens to generate


@partial(jax.jit, donate_argnums=1)
def check(params, cache, batch):
    """int32 [B, T]: what the model says after each of the T tokens."""
    shape = batch.tokens.shape
    x = params["embed"][batch.tokens] + params["place"][batch.positions]
    q, k, v = ((x @ params[name]).reshape(*shape, -1, loop.DIM) for name in "qkv")
    seen, cache = cache.append_and_attend(0, q, k, v, batch)
    return jnp.argmax(seen.reshape(*shape, -1) @ params["out"], axis=-1), cache


def drafts(text):
    """Prompt lookup: what followed when the newest token came last; 0 where nothing did."""
    before = [i for i in range(len(text) - 1) if text[i] == text[-1]]
    guess = text[before[-1] + 1 :][: T - 1] if before else []
    return [*guess, *[0] * (T - 1 - len(guess))]


def main():
    params, cache, allocator = loop.make()
    texts = [list(prompt) for prompt in loop.PROMPTS]
    handles = [allocator.allocate(text[:-1]) for text in texts]  # the newest is never in the cache
    lengths, goals = ([len(text) + more for text in texts] for more in (-1, NEW))
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=max(lengths), columns=8)
    _, cache = check(params, cache, batch)
    steps = np.zeros(len(texts), int)
    while (left := np.array(goals) - [len(text) for text in texts]).any():
        tokens = np.array([[text[-1], *drafts(text)] for text in texts])
        cache, batch = cache.extend(allocator, handles, tokens, columns=16)  # commits what stayed
        chosen, cache = check(params, cache, batch)
        same = np.cumprod(tokens[:, 1:] == chosen[:, :-1], axis=1).sum(axis=1)
        for text, right, more, row in zip(texts, same, left, np.asarray(chosen), strict=True):
            text += row[: min(right + 1, more)].tolist()
        allocator.truncate(handles, [len(text) - 1 for text in texts])
        steps += left > 0
    for text, number in zip(texts, steps, strict=True):
        print(f"{NEW} tokens in {number} steps:", *text)
    allocator.free(handles)
    allocator.check_invariants()


if __name__ == "__main__":
    main()
