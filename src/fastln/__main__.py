"""`python -m fastln`: the command line."""

from fastln.cli import main

main()
