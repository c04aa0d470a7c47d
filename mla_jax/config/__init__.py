"""The shape of one MLA layer: which widths, which rotary embedding, which scale factors.

Keys are those of the Hugging Face config.json, verbatim, so that a checkpoint's config reads as
documentation of this one. A config is data: frozen, hashable, and validated where it is made.

Letters: N num_attention_heads, D hidden_size, Q q_lora_rank, R kv_lora_rank, H qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim.

`layer` has `MLAConfig`, `rope_scaling` what stretches its rotary frequencies, `checks` what its
fields ask of one another, `files` the presets. A whole model's shape is `models.DecoderConfig`.
"""

from mla_jax.config.files import aliases as aliases
from mla_jax.config.files import configs_dir as configs_dir
from mla_jax.config.files import presets as presets
from mla_jax.config.layer import MLAConfig as MLAConfig
from mla_jax.config.rope_scaling import YARN as YARN
from mla_jax.config.rope_scaling import RopeScaling as RopeScaling
from mla_jax.config.rope_scaling import yarn_mscale as yarn_mscale
