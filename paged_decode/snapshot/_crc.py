"""CRC-32 as in zlib; ISA-L computes the same number about seven times as fast."""

from __future__ import annotations

import zlib
from collections.abc import Callable

__all__ = ["crc32"]


def _fastest() -> Callable[..., int]:
    try:
        from isal import isal_zlib  # pyright: ignore[reportMissingImports]
    except ImportError:  # no wheel for this machine
        return zlib.crc32
    return isal_zlib.crc32


crc32 = _fastest()
