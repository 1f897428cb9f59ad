"""Errors shared by the whole library; `paged_decode.errors` is their public home."""

__all__ = [
    "CorruptState",
    "OutOfPages",
    "PageTableError",
    "PagedDecodeError",
    "SequenceTooLong",
    "StaleHandle",
]


class PagedDecodeError(Exception):
    """Base of every error that is about the state of a cache, not about a wrong argument."""


class OutOfPages(PagedDecodeError):
    """The pool cannot give the pages now; freeing or preempting something may cure it.

    `needed`, `free` and `evictable` count pages of the group of layers number `group`. Nothing was
    taken.
    """

    def __init__(self, needed: int, free: int, evictable: int, group: int = 0):
        self.needed, self.free, self.evictable, self.group = needed, free, evictable, group
        where = f" in group {group}" if group else ""
        super().__init__(
            f"needed {needed} pages{where}, but only {free} are free and {evictable} cached ones "
            "can be evicted; free or preempt a sequence, or create a larger pool"
        )

    def __reduce__(self):
        return type(self), (self.needed, self.free, self.evictable, self.group)


class SequenceTooLong(PagedDecodeError):
    """The sequence can never fit, however much is freed; retrying is useless."""


class StaleHandle(PagedDecodeError):
    """The handle names a sequence that was freed, or that this allocator never made."""


class PageTableError(PagedDecodeError):
    """A page table, slot or page id breaks the rules of the pool it points into."""


class CorruptState(PagedDecodeError):
    """The bookkeeping contradicts itself: a bug here, or in an eviction policy. Do not go on.

    `violations` lists every rule that is broken, one string each.
    """

    def __init__(self, violations: list[str]):
        self.violations = violations
        super().__init__("the allocator is corrupt: " + "; ".join(violations))

    def __reduce__(self):
        return type(self), (self.violations,)
