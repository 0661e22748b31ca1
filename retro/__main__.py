"""`python -m retro` is the `retro` command."""

from retro.cli import main

main()
