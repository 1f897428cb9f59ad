"""`paged-decode doctor`: which backends this machine has, why not the others, and do they work."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import __version__
from ..kernels import BACKENDS, append_and_attend, backend_status, paged_attention
from ..kernels.dispatch import default_platform

__all__ = ["Diagnosis", "add", "diagnose"]

TOLERANCE = 1e-2  # matrix units may round float32 to bfloat16; a wrong page is off by about 1
NEEDS = {
    "gpu": "an NVIDIA GPU, with pip install 'paged-decode[cuda]'",
    "tpu": "a TPU, with pip install 'paged-decode[tpu]'",
}
# Where a driver shows its devices, even if no package of jax knows them.
DRIVERS = {"gpu": ("dev/nvidia0", "dev/kfd"), "tpu": ("dev/accel0", "dev/vfio/0")}


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    text = "which backends this machine has, why not the others, and a short check of each"
    doctor = subparsers.add_parser("doctor", help=text, description=text)
    doctor.set_defaults(run=_run)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is known of one backend on this machine.

    Attributes:
      name: what `implementation=` takes.
      tried: whether `implementation=None` tries it here.
      reason: why it cannot run here; None: it can.
      cure: what would change that; None: nothing is known.
      error: largest difference to the reference; None: it did not run.
      seconds: of the check, compilation included.
    """

    name: str
    tried: bool
    reason: str | None = None
    cure: str | None = None
    error: float | None = None
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether it ran and agreed with the reference."""
        return self.error is not None and self.error <= TOLERANCE


def diagnose(root: Path = Path("/")) -> Iterator[Diagnosis]:
    """One diagnosis for each backend, as they become known; `root` is where devices are listed."""
    here = default_platform()
    status = backend_status(here)
    want = _answers("reference")
    for backend in BACKENDS:
        reason, by_name = status[backend.name], not backend.platforms
        if reason is not None and not by_name:
            reason = reason.removeprefix(f"{backend.name}: ")
            yield Diagnosis(backend.name, False, reason, _cure(backend.platforms, here, root))
            continue
        begin = time.perf_counter()
        try:
            got = _answers(backend.name)
        except NotImplementedError as refusal:
            reason = str(refusal).removeprefix(f"{backend.name}: ")
            yield Diagnosis(backend.name, False, reason)
            continue
        error = max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))
        seconds = time.perf_counter() - begin
        yield Diagnosis(backend.name, not by_name, error=error, seconds=seconds)


def _cure(platforms: tuple[str, ...], here: str, root: Path) -> str | None:
    """What it takes to have one of `platforms`."""
    if here in platforms:
        return NEEDS.get(here)
    for name in platforms:
        found = [path for path in DRIVERS.get(name, ()) if (root / path).exists()]
        if found:
            return f"there is a /{found[0]} that jax does not use: needs {NEEDS[name]}"
    return next((f"needs {NEEDS[name]}" for name in platforms if name in NEEDS), None)


def _answers(name: str) -> tuple[np.ndarray, ...]:
    """What one backend makes of a small batch: ragged, all options, pages scrambled; then append.

    A not-a-number in any slot that nobody may read would show in the error.
    """
    rng = np.random.default_rng(0)
    rows, kv_heads, group, size, columns, dim = 4, 2, 4, 16, 3, 128
    q = rng.standard_normal((rows, kv_heads * group, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, kv_heads, dim)).astype(np.float32)
    pools = rng.standard_normal((2, rows * columns + 1, kv_heads, size, dim)).astype(np.float32)
    pools[:, 0] = np.nan  # the null page
    table = rng.permutation(np.arange(1, rows * columns + 1, dtype=np.int32)).reshape(rows, columns)
    lens = np.array([48, 0, 17, 33], np.int32)
    options: dict[str, Any] = dict(
        starts=np.array([0, 0, 3, 1], np.int32), sliding_window=30, soft_cap=20.0,
        sinks=rng.standard_normal((kv_heads * group, 1)).astype(np.float32),
    )  # fmt: skip
    k_pages, v_pages = map(jnp.asarray, pools)
    out = paged_attention(q, k_pages, v_pages, table, lens, implementation=[name], **options)
    appended, k_pages, v_pages = append_and_attend(
        k_pages, v_pages, q, k, v, table, lens, implementation=[name]
    )
    return tuple(map(np.asarray, (out, appended, k_pages[1:], v_pages[1:])))


def _run(args: argparse.Namespace) -> int:
    devices = jax.devices()
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib")]
    python = f"Python {platform.python_version()}"
    print(", ".join((f"paged-decode {__version__}", *versions, python)))
    print(f"{len(devices)} x {devices[0].device_kind} ({default_platform()})\n")
    found = []
    for one in diagnose():
        found.append(one)
        state = "tried" if one.tried else "only when named" if one.reason is None else "out"
        print(f"{one.name:<12} {state:<16} {_told(one)}")
        if one.cure is not None:
            print(f"{'':<29} {one.cure}")
    wrong = [one.name for one in found if one.error is not None and not one.sound]
    if wrong:
        print(
            f"\nWRONG RESULTS from {', '.join(wrong)}: do not use it here, and please report this"
        )
    return 0 if not wrong and any(one.tried and one.sound for one in found) else 1


def _told(one: Diagnosis) -> str:
    if one.error is None:
        return one.reason or ""
    verdict = "agrees with the reference" if one.sound else "DIFFERS from the reference"
    return f"{verdict}, largest error {one.error:.0e}, {one.seconds:.1f} s"
