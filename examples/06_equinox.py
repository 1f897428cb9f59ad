"""Equinox: the module takes the cache and returns it, and filter_jit updates it in place."""

from importlib import import_module

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

loop = import_module("01_custom_loop")  # its weights, its prompts, and so its tokens


class Toy(eqx.Module):
    embed: jax.Array
    place: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array

    def __call__(self, cache, batch):
        x = self.embed[batch.tokens] + self.place[batch.positions]
        q, k, v = (
            (x @ weights).reshape(*batch.tokens.shape, -1, loop.DIM)
            for weights in (self.q, self.k, self.v)
        )
        seen, cache = cache.append_and_attend(0, q, k, v, batch)
        return seen[:, -1].reshape(len(seen), -1) @ self.out, cache


@eqx.filter_jit(donate="all-except-first")  # the weights stay, the pages change in place
def step(model, cache, batch):
    logits, cache = model(cache, batch)
    return jnp.argmax(logits, axis=-1), cache


def main():
    params, cache, allocator = loop.make()
    model = Toy(**params)
    handles = [allocator.allocate(prompt) for prompt in loop.PROMPTS]
    lengths = [len(prompt) for prompt in loop.PROMPTS]
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=max(lengths), columns=8)
    chosen, cache = step(model, cache, batch)
    for _ in range(20):
        cache, batch = cache.advance(allocator, handles, np.asarray(chosen), columns=8)
        chosen, cache = step(model, cache, batch)
    for handle in handles:
        print(*allocator.tokens(handle))


if __name__ == "__main__":
    main()
