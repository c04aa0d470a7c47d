"""The gate behind a load: what is left of a checkpoint is named, or may stay, and why."""

import re
from collections.abc import Iterable

from mla_jax.checkpoint import stored
from mla_jax.checkpoint.files import Checkpoint
from mla_jax.families import Family
from mla_jax.models.config import DecoderConfig

# What a left tensor's last name tells of it.
_SCHEMES = (
    (r"(qweight|qzeros|g_idx)$", "AWQ or GPTQ, which are not read"),
    (r"(weight_scale_2|weight_global_scale|input_global_scale)$", "NVFP4, which is not read"),
    (r"(_blocks|_scales)$", "MXFP4, which is not read"),
    (r"(absmax|quant_map|quant_state\..*|SCB)$", "bitsandbytes, which is not read"),
    (r"(weight_zero_point|weight_g_idx)$", "an asymmetric or reordered scheme, which is not read"),
)
_SCALE = re.compile(rf"({'|'.join(stored.SCALES)}|weight_shape|[a-z]+_scale)$")


def refuse_unused(
    files: Checkpoint,
    used: set[str],
    *,
    family: Family,
    whole: Family,
    root: str,
    config: DecoderConfig,
    drafts: bool,
) -> None:
    """Raises where a tensor of the language model was not used.

    Args:
        files: the checkpoint.
        used: names of the tensors that were; a scale only if something was multiplied by it.
        family: of the language model.
        whole: of the checkpoint, whose vision tower may stay.
        root: what stands before the language model's names.
        config: of the model.
        drafts: whether the block for multi-token prediction was loaded.

    Raises:
        ValueError: the message names the tensor, its file, and what it may be.
    """
    left = [name for name in files if name not in used]
    left = [name for name in left if stored.BUFFER.search(name) is None]
    left = [name for name in left if stored.beside(name, files) not in used]
    left = [name for name in left if not _is_vision(name, whole, root)]
    layers = root + family.tensor_name("layers")
    count = config.attention.num_hidden_layers
    behind = set() if drafts else _drafts(files, f"{layers}.", count, config, family)
    behind |= {root + prefix for prefix in family.skipped}
    left = [name for name in left if not name.startswith(tuple(behind))]
    left = [name for name in left if not _returns_its_input(name, f"{layers}.", config)]
    if not left:
        return
    name = left[0]
    more = f" There are {len(left)} such tensors." if len(left) > 1 else ""
    raise ValueError(
        f"{files.where(name)} is not used: {_reason(name, files, layers, count, config)}.{more}"
    )


def _is_vision(name: str, whole: Family, root: str) -> bool:
    """Whether a tensor belongs to a model beside the language model, which is nested then."""
    if root in ("", "model."):
        return False
    top = root.split(".")[0] + "."
    return name.startswith(whole.beside) or name.removeprefix(top).startswith(whole.beside)


def _returns_its_input(name: str, layers: str, config: DecoderConfig) -> bool:
    """Whether a tensor is of an expert that has no use for it."""
    match = re.match(rf"{re.escape(layers)}\d+\.mlp\.experts\.(\d+)\.", name)
    first = config.n_routed_experts or 0
    return match is not None and first <= int(match[1]) < first + config.zero_expert_num


def _drafts(
    files: Iterable[str], layers: str, count: int, config: DecoderConfig, family: Family
) -> set[str]:
    """Prefixes of the blocks for multi-token prediction: num_nextn_predict_layers with an eh_proj.

    They follow the layers, or stand beside them as "mtp".
    """
    found = set()
    last = f".{family.tensor_name('eh_proj')}.weight"
    drafts = config.num_nextn_predict_layers
    prefixes = [f"{layers}{index}." for index in range(count, count + drafts)]
    prefixes += [f"{layers.rpartition(family.tensor_name('layers'))[0]}mtp."] if drafts else []
    for prefix in prefixes:
        if any(name.startswith(prefix) and name.endswith(last) for name in files):
            found.add(prefix)
    return found


def _reason(name: str, files: Checkpoint, layers: str, count: int, config: DecoderConfig) -> str:
    match = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
    if match is not None and int(match[1]) >= count:
        return (
            f"its config says num_hidden_layers={count} and num_nextn_predict_layers="
            f"{config.num_nextn_predict_layers}, and a block for drafting has eh_proj"
        )
    for pattern, scheme in _SCHEMES:
        if re.search(pattern, name):
            return f"it looks like {scheme}"
    if _SCALE.search(name):
        return "nothing is multiplied by this scale"
    if name.endswith(".bias"):
        return "this decoder has no such bias"
    if match is not None:
        return "this decoder's layers have no such tensor"
    return "this decoder has no such tensor"
