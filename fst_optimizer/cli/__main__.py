"""`python -m fst_optimizer.cli`: the fst command."""

from fst_optimizer.cli.main import main

main()
