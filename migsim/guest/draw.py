"""Which pages of a chunk did a stream of writes hit? Exact draws from the law of the workload, as numba kernels.

A uniform stream that made `w` writes over `n` pages hits each page independently with p = 1 - exp(-w / n) (the
Poisson law of a random number of writes; between two observations only the set of pages written can be seen). Dense
draws are an AND/OR chain over the leading binary digits of p with geometric skipping for the rest of p, so that the
two together have probability p exactly: 1 - (1 - p0)(1 - d) = p. Sparse draws are geometric skipping alone.
`bits_hit` is the page-at-a-time rule of the same law: same key, same pages.
"""

from __future__ import annotations

import math

import numpy as np

from migsim.jit import kernel
from migsim.planes import SUMMARY_WORDS, Words
from migsim.sim import prng
from migsim.words import raise_summary

_GOLDEN = np.uint64(prng.GOLDEN)
_MIX_1 = np.uint64(prng.MIX_1)
_MIX_2 = np.uint64(prng.MIX_2)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_S30, _S27, _S31, _S11, _S6 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11), np.uint64(6)
_LOW6 = np.uint64(63)

DIGITS = 12  # of p, drawn by the chain; the rest (below 2**-12) is skipped to
DENSE_FROM = 3e-3  # where the chain becomes cheaper than skipping: 17 us a chunk against 21 ns a hit, measured
SPARSE_SALT = 0x5BA75E  # the chain and the skipping draw from different keys
_SALT = np.uint64(prng.mix(SPARSE_SALT))


@kernel
def mix64(value: np.uint64) -> np.uint64:
    """SplitMix64's finaliser on uint64 (see sim.prng.mix)."""
    value = (value ^ (value >> _S30)) * _MIX_1
    value = (value ^ (value >> _S27)) * _MIX_2
    return value ^ (value >> _S31)


@kernel
def chunk_key(seed_key: np.uint64, stream: int, chunk: int, visit: int) -> np.uint64:
    """sim.prng.stream_key continued by (stream, chunk, visit) from an already mixed seed key."""
    key = mix64(seed_key + np.uint64(stream + 1) * _GOLDEN)
    key = mix64(key + np.uint64(chunk + 1) * _GOLDEN)
    return mix64(key + np.uint64(visit + 1) * _GOLDEN)


@kernel
def _set_range(out: Words, first: int, end: int) -> None:
    """OR ones into bits [first, end) of `out`."""
    if end <= first:
        return
    w0, w1 = first >> 6, (end - 1) >> 6
    low = _ONES << (np.uint64(first) & _LOW6)
    high = _ONES >> (_LOW6 - (np.uint64(end - 1) & _LOW6))
    if w0 == w1:
        out[w0] |= low & high
        return
    out[w0] |= low
    for i in range(w0 + 1, w1):
        out[i] = _ONES
    out[w1] |= high


@kernel
def _skip(out: Words, summary: Words, first: int, end: int, p: float, key: np.uint64) -> None:
    """OR each bit of [first, end) with probability p, by geometric skipping."""
    scale = 1.0 / math.log1p(-p)
    key ^= _SALT
    counter = _GOLDEN
    at, top = first, _ZERO
    while at < end:
        u = (np.float64(mix64(key + counter) >> _S11) + 0.5) * 1.1102230246251565e-16
        gap = math.log(u) * scale
        if gap >= end - at:
            break
        at += int(gap)
        word = at >> 6
        out[word] |= _ONE << (np.uint64(at) & _LOW6)
        summary[word >> 6] |= _ONE << (np.uint64(word) & _LOW6)
        top |= _ONE << (np.uint64(word >> 6) & _LOW6)
        at += 1
        counter += _GOLDEN
    summary[SUMMARY_WORDS] |= top


@kernel
def _chain(out: Words, w0: int, w1: int, digits: int, key: np.uint64) -> None:
    """OR into words [w0, w1) bits of probability digits / 2**12: one random word a binary digit, no branches."""
    d0, d1, d2 = _ZERO - np.uint64(digits & 1), _ZERO - np.uint64(digits >> 1 & 1), _ZERO - np.uint64(digits >> 2 & 1)
    d3, d4, d5 = (
        _ZERO - np.uint64(digits >> 3 & 1),
        _ZERO - np.uint64(digits >> 4 & 1),
        _ZERO - np.uint64(digits >> 5 & 1),
    )
    d6, d7, d8 = (
        _ZERO - np.uint64(digits >> 6 & 1),
        _ZERO - np.uint64(digits >> 7 & 1),
        _ZERO - np.uint64(digits >> 8 & 1),
    )
    d9, d10, d11 = (
        _ZERO - np.uint64(digits >> 9 & 1),
        _ZERO - np.uint64(digits >> 10 & 1),
        _ZERO - np.uint64(digits >> 11 & 1),
    )
    step = np.uint64(DIGITS) * _GOLDEN
    part = out[w0:w1]  # a view that begins at 0 is what the compiler turns into vector code
    for i in range(len(part)):
        at = key + np.uint64(w0 + i) * step
        acc = _ZERO
        r = mix64(at + _GOLDEN)
        acc = (acc & r) | (d0 & (acc ^ r))
        r = mix64(at + np.uint64(2) * _GOLDEN)
        acc = (acc & r) | (d1 & (acc ^ r))
        r = mix64(at + np.uint64(3) * _GOLDEN)
        acc = (acc & r) | (d2 & (acc ^ r))
        r = mix64(at + np.uint64(4) * _GOLDEN)
        acc = (acc & r) | (d3 & (acc ^ r))
        r = mix64(at + np.uint64(5) * _GOLDEN)
        acc = (acc & r) | (d4 & (acc ^ r))
        r = mix64(at + np.uint64(6) * _GOLDEN)
        acc = (acc & r) | (d5 & (acc ^ r))
        r = mix64(at + np.uint64(7) * _GOLDEN)
        acc = (acc & r) | (d6 & (acc ^ r))
        r = mix64(at + np.uint64(8) * _GOLDEN)
        acc = (acc & r) | (d7 & (acc ^ r))
        r = mix64(at + np.uint64(9) * _GOLDEN)
        acc = (acc & r) | (d8 & (acc ^ r))
        r = mix64(at + np.uint64(10) * _GOLDEN)
        acc = (acc & r) | (d9 & (acc ^ r))
        r = mix64(at + np.uint64(11) * _GOLDEN)
        acc = (acc & r) | (d10 & (acc ^ r))
        r = mix64(at + np.uint64(12) * _GOLDEN)
        acc = (acc & r) | (d11 & (acc ^ r))
        part[i] |= acc


@kernel
def draw_uniform(
    out: Words, summary: Words, scratch: Words, first: int, end: int, p: float, key: np.uint64
) -> None:
    """OR each bit of [first, end) of `out` with probability p, independently.

    `out`, `scratch`: uint64[>= ceil(end / 64)]; `scratch` is overwritten when the ends are not word-aligned.
    `summary`: uint64[65], of the words of `out`, which are one chunk's (see migsim.words).
    """
    if p <= 0.0 or end <= first:
        return
    if p < DENSE_FROM:
        _skip(out, summary, first, end, p, key)
        return
    raise_summary(summary, first >> 6, (end + 63) >> 6)
    if p >= 1.0:
        _set_range(out, first, end)
        return
    digits = int(p * 4096.0)
    rest = (p - digits / 4096.0) / (1.0 - digits / 4096.0)
    w0, w1 = first >> 6, (end + 63) >> 6
    if first & 63 == 0 and end & 63 == 0:
        _chain(out, w0, w1, digits, key)
    else:
        for i in range(w0, w1):
            scratch[i] = _ZERO
        _chain(scratch, w0, w1, digits, key)
        scratch[w0] &= _ONES << (np.uint64(first) & _LOW6)
        scratch[w1 - 1] &= _ONES >> (_LOW6 - (np.uint64(end - 1) & _LOW6))
        for i in range(w0, w1):
            out[i] |= scratch[i]
    if rest > 0.0:
        _skip(out, summary, first, end, rest, key)


@kernel
def _sweep_range(out: Words, summary: Words, first: int, end: int) -> None:
    if end > first:
        _set_range(out, first, end)
        raise_summary(summary, first >> 6, (end + 63) >> 6)


@kernel
def draw_sweep(
    out: Words, summary: Words, base: int, pages: int, first: int, end: int, start: float, stop: float
) -> None:
    """OR the pages a sequential sweep of [first, end) wrote between its write counts `start` and `stop`.

    Pages are numbered from `base` (bit 0 of `out`), and only [base, base + pages) counts. Write k goes to page
    first + k mod (end - first), k = floor(start) .. floor(stop) - 1.
    """
    n = end - first
    a, b = math.floor(start), math.floor(stop)
    if b <= a or n <= 0:
        return
    limit = base + pages
    if b - a >= n:
        _sweep_range(out, summary, max(first, base) - base, min(end, limit) - base)
        return
    lo, hi = first + a % n, first + a % n + (b - a)
    _sweep_range(out, summary, max(lo, base) - base, min(min(hi, end), limit) - base)
    if hi > end:
        _sweep_range(out, summary, max(first, base) - base, min(hi - n, limit) - base)


def bits_hit(first: int, end: int, p: float, key: int) -> set[int]:
    """The rule, page at a time: which of bits [first, end) a uniform draw under `key` hits."""
    if p <= 0.0:
        return set()
    if p >= 1.0:
        return set(range(first, end))
    hit: set[int] = set()
    rest = p
    if p >= DENSE_FROM:
        digits = int(p * 4096.0)
        rest = (p - digits / 4096.0) / (1.0 - digits / 4096.0)
        for page in range(first, end):
            acc = 0
            for digit in range(DIGITS):
                r = prng.word(key, (page >> 6) * DIGITS + digit) >> (page & 63) & 1
                acc = acc | r if digits >> digit & 1 else acc & r
            if acc:
                hit.add(page)
    at, index, sparse_key = first, 0, key ^ int(_SALT)
    while rest > 0.0:
        gap = math.log(prng.uniform(sparse_key, index)) / math.log1p(-rest)
        if gap >= end - at:
            break
        at += int(gap)
        hit.add(at)
        at, index = at + 1, index + 1
        if at >= end:
            break
    return hit
