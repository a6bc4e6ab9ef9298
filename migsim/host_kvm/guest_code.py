"""Operations to machine code: straight-line flat 32-bit code, one instruction a store, ended by HLT.

The code lives in the control slot, outside every logged slot, so that fetching it dirties nothing; a loaded
value is stored back into the control slot as well.  One instruction a store matters where KVM emulates
the guest instruction by instruction.  Encodings: Intel SDM volume 2, MOV, ADD, HLT.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

Op = tuple[str, int, int]
"""(kind, gpa, value): 'w' stores the u32 value, 'r' loads a u32, 'a' adds the u32 value under LOCK."""

ADDRESS_LIMIT = 1 << 32  # what 32-bit code without paging can name
_STORE = struct.Struct("<2sII")  # mov dword [gpa], value
_LOAD = struct.Struct("<sIsI")  # mov eax, [gpa]; mov [result], eax
_ATOMIC_ADD = struct.Struct("<3sII")  # lock add dword [gpa], value
_HLT = b"\xf4"
_LOCK_ADD = b"\xf0\x81\x05"
OP_BYTES_MAX = max(_STORE.size, _LOAD.size, _ATOMIC_ADD.size)


@dataclass(frozen=True)
class Program:
    """Machine code and, for each operation, the byte offset at which it begins."""

    code: bytes
    starts: list[int]

    def operations_before(self, offset: int) -> int:
        """How many operations are complete when the instruction pointer stands at ``offset`` (bytes)."""
        return len(self.starts) if offset >= len(self.code) - 1 else bisect_right(self.starts, offset) - 1


def assemble(ops: Sequence[Op], results_gpa: int) -> Program:
    """Code for ``ops``; the k-th load leaves its u32 at ``results_gpa + 4 k``.  ValueError for a gpa past 4 GiB."""
    parts: list[bytes] = []
    starts: list[int] = []
    offset = loads = 0
    for kind, gpa, value in ops:
        if not 0 <= gpa <= ADDRESS_LIMIT - 4:
            raise ValueError(f"gpa {gpa:#x}: the 32-bit guest reaches only below 4 GiB")
        if kind == "w":
            part = _STORE.pack(b"\xc7\x05", gpa, value)
        elif kind == "r":
            part = _LOAD.pack(b"\xa1", gpa, b"\xa3", results_gpa + 4 * loads)
            loads += 1
        elif kind == "a":
            part = _ATOMIC_ADD.pack(_LOCK_ADD, gpa, value)
        else:
            raise ValueError(f"operation kind {kind!r}: 'w', 'r' or 'a'")
        starts.append(offset)
        parts.append(part)
        offset += len(part)
    return Program(b"".join(parts) + _HLT, starts)
