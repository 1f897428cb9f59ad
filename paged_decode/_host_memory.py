"""Page-locked host memory: where copies from an accelerator are fast and run beside its programs.

`np.asarray` and `copy_to_host_async` of an array on a GPU wait for the device and take ten times as
long (`benchmarks/tier.py`). Arrays of a few MiB are too small: Python takes as long as the copy.
"""

from __future__ import annotations

from typing import Any

__all__ = ["pinned_sharding"]


def pinned_sharding(array: Any) -> Any:
    """Where the array would lie in page-locked memory; None where that is nothing special."""
    device = next(iter(array.devices()))
    if device.platform == "cpu":
        return None
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return array.sharding.with_memory_kind("pinned_host")
