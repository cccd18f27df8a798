"""`python -m immunonet`, which is the command `immunonet`."""

from immunonet.cli import main

main()
