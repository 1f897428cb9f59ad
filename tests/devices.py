"""Devices for tests of meshes: a machine's CPUs are 8, its GPUs may be fewer."""

from __future__ import annotations

import jax
import pytest


def first_devices(count: int) -> list[jax.Device]:
    """So many of the machine's devices; the test is skipped where there are fewer."""
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices, there are {len(jax.devices())}")
    return jax.devices()[:count]
