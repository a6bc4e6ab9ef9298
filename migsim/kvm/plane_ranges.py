"""Counting, clearing and erasing ranges of bit planes without touching memory in which nothing is set."""

from __future__ import annotations

import numpy as np

from migsim.kvm.leaf_planes import LeafPlanes
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES


def count_range(plane: Plane, first: int, count: int) -> int:
    """Pages set in [first, first + count)."""
    if first % 64:
        head = min(64 - first % 64, count)
        ones = sum(plane.get(i) for i in range(first, first + head))
        return ones + count_range(plane, first + head, count - head) if count > head else ones
    total = 0
    while count > 0:
        step = min(count, CHUNK_PAGES - first % CHUNK_PAGES)
        if plane.full[first // CHUNK_PAGES]:
            total += step
        else:
            total += int(np.bitwise_count(plane.slice_words(first, step)).sum())
        first, count = first + step, count - step
    return total


def clear_range(plane: Plane | None, first: int, count: int) -> bool:
    """Clear a range chunk by chunk, not touching memory where nothing is set; True if something was."""
    changed = False
    while plane is not None and count > 0:
        chunk = first // CHUNK_PAGES
        step = min(count, (chunk + 1) * CHUNK_PAGES - first)
        words = plane.words[first >> 6 : (first + step + 63) >> 6]
        if (plane.full[chunk] or words.any()) and count_range(plane, first, step):
            plane.clear_range(first, step)
            changed = True
        first, count = first + step, count - step
    return changed


def erase_range(planes: LeafPlanes, first: int, count: int) -> int:
    """Make 4K leaves non-present; returns how many there were."""
    present = count_range(planes.present, first, count)
    if present:
        for plane in planes.planes():
            clear_range(plane, first, count)
        planes.forget_frames(first, count)
    return present
