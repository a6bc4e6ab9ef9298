"""A whole number on the command line, within its limits."""

from __future__ import annotations

import argparse

__all__ = ["SEED_MAX", "Bounded"]

SEED_MAX = (1 << 64) - 1


class Bounded:
    """An int of argparse with limits, said in the error."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __call__(self, text: str) -> int:
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 24 else -1
        if not self.least <= value <= self.most:
            limits = f"must be a whole number from {self.least} to {self.most}"
            raise argparse.ArgumentTypeError(f"{ascii(text[:40])} {limits}")
        return value
