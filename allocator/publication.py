"""Putting the full, computed pages of a sequence into the prefix cache."""

from typing import NamedTuple

from .pool import PagePool
from .sequences import SequenceTable

__all__ = ["Publication", "plan_publication", "publish"]


class Publication(NamedTuple):
    """What a row will publish: the entries it keeps, and the digests of the pages behind them.

    `forgotten` is the cache's count of forgotten entries when the kept ones were seen to be live.
    """

    row: int
    keep: int
    digests: list[bytes]
    forgotten: int


def plan_publication(pool: PagePool, table: SequenceTable, row: int, full: int) -> Publication:
    """Digest the row's first `full` pages, as far as that is not done yet; changes nothing.

    An entry of the row may have been forgotten meanwhile: evicted, where another sequence's page
    stood for the same content. Nothing behind it can be found, so the row publishes its own pages
    from there on. The entries are only looked at if any was forgotten since the last time.
    """
    chain, forgotten = table.chains[row], pool.cache.num_forgotten
    keep = len(chain)
    if table.chain_seen[row] != forgotten:
        live = map(pool.cache.is_live, chain)
        keep = next((i for i, alive in enumerate(live) if not alive), keep)
    parent = chain[keep - 1].digest if keep else table.namespaces[row].digest
    tokens = pool.tokens[table.pages(row)[keep:full]]
    return Publication(row, keep, list(pool.cache.digests(parent, tokens)), forgotten)


def publish(pool: PagePool, table: SequenceTable, plan: Publication) -> None:
    """Carry a plan out."""
    chain, pages = table.chains[plan.row], table.pages(plan.row)
    del chain[plan.keep :]
    for digest in plan.digests:
        parent = chain[-1].serial if chain else table.namespaces[plan.row].key
        depth = len(chain)
        chain.append(pool.publish(int(pages[depth]), digest, parent, depth))
    table.chain_seen[plan.row] = plan.forgotten
