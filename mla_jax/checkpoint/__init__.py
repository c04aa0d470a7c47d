"""Hugging Face checkpoints: whole models and attention layers, to and from their safetensors.

model = mla_jax.checkpoint.load_decoder(folder)
mla_jax.checkpoint.save_decoder(model, other_folder)

layers = [MultiHeadLatentAttention(config, ...) for _ in range(config.num_hidden_layers)]
with mla_jax.checkpoint.Checkpoint(folder) as files:
    for index, layer in enumerate(layers):
        mla_jax.checkpoint.load_attention(layer, files.attention(index))
mla_jax.checkpoint.save_attention(other_folder, dict(enumerate(layers)))

One table (`tensors`) says which tensor is which part of which parameter; `stored` what a quantised
one holds, `scheme` which forms a config announces, `gate` what may be left over; `host` copies.
"""

from mla_jax.checkpoint.attention import attention_tensors as attention_tensors
from mla_jax.checkpoint.attention import load_attention as load_attention
from mla_jax.checkpoint.attention import save_attention as save_attention
from mla_jax.checkpoint.attention import save_tensors as save_tensors
from mla_jax.checkpoint.decoder import load_decoder as load_decoder
from mla_jax.checkpoint.decoder import save_decoder as save_decoder
from mla_jax.checkpoint.files import Checkpoint as Checkpoint
from mla_jax.checkpoint.files import resolve as resolve
from mla_jax.checkpoint.host import place as place
from mla_jax.checkpoint.stored import Stored as Stored
