"""`python -m migsim` is the command `migsim`."""

from __future__ import annotations

import sys

from migsim.cli import main

if __name__ == "__main__":
    sys.exit(main())
