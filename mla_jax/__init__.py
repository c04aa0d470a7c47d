"""Multi-head Latent Attention for JAX and Flax."""

from mla_jax import checkpoint as checkpoint
from mla_jax import costs as costs
from mla_jax import generation as generation
from mla_jax.cache import LatentCache as LatentCache
from mla_jax.config import MLAConfig as MLAConfig
from mla_jax.config import RopeScaling as RopeScaling
from mla_jax.config import presets as presets
from mla_jax.generation.sampling import sample as sample
from mla_jax.generation.steps import decode_loop as decode_loop
from mla_jax.generation.steps import decode_step as decode_step
from mla_jax.generation.steps import prefill_step as prefill_step
from mla_jax.layers.attention import MultiHeadLatentAttention as MultiHeadLatentAttention
from mla_jax.ops.dispatch import decode_schedule as decode_schedule
from mla_jax.ops.dispatch import expanded_attention as expanded_attention
from mla_jax.ops.dispatch import explain as explain
from mla_jax.ops.dispatch import latent_attention as latent_attention
from mla_jax.ops.dispatch import merge_attention as merge_attention
