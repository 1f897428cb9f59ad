"""Flax NNX: the pages are a variable of the model, and nnx.jit updates them in place."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

loop = import_module("01_custom_loop")  # its weights, its prompts, and so its tokens


class Pages(nnx.Variable):
    """Holds a KVCache. No nnx.Param: optimizers and checkpoints of the weights pass it by."""


class Toy(nnx.Module):
    def __init__(self, params, cache):
        self.embed, self.place = nnx.Param(params["embed"]), nnx.Param(params["place"])
        self.q, self.k, self.v = (nnx.Param(params[name]) for name in "qkv")
        self.out = nnx.Param(params["out"])
        self.pages = Pages(cache)

    def __call__(self, batch):
        x = self.embed[batch.tokens] + self.place[batch.positions]
        q, k, v = (
            (x @ weights[...]).reshape(*batch.tokens.shape, -1, loop.DIM)
            for weights in (self.q, self.k, self.v)
        )
        seen, cache = self.pages.get_value().append_and_attend(0, q, k, v, batch)
        self.pages.set_value(cache)
        return seen[:, -1].reshape(len(seen), -1) @ self.out[...]


@partial(nnx.jit, donate_argnums=0)  # gives away all arrays of the model; the new ones are put back
def step(model, batch):
    return jnp.argmax(model(batch), axis=-1)


def main():
    params, cache, allocator = loop.make()
    model = Toy(params, cache)
    handles = [allocator.allocate(prompt) for prompt in loop.PROMPTS]
    lengths = [len(prompt) for prompt in loop.PROMPTS]
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=max(lengths), columns=8)
    chosen = step(model, batch)
    for _ in range(20):  # the host's part stays outside: it takes the cache out and puts it back
        cache = model.pages.get_value()
        cache, batch = cache.advance(allocator, handles, np.asarray(chosen), columns=8)
        model.pages.set_value(cache)
        chosen = step(model, batch)
    for handle in handles:
        print(*allocator.tokens(handle))
    print(len(jax.tree.leaves(nnx.state(model, nnx.Param))), "weights beside the pages")


if __name__ == "__main__":
    main()
