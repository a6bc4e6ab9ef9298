"""What must hold of shadow pages between two operations: counts, marks, links, and that no table is written unseen.

Page by page and entry by entry, so for small guests; a VM without a shadowed guest has nothing to look at.
"""

from __future__ import annotations

from collections.abc import Iterator

from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.spte import PG_LEVEL_4K


def shadow_violations(shadow: ShadowMmu) -> Iterator[str]:
    """Every check; one sentence for each violation."""
    pages = list(shadow.pages)
    yield from _counts(shadow, pages)
    for page in pages:
        yield from _links(shadow, page)
        if page.has_gptes:
            yield from _table_written_unseen(shadow, page)


def _counts(shadow: ShadowMmu, pages: list[ShadowPage]) -> Iterator[str]:
    """mmu_unsync and the number of shadowed tables equal a recount; references to roots equal their holders."""
    stats, mmu = shadow.mmu.stats, shadow.mmu
    unsync = sum(page.unsync for page in pages)
    if stats.mmu_unsync != unsync:
        yield f"mmu_unsync is {stats.mmu_unsync}, a recount finds {unsync}"
    indirect = sum(page.has_gptes for page in pages)
    if mmu.indirect_shadow_pages != indirect:
        yield f"indirect_shadow_pages is {mmu.indirect_shadow_pages}, a recount finds {indirect}"
    held = sum(page.root_count for page in pages) + shadow.pages.held_count
    if held != len(shadow.held_roots):
        yield f"{held} references to shadow roots, {len(shadow.held_roots)} vCPUs hold one"


def _links(shadow: ShadowMmu, page: ShadowPage) -> Iterator[str]:
    """Who points to a page is among its parents; a page out of step is marked on every way down to it."""
    for entry in page.sptes:
        child = shadow.pages.child_at(page, entry)
        if child is not None and (page.pfn, entry) not in child.parents:
            yield f"{page!r} entry {entry} points to {child!r}, which does not know"
    if not page.unsync and not page.unsync_children:
        return
    for pfn, entry in page.parents:
        if entry not in shadow.pages.by_pfn(pfn).unsync_children:
            yield f"{page!r}: the way to it through entry {entry} of table {pfn:#x} is not marked"


def _table_written_unseen(shadow: ShadowMmu, page: ShadowPage) -> Iterator[str]:
    """A table in step can be written by no mapping without a fault; an upper one is write-tracked besides."""
    mmu, gfn = shadow.mmu, page.key.gfn
    slot = mmu.vm.gfn_to_slot(page.key.as_id, gfn)
    if slot is None:
        yield f"{page!r}: its table lies in no memslot"
        return
    if page.key.level > PG_LEVEL_4K and (page.unsync or not mmu.is_write_tracked(slot, gfn)):
        yield f"{page!r}: an upper table that is not write-tracked, or unsync"
    if page.unsync:
        return
    direct = [(str(root), root.lookup(gfn)) for root in mmu.roots.valid(slot.as_id)]
    shadowed = [
        ("a shadowed guest", (entry.table.read(entry.at), level))
        for level, _, entry in shadow.rmap.shadowed_in(slot.as_id, gfn, gfn + 1)
    ]
    for whose, (spte, level) in direct + shadowed:
        if mmu.fmt.is_present(spte) and mmu.fmt.is_leaf(spte, level) and mmu.fmt.is_mmu_writable(spte):
            yield f"{page!r} is in step, yet SPTE {spte:#018x} level {level} of {whose} lets its table be written"
