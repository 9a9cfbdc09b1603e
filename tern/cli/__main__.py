"""`python -m tern.cli`: the same as `tern`."""

from tern.cli import main

main()
