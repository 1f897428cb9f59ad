"""Putting the full, computed pages of a sequence into the prefix cache."""

from typing import NamedTuple

from .pool import PagePool
from .sequences import SequenceTable

__all__ = ["Publication", "plan_publication", "publish"]


class Publication(NamedTuple):
    """What a row will publish: the entries it keeps, and the digests of the pages behind them.

    `withdrawn` is the cache's count of withdrawn entries when the kept ones were seen to be live.
    """

    row: int
    keep: int
    digests: list[bytes]
    withdrawn: int


def plan_publication(pool: PagePool, table: SequenceTable, row: int, full: int) -> Publication:
    """Digest the row's first `full` pages, as far as that is not done yet; changes nothing.

    An entry of the row may have been forgotten meanwhile: evicted, where another sequence's page
    stood for the same content, or withdrawn. Nothing behind it can be found, so the row publishes
    its own pages from there on. The entries are only looked at if any of the row's may be gone;
    those on its own pages cannot be evicted, or long sequences would be searched at every commit.
    """
    chain, withdrawn = table.chains[row], pool.cache.num_withdrawn
    keep = len(chain)
    if table.chain_seen[row] != withdrawn + table.borrows[row] * pool.cache.num_evicted:
        live = map(pool.cache.is_live, chain)
        keep = next((i for i, alive in enumerate(live) if not alive), keep)
    parent = chain[keep - 1].digest if keep else table.namespaces[row].digest
    tokens = pool.tokens[table.pages(row)[keep:full]]
    return Publication(row, keep, list(pool.cache.digests(parent, tokens)), withdrawn)


def publish(pool: PagePool, table: SequenceTable, plan: Publication) -> None:
    """Carry a plan out."""
    chain, row = table.chains[plan.row], plan.row
    del chain[plan.keep :]
    parent = chain[-1].serial if chain else table.namespaces[row].key
    pages = table.pages(row)[plan.keep : plan.keep + len(plan.digests)].tolist()
    for depth, (page, digest) in enumerate(zip(pages, plan.digests, strict=True), plan.keep):
        entry = pool.publish(page, digest, parent, depth)
        chain.append(entry)
        parent = entry.serial
        if entry.page != page:
            table.borrows[row] = True
    table.chain_seen[row] = plan.withdrawn + table.borrows[row] * pool.cache.num_evicted
