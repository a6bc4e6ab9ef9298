"""Anonymous and device mappings that are always given back: ``mmap``/``munmap`` straight from libc.

Python's own ``mmap`` hides the address while it is closable, and KVM wants addresses; so two calls of libc.
"""

from __future__ import annotations

import ctypes
import mmap as _mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROT_NONE = 0
PROT_READ = _mmap.PROT_READ
PROT_READ_WRITE = _mmap.PROT_READ | _mmap.PROT_WRITE
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Mapping:
    """One mapping of ``size`` bytes at ``address`` (0 once closed).  Without ``fd``: private anonymous memory.

    Raises OSError with mmap's errno (EINVAL for a private mapping of a dirty ring, for one).
    """

    def __init__(
        self, size: int, *, fd: int = -1, offset: int = 0, shared: bool = True, prot: int = PROT_READ_WRITE
    ) -> None:
        flags = _mmap.MAP_SHARED if shared else _mmap.MAP_PRIVATE
        if fd < 0:
            flags = _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _libc.mmap(None, size, prot, flags, fd, offset)
        if address is None or address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address: int = address
        self.size = size

    def array(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The mapping's bytes as a numpy array of ``dtype``.  Valid until :meth:`close`, no longer."""
        buffer = (ctypes.c_char * self.size).from_address(self.address)
        return np.frombuffer(memoryview(buffer), dtype=dtype)

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= self.size
        ctypes.memmove(self.address + offset, data, len(data))

    def read(self, offset: int, n_bytes: int) -> bytes:
        assert offset >= 0 and offset + n_bytes <= self.size
        return ctypes.string_at(self.address + offset, n_bytes)

    def protect(self, prot: int, offset: int = 0, n_bytes: int | None = None) -> None:
        """mprotect: the MMU notifier of KVM sees it."""
        _check(_libc.mprotect(self.address + offset, self.size - offset if n_bytes is None else n_bytes, prot))

    def discard(self, offset: int, n_bytes: int) -> None:
        """madvise(MADV_DONTNEED): contents become zero, the MMU notifier unmaps the range."""
        _check(_libc.madvise(self.address + offset, n_bytes, _mmap.MADV_DONTNEED))

    def close(self) -> None:
        address, self.address = self.address, 0
        if address:
            _check(_libc.munmap(address, self.size))
