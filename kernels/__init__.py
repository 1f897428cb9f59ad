"""Device code: attention over pages, writes into pages, merges. Pure functions of arrays."""

from .add_norm import add_and_norm
from .annotations import AttentionOptions, Implementation
from .cache_ops import append_kv, copy_pages
from .dense import decode_attention
from .device_sum import DeviceSum
from .dispatch import BACKENDS, Backend, backend_status
from .grouped_matmul import GroupedRows, group_rows, grouped_matmul
from .merge import merge_attention
from .op import append_and_attend, paged_attention
from .placement import Placement
from .shared_prefix import SharedPrefix, shared_prefix_plan

__all__ = [
    "BACKENDS",
    "AttentionOptions",
    "Backend",
    "DeviceSum",
    "GroupedRows",
    "Implementation",
    "Placement",
    "SharedPrefix",
    "add_and_norm",
    "append_and_attend",
    "append_kv",
    "backend_status",
    "copy_pages",
    "decode_attention",
    "group_rows",
    "grouped_matmul",
    "merge_attention",
    "paged_attention",
    "shared_prefix_plan",
]
