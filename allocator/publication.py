"""Putting the full, computed pages of sequences into the prefix cache."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .groups import PageGroup
from .hits import hang
from .prefix import CacheEntry
from .rows import RowTable

__all__ = ["Publications", "digests_of", "plan_publications", "publish"]


class OneEach(NamedTuple):
    """Rows that publish one page each, behind all that they have published; int64 `[n]` and lists.

    `depth` is how many pages that is, `seen` the `chain_seen` of the row.
    """

    row: np.ndarray
    depth: list[int]
    page: list[int]
    digest: list[bytes]
    seen: np.ndarray


class Several(NamedTuple):
    """What another row will publish: the entries it keeps, and the pages behind them.

    `lost` is the cache's `num_lost` when the kept ones were seen to be live, for a row without
    borrowed entries and for one with.
    """

    row: int
    keep: int
    pages: list[int]
    digests: list[bytes]
    lost: tuple[int, int]


class Publications(NamedTuple):
    """What rows will publish."""

    one_each: OneEach
    others: list[Several]


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


def plan_publications(
    group: PageGroup, rows: RowTable, row: np.ndarray, full: np.ndarray
) -> Publications:
    """Digest the first `full[b]` pages of rows `[B]`, at least 1 of each, as far as that is not
    done yet; changes nothing.

    While rows decode, nearly all have one new page, and nothing of theirs was lost: these are
    planned, and carried out, all at once.
    """
    cache = group.pool.cache
    lost = cache.num_lost(0), cache.num_lost(1)
    seen = np.where(rows.borrows[row], lost[1], lost[0])
    lives = (rows.chain_seen[row] == seen).tolist()
    counts, known = full.tolist(), [rows.digests[each] for each in row.tolist()]
    sizes = [len(rows.chains[each]) for each in row.tolist()]
    each = zip(lives, counts, known, sizes, strict=True)
    plain = [live and len(has) == size == count - 1 for live, count, has, size in each]
    others: list[Several] = []
    if not all(plain):
        for one, count, live, is_plain in zip(row.tolist(), counts, lives, plain, strict=True):
            if not is_plain:
                others.append(_plan(group, rows, one, count, live, lost))
        row, full, seen = row[plain], full[plain], seen[plain]
        known = [has for has, is_plain in zip(known, plain, strict=True) if is_plain]
    page = group.table.ids[row, full - 1]
    before = zip(known, row.tolist(), strict=True)
    parents = [has[-1] if has else rows.namespaces[each].digest for has, each in before]
    digests = cache.next_digests(parents, group.pool.tokens[page])
    for has, digest in zip(known, digests, strict=True):
        has.append(digest)
    one_each = OneEach(row, (full - 1).tolist(), page.tolist(), digests, seen)
    return Publications(one_each, others)


def _plan(
    group: PageGroup, rows: RowTable, row: int, full: int, is_live: bool, lost: tuple[int, int]
) -> Several:
    """The same for any number of pages.

    An entry of the row may have been forgotten meanwhile: evicted, where another sequence's page
    stood for the same content, or withdrawn. Nothing behind it can be found, so the row publishes
    its own pages from there on. The entries are only looked at if any of the row's may be gone, or
    long sequences would be searched at every commit.
    """
    chain, cache = rows.chains[row], group.pool.cache
    keep = len(chain)
    if not is_live:
        live = map(cache.is_live, chain)
        keep = next((i for i, alive in enumerate(live) if not alive), keep)
    digests = digests_of(group, rows, row, full)[keep:full]
    pages = group.table.pages(row)[keep : keep + len(digests)].tolist()
    return Several(row, keep, pages, digests, lost)


def publish(groups: Sequence[PageGroup], rows: RowTable, plan: Publications) -> None:
    """Carry it out; what the rows hold there in other groups goes with the entries."""
    group, others = groups[0], groups[1:]
    row, depth, pages, digests, seen = plan.one_each
    chains = [rows.chains[each] for each in row.tolist()]
    before = zip(chains, row.tolist(), strict=True)
    parents = [chain[-1].serial if chain else rows.namespaces[each].key for chain, each in before]
    entries = group.pool.publish_each(pages, digests, parents, depth)
    rows.chain_seen[row] = seen
    for each, chain, entry, page in zip(row.tolist(), chains, entries, pages, strict=True):
        chain.append(entry)
        if entry.page != page:
            rows.borrows[each], rows.chain_seen[each] = True, -1  # to be looked at
    for other in others:
        hang(group, other, other.table.ids[row, depth], entries, depth)
    for several in plan.others:
        entries = _publish(group, rows, several)
        columns = range(several.keep, several.keep + len(entries))
        for other in others:
            held = other.table.ids[several.row, columns.start : columns.stop]
            hang(group, other, held, entries, columns)


def _publish(group: PageGroup, rows: RowTable, plan: Several) -> list[CacheEntry]:
    row, keep, pages, digests, lost = plan
    chain = rows.chains[row]
    if keep < len(chain):
        chain = chain[:keep]
    parent = chain[-1].serial if chain else rows.namespaces[row].key
    entries = group.pool.publish_chain(pages, digests, parent, keep)
    if [entry.page for entry in entries] != pages:
        rows.borrows[row] = True
    chain.extend(entries)  # in place: a long sequence's is not copied at every chunk
    rows.chains[row] = chain
    rows.chain_seen[row] = lost[int(rows.borrows[row])]
    return entries
