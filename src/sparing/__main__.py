"""``python -m sparing``: the command line where the script is not on the path."""

from sparing.cli import main

main()
