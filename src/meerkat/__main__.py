"""`python -m meerkat`."""

from meerkat.cli import main

main()
