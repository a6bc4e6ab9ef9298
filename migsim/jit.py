"""How every kernel is compiled: without the interpreter's lock, without reference counts, and cached on disk.

numba keeps compiled code beside a fingerprint of the one file the function is in. A kernel also contains what it calls
and the constants it was compiled with, which come from other files, so its fingerprint here covers those, too.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
from numba import njit

_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False, "no_cfunc_wrapper": True}

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile `function` when it is first called. It may take views of its arrays, but make no array of its own.

    Reference counts are left out (`_nrt`) because a chunk's visit passes hundreds of arrays along: counting them took
    half of a sparse round, and a third of the compiling. Whoever calls a kernel holds the arrays.
    """
    return _compiled(function, _OPTIONS)


def inner(function: Function) -> Function:
    """A kernel that only kernels call: without the code that takes its hundred arrays out of Python objects."""
    return _compiled(function, _OPTIONS | {"no_cpython_wrapper": True})


def _compiled(function: Function, options: dict[str, Any]) -> Function:
    compiled = njit(**options)(function)
    index = _cache_index(compiled)
    if index is not None:
        index._source_stamp = _fingerprint(index._source_stamp, function.__globals__)
    return compiled  # type: ignore[no-any-return]


def _cache_index(value: object) -> Any:
    """numba's index of what is cached for a compiled function; None for anything else."""
    return getattr(getattr(value, "_cache", None), "_cache_file", None)


def _fingerprint(own: object, known: dict[str, Any]) -> str:
    """Of a function whose file has the stamp `own` and that may use the kernels and numbers among its globals."""
    parts = [repr(own)]
    for name, value in sorted(known.items()):
        index = _cache_index(value)
        if index is not None:
            parts.append(f"{name} {index._source_stamp!r}")
        elif isinstance(value, int | float | np.integer):
            parts.append(f"{name} {value!r}")
    return sha256("\n".join(parts).encode()).hexdigest()
