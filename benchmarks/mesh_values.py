"""What a layout of mesh.py computes, to be compared with one device: logits, experts and a text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from mesh_layout import Compiler, Spot  # beside this file

from mla_jax import sharding
from mla_jax.generation import generate
from mla_jax.models import Decoder, DecoderConfig

WRITTEN = 24  # words of the greedy text
WIDTH = 136  # tokens of the longest prompt: behind a border of 128 slots


def in_float32(model: Decoder) -> Decoder:
    """The same weights, computed with in float32."""
    other = nnx.eval_shape(
        lambda: Decoder(
            model.config, dtype=jnp.float32, param_dtype=jnp.bfloat16, precision="highest",
            implementation="xla", rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    nnx.update(other, nnx.state(model))
    return other


def untipped(model: Decoder) -> Decoder:
    """The same weights, but routers whose scores are all equal: every choice is the first ones."""
    other = nnx.merge(*nnx.split(model), copy=True)  # variables of its own, the same arrays
    for block in other.blocks:
        if hasattr(block.mlp, "router"):
            kernel = block.mlp.router.kernel
            kernel.set_value(jnp.zeros_like(kernel[...]))
    return other


def mixture(model: Decoder) -> Any:
    """The first mixture of experts; None where there is none."""
    return next((block.mlp for block in model.blocks if hasattr(block.mlp, "router")), None)


@jax.jit
def mixed(layer, x):
    """A mixture of experts."""
    return sharding.move(layer(x))


@jax.jit
def forward(model, cache, prompts, counts, more):
    """Logits of a prompt's last tokens and of three more, one by one: [B 4 W]."""
    last, cache = model.prefill_last(prompts, cache.as_fresh(), counts)

    def step(cache, token):
        logits, cache = model.decode(token[:, None], cache)
        return cache, sharding.move(logits[:, 0])

    _, after = lax.scan(step, cache, more.T)
    return jnp.concatenate([sharding.move(last)[:, None], after.swapaxes(0, 1)], axis=1)


@jax.jit
def fingerprint(arrays):
    """A sum of the arrays' bits with odd weights: the same in every layout."""
    found = jnp.uint32(0)
    for x in arrays:
        bits = lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
        ramp = jnp.zeros_like(bits, jnp.uint32)
        for axis in range(x.ndim):
            at = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            ramp = ramp * 65599 + sharding.beside(at, x)
        found += sharding.move((bits.astype(jnp.uint32) * (2 * ramp + 1)).sum(dtype=jnp.uint32))
    return found


def looked_at(model: Decoder) -> list[Any]:
    """The weights of the last layer and of the embedding."""
    return jax.tree.leaves((nnx.state(model.blocks[-1]), nnx.state(model.embed)))


def probe(n: int, config: DecoderConfig) -> tuple[Any, Any, Any]:
    """Ragged prompts, a row for every device, their lengths, and three words that follow."""
    counts = np.array([WIDTH - 7 * i for i in range(n)], np.int32)
    counts[-1] = 1
    words = np.random.default_rng(0).integers(0, config.vocab_size, (n, WIDTH + 3), np.int32)
    return words[:, :WIDTH], counts, words[:, WIDTH:]


class Values:
    """What is compared with one device: a whole model's logits and one mixture of experts.

    `forms` are the computations: "bfloat16", and "float32" where this says what is right.
    """

    def __init__(self, spot: Spot, config: DecoderConfig, compiler: Compiler, forms: Any, name=""):
        self.spot, self.config, self.compiler, self.forms = spot, config, compiler, forms
        self.name, self.n = name, spot.mesh.size
        self.slots = 128 * max(2, self.n)

    def compile(self) -> None:
        """Adds the programs."""
        with self.spot.use():
            shapes = self.spot.model(self.config)
            given = probe(self.n, self.config)
            cache = self.spot.laid(jax.eval_shape(lambda: shapes.init_cache(self.n, self.slots)))
            for form in self.forms:
                model = in_float32(shapes) if form == "float32" else shapes
                held = jax.eval_shape(lambda model=model: model.init_cache(self.n, self.slots))
                cache = self.spot.laid(held)
                self.compiler.add(f"{self.name}logits, {form}", forward, model, cache, *given)
                for tokens in (1, WIDTH) if mixture(model) is not None else ():
                    width = self.config.attention.hidden_size
                    x = self.spot.rows(self.n, tokens, width, dtype=jnp.bfloat16)
                    name = f"{self.name}experts of {tokens}, {form}"
                    self.compiler.add(name, mixed, mixture(model), x)
            self.compiler.add(f"{self.name}fingerprint", fingerprint, looked_at(shapes))

    def found(self, model: Decoder) -> dict[str, Any]:
        """By form: logits [n 4 W] and what the experts make, on the host in float32."""
        host = lambda x: np.asarray(x.astype(jnp.float32))  # noqa: E731
        found: dict[str, Any] = {}
        with self.spot.use():
            bits = self.compiler[f"{self.name}fingerprint"](looked_at(model))
            found["fingerprint"] = int(np.asarray(bits))
            zeros = untipped(model)
            for form in self.forms:
                wide, plain = (zeros, model)
                if form == "float32":
                    wide, plain = in_float32(zeros), in_float32(model)
                rules = {"sharding": self.spot.rules} if self.spot.rules else {}
                cache = wide.init_cache(self.n, self.slots, **rules)
                given = probe(self.n, self.config)
                logits = self.compiler[f"{self.name}logits, {form}"](wide, cache, *given)
                experts = []
                for tokens in (1, WIDTH) if mixture(model) is not None else ():
                    like = self.spot.rows(self.n, tokens, self.config.attention.hidden_size)
                    x = np.random.default_rng(tokens).standard_normal(like.shape, np.float32)
                    x = jnp.asarray(x, jnp.bfloat16)
                    x = jax.device_put(x, like.sharding) if self.spot.rules else x
                    program = self.compiler[f"{self.name}experts of {tokens}, {form}"]
                    experts.append(host(program(mixture(plain), x)))
                found[form] = {"logits": host(logits), "experts": experts}
        return found


@jax.jit
def scored(model, tokens):
    """Logits of whole texts [B T W], in float32."""
    return model(tokens).astype(jnp.float32)


def text(spot: Spot, config: DecoderConfig, copied: bool) -> dict[str, Any]:
    """A greedy text of `generate`, and how far its words are from the best of one device's float32.

    One device also says the largest error of its own logits in bfloat16, of the same text.
    """
    n = spot.mesh.size
    prompts = probe(n, config)[0][:, :20]
    there = untipped(spot.made(config, copied))
    # By way of the host: an array that is moved between devices keeps its mesh in its type.
    one = jax.tree.map(jnp.asarray, jax.device_get(there)) if spot.rules else there
    with spot.use():
        rules: dict[str, Any] = {"max_length": 128 * max(2, n)}  # a block for every device
        rules |= {"sharding": spot.rules} if spot.rules else {}
        written = generate(there, prompts.tolist(), max_new_tokens=WRITTEN, **rules).tokens
    whole = np.concatenate([prompts, np.array(written, np.int32)], axis=1)
    right = np.asarray(scored(in_float32(one), whole))[:, prompts.shape[1] - 1 : -1]
    chosen = np.take_along_axis(right, np.array(written)[..., None], axis=2)[..., 0]
    found = {"words": np.array(written), "lost": float((right.max(2) - chosen).max())}
    if not spot.rules:
        own = np.asarray(scored(one, whole))[:, prompts.shape[1] - 1 : -1]
        found["most"] = float(np.abs(own - right).max())
    return found
