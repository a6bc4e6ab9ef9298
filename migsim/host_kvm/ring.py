"""The dirty ring of one vCPU as user space maps it: 16-byte entries at page 64 of the vCPU's fd."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from migsim.host_kvm import abi
from migsim.host_kvm.mapping import Mapping
from migsim.kvm import uapi


class HostDirtyRing:
    """A view of ``size`` entries.  ``entries`` is the live mapping: the kernel writes DIRTY, user space RESET."""

    def __init__(self, vcpu_fd: int, size_bytes: int) -> None:
        self._mapping = Mapping(size_bytes, fd=vcpu_fd, offset=abi.RING_MMAP_OFFSET)
        self.size = size_bytes // uapi.DIRTY_GFN.itemsize
        self.entries: NDArray[Any] = self._mapping.array(uapi.DIRTY_GFN)
        self.fetch_index = 0

    def harvest(self, limit: int | None = None) -> list[tuple[int, int]]:
        """Collect up to ``limit`` dirty entries in order as (slot, offset), marking each RESET.

        ``slot`` is as_id << 16 | id.  x86 orders the kernel's stores, so the flag read first vouches for the rest.
        """
        found: list[tuple[int, int]] = []
        while limit is None or len(found) < limit:
            entry = self.entries[self.fetch_index % self.size]
            if int(entry["flags"]) != uapi.KVM_DIRTY_GFN_F_DIRTY:
                break
            found.append((int(entry["slot"]), int(entry["offset"])))
            entry["flags"] = uapi.KVM_DIRTY_GFN_F_RESET
            self.fetch_index += 1
        return found

    def used(self) -> int:
        """Entries pushed and not yet reset by the kernel, counted from their flags."""
        return int(np.count_nonzero(self.entries["flags"]))

    def close(self) -> None:
        self.entries = np.zeros(0, uapi.DIRTY_GFN)
        self._mapping.close()
