"""Tern beside other engines and formats, and over long contexts: programs to run, apart from the tests."""
