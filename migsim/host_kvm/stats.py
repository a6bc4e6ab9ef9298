"""Read KVM's binary statistics file descriptor (KVM_GET_STATS_FD) into names and integers."""

from __future__ import annotations

import fcntl
import os

from migsim.host_kvm import abi
from migsim.kvm import uapi


def read_stats(fd: int) -> dict[str, int]:
    """Every one-value statistic of a VM or vCPU file descriptor by KVM's name; histograms are left out."""
    stats_fd = fcntl.ioctl(fd, uapi.KVM_GET_STATS_FD, 0)
    try:
        return _parse(stats_fd)
    finally:
        os.close(stats_fd)


def _parse(fd: int) -> dict[str, int]:
    _flags, name_size, n_desc, _id_offset, desc_offset, data_offset = abi.STATS_HEADER.unpack(
        os.pread(fd, abi.STATS_HEADER.size, 0)
    )
    stride = abi.STATS_DESC.size + name_size
    table = os.pread(fd, stride * n_desc, desc_offset)
    values: dict[str, int] = {}
    for at in range(0, stride * n_desc, stride):
        _, _, n_values, offset, _ = abi.STATS_DESC.unpack_from(table, at)
        if n_values == 1:
            name = table[at + abi.STATS_DESC.size : at + stride].split(b"\0", 1)[0].decode()
            values[name] = int.from_bytes(os.pread(fd, 8, data_offset + offset), "little")
    return values
