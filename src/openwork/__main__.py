"""`python -m openwork` is the `openwork` command."""

from openwork.cli import main

main()
