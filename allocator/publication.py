"""Putting the full, computed pages of a sequence into the prefix cache."""

from typing import NamedTuple

from .pool import PagePool
from .sequences import SequenceTable

__all__ = ["Publication", "plan_publication", "publish"]


class Publication(NamedTuple):
    """What a row will publish: the entries it keeps, and the digests of the pages behind them."""

    row: int
    keep: int
    digests: list[bytes]


def plan_publication(pool: PagePool, table: SequenceTable, row: int, full: int) -> Publication:
    """Digest the row's first `full` pages, as far as that is not done yet; changes nothing."""
    chain = table.chains[row]
    keep = len(chain)
    while keep and not pool.cache.is_live(chain[keep - 1]):
        keep -= 1  # evicted meanwhile: what is published behind it could never be found
    parent = chain[keep - 1].digest if keep else table.namespaces[row].digest
    tokens = pool.tokens[table.pages(row)[keep:full]]
    return Publication(row, keep, list(pool.cache.digests(parent, tokens)))


def publish(pool: PagePool, table: SequenceTable, plan: Publication) -> None:
    """Carry a plan out."""
    chain, pages = table.chains[plan.row], table.pages(plan.row)
    del chain[plan.keep :]
    for digest in plan.digests:
        parent = chain[-1].serial if chain else table.namespaces[plan.row].key
        chain.append(pool.publish(int(pages[len(chain)]), digest, parent))
