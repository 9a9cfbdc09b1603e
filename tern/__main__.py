"""`python -m tern`: the same as the command `tern`."""

from tern.cli import main

main()
