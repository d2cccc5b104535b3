"""`python -m amp_convert`: the same as the console script."""

from amp_convert.cli.main import main

main()
