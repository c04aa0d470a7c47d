"""Models built from the public layer."""

from mla_jax.models.decoder import Decoder as Decoder
from mla_jax.models.decoder import DecoderConfig as DecoderConfig
