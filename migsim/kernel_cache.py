"""Where numba keeps the compiled kernels: beside the modules, else in the user's cache. It refuses to load any where
neither can be written (a system-wide install, a read-only container), so a folder of this process's own steps in.

Run at `import migsim`, before numba is imported; imports nothing heavy.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["FOR_ONE_RUN", "filled", "provide"]

FOR_ONE_RUN: Final = "migsim-kernels-"  # how the folder's name begins that is gone after this run
_PACKAGE: Final = Path(__file__).parent


def provide() -> None:
    """Sees to it that there is a place; where there can be none, numba will say so (migsim.cli has a sentence)."""
    if any(_can_be_written(place) for place in _places()):
        return
    try:
        folder = tempfile.mkdtemp(prefix=FOR_ONE_RUN)
    except OSError:
        return
    os.environ["NUMBA_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def filled() -> bool:
    """Are there compiled kernels where numba will look for them?"""
    place = next((place for place in _places() if _can_be_written(place)), None)
    return place is not None and any(place.glob("*.nbi"))


def _places() -> list[Path]:
    """In numba's order (numba.core.caching, 0.60): a folder asked for, beside the module, the user's cache."""
    below = f"{_PACKAGE.name}_{hashlib.sha1(str(_PACKAGE).encode()).hexdigest()}"
    asked, cache = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    users = Path(os.path.expanduser(cache), "numba", below)
    return [*([Path(asked, below)] if asked else []), _PACKAGE / "__pycache__", users]


def _can_be_written(place: Path) -> bool:
    """Is it a folder that can be written, or can it be made?"""
    there = next((folder for folder in (place, *place.parents) if os.path.lexists(folder)), place)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
