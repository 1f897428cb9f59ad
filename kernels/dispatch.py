"""Which backend serves a call: a list of names, tried in order.

A backend is a module with two functions, imported only when it is asked for:

- `refusal(call) -> str | None`: why it cannot serve this call, in words, or None if it can;
- `attend(call) -> (out [B, T, Hq, D] like q, lse float32 [B, T, Hq])`, B at least 1. What it raises
  is an error, NotImplementedError as well: a slower backend must not take over without a word.

Three more are optional. `append_and_attend(call, k, v, slots) -> (out, lse, *pools)` writes the
newest tokens, k and v `[B, T, Hk, D]` of the pages' dtype (as they came, for pages of 8 bits, to
which the kernel quantises them), in the same launch, but for those with a slot in the null page;
without it they are written before the call. `prefers(call) -> bool`
says that this backend serves the call and is the fastest that does, by what was measured: where
nobody named another, it comes first. `attend_joined(call, filled, place, tails, sink)` does at once
what `attend` and `merge.join` do.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .annotations import FixedScales
from .merge import join
from .record import AttentionCall

__all__ = [
    "BACKENDS",
    "Backend",
    "append_and_attend",
    "attend",
    "attend_joined",
    "backend_status",
    "default_platform",
    "launches",
]


@dataclass(frozen=True, slots=True)
class Backend:
    """A name, where its code lies, and the platforms that try it without being asked.

    Attributes:
      name: what `implementation=` takes.
      load: returns the backend's module; ImportError means that a package is missing.
      platforms: of "cpu", "gpu", "tpu"; empty means by name only.
    """

    name: str
    load: Callable[[], ModuleType]
    platforms: tuple[str, ...]


def _module(name: str) -> Callable[[], ModuleType]:
    return lambda: importlib.import_module(f".{name}", __package__)


# In order of preference on every platform: the fastest first.
BACKENDS: tuple[Backend, ...] = (
    Backend("triton", _module("triton"), ("gpu",)),
    Backend("pallas_tpu", _module("pallas_tpu"), ("tpu",)),
    # Before triton for the calls that it prefers, and where jax-triton is missing.
    Backend("pallas_gpu", _module("pallas_gpu"), ("gpu",)),
    Backend("xla", _module("xla"), ("cpu", "gpu", "tpu")),
    # An oracle: its memory grows with the width of the table, so a silent fall to it would be worse
    # than an error.
    Backend("reference", _module("reference"), ()),
)


def default_platform(platform: str | None = None) -> str:
    """The platform a call will run on, "cpu", "gpu" or "tpu"; `platform` where it is known."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if platform is not None:
        pass
    elif device is None:
        platform = jax.default_backend()
    else:
        platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def launches(dtype: Any) -> bool:
    """Whether a Triton kernel over arrays of this dtype runs here."""
    if default_platform() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return False
    return importlib.import_module(".triton.launch", __package__).problem() is None


def attend(
    call: AttentionCall,
    implementation: Sequence[str] | None = None,
    *,
    backends: tuple[Backend, ...] = BACKENDS,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Run `call` on the first backend that serves it.

    `implementation` lists names to try in order; None means all that serve
    the platform of the call.

    Raises:
      ValueError: a name that no backend has.
      NotImplementedError: the only backend that was asked refused, with why.
      ExceptionGroup: several were asked and all refused; it holds one NotImplementedError for each.
    """

    return _first(call, implementation, backends, lambda module: _attend(module, call))


def _attend(module: ModuleType, call: AttentionCall) -> tuple[Array, Array]:
    if _is_empty(call):
        return _nothing(call)
    with jax.named_scope("paged_decode.attend"):
        return module.attend(call)


def attend_joined(
    call: AttentionCall,
    names: Sequence[str] | None = None,
    *,
    filled: int,
    place: Int32[Array, " B"],
    tails: tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]],
    sink: Float[Array, " Hq"] | None,
    backends: tuple[Backend, ...] = BACKENDS,
) -> tuple[Float[Array, "B 1 Hq D"], Float[Array, "B 1 Hq"]]:
    """`attend` of parts of R rows, T = 1, merged with the tails of B rows: `merge.join`.

    `filled` is about how many of the parts are not empty.
    """

    def run(module: ModuleType) -> tuple[Array, Array]:
        joined = getattr(module, "attend_joined", None)
        if joined is None:
            return join(_attend(module, call), place, tails, sink, call.kv_heads)
        with jax.named_scope("paged_decode.attend"):
            return joined(call, filled, place, tails, sink)

    return _first(call, names, backends, run)


def append_and_attend(
    call: AttentionCall,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    slots: Int32[Array, "B T"] | None = None,
    *,
    fixed_scales: FixedScales | None = None,
    names: Sequence[str] | None = None,
    backends: tuple[Backend, ...] = BACKENDS,
) -> tuple[Array, ...]:
    """Write k and v at the newest positions of every row, then as `attend`.

    `slots` in the null page are of tokens that are not new; `fixed_scales` are those of all tokens,
    where they do not follow from each. Returns `(out, lse, *pools)`.
    """

    def run(module: ModuleType) -> tuple[Array, ...]:
        if _is_empty(call):
            return *_nothing(call), *call.pools
        fused = getattr(module, "append_and_attend", None)
        # A fused kernel adds the newest token by itself, and rows of one sequence could not see
        # each other's.
        if fused and fixed_scales is None and not call.batch_invariant:
            with jax.named_scope("paged_decode.append_and_attend"):
                return fused(call, k, v, slots)
        with jax.named_scope("paged_decode.append"):
            written = call.with_newest(k, v, slots, fixed_scales)
        with jax.named_scope("paged_decode.attend"):
            return *module.attend(written), *written.pools

    return _first(call, names, backends, run)


def _is_empty(call: AttentionCall) -> bool:
    """Whether there is no row: no backend is asked to launch nothing."""
    return call.rows == 0


def _nothing(call: AttentionCall) -> tuple[Array, Array]:
    return call.q, jnp.zeros(call.q.shape[:-1], jnp.float32)


def _first(
    call: AttentionCall,
    implementation: Sequence[str] | None,
    backends: tuple[Backend, ...],
    run: Callable[[ModuleType], Any],
) -> Any:
    refusals: list[Exception] = []
    candidates = _candidates(implementation, call.platform, backends)
    if implementation is None:
        candidates.sort(key=lambda backend: not _prefers(backend, call))
    for backend in candidates:
        try:
            module = _load(backend)
        except NotImplementedError as missing:
            refusals.append(missing)
            continue
        if (reason := module.refusal(call)) is None:
            return run(module)
        refusals.append(NotImplementedError(f"{backend.name}: {reason}"))
    if len(refusals) == 1:
        raise refusals[0]
    raise ExceptionGroup("no backend serves this attention call", refusals)


def _prefers(backend: Backend, call: AttentionCall) -> bool:
    try:
        prefers = getattr(_load(backend), "prefers", None)
    except NotImplementedError:
        return False
    return prefers is not None and prefers(call)


def backend_status(platform: str | None = None) -> dict[str, str | None]:
    """For every backend: None if `implementation=None` tries it on `platform`, else why not.

    Examples:
      >>> backend_status("cpu")["xla"] is None
      True
    """
    platform = default_platform() if platform is None else platform
    status: dict[str, str | None] = {}
    for backend in BACKENDS:
        try:
            _load(backend)
            status[backend.name] = _off_platform(backend, platform)
        except NotImplementedError as refusal:
            status[backend.name] = str(refusal)
    return status


def _candidates(
    names: Sequence[str] | None, platform: str, backends: tuple[Backend, ...]
) -> list[Backend]:
    if names is None:
        return [backend for backend in backends if platform in backend.platforms]
    known = {backend.name: backend for backend in backends}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = ", ".join(map(repr, unknown)) or "an empty sequence"
        raise ValueError(f"implementation must name some of {sorted(known)}; got {wrong}")
    return [known[name] for name in names]


def _load(backend: Backend) -> ModuleType:
    try:
        return backend.load()
    except ImportError as error:
        raise NotImplementedError(f"{backend.name}: cannot be imported: {error}") from error


def _off_platform(backend: Backend, platform: str) -> str | None:
    if platform in backend.platforms:
        return None
    if not backend.platforms:
        return f"{backend.name}: runs only when named"
    return f"{backend.name}: serves {', '.join(backend.platforms)}, not {platform}"
