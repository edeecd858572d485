"""`python -m steerback` is the command line."""

from steerback.cli import main

main()
