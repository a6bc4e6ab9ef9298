"""Counter-based randomness: what is drawn depends on what it is for, never on who asked first.

`stream_key(seed, *names)` gives a 64-bit key; `word(key, i)` the i-th 64-bit word under it. Both are the finaliser
of SplitMix64 (Steele, Lea, Flood 2014) over a counter, so any word can be had at once, in any order, by any thread.
The numba kernels in `guest.draw` compute the same words; a test holds the two equal.
"""

from __future__ import annotations

from typing import Final

MASK: Final = (1 << 64) - 1
GOLDEN: Final = 0x9E37_79B9_7F4A_7C15
MIX_1: Final = 0xBF58_476D_1CE4_E5B9
MIX_2: Final = 0x94D0_49BB_1331_11EB


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers that looks random."""
    value &= MASK
    value = (value ^ (value >> 30)) * MIX_1 & MASK
    value = (value ^ (value >> 27)) * MIX_2 & MASK
    return value ^ (value >> 31)


def word(key: int, index: int) -> int:
    """The `index`-th 64-bit word under `key`."""
    return mix(key + (index + 1) * GOLDEN)


def stream_key(seed: int, *names: int) -> int:
    """A key of its own for each tuple of small integers (seed, stream, chunk, visit ...)."""
    return derived(mix(seed ^ GOLDEN), *names)


def derived(key: int, *names: int) -> int:
    """A key below `key` for each tuple of names; deriving in two goes is deriving in one."""
    for name in names:
        key = mix(key + (name + 1) * GOLDEN)
    return key


def uniform(key: int, index: int) -> float:
    """A float in (0, 1), 53 bits, never 0 or 1."""
    return ((word(key, index) >> 11) + 0.5) * 2.0**-53
