"""What the fused kernels look at, as tuples of arrays, and how they answer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.bulk import Leaves
from migsim.planes import Flags, Words

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Why a kernel came back, beyond ram_kernels' reasons.
NEED_4K, NEED_CLOCK, NEED_TABLES = 10, 11, 12

# Indices into the int64 results of a kernel. REARMED_PAGES: by CLEAR; TAKEN: by GET without manual protection.
# TABLES: huge pages split for the CLEAR that comes next, in tables; it takes them. LEAVES: re-armed 4K leaves.
NEW, LOST, FIRST_LOST, BITS, REARMED_PAGES, CLEAR_CALLS, NOW_NS, TAKEN, TABLES, LEAVES = range(10)
RESULTS_LEN = 10


class Streams(NamedTuple):
    """The workload's arrays (guest.workload.Workload)."""

    law: Ints
    first: Ints
    end: Ints
    clock: Floats
    rate: Floats
    seen: Floats
    visits: NDArray[np.uint32]
    seed_key: np.uint64


class SlotView(NamedTuple):
    """One memslot: KVM's planes and QEMU's copy of the last GET. `offset`: the slot's first chunk in its block."""

    pages: int
    offset: int
    log: Words
    log_summary: Words
    log_full: Flags
    leaves: Leaves  # the planes of its SPTEs, and what maps each 2 MiB
    tabled: Flags  # the chunk has a level-1 table everywhere: its planes tell everything
    reach: Flags  # CLEAR has to do something about huge pages of the chunk first (2: it has, this time)
    known: Words
    known_summary: Words
    known_full: Flags
    known_is_bmap: Flags  # the last GET of the chunk equals the block's bitmap, so `known` was not written
    pml: bool
    fast_path: bool  # the MMU repairs write protection without the slow path
    plain: bool  # it does, and may so for every leaf
    silent: bool  # while every page of a chunk is marked no store to it faults
    walks: bool  # CLEAR looks for huge pages through the rmap, too
    manual: bool  # GET only copies; without manual protection it takes the bits and protects at once


class BlockView(NamedTuple):
    """One RAM block: QEMU's bitmaps and the ground truth. Without the oracle `stale` is `bmap` itself."""

    pages: int
    first_page: int
    first_chunk: int
    bmap: Words
    bmap_summary: Words
    bmap_full: Flags
    clear_bmap: Flags
    stale: Words
    stale_summary: Words
    stale_full: Flags
    zero: Words
    zero_full: Flags
    zero_any: Flags
    verify: bool
    open: Ints  # (chunk, first page of it not sent yet) where its words need not be written, or chunk -1


class Costs(NamedTuple):
    """migration.ram.SaveCosts for the kernels."""

    normal_ps: int
    zero_ps: int
    word_ps: int
    clear_ps: int
    clear_page_ps: int
    normal_bytes: int
    zero_bytes: int
    clear_leaf_ps: int
    clear_table_ps: int
