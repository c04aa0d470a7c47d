"""Hugging Face checkpoints: reading their safetensors, and attention weights to and from layers.

layers = [MultiHeadLatentAttention(config, ...) for _ in range(config.num_hidden_layers)]
with mla_jax.checkpoint.Checkpoint(folder) as files:
    for index, layer in enumerate(layers):
        mla_jax.checkpoint.load_attention(layer, files.attention(index))
mla_jax.checkpoint.save_attention(other_folder, dict(enumerate(layers)))
"""

from mla_jax.checkpoint.attention import attention_tensors as attention_tensors
from mla_jax.checkpoint.attention import load_attention as load_attention
from mla_jax.checkpoint.attention import place as place
from mla_jax.checkpoint.attention import save_attention as save_attention
from mla_jax.checkpoint.decoder import load_decoder as load_decoder
from mla_jax.checkpoint.files import Checkpoint as Checkpoint
from mla_jax.checkpoint.files import save_tensors as save_tensors
