"""What a quantization_config says: in which forms a checkpoint's weights may be stored.

A form is a kind of number and the block of numbers that share a scale. Read are fp8 and int8 with a
scale per tensor, row or block, and compressed-tensors' packed integers with one per group of a row
(Kimi-K2-Thinking's experts). Any other scheme is refused by its name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mla_jax.families import language_model

Grain = Literal["tensor", "row", "block"]
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
INT8, INT32 = np.dtype(np.int8), np.dtype(np.int32)
_BLOCK = (128, 128)
# Keys of a config.json that announce stored forms.
QUANTIZATION = ("quantization_config", "compression_config", "quantization")
# Names that say nothing of how weights are stored, such as how activations would be quantised.
_SILENT = (
    "quant_method", "activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt",
    "fmt", "weight_block_size", "activation_scale_ub", "dequantize", "exclude_modules", "producer",
    "kv_cache_scheme", "kv_cache_quant_algo", "quant_algo", "ignore",
    "is_checkpoint_fp8_serialized", "config_groups",
)  # fmt: skip
_READ = (
    "fp8, fbgemm_fp8, w8a8_fp8, w8a8_int8, blockwise_int8, modelopt's FP8 and compressed-tensors' "
    "float-quantized, int-quantized, naive-quantized and pack-quantized"
)
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a stored weight.

    Attributes:
        dtype: what the file holds; int32 is packed integers.
        block: rows and columns that share a scale; None is all of that axis.
        bits: of one number.
        exponents: whether scales may be powers of two, stored as their exponents.
    """

    dtype: np.dtype
    block: tuple[int | None, int | None]
    bits: int = 8
    exponents: bool = False

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight."""
        return tuple(
            -(-size // (step or size or 1)) for size, step in zip(shape, self.block, strict=True)
        )


def forms(config: Mapping[str, Any], where: str) -> tuple[Form, ...] | None:
    """The forms that a config.json announces.

    Args:
        config: the config.json, {} where there is none.
        where: what to call it in an error.

    Returns:
        None where nothing is announced: then fp8 and int8 in any grain may come.

    Raises:
        ValueError: a scheme that is not read; the message names it.

    >>> forms({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ...       "config.json")[0].block
    (128, 128)
    >>> forms({"quantization_config": {"quant_method": "awq"}}, "config.json")
    Traceback (most recent call last):
    ValueError: config.json: quantization_config: quant_method='awq': its weights are not read...
    """
    for part in (language_model(config), config):
        for key in QUANTIZATION:
            found = part.get(key)
            if found is None:
                continue
            if not isinstance(found, Mapping):
                raise ValueError(f"{where}: {key}={found!r} must be an object or null.")
            return _forms(found, f"{where}: {key}")
    return None


def undeclared() -> tuple[Form, ...]:
    """What is read where nothing is announced."""
    return _grains((E4M3, E5M2, INT8), ("block", "row", "tensor"), _BLOCK, exponents=True)


def _grains(dtypes, grains, block, exponents=False) -> tuple[Form, ...]:
    blocks = {"tensor": (None, None), "row": (1, None), "block": block}
    return tuple(
        Form(dtype, blocks[grain], exponents=exponents and dtype != INT8)
        for dtype in dtypes
        for grain in grains
    )


def _forms(config: Mapping[str, Any], where: str) -> tuple[Form, ...]:
    if "qformat_weight" in config:  # Mistral's params.json
        if config["qformat_weight"] != "fp8_e4m3":
            _refuse(where, "qformat_weight", config["qformat_weight"])
        return _grains((E4M3,), ("block", "row", "tensor"), _BLOCK)
    method = config.get("quant_method")
    if method is None and config.get("weight_block_size") is not None:
        block = _block_size(config["weight_block_size"], where)
        return _grains((E4M3, E5M2, INT8), ("block",), block, exponents=True)
    if method == "compressed-tensors":
        return _compressed(config, where)
    if method == "modelopt" and config.get("quant_algo") != "FP8":
        _refuse(where, "quant_algo", config.get("quant_algo"))
    if method not in ("fp8", "fbgemm_fp8", "w8a8_fp8", "w8a8_int8", "blockwise_int8", "modelopt"):
        _refuse(where, "quant_method", method)
    for key, value in config.items():
        if key not in _SILENT and value not in (None, False):
            _refuse(where, key, value)
    block = _block_size(config.get("weight_block_size"), where)
    if method in ("w8a8_int8", "blockwise_int8"):
        dtypes = (INT8,)
    else:
        kind = config.get("fmt", "e4m3")
        kinds = {"e4m3": E4M3, "float8_e4m3fn": E4M3, "e5m2": E5M2, "float8_e5m2": E5M2}
        if kind not in kinds:
            _refuse(where, "fmt", kind)
        dtypes = (kinds[kind],)
    exponents = config.get("scale_fmt") == "ue8m0"
    if block is not None:
        return _grains(dtypes, ("block",), block, exponents)
    if method == "blockwise_int8":
        raise ValueError(f"{where} lacks weight_block_size.")
    grains = ("tensor", "row") if method in ("fp8", "modelopt") else ("row",)
    return _grains(dtypes, grains, None, exponents)


def _compressed(config: Mapping[str, Any], where: str) -> tuple[Form, ...]:
    """compressed-tensors: one form a group of modules; `ignore` names those that stay plain."""
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            _refuse(where, key, config[key])
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where}: config_groups={groups!r} must be an object with groups.")
    found = []
    for name, group in groups.items():
        inside = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{inside}={group!r} must be an object.")
        format = group.get("format") or config.get("format")
        if format not in _FORMATS:
            _refuse(inside, "format", format)
        weights = group.get("weights")
        if weights is not None:
            found.append(_compressed_group(weights, format, f"{inside}.weights"))
    return tuple(found)


def _compressed_group(weights: Any, format: str, where: str) -> Form:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}={weights!r} must be an object.")
    if weights.get("symmetric", True) is not True:
        _refuse(where, "symmetric", weights["symmetric"])
    if weights.get("actorder") not in (None, False, "static", "weight"):
        _refuse(where, "actorder", weights["actorder"])
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(size, int) and size > 0 else "tensor"
    block: tuple[int | None, int | None]
    if strategy == "group":
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: group_size={size!r} must be a positive whole number.")
        block = (1, size)
    elif strategy == "block":
        given = _block_size(weights.get("block_structure"), where, "block_structure")
        block = given or _BLOCK
    elif strategy in ("tensor", "channel"):
        block = (None, None) if strategy == "tensor" else (1, None)
    else:
        _refuse(where, "strategy", strategy)
    if format == "pack-quantized":
        if kind != "int" or bits not in (4, 8):
            raise ValueError(
                f"{where}: num_bits={bits!r}, type={kind!r}: packed are read integers of 4 or 8 "
                "bits."
            )
        return Form(INT32, block, bits)
    dtypes: dict[Any, np.dtype] = {("int", 8): INT8, ("float", 8): E4M3}
    if (kind, bits) not in dtypes:
        raise ValueError(f"{where}: num_bits={bits!r}, type={kind!r}: {format} has 8 bits.")
    return Form(dtypes[kind, bits], block)


def _block_size(block: Any, where: str, key: str = "weight_block_size") -> tuple[int, int] | None:
    if block is None:
        return None
    sizes = range(1, 2**20)
    whole = isinstance(block, list | tuple) and len(block) == 2
    if not whole or any(isinstance(b, bool) or b not in sizes for b in block):
        raise ValueError(f"{where}: {key}={block!r} must be two positive whole numbers.")
    return block[0], block[1]


def _refuse(where: str, key: str, value: Any):
    raise ValueError(f"{where}: {key}={value!r}: its weights are not read; these are: {_READ}.")
