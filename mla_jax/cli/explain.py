"""`mla-jax explain`: what would run on this machine, as `mla_jax.explain` tells it."""

import jax.numpy as jnp

import mla_jax
from mla_jax.cli.options import Explain, judging_flags
from mla_jax.models import DecoderConfig, decoder_presets


def explain(options: Explain) -> None:
    """Prints which form and backend would run, and why the others would not."""
    with judging_flags():
        config = mla_jax.MLAConfig.from_preset(options.preset)
        if options.preset in decoder_presets():
            config = DecoderConfig.from_preset(options.preset)
        try:
            jnp.dtype(options.dtype)
        except TypeError as error:
            raise ValueError(
                f"dtype={options.dtype!r} is not a dtype: use e.g. bfloat16."
            ) from error
        mla_jax.explain(
            config, batch_size=options.batch, length=options.length, queries=options.queries,
            dtype=options.dtype, cache_dtype=options.cache_dtype,
        )  # fmt: skip
