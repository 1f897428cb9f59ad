"""Putting the full, computed pages of a sequence into the prefix cache."""

from typing import NamedTuple

from .groups import PageGroup
from .rows import RowTable

__all__ = ["Publication", "digests_of", "plan_publication", "publish"]


class Publication(NamedTuple):
    """What a row will publish: the entries it keeps, and the digests of the pages behind them.

    `lost` is the cache's `num_lost` when the kept ones were seen to be live, for a row without
    borrowed entries and for one with.
    """

    row: int
    keep: int
    digests: list[bytes]
    lost: tuple[int, int]


def digests_of(group: PageGroup, rows: RowTable, row: int, full: int) -> list[bytes]:
    """The digests of the row's first `full` pages, which have a token in every slot, or of more of
    them; the row's own list, which is not copied at every page of a long sequence."""
    known = rows.digests[row]
    if (count := len(known)) < full:
        parent = known[-1] if known else rows.namespaces[row].digest
        table = group.table
        first = int(table.first[row])
        tokens = group.pool.tokens[table.ids[row, first + count : first + full]]
        known.extend(group.pool.cache.digests(parent, tokens))
    return known


def plan_publication(group: PageGroup, rows: RowTable, row: int, full: int) -> Publication:
    """Digest the row's first `full` pages, as far as that is not done yet; changes nothing.

    An entry of the row may have been forgotten meanwhile: evicted, where another sequence's page
    stood for the same content, or withdrawn. Nothing behind it can be found, so the row publishes
    its own pages from there on. The entries are only looked at if any of the row's may be gone, or
    long sequences would be searched at every commit.
    """
    chain, cache = rows.chains[row], group.pool.cache
    keep = len(chain)
    if rows.chain_seen[row] != cache.num_lost(int(rows.borrows[row])):
        live = map(cache.is_live, chain)
        keep = next((i for i, alive in enumerate(live) if not alive), keep)
    digests = digests_of(group, rows, row, full)[keep:full]
    return Publication(row, keep, digests, (cache.num_lost(0), cache.num_lost(1)))


def publish(group: PageGroup, rows: RowTable, plan: Publication) -> None:
    """Carry a plan out."""
    row, chain = plan.row, rows.chains[plan.row]
    if plan.keep < len(chain):
        chain = chain[: plan.keep]
    parent = chain[-1].serial if chain else rows.namespaces[row].key
    pages = group.table.pages(row)[plan.keep : plan.keep + len(plan.digests)].tolist()
    for depth, (page, digest) in enumerate(zip(pages, plan.digests, strict=True), plan.keep):
        entry = group.pool.publish(page, digest, parent, depth)
        chain.append(entry)
        parent = entry.serial
        if entry.page != page:
            rows.borrows[row] = True
    rows.chains[row] = chain
    rows.chain_seen[row] = plan.lost[int(rows.borrows[row])]
