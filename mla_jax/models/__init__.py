"""Models built from the public layer."""

from mla_jax.models.decoder import Decoder as Decoder
from mla_jax.models.decoder import DecoderConfig as DecoderConfig
from mla_jax.models.deepseek import DeepseekDecoder as DeepseekDecoder
from mla_jax.models.deepseek import MultiTokenPredictor as MultiTokenPredictor
from mla_jax.models.deepseek_config import DeepseekConfig as DeepseekConfig
from mla_jax.models.deepseek_config import decoder_presets as decoder_presets
from mla_jax.models.random import random_decoder as random_decoder
