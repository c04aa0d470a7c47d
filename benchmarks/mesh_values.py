"""What a layout of mesh.py computes, to be compared with one device: logits, texts and experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from mesh_layout import Compiler, Spot  # beside this file

from mla_jax import sharding
from mla_jax.models import Decoder, DecoderConfig

WRITTEN = 24  # decode steps that follow a prompt
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
def forward(model, cache, prompts, counts, text):
    """Logits of prompts' last tokens and of the text [B T] that follows: [B 1+T W].

    In the place of a word below 0 stands the best one: so a text of such words is greedy.
    """
    last, cache = model.prefill_last(prompts, cache.as_fresh(), counts)
    last = sharding.move(last)

    def step(carry, word):
        cache, logits = carry
        word = jnp.where(word < 0, logits.argmax(-1).astype(word.dtype), word)
        logits, cache = model.decode(word[:, None], cache)
        logits = sharding.move(logits[:, 0])
        return (cache, logits), logits

    _, after = lax.scan(step, (cache, last), text.T)
    return jnp.concatenate([last[:, None], after.swapaxes(0, 1)], axis=1)


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
    """Ragged prompts, a row for every device, their lengths, and a text yet to be written."""
    counts = np.array([WIDTH - 7 * i for i in range(n)], np.int32)
    counts[-1] = 1
    words = np.random.default_rng(0).integers(0, config.vocab_size, (n, WIDTH), np.int32)
    return words, counts, np.full((n, WRITTEN), -1, np.int32)


class Values:
    """What is compared with one device: a model's logits, its greedy text, one mixture of experts.

    `forms` are the computations: "bfloat16", and before it "float32" where this says what is right.
    """

    def __init__(
        self, spot: Spot, config: DecoderConfig, compiler: Compiler, forms: Any, name: str
    ):
        self.spot, self.config, self.compiler, self.forms = spot, config, compiler, forms
        self.name, self.n = name, spot.mesh.size
        self.slots = 128 * max(2, self.n)

    def compile(self) -> None:
        """Adds the programs."""
        with self.spot.use():
            shapes = self.spot.model(self.config)
            given = probe(self.n, self.config)
            for form in self.forms:
                model = in_float32(shapes) if form == "float32" else shapes
                empty = functools.partial(model.init_cache, self.n, self.slots)
                self.compiler.add(f"{self.name}, cache, {form}", self.spot.maker(empty))
                cache = self.spot.laid(jax.eval_shape(empty))
                self.compiler.add(f"{self.name}, logits, {form}", forward, model, cache, *given)
                for tokens in (1, WIDTH) if mixture(model) is not None else ():
                    width = self.config.attention.hidden_size
                    x = self.spot.rows(self.n, tokens, width, dtype=jnp.bfloat16)
                    name = f"{self.name}, experts of {tokens}, {form}"
                    self.compiler.add(name, mixed, mixture(model), x)
            self.compiler.add(f"{self.name}, fingerprint", fingerprint, looked_at(shapes))

    def found(self, model: Decoder, text: Any = None) -> dict[str, Any]:
        """By form: logits [n 1+T W] of a text, and what the experts make, on the host in float32.

        The text [n T] is float32's greedy one, and None where float32 is among the forms. Each form
        also writes its own words [n 1+T].
        """
        say, host = self.compiler.say, lambda x: np.asarray(x.astype(jnp.float32))
        found: dict[str, Any] = {}
        with self.spot.use():
            say(f"{self.name}, fingerprint")
            bits = self.compiler[f"{self.name}, fingerprint"](looked_at(model))
            found["fingerprint"] = int(np.asarray(bits))
            zeros = untipped(model)
            for form in self.forms:
                wide, plain = (zeros, model)
                if form == "float32":
                    wide, plain = in_float32(zeros), in_float32(model)
                cache = self.compiler[f"{self.name}, cache, {form}"]()
                prompts, counts, unwritten = probe(self.n, self.config)
                program = self.compiler[f"{self.name}, logits, {form}"]
                say(f"{self.name}, logits, {form}")
                logits = host(program(wide, cache, prompts, counts, unwritten))
                words = logits.argmax(2).astype(np.int32)
                if form == "float32":
                    text = words[:, :-1]
                else:
                    logits = host(program(wide, cache, prompts, counts, text))
                found[form] = {"logits": logits, "words": words, "experts": []}
                for tokens in (1, WIDTH) if mixture(model) is not None else ():
                    say(f"{self.name}, experts of {tokens}, {form}")
                    like = self.spot.rows(self.n, tokens, self.config.attention.hidden_size)
                    x = np.random.default_rng(tokens).standard_normal(like.shape, np.float32)
                    x = jnp.asarray(x, jnp.bfloat16)
                    x = jax.device_put(x, like.sharding) if self.spot.rules else x
                    program = self.compiler[f"{self.name}, experts of {tokens}, {form}"]
                    found[form]["experts"].append(host(program(mixture(plain), x)))
        return found
