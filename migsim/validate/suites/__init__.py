"""The suites: one body each, run on every backend that can show what it asserts."""
