"""`migsim bench`: how fast the emulator is on this machine, each figure beside what it should reach.

Every figure is a ratio taken in one run, or a count, so that it says something on any machine: `table` holds the rows
and their targets, `command` prints them, the other modules measure one group of rows each.
"""
