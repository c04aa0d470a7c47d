"""`python -m mla_jax.cli` is `mla-jax`."""

from mla_jax.cli import main

main()
