"""The allocator is host bookkeeping: it must not need jax."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys, types
for name in ("jax", "jaxlib", "jaxtyping", "msgpack"):
    sys.modules[name] = None  # any import of it fails now
package = types.ModuleType("paged_decode")
package.__path__ = [{path!r}]  # the package without its __init__, which imports jax
sys.modules["paged_decode"] = package
from paged_decode.allocator import BlockAllocator
allocator = BlockAllocator(9, 4)
handle = allocator.allocate(range(9))
allocator.advance([handle], [9])
allocator.commit([handle], 10)
allocator.free(handle)
allocator.check_invariants()
print(allocator.num_evictable, [m for m in sys.modules if m[:3] == "jax" and sys.modules[m]])
"""


def test_the_allocator_works_where_jax_cannot_be_imported():
    code = BLOCKED.format(path=str(ROOT / "paged_decode"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 []\n", "")
