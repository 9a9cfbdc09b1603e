"""Doors under the names that other engines gave theirs. Knows the command line only."""
