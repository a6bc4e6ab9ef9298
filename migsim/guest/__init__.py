"""The guest: its memory, what is true of it, and who writes to it."""
