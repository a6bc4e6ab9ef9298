"""A guest whose own tables are shadowed, and the eager splitting of its huge pages."""

from __future__ import annotations

from typing import Any

from migsim.kvm.spte import AdType

from .declare import gone, inside, without

gone("a table of level 1", "unsync.Unsync.refuses_write", "never protects a table it did not map", answer=False)
inside("a table of level 1", "unsync.Unsync.refuses_write", "forgets which are tracked",
       "mmu_state.MmuState.is_write_tracked", lambda _: lambda *_, **__: False)  # fmt: skip


@without("a table of level 1", "unsync.Unsync.refuses_write", "tracks tables of level 1 as well")
def _(honest: Any) -> Any:
    return lambda unsync, slot, gfn, **more: bool(unsync._pages.of_gfn(gfn)) or honest(unsync, slot, gfn, **more)


without("neither a prefetch", "unsync.Unsync.refuses_write", "does not mind prefetches",
        lambda honest: lambda unsync, slot, gfn, *, synchronizing=False, prefetch=False: honest(
            unsync, slot, gfn, synchronizing=synchronizing))  # fmt: skip
without("neither a prefetch", "unsync.Unsync.refuses_write", "does not mind syncs",
        lambda honest: lambda unsync, slot, gfn, *, synchronizing=False, prefetch=False: honest(
            unsync, slot, gfn, prefetch=prefetch))  # fmt: skip
gone("CR3 load", "unsync.Unsync.sync_children", "syncs nothing", answer=True)
inside("CR3 load", "unsync.Unsync.sync_children", "does not protect the tables", "unsync.Unsync._protect_table",
       lambda _: lambda *_: False)  # fmt: skip
gone("INVLPG syncs", "unsync.Unsync.invalidate_addr", "syncs nothing")


@without("INVLPG syncs", "unsync.Unsync.invalidate_addr", "syncs all")
def _(honest: Any) -> Any:
    return lambda unsync, root, gfn: unsync.sync_root(root)


@without("an entry that names", "unsync.Unsync.sync_spte", "keeps the old rights")
def _(honest: Any) -> Any:
    def sync(unsync: Any, page: Any, entry: int) -> int:
        old = page.read(page.at(entry))
        flush = honest(unsync, page, entry)
        if entry in page.gfns and old:
            page.write(page.at(entry), old)
        return int(flush)

    return sync


@without("an entry that names", "unsync.Unsync.sync_spte", "keeps what names another page")
def _(honest: Any) -> Any:
    def sync(unsync: Any, page: Any, entry: int) -> int:
        gpte = unsync._tables.usable(page.key, entry)
        return 0 if gpte is not None and gpte.gfn != page.gfns.get(entry) else int(honest(unsync, page, entry))

    return sync


@without("an unsync page found again", "shadow_pages.ShadowPages.find", "does not sync it")
def _(honest: Any) -> Any:
    def find(pages: Any, key: Any) -> Any:
        sync, pages.sync = pages.sync, lambda page: 0
        found = honest(pages, key)
        pages.sync = sync
        return found

    return find


@without("an unsync page found again", "shadow_pages.ShadowPages.find", "leaves what becomes an upper table")
def _(honest: Any) -> Any:
    def find(pages: Any, key: Any) -> Any:
        held = [page for page in pages if page.unsync and page.key != key]
        for page in held:
            page.unsync = False
        found = honest(pages, key)
        for page in held:
            page.unsync = not page.invalid
        return found

    return find


without("pages below one", "shadow_pages.ShadowPages.drop", "leaves them",
        lambda honest: lambda pages, page, entry, whole_tree=False: honest(pages, page, entry))  # fmt: skip


gone("so do unsync pages", "shadow_pages.ShadowPages.unsync_below", "leaves them", answer=[])


@without("A and D of the guest", "guest_tables.GuestTables.walk", "sets no bits")
def _(honest: Any) -> Any:
    return lambda tables, root, gfn, *, write, exec: tables.read(root.as_id, root.gfn, gfn)


without("without A/D bits", "nested.NestedGuest.ad_type", "uses its own all the same",
        lambda _: property(lambda l2: AdType.ENABLED))  # fmt: skip
gone("a fault maps", "shadow_fault.ShadowFaults._prefetch", "maps nothing unasked")
gone("execution in L2", "nx_recovery.recover_nx_shadow_pages", "recovers nothing", answer=0)
gone("every emulated store", "guest_writes.GuestWrites.track_write", "sees none")
gone("a store that is none", "guest_writes.is_misaligned", "takes any for one of an entry", answer=False)
gone("the page limit", "page_limit.PageLimit.change", "changes nothing")
gone("the page limit", "page_limit.PageLimit.make_available", "lets pages grow without end")
gone("checked after every step", "shadow_invariants.shadow_violations", "finds nothing", answer=())
inside("no memory there", "shadow_fault.ShadowFaults.page_fault", "asks in full every time",
       "shadow_fault.ShadowFaults._is_known_mmio", lambda _: lambda *_: False)  # fmt: skip
gone("6.0 eager splitting", "shadow_split.ShadowSplit.split_range", "splits nothing")
without("6.0 memory for it", "shadow_split.ShadowSplit.try_split", "asks for no memory",
        lambda honest: lambda split, page, at: split._split(page, at.entry) or 0)  # fmt: skip
