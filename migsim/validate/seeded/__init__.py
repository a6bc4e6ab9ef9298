"""Known bugs, put in on purpose one at a time, to see that each is caught.  Production code never asks about them."""
