"""k decode steps in one program: the host finds the pages before, and hears of the tokens after."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_decode import one_token_batch

loop = import_module("01_custom_loop")  # the toy model of the first example
STEPS = 5


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def many_steps(model, params, cache, newest, batch):
    """newest [B] -> the k tokens that follow it [B, k]; no host in between."""

    def one(carry, _):
        cache, newest, lengths = carry
        lengths = lengths + 1  # with the newest token, whose keys and values this step writes
        now = one_token_batch(batch, newest, lengths)
        logits, cache = model(params, cache, now.tokens, now)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (cache, chosen, lengths), chosen

    (cache, _, _), chosen = lax.scan(one, (cache, newest, batch.seq_lens), length=STEPS)
    return chosen.T, cache


def main():
    params, cache, allocator = loop.make()
    handles = [allocator.allocate(prompt) for prompt in loop.PROMPTS]
    lengths = np.array([len(prompt) for prompt in loop.PROMPTS])
    batch = allocator.batch(handles, 0, lengths, tokens_per_row=max(lengths), columns=8)
    newest, cache = loop.step(loop.toy_model, params, cache, batch)
    allocator.commit(handles, lengths)

    for _ in range(4):
        cache, batch = cache.reserve(allocator, handles, STEPS, columns=8)  # pages for all steps
        batch = jax.device_put(batch)  # the one transfer to the device
        with jax.transfer_guard("disallow"):
            chosen, cache = many_steps(loop.toy_model, params, cache, newest, batch)
        # Written are the newest token and all that followed but the last, which is the newest now.
        allocator.append(handles, np.column_stack([newest, chosen[:, :-1]]))
        lengths += STEPS
        allocator.commit(handles, lengths)
        newest = chosen[:, -1]
    for handle in handles:
        print(*allocator.tokens(handle))
    allocator.free(handles)
    allocator.check_invariants()


if __name__ == "__main__":
    main()
