"""`python -m freezeout` is the command `freezeout`."""

from .cli import main

main()
