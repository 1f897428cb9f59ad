"""The systems of `decode_grid.py`: how each is called, with the settings worth trying.

A system is a function of a case that compiles what it needs and returns, by variant, a function
of the device arrays that returns a call. Only the last touches the card.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from paged_decode.kernels import paged_attention
from paged_decode.kernels.eight_bits import LARGEST, LEAST

__all__ = ["SYSTEMS", "Arrays", "GridCase", "pool_of", "warm_flashinfer", "wide"]

Call = Callable[[], Any]
Bind = Callable[["Arrays"], Call]


Pools = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def pool_of(pages: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages in this dtype and their scales `[N, Hk, S]`, which are 1 but for 8 bits."""
    if dtype == str(pages.dtype).removeprefix("torch."):
        return pages, torch.ones(pages.shape[:-1], device=pages.device)
    largest = LARGEST[np.dtype(dtype)]
    scales = pages.abs().amax(-1).float().clamp_min(LEAST) / largest
    numbers = pages.float() / scales[..., None]
    return (numbers.round() if dtype == "int8" else numbers).to(getattr(torch, dtype)), scales


def wide(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What pages say, in float32."""
    return numbers.float() * scales[..., None]


class GridCase:
    """One point of the grid: lengths, heads and pages."""

    def __init__(self, case: dict[str, Any], lens: list[int]):
        self.case, self.lens = case, lens
        self.heads, self.kv_heads, self.dim = case["heads"], case["kv_heads"], case["dim"]
        self.page_size, self.rows = case["page_size"], len(lens)
        self.need = [-(-length // self.page_size) for length in lens]
        self.columns = max(max(self.need), 1)
        self.pages = math.ceil(sum(self.need) * 1.3) + 2
        self.kv_bytes = sum(lens) * self.kv_heads * self.dim * 2 * 2
        self.uniform = len(set(lens)) == 1

    def specs(self, *pool: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, two pools of shape `pool`, table and lengths."""
        of = jax.ShapeDtypeStruct
        q = of((self.rows, self.heads, self.dim), jnp.bfloat16)
        pages = of(pool, jnp.bfloat16)
        table = of((self.rows, self.columns), jnp.int32)
        return q, pages, pages, table, of((self.rows,), jnp.int32)


class Arrays:
    """The arrays of a case on the card, as torch made them: page ids permuted, random values."""

    def __init__(self, point: GridCase):
        self.point = point
        generator = torch.Generator(device="cuda").manual_seed(0)
        shape = (point.pages, point.kv_heads, point.page_size, point.dim)

        def normal(*size: int) -> torch.Tensor:
            empty = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            return empty.normal_(generator=generator)

        self.k, self.v = normal(*shape), normal(*shape)
        self.q = normal(point.rows, point.heads, point.dim)
        ids = np.arange(1, point.pages)
        if point.case["order"] == "permuted":
            ids = np.random.default_rng(0).permutation(ids)
        table = np.zeros((point.rows, point.columns), np.int32)
        ends = np.cumsum([0, *point.need])
        for row, need in enumerate(point.need):
            table[row, :need] = ids[ends[row] : ends[row + 1]]
        self.ids, self.ends = ids, ends
        self.table = torch.from_numpy(table).cuda()
        self.lens = torch.tensor(point.lens, dtype=torch.int32, device="cuda")
        self._pools: dict[str, Pools] = {}

    def pools(self, dtype: str) -> Pools:
        """K and V as pages of this dtype, each with its scales: of 8 bits, those of the library."""
        if dtype not in self._pools:
            self._pools[dtype] = tuple(pool_of(pages, dtype) for pages in (self.k, self.v))
        return self._pools[dtype]

    def row(self, pages: torch.Tensor, row: int) -> torch.Tensor:
        """The tokens of a row, `[Hk, length, D]`."""
        used = self.table[row, : self.point.need[row]].long()
        tokens = pages[used].transpose(0, 1).reshape(self.point.kv_heads, -1, self.point.dim)
        return tokens[:, : self.point.lens[row]]

    def reference(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The result over these pages, in float32."""
        out = torch.zeros(self.q.shape, device="cuda")
        for row, length in enumerate(self.point.lens):
            if length == 0:
                continue
            q = self.q[row].float().reshape(self.point.kv_heads, -1, self.point.dim)
            logits = torch.einsum("hgd,htd->hgt", q, self.row(k, row).float())
            weights = torch.softmax(logits * self.point.dim**-0.5, -1)
            mixed = torch.einsum("hgt,htd->hgd", weights, self.row(v, row).float())
            out[row] = mixed.reshape(-1, self.point.dim)
        return out


def _jax(function: Callable[..., Any], specs: tuple, arrays: Callable[[Arrays], tuple]) -> Bind:
    compiled = jax.jit(function).lower(*specs).compile()

    def bind(on_card: Arrays) -> Call:
        given = [jax.dlpack.from_dlpack(array.contiguous()) for array in arrays(on_card)]
        return lambda: compiled(*given).block_until_ready()

    return bind


def ours(point: GridCase, implementation: str = "triton") -> Iterator[tuple[str, Bind]]:
    """One of our backends as it is shipped, through JAX."""

    def attend(q: Any, k: Any, v: Any, table: Any, lens: Any) -> Any:
        return paged_attention(q, k, v, table, lens, implementation=[implementation])

    specs = point.specs(point.pages, point.kv_heads, point.page_size, point.dim)
    yield "default", _jax(attend, specs, lambda a: (a.q, a.k, a.v, a.table, a.lens))


def ours_in_8_bits(point: GridCase, dtype: str) -> Iterator[tuple[str, Bind]]:
    """The Triton backend over pages of 8 bits; the bytes of its records are those of bfloat16."""
    q, pages, _, table, lens = point.specs(point.pages, point.kv_heads, point.page_size, point.dim)
    numbers = jax.ShapeDtypeStruct(pages.shape, dtype)
    scales = jax.ShapeDtypeStruct(pages.shape[:-1], jnp.float32)

    @jax.jit
    def attend(q: Any, k: Any, v: Any, table: Any, lens: Any, k_scales: Any, v_scales: Any) -> Any:
        of = dict(k_scales=k_scales, v_scales=v_scales)
        return paged_attention(q, k, v, table, lens, **of, implementation=["triton"])

    compiled = attend.lower(q, numbers, numbers, table, lens, scales, scales).compile()

    def bind(arrays: Arrays) -> Call:
        (k, of_k), (v, of_v) = arrays.pools(dtype)
        given = (arrays.q, k.view(torch.int8), v.view(torch.int8), arrays.table, arrays.lens)
        on_card = [jax.dlpack.from_dlpack(x.contiguous()) for x in (*given, of_k, of_v)]
        on_card[1:3] = (jax.lax.bitcast_convert_type(x, dtype) for x in on_card[1:3])

        def call() -> Any:
            return compiled(*on_card).block_until_ready()

        call.want = arrays.reference(wide(k, of_k), wide(v, of_v))  # pyright: ignore[reportFunctionMemberAccess]
        return call

    yield "default", bind


def flash_attention_3(point: GridCase) -> Iterator[tuple[str, Bind]]:
    """FlashAttention-3 through flash-attn3-jax, at every useful number of splits."""
    from flash_attn3_jax import flash_mha_with_kvcache  # pyright: ignore

    if point.dim != 128:
        raise NotImplementedError("D = 128 only")
    specs = point.specs(point.pages, point.page_size, point.kv_heads, point.dim)
    for splits in (1, 2, 4, 8, 16, 32):
        if splits > 1 and point.uniform and splits * point.rows * point.kv_heads > 1056:
            continue

        def attend(q: Any, k: Any, v: Any, table: Any, lens: Any, splits: int = splits) -> Any:
            out = flash_mha_with_kvcache(
                q[:, None],
                k,
                v,
                cache_seqlens=lens,
                page_table=table,
                softmax_scale=point.dim**-0.5,
                num_splits=splits,
            )
            return (out[0] if isinstance(out, tuple | list) else out)[:, 0]

        yield (
            f"num_splits={splits}",
            _jax(
                attend,
                specs,
                lambda a: (a.q, a.k.transpose(1, 2), a.v.transpose(1, 2), a.table, a.lens),
            ),
        )


def ejkernel(point: GridCase) -> Iterator[tuple[str, Bind]]:
    """ejkernel's Triton page attention."""
    from ejkernel.kernels._triton.page_attention import page_attention  # pyright: ignore

    specs = point.specs(point.pages, point.kv_heads, point.page_size, point.dim)
    for splits in (0, 8):

        def attend(q: Any, k: Any, v: Any, table: Any, lens: Any, splits: int = splits) -> Any:
            return page_attention(
                q, k, v, lens, table, max_context_len=max(point.lens), num_splits=splits
            )

        yield (
            f"num_splits={splits}",
            _jax(attend, specs, lambda a: (a.q, a.k, a.v, a.table, a.lens)),
        )


def jax_pallas(point: GridCase) -> Iterator[tuple[str, Bind]]:
    """The deprecated paged attention in JAX's own tree."""
    from jax.experimental.pallas.ops.gpu.paged_attention import (  # pyright: ignore
        paged_attention as in_tree,
    )

    specs = point.specs(point.kv_heads, point.pages, point.page_size, point.dim)
    for splits in (16, 4, 1):
        if point.columns % splits:
            continue

        def attend(q: Any, k: Any, v: Any, table: Any, lens: Any, splits: int = splits) -> Any:
            return in_tree(q * point.dim**-0.5, k, v, table, lens, k_splits=splits)

        yield (
            f"k_splits={splits}",
            _jax(
                attend,
                specs,
                lambda a: (a.q, a.k.transpose(0, 1), a.v.transpose(0, 1), a.table, a.lens),
            ),
        )


def flashinfer(point: GridCase, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Bind]]:
    """FlashInfer's CUDA-core, tensor-core and XQA kernels; `plan` is not in the time.

    Pages of 8 bits are rounded without scales, which random normal numbers allow.
    """
    for name in ("cuda-core", "tensor-core", "xqa"):
        if name == "cuda-core" and point.heads // point.kv_heads not in (1, 2, 3, 4, 8):
            continue
        if name == "xqa" and point.page_size not in (16, 32, 64, 128):
            continue
        yield name, lambda arrays, name=name: _flashinfer_call(arrays, name, dtype)


def _flashinfer_call(arrays: Arrays, name: str, dtype: torch.dtype) -> Call:
    import flashinfer  # pyright: ignore

    point = arrays.point
    k, v = arrays.k.to(dtype), arrays.v.to(dtype)
    work = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    if name == "xqa":

        def run() -> Any:
            return flashinfer.decode.trtllm_batch_decode_with_kv_cache(
                arrays.q,
                (k, v),
                work,
                arrays.table,
                arrays.lens,
                max(point.lens),
                bmm1_scale=point.dim**-0.5,
                bmm2_scale=1.0,
                kv_layout="HND",
                backend="xqa",
            )

        if dtype != arrays.k.dtype:
            run.want = arrays.reference(k, v)  # pyright: ignore[reportFunctionMemberAccess]
        return run
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        work, "HND", use_tensor_cores=name == "tensor-core"
    )
    start = time.perf_counter()
    wrapper.plan(
        torch.from_numpy(arrays.ends.astype(np.int32)).cuda(),
        torch.from_numpy(arrays.ids[: arrays.ends[-1]].astype(np.int32)).cuda(),
        ((arrays.lens - 1) % point.page_size + 1).to(torch.int32),
        point.heads,
        point.kv_heads,
        point.dim,
        point.page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=dtype,
        sm_scale=point.dim**-0.5,
    )
    torch.cuda.synchronize()
    plan_s = time.perf_counter() - start

    def call() -> Any:
        return wrapper.run(arrays.q, (k, v))

    call.aside = {"plan_s": plan_s}  # pyright: ignore[reportFunctionMemberAccess]
    if dtype != arrays.k.dtype:
        call.want = arrays.reference(k, v)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def torch_dense(point: GridCase) -> Iterator[tuple[str, Bind]]:
    """torch's attention over a dense copy of the same tokens: no paging at all."""
    if not point.uniform:
        raise NotImplementedError("dense only")

    def bind(arrays: Arrays) -> Call:
        k, v = (
            torch.stack([arrays.row(pages, row) for row in range(point.rows)])
            for pages in (arrays.k, arrays.v)
        )
        q = arrays.q[:, :, None]
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, enable_gqa=True)[:, :, 0]

    yield "sdpa", bind


def warm_flashinfer(case: dict[str, Any], system: str) -> str:
    """Build FlashInfer's modules for a case, by calls on one small row."""
    point = GridCase(case, [300])
    for name, bind in SYSTEMS[system](point):
        try:
            bind(Arrays(point))()
            torch.cuda.synchronize()
        except Exception as error:
            return f"{name}: {error!r}"[:300]
    return ""


SYSTEMS = {
    "paged-decode/triton": ours,
    "paged-decode/pallas": partial(ours, implementation="pallas_gpu"),
    "paged-decode/int8": partial(ours_in_8_bits, dtype="int8"),
    "paged-decode/e4m3": partial(ours_in_8_bits, dtype="float8_e4m3fn"),
    "flashinfer": flashinfer,
    "flashinfer/fp8": partial(flashinfer, dtype=torch.float8_e4m3fn),
    "flash-attention-3": flash_attention_3,
    "ejkernel": ejkernel,
    "jax/pallas": jax_pallas,
    "torch/dense": torch_dense,
}
