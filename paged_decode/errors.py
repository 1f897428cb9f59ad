"""The exception tree. ValueError and TypeError mean a bad argument; these mean a bad state."""

from paged_decode.allocator.errors import (
    OutOfPages,
    PagedDecodeError,
    PageTableError,
    SequenceTooLong,
    StaleHandle,
)

__all__ = ["OutOfPages", "PageTableError", "PagedDecodeError", "SequenceTooLong", "StaleHandle"]
