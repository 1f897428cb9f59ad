"""Exact merge of attention over disjoint parts of the tokens, and sinks as one more part."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .checks import AnyArray, check_float

__all__ = [
    "check_sinks",
    "finished",
    "finite",
    "join",
    "merge_attention",
    "sink_mass",
    "weighed",
]


def merge_attention(
    outs: Float[AnyArray, "K *axes Hq D"],
    lses: Float[AnyArray, "K *axes Hq"],
    *,
    sinks: Float[AnyArray, "*heads M"] | None = None,
) -> tuple[Float[Array, "*axes Hq D"], Float[Array, "*axes Hq"]]:
    """Attention over the union of K disjoint sets of tokens, from the K partial results.

    ```
    tokens   [ shared prefix ][ row's own ]      lse = log(sum_k exp(lse_k))
             out_0, lse_0     out_1, lse_1       out = sum_k exp(lse_k - lse) * out_k
    ```

    Args:
      outs: `[K, ..., Hq, D]`, partial outputs **without sinks**.
      lses: float32 `[K, ..., Hq]`, their natural-log sums; -inf marks a part that saw nothing.
      sinks: `[M]`, `[Hk, M]` or `[Hq, M]` logits that join the denominator once, after the merge;
        one axis of length Hq > 1 is refused, as in `paged_attention`.

    Returns:
      `(out, lse)`, out of the dtype of `outs`, lse float32 without sinks: merging is associative.

    Raises:
      TypeError: arrays that are not floating-point.
      ValueError: shapes that disagree.

    Examples:
      >>> import jax.numpy as jnp
      >>> out, lse = merge_attention(jnp.array([[[2.0]], [[4.0]]]), jnp.zeros((2, 1)))
      >>> out.tolist()
      [[3.0]]
    """
    check_float("outs", outs)
    check_float("lses", lses)
    if outs.ndim < 3 or lses.shape != outs.shape[:-1] or outs.shape[0] == 0:
        raise ValueError(
            "outs must be [K, ..., Hq, D] and lses [K, ..., Hq] with K >= 1; got shapes "
            f"{outs.shape} and {lses.shape}"
        )
    heads = outs.shape[-2]
    if sinks is not None:
        check_sinks(sinks, heads)
    lses = lses.astype(jnp.float32)
    top = jnp.max(lses, axis=0)
    parts, weights = weighed(outs, lses, finite(top))
    summed = jnp.sum(parts, axis=0)
    sink = None if sinks is None else sink_mass(sinks, heads)
    out, lse = finished(summed, top, jnp.sum(weights, axis=0), sink)
    return out.astype(outs.dtype), lse


def join(
    parts: tuple[Float[Array, "N 1 M D"], Float[Array, "N 1 M"]],
    place: Int32[Array, " B"],
    tails: tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]],
    sink: Float[Array, " Hq"] | None,
    kv_heads: int,
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """Each row's attention over what it shares, which is where it sits in the parts, and its tail.

    The M heads of a part are those of its R rows beside each other, KV head by KV head, and `place`
    counts rows through all parts; N * R or more: a row is in none. XLA stacks nothing here: the
    gather is part of the merge.
    """
    heads = tails[1].shape[-1]

    def of_rows(x: Float[Array, "N 1 M *D"], empty: float) -> Float[Array, "B 1 Hq *D"]:
        size = x.shape[3:]
        x = jnp.swapaxes(x.reshape(len(x), kv_heads, -1, heads // kv_heads, *size), 1, 2)
        rows = x.reshape(-1, heads, *size)
        return rows.at[place].get(mode="fill", fill_value=empty)[:, None]

    prefix = of_rows(parts[0], 0.0), of_rows(parts[1], -jnp.inf)
    top = jnp.maximum(prefix[1], tails[1])
    (first, mass), (second, more) = (weighed(*part, finite(top)) for part in (prefix, tails))
    out, lse = finished(first + second, top, mass + more, sink)
    return out.astype(tails[0].dtype), lse


def weighed(
    out: Float[AnyArray, "*queries D"],
    lse: Float[AnyArray, "*queries"],
    base: Float[Array, "..."],
) -> tuple[Float[Array, "*queries D"], Float[Array, "*queries"]]:
    """What a partial result adds to sums relative to exp(base): to those of values, and its mass.

    A part of mass 0 saw nothing; its output counts as 0 whatever it holds.
    """
    mass = jnp.exp(lse - base)
    return mass[..., None] * jnp.where(mass[..., None] > 0, out.astype(jnp.float32), 0.0), mass


def finished(
    acc: Float[Array, "*queries D"],
    top: Float[Array, "*queries"],
    total: Float[Array, "*queries"],
    sink: Float[Array, "..."] | None,
) -> tuple[Float[Array, "*queries D"], Float[Array, "*queries"]]:
    """The end of a softmax: out with sinks and lse without, from sums relative to exp(top).

    `sink` is the log of a mass, and broadcasts to the queries. The kernels do the same in their
    own languages, in base 2: `store_result` of triton/merge.py, `finished` of pallas_gpu/tiles.py
    and `_finish` of pallas_tpu/decode_tail.py; what changes here changes there.
    """
    # The sink may dwarf the tokens: the sums are scaled to the larger of the two, but lse comes
    # from the tokens' own maximum, where nothing of it is lost.
    base = finite(top if sink is None else jnp.maximum(top, sink))
    share = jnp.exp(top - base)
    mass = total * share + (0.0 if sink is None else jnp.exp(sink - base))
    out = acc * (share / jnp.where(mass == 0, 1.0, mass))[..., None]
    return out, top + jnp.log(total)


def finite(top: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """A maximum to subtract: 0 where nothing was seen, because -inf - -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def check_sinks(sinks: Any, heads: int, kv_heads: int | None = None) -> None:
    """Raise unless `sinks` are `[K]`, `[Hk, K]` or `[Hq, K]`, and cannot mean two things."""
    check_float("sinks", sinks)
    rows = sinks.shape[0] if sinks.ndim == 2 else heads
    known = heads % max(rows, 1) == 0 if kv_heads is None else rows in (kv_heads, heads)
    if sinks.ndim not in (1, 2) or 0 in sinks.shape or not known:
        sizes = f"Hq = {heads}" if kv_heads is None else f"Hk = {kv_heads}, Hq = {heads}, K >= 1"
        raise ValueError(
            f"sinks must be [K], [Hk, K] or [Hq, K] with {sizes}; got shape {sinks.shape}"
        )
    if sinks.ndim == 1 and sinks.shape[0] == heads > 1:
        raise ValueError(
            f"sinks of shape [{heads}] with Hq = {heads} may be one sink for each head, or {heads} "
            "that all heads share; for the first pass sinks[:, None], for the second "
            f"jnp.broadcast_to(sinks, (Hq, {heads}))"
        )


def sink_mass(sinks: Float[AnyArray, "*heads K"], heads: int) -> Float[Array, " Hq"]:
    """Log of the denominator mass of all sinks of each query head, float32 `[Hq]`.

    However many sinks a head has, they act as one logit: `logsumexp` over K.
    """
    mass = jnp.atleast_1d(jax.nn.logsumexp(sinks.astype(jnp.float32), axis=-1))
    return jnp.repeat(mass, heads // mass.shape[0])
