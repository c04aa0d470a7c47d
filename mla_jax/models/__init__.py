"""Whole models built from the public layer.

`decoder` is the model, `block` one layer of it, `config` its shape; `predictor` drafts, `loss` is
what training minimises, `random` makes one with random weights, to measure speed.
"""

from mla_jax.models.config import DecoderConfig as DecoderConfig
from mla_jax.models.config import decoder_presets as decoder_presets
from mla_jax.models.decoder import Decoder as Decoder
from mla_jax.models.loss import LossTerms as LossTerms
from mla_jax.models.loss import training_loss as training_loss
from mla_jax.models.predictor import MultiTokenPredictor as MultiTokenPredictor
from mla_jax.models.random import random_decoder as random_decoder
