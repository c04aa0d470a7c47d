"""A whole decoder from a Hugging Face checkpoint: every tensor used, none left over.

Layer by layer, each parameter placed as soon as it is read; the experts of a layer, which the
checkpoint holds one by one, become one array. The block for multi-token prediction follows the
layers under the next number, and is read where it is asked for.

Letters: D hidden size, F intermediate size, E experts.
"""

import concurrent.futures
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.checkpoint import names as naming
from mla_jax.checkpoint.attention import (
    THREADS,
    Shardings,
    copy,
    empty,
    load_attention,
    place,
    sharding_of,
)
from mla_jax.checkpoint.files import AttentionTensors, Checkpoint, is_scale
from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.layers.mlp import GatedMLP
from mla_jax.models.block import Block
from mla_jax.models.config import DecoderConfig
from mla_jax.models.decoder import Decoder
from mla_jax.models.predictor import MultiTokenPredictor


def load_decoder(
    path: str | os.PathLike,
    *,
    mtp: bool = False,
    dtype=jnp.bfloat16,
    param_dtype=None,
    precision=None,
    implementation: str | None = None,
    sharding: Shardings | None = None,
) -> Decoder:
    """Reads a model of DeepSeek's shape: its config.json and its safetensors.

    Args:
        path: a folder, or a repo id where `huggingface_hub` is installed.
        mtp: read the block for multi-token prediction too, the model's `predictor`. Its copies of
            the embedding and the head are not kept where they equal the model's, as usual.
        dtype: of the computation.
        param_dtype: of the parameters; None is `dtype`. The router's stay float32.
        precision, implementation: as in `MultiHeadLatentAttention`.
        sharding: as in `load_attention`; paths begin with "blocks.3.attention." and the like.

    Raises:
        ValueError: a config that is not of this shape; tensors missing, left over, or of another
            shape; mtp where there is no such block. The message names key and file.
        FileNotFoundError: no such folder or file.

    >>> import jax.numpy as jnp, mla_jax
    >>> model = load_decoder("DeepSeek-V2-Lite")  # doctest: +SKIP
    >>> model(jnp.array([[1, 2, 3]])).shape  # doctest: +SKIP
    (1, 3, 102400)
    """
    with Checkpoint(path) as files:
        config = decoder_config(files)
        try:
            model = nnx.eval_shape(
                lambda: Decoder(
                    config, mtp=mtp, dtype=dtype, param_dtype=param_dtype or dtype,
                    precision=precision, implementation=implementation, rngs=nnx.Rngs(0),
                )
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{files.path}: {error}") from error
        _Loader(files, model, sharding).load()
    return model


def decoder_config(files: Checkpoint) -> DecoderConfig:
    """The config of a checkpoint.

    Raises:
        FileNotFoundError: it has none.
        ValueError: as `DecoderConfig.from_hf`; the message names the checkpoint.
    """
    if not files.config:
        raise FileNotFoundError(f"{files.path} has no config.json, which says what model it is.")
    try:
        return DecoderConfig.from_hf(files.config)
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from error


class _Loader:
    def __init__(self, files: Checkpoint, model: Decoder, sharding: Shardings | None):
        self.files, self.model, self.sharding = files, model, sharding
        layers = files.layers()
        count = model.config.attention.num_hidden_layers
        if layers != list(range(count)):
            raise ValueError(
                f"{files.path} has latent attention in layers {layers}; its config says {count}."
            )
        self.attention_prefix = naming.attention_prefixes(files)[0, 0]
        self.root = self.attention_prefix[: self.attention_prefix.rindex("layers.0.")]
        self.embed = f"{self.root}embed_tokens.weight"
        # beside the root: "lm_head.weight", in a VLM "language_model.lm_head.weight", or above
        beside = f"{self.root.removesuffix('model.')}lm_head.weight"
        self.head = beside if beside in files else "lm_head.weight"
        self.used: set[str] = set()

    def load(self) -> None:
        """Fills the model."""
        root, model = self.root, self.model
        self._prefetch(self.embed, f"{root}layers.0.")
        self._fill("embed.embedding", model.embed.embedding, self.embed)
        for index, block in enumerate(model.blocks):
            tensors = self.files.attention(index)
            if index + 1 == len(model.blocks):
                self._prefetch(f"{root}layers.{index}.", f"{root}norm.", self.head)
            self._block(f"blocks.{index}.", block, f"{root}layers.{index}.", tensors)
        self._fill("norm.scale", model.norm.scale, f"{root}norm.weight")
        if model.head is not None:
            self._fill("head.kernel", model.head.kernel, self.head, transposed=True)
        if model.predictor is not None:
            self._predictor(model.predictor)
        self._check_all_used()

    def _prefetch(self, *prefixes: str) -> None:
        self.files.prefetch(name for name in self.files if name.startswith(prefixes))

    def _block(self, path: str, block: Block, prefix: str, tensors: AttentionTensors) -> None:
        own = self._attention_sharding(path)
        load_attention(block.attention, tensors, sharding=own)
        self.used |= {tensors.full_name(name) for name in tensors}
        for norm, theirs in (("attention_norm", "input_layernorm"),
                             ("mlp_norm", "post_attention_layernorm")):  # fmt: skip
            scale = getattr(block, norm).scale
            self._fill(f"{path}{norm}.scale", scale, f"{prefix}{theirs}.weight")
        if isinstance(block.mlp, MixtureOfExperts):
            self._mixture(f"{path}mlp.", block.mlp, f"{prefix}mlp.")
        else:
            self._mlp(f"{path}mlp.", block.mlp, f"{prefix}mlp.")

    def _predictor(self, predictor: MultiTokenPredictor) -> None:
        config = self.model.config
        prefix = f"{self.root}layers.{config.attention.num_hidden_layers}."
        if not any(name.startswith(prefix) for name in self.files):
            raise ValueError(
                f"{self.files.path} has nothing under {prefix}, where its config "
                f"(num_nextn_predict_layers={config.num_nextn_predict_layers}) puts the block for "
                "multi-token prediction; without mtp, draft by prompt lookup."
            )
        for ours, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm")):
            scale = getattr(predictor, ours).scale
            self._fill(f"predictor.{ours}.scale", scale, f"{prefix}{theirs}.weight")
        kernel = predictor.eh_proj.kernel
        self._fill("predictor.eh_proj.kernel", kernel, f"{prefix}eh_proj.weight", True)
        inside = self.attention_prefix.removeprefix(f"{self.root}layers.0.")
        tensors = AttentionTensors(self.files, prefix + inside)
        self._block("predictor.block.", predictor.block, prefix, tensors)
        embed = f"{prefix}embed_tokens.weight"
        if self._differs(embed, self.embed):
            sizes = config.vocab_size, config.attention.hidden_size
            predictor.embed = nnx.eval_shape(lambda: nnx.Embed(*sizes, **self._types()))
            self._fill("predictor.embed.embedding", predictor.embed.embedding, embed)
        head = f"{prefix}shared_head.head.weight"
        if self._differs(head, self.embed if self.model.head is None else self.head):
            sizes = config.attention.hidden_size, config.vocab_size
            bare = {"use_bias": False, "precision": predictor.eh_proj.precision}
            predictor.head = nnx.eval_shape(lambda: nnx.Linear(*sizes, **bare, **self._types()))
            self._fill("predictor.head.kernel", predictor.head.kernel, head, True)

    def _types(self) -> dict[str, Any]:
        embed = self.model.embed
        return {"dtype": embed.dtype, "param_dtype": embed.param_dtype, "rngs": nnx.Rngs(0)}

    def _differs(self, name: str, shared: str) -> bool:
        """Whether a tensor is there and is not a copy of another, which is used."""
        if name not in self.files:
            return False
        copy, own = self._read(name, self.files.shape(shared)), self.files.tensor(shared)
        step = max(1, 2**24 // max(1, own[:1].nbytes))
        for start in range(0, len(own), step):
            rows = slice(start, start + step)
            same = copy[rows].tobytes() == own[rows].tobytes()
            self.files.release()
            if not same:
                return True
        return False

    def _mixture(self, path: str, mlp: MixtureOfExperts, prefix: str) -> None:
        self._fill(f"{path}router.kernel", mlp.router.kernel, f"{prefix}gate.weight", True)
        if hasattr(mlp.router, "bias"):
            bias = f"{prefix}gate.e_score_correction_bias"
            self._fill(f"{path}router.bias", mlp.router.bias, bias)
        for kernel in ("gate_proj", "up_proj", "down_proj"):
            parameter = getattr(mlp, kernel)
            experts, *shape = parameter.shape
            dtype = np.dtype(parameter.dtype)
            stacked = empty(parameter.shape, dtype)

            def fill(expert, kernel=kernel, stacked=stacked, shape=tuple(shape[::-1])):
                name = f"{prefix}experts.{expert}.{kernel}.weight"
                copy(self._read(name, shape).T, stacked[expert])

            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fill, range(experts)))
            self.files.release()
            self._place(path + kernel, parameter, stacked, take=True)
        if mlp.shared is not None:
            self._mlp(f"{path}shared.", mlp.shared, f"{prefix}shared_experts.")

    def _mlp(self, path: str, mlp: GatedMLP, prefix: str) -> None:
        for kernel in ("gate_proj", "up_proj", "down_proj"):
            parameter = getattr(mlp, kernel).kernel
            self._fill(f"{path}{kernel}.kernel", parameter, f"{prefix}{kernel}.weight", True)

    def _fill(self, path: str, parameter: Any, name: str, transposed: bool = False) -> None:
        shape = parameter.shape[::-1] if transposed else parameter.shape
        tensor = self._read(name, shape)
        self._place(path, parameter, tensor.T if transposed else tensor)
        self.files.release()

    def _place(self, path: str, parameter: Any, host: np.ndarray, take: bool = False) -> None:
        goal = sharding_of(self.sharding, path, parameter.shape)
        parameter.set_value(place(host, parameter.dtype, goal, take=take))

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.files:
            raise ValueError(f"{self.files.path} lacks {name}, which its config asks for.")
        tensor = self.files.tensor(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} in {self.files.file_of(name)} has shape {tensor.shape}: the config asks "
                f"for {shape}."
            )
        self.used.add(name)
        return tensor

    def _attention_sharding(self, path: str) -> Shardings | None:
        if self.sharding is None:
            return None
        full = f"{path}attention."
        return lambda own, shape: sharding_of(self.sharding, full + own, shape)

    def _check_all_used(self) -> None:
        """Blocks for drafting that are not loaded and a tied head's copy may stay; nothing else."""
        count = self.model.config.attention.num_hidden_layers + (self.model.predictor is not None)
        left = []
        for name in self.files:
            if name in self.used or not name.startswith(self.root):
                continue
            rest = name.removeprefix(self.root)
            layer = rest.split(".")[1] if rest.startswith("layers.") else ""
            if (layer.isdigit() and int(layer) >= count) or rest.startswith("mtp."):
                continue
            if not naming.IGNORED.search(name) and not is_scale(name, self.files):
                left.append(name)
        if left:
            raise ValueError(
                f"{self.files.path} has {len(left)} tensors that this decoder does not use, such "
                f"as {left[0]} in {self.files.file_of(left[0])}."
            )
