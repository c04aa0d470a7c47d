"""Meituan's LongCat: two attentions a layer, beside a shortcut through its experts.

Releases hold tensors for the experts that have kernels; transformers writes gate and up tensors for
those that return their input, too, which nothing reads.
"""

from typing import Any

from mla_jax.families.decoder import mixture
from mla_jax.families.family import Family

_FLASH = {  # LongcatFlashConfig of transformers; its latents are always scaled
    "vocab_size": 131072, "hidden_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 10_000_000.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 512,
    "zero_expert_num": 256, "zero_expert_type": "identity", "num_experts_per_tok": 12,
    "routed_scaling_factor": 6.0, "norm_topk_prob": False, "eos_token_id": 2,
}  # fmt: skip
_RENAMED = {
    "num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size",
    "expert_ffn_hidden_size": "moe_intermediate_size", "moe_topk": "num_experts_per_tok",
}  # fmt: skip
_NAMES = {
    "mlp.gate": "mlp.router.classifier",
    "mlp.gate.e_score_correction_bias": "mlp.router.e_score_correction_bias",
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    if hf.get("num_layers") is not None:  # transformers' num_hidden_layers counts the attentions
        hf["num_hidden_layers"] = hf["num_layers"]
    if isinstance(hf.get("num_hidden_layers"), int):
        hf["num_mla_layers"] = 2 * hf["num_hidden_layers"]
    return hf


def _decoder(hf, attention, where):
    kind = hf.get("zero_expert_type")
    if kind not in (None, "identity"):
        raise ValueError(
            f"{where}: zero_expert_type={kind!r}: supported is 'identity', which returns its input."
        )
    if hf.get("router_bias"):
        raise ValueError(f"{where}: router_bias=True: the router's logits have no bias here.")
    # Its block for drafting, below "mtp.", has another shape.
    plain = hf | {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "n_shared_experts": 0}
    fields = mixture(plain, where, scoring="softmax")
    zero = hf.get("zero_expert_num") or 0
    return fields | {"shortcut": True, "selection_bias": True, "zero_expert_num": zero}


def _written(config, hf):
    theirs = {ours: name for name, ours in _RENAMED.items()}
    gone = ("num_mla_layers", "first_k_dense_replace", "n_shared_experts", "topk_method",
            "moe_layer_freq", "num_nextn_predict_layers", "scoring_func")  # fmt: skip
    kept = {theirs.get(key, key): value for key, value in hf.items() if key not in gone}
    return kept | {"zero_expert_num": config.zero_expert_num, "zero_expert_type": "identity"}


FAMILIES = (
    Family(
        model_types=("longcat_flash",), architecture="LongcatFlashForCausalLM", defaults=_FLASH,
        renamed=_RENAMED, adjust=_adjust, names=_NAMES, skipped=("mtp.",), decoder=_decoder,
        written=_written,
    ),
    Family(
        model_types=("longcat_flash_ngram", "longcat_next"), defaults=_FLASH, renamed=_RENAMED,
        adjust=_adjust,
        no_decoder="embeddings of several tokens together are not supported",
    ),
)  # fmt: skip
