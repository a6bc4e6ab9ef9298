"""Which behaviour of which kernel: one row per MMU generation, each column a change that can be seen.

`mmu = "shadow" | "tdp-5.10" | "tdp"` picks a row; the rows between are for comparing kernels. Facts: Linux commits
named beside the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

DisableForm = Literal["zap-nothing", "zap-leafs", "zap-tables", "recover"]


@dataclass(frozen=True, slots=True)
class Vintage:
    """Columns, in the order of history.

    format_5_10: SPTE software bits at 10 and 11, non-present is 0. shared_lock: rwlock, faults and slot-wide walks
    take it for read (5.12). fast_page_fault: lockless repair (TDP: 5.15). fast_zap: zap-all by invalidating roots
    (5.13). eager_split: huge pages split when logging is enabled or cleared (5.18); nested_eager_split: those of nested
    guests too (6.0, ada51a9d). splits_on_fault: a huge page in
    the way is split with its 512 translations, not zapped to an empty table (6.2). marks_before_install: a page is
    marked while its SPTE is made, no longer by the change handler after the store. age_clears_dirty, changed_pte
    (until 6.10), protects_huge_at_enable (INITIALLY_SET, 5.7 to 5.10), zaps_tables (range zaps take whole tables
    along): 5.10 habits. disable: what disabling the log does: 5.10 tests the wrong frame and zaps nothing (fixed by
    3eda3381), then leaf by leaf, then tables (5ba7c4c6), then in-place recovery (6.13). nx_skips_logged: NX recovery
    leaves tables of logged slots (eb298605). write_protected: RET_PF_WRITE_PROTECTED exists (6.12). lockless_aging:
    aging needs RCU alone, or the rmap head's lock bit (6.14). nx_read_lock: NX recovery of the TDP MMU holds mmu_lock
    for read (6.18, a5775090), before for write. root_read_lock: roots are allocated and freed under the read lock and
    tdp_mmu_pages_lock (6.9). pages_list: every table of the TDP MMU is on a list, so that linking and unlinking one
    takes tdp_mmu_pages_lock (5.12 to 6.1; d25ceb92 counts them instead). pushes_page_state: the host's page is told
    that it is dirty or accessed when an SPTE that says so goes (until 6.12), and no longer when it is mapped.
    notifier_always_locks: also where no slot maps the address (until 8931a454, 5.13).
    nx_tags_all: what an instruction fetch under the NX workaround made is tagged even if nothing huge was possible then
    (428e9216, 6.2). split_drops_lock: eager splitting lets mmu_lock go for each table it allocates (cf3ff0ee, 6.11).
    zap_root_levels: the passes over a root that goes, before the last at its own level: none, 1G first (1b6043e8,
    5.18), then from 4K up (6.9).
    tdp: the TDP MMU serves direct roots; else the shadow MMU does.
    """

    name: str
    tdp: bool = True
    format_5_10: bool = False
    shared_lock: bool = True
    fast_page_fault: bool = True
    fast_zap: bool = True
    eager_split: bool = True
    nested_eager_split: bool = True
    splits_on_fault: bool = True
    marks_before_install: bool = True
    age_clears_dirty: bool = False
    changed_pte: bool = False
    protects_huge_at_enable: bool = False
    zaps_tables: bool = False
    disable: DisableForm = "recover"
    nx_skips_logged: bool = True
    write_protected: bool = True
    lockless_aging: bool = True
    nx_read_lock: bool = True
    root_read_lock: bool = True
    pages_list: bool = False
    pushes_page_state: bool = False
    notifier_always_locks: bool = False
    nx_tags_all: bool = True
    split_drops_lock: bool = True
    zap_root_levels: tuple[int, ...] = (1, 2, 3)


TDP: Final = Vintage("tdp")
TDP_6_8: Final = replace(TDP, name="tdp-6.8", disable="zap-tables", write_protected=False,
                          changed_pte=True, lockless_aging=False, nx_read_lock=False, root_read_lock=False,
                          pushes_page_state=True, split_drops_lock=False, zap_root_levels=(3,))  # fmt: skip
TDP_5_19: Final = replace(TDP_6_8, name="tdp-5.19", splits_on_fault=False, nx_skips_logged=False,
                           nested_eager_split=False, pages_list=True, nx_tags_all=False)  # fmt: skip
TDP_5_15: Final = replace(TDP_5_19, name="tdp-5.15", eager_split=False, disable="zap-leafs", zap_root_levels=())
TDP_5_10: Final = Vintage(
    "tdp-5.10",
    format_5_10=True,
    shared_lock=False,
    fast_page_fault=False,
    fast_zap=False,
    eager_split=False,
    nested_eager_split=False,
    splits_on_fault=False,
    marks_before_install=False,
    age_clears_dirty=True,
    changed_pte=True,
    protects_huge_at_enable=True,
    zaps_tables=True,
    disable="zap-nothing",
    nx_skips_logged=False,
    write_protected=False,
    lockless_aging=False,
    nx_read_lock=False,
    root_read_lock=False,
    pushes_page_state=True,
    notifier_always_locks=True,
    nx_tags_all=False,
    split_drops_lock=False,
    zap_root_levels=(),
)
SHADOW: Final = replace(
    TDP, name="shadow", tdp=False, shared_lock=False, eager_split=False, nested_eager_split=False,
    splits_on_fault=False, disable="zap-leafs", nx_read_lock=False, root_read_lock=False,
)  # fmt: skip
VINTAGES: Final = {row.name: row for row in (SHADOW, TDP_5_10, TDP_5_15, TDP_5_19, TDP_6_8, TDP)}
