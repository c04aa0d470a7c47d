"""A decoder with random weights, made where it will run: to measure speed without a checkpoint."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from mla_jax.models.block import Block
from mla_jax.models.config import DecoderConfig
from mla_jax.models.decoder import Decoder
from mla_jax.models.longcat import ShortcutBlock
from mla_jax.models.rounding import round_weights
from mla_jax.ops import dispatch
from mla_jax.sharding import Rules


def random_decoder(
    config: DecoderConfig,
    *,
    seed: int = 0,
    mtp: bool = False,
    dtype=None,
    param_dtype=jnp.float32,
    precision=None,
    implementation: dispatch.Implementation = None,
    sharding: Rules | None = None,
    weights: str | None = None,
) -> Decoder:
    """What `Decoder(..., rngs=nnx.Rngs(seed))` is, other numbers, in a few programs.

    The constructor runs operation by operation: a minute for 16 G parameters on an H200. Here equal
    layers share one compiled program, and random bits come from the device's own generator.

    Args:
        config: its shape.
        seed: of the weights; the same seed gives the same weights on the same kind of device.
        mtp, dtype, param_dtype, precision, implementation: as in `Decoder`.
        sharding: how the mesh in use splits it; None is one device.
        weights: a form of `models.rounding` to which the layers' weights are rounded, as a
            checkpoint keeps them; None leaves them in param_dtype.

    Raises:
        ValueError: as `Decoder` and `sharding.Rules.of`.

    >>> import jax, jax.numpy as jnp
    >>> from mla_jax import MLAConfig
    >>> from mla_jax.models import DecoderConfig
    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> model = random_decoder(DecoderConfig(attention=attention), param_dtype=jnp.bfloat16)
    >>> jax.jit(lambda model, x: model(x))(model, jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 256)
    """
    types = {
        "dtype": dtype, "param_dtype": param_dtype, "precision": precision,
        "implementation": implementation,
    }  # fmt: skip

    def kept(block: nnx.Module) -> nnx.Module:
        if weights is not None:
            round_weights(block, weights)
        return block

    def whole():
        model = Decoder(config, mtp=mtp, rngs=nnx.Rngs(0), **types)
        kept(model.blocks)
        return model

    model = nnx.eval_shape(whole)
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), len(model.blocks) + 1)
    # All but the layers: of a model of one layer, whose own weights nobody asks for. A predictor's
    # block is the one behind, here as in the whole model sparse or dense.
    shallow = config.replace(
        attention=config.attention.replace(num_hidden_layers=1),
        indexer_types=None,
        first_k_dense_replace=0 if config.is_sparse(len(model.blocks)) or config.shortcut else 2,
    )

    def outside(key: Key[Array, ""]):
        made = Decoder(shallow, mtp=mtp, rngs=nnx.Rngs(key), **types)
        made.blocks = nnx.List()
        return nnx.state(made)

    def inside(layer: int):
        block = ShortcutBlock if config.shortcut else Block
        return lambda key: nnx.state(kept(block(config, layer, rngs=nnx.Rngs(key), **types)))

    program = jax.jit if sharding is None else sharding.maker
    nnx.update(model, program(outside)(keys[-1]))
    kind = lambda layer: (config.is_sparse(layer), config.attention_of(layer))  # noqa: E731
    alike = {kind(layer): layer for layer in range(len(model.blocks))}
    programs = {key: program(inside(layer)) for key, layer in alike.items()}
    for layer, block in enumerate(model.blocks):
        nnx.update(block, programs[kind(layer)](keys[layer]))
    return model
