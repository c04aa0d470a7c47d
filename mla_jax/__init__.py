"""Multi-head Latent Attention for JAX and Flax."""

from mla_jax import checkpoint as checkpoint
from mla_jax import costs as costs
from mla_jax import generation as generation
from mla_jax.cache import Cache as Cache
from mla_jax.config import MLAConfig as MLAConfig
from mla_jax.config import RopeScaling as RopeScaling
from mla_jax.config import presets as presets
from mla_jax.explain import explain as explain
from mla_jax.generation.steps import decode_loop as decode_loop
from mla_jax.generation.steps import decode_step as decode_step
from mla_jax.generation.steps import prefill_step as prefill_step
from mla_jax.generation.steps import sample as sample
from mla_jax.layers.attention import MultiHeadLatentAttention as MultiHeadLatentAttention
from mla_jax.layers.step import Step as Step
from mla_jax.ops import expanded_attention as expanded_attention
from mla_jax.ops import latent_attention as latent_attention
from mla_jax.ops import merge_attention as merge_attention
