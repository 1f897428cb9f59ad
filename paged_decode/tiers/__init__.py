"""Where pages go that the device has no room for: host memory, and behind it a disk."""

from ._device import CacheHolder, CopyFailed, CopyPending, DeviceMover, PageMover
from ._disk import DiskTier
from ._host import HostTier, TierStats

__all__ = [
    "CacheHolder",
    "CopyFailed",
    "CopyPending",
    "DeviceMover",
    "DiskTier",
    "HostTier",
    "PageMover",
    "TierStats",
]
