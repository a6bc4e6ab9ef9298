"""What is taken out of each row of docs/series.md, one entry a behaviour: the row's tests must fail without it.

An entry names the row (a patch's number, or the first words of a later row, "version change" in the third table), the
function of that row that is changed, and what the kernel does then. tests/test_series.py has each of them run
(`__main__`) and holds that every function and every test of every row has its entry.
"""

from . import invariants, later, nested, part_2, patches  # noqa: F401 - each declares its mutations
from .declare import MUTATIONS, Mutation, Patch

__all__ = ["MUTATIONS", "Mutation", "Patch"]
