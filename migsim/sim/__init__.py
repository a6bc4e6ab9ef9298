"""The world's clockwork: integer time, counted operations, counter-based randomness."""
