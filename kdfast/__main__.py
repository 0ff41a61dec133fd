"""`python -m kdfast`, and `torchrun -m kdfast` for several processes."""

from kdfast.cli import main

main()
