"""The cache that travels through `jit`, and the batches that say where its rows lie."""

from ..allocator import DecodeBatch, GroupBatch, PageCopies
from .batches import one_token_batch
from .kv_cache import KVCache

__all__ = ["DecodeBatch", "GroupBatch", "KVCache", "PageCopies", "one_token_batch"]
