"""`python -m prunebench` is the same program as `prunebench`."""

from prunebench.cli import main

main()
