"""dots3: sliding layers have widths and a rotary base of their own; the others are sparse."""

from collections.abc import Mapping
from typing import Any

from mla_jax.families.family import Family
from mla_jax.families.per_layer import count, one_of

_NOTE = {  # Dots3NoteTextConfig of transformers, and what its code does
    "vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 46, "num_attention_heads": 128,
    "q_lora_rank": 1024, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 524288, "rms_norm_eps": 1e-5, "index_topk": 2048,
    "index_n_heads": 64, "index_head_dim": 128, "indexer_rope_interleave": True,
    "rope_theta": 80_000_000.0, "k_rope_norm": True, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True, "output_gate": "head",
}  # fmt: skip
_SLIDING = {
    "num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024, "qk_nope_head_dim": 192,
    "v_head_dim": 128, "head_dim": 256,
}  # fmt: skip


def _adjust(hf: dict[str, Any], where: str, layer: int | None) -> dict[str, Any]:
    hf.setdefault("latent_norm_eps", hf.get("rms_norm_eps", 1e-5))
    canonical = hf.get("per_layer_config") is not None
    kinds = hf.get("layer_types")
    sparse = hf.get("use_dsa", None if canonical else True)
    if kinds is None:
        full = "full_attention" if sparse is False else "indexed_attention"
        sliding = hf.get("use_sliding_window", True)
        kinds = [
            "sliding_attention" if sliding and i >= 2 and i % 4 != 1 else full
            for i in range(count(hf, where))
        ]
    elif sparse is not None and isinstance(kinds, list):
        renamed = ("full_attention", "indexed_attention")[:: 1 if sparse else -1]
        kinds = [renamed[1] if kind == renamed[0] else kind for kind in kinds]
    kind = one_of(kinds, where, layer, "layer_types")
    hf["layer_types"] = [kind]
    window = hf.pop("sliding_window", None) or hf.pop("sliding_window_size", None) or 512
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling")
    if isinstance(parameters, Mapping):
        own = [value for key, value in parameters.items() if key == kind]
        if own and isinstance(own[0], Mapping):
            hf["rope_parameters"] = own[0]
    if kind != "sliding_attention":
        return hf
    hf["sliding_window"], hf["index_topk"] = window, None
    if canonical:
        own = hf["per_layer_config"]
        index = 0 if layer is None else layer  # all alike where None
        own = own.get(str(index), own.get(index)) if isinstance(own, Mapping) else None
        if not isinstance(own, Mapping):
            raise ValueError(f"{where}: per_layer_config lacks the sliding layer {index}.")
        return hf | dict(own)
    hf |= {name: hf.get(f"swa_{name}", default) for name, default in _SLIDING.items()}
    if hf.get("swa_qk_rope_head_dim") is not None:
        hf["qk_rope_head_dim"] = hf["swa_qk_rope_head_dim"]
    elif isinstance(hf["head_dim"], int) and isinstance(hf["qk_nope_head_dim"], int):
        hf["qk_rope_head_dim"] = hf["head_dim"] - hf["qk_nope_head_dim"]
    hf["rope_theta"] = hf.get("swa_rope_theta", 50_000.0)
    return hf


FAMILIES = (
    Family(model_types=("dots3_note", "dots3_note_text"), defaults=_NOTE, adjust=_adjust),
)  # fmt: skip
