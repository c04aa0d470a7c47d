"""Of mesh.py: where a model lies, programs that are compiled from shapes, and decode steps."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import links  # beside this file
import numpy as np
from flax import nnx
from jax import lax

import mla_jax
from mla_jax import sharding
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.placing import placement
from mla_jax.sharding import Rules

SPLIT: dict[str, Any] = {"N": "x", "F": "x", "W": "x", "E": "x"}
LAYOUTS = {  # in the order of their turns
    "tensor": Rules(**SPLIT),
    "helix": Rules(S="x", **SPLIT),
    "wide": Rules(B="x", **SPLIT),
    "expert": Rules(B="x", E="x"),
    "data": Rules(B="x"),
}
ONE = "one device"
TYPES: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a model lies: on one device, whose rules are None, or on the mesh."""

    mesh: Any
    rules: Any

    @classmethod
    def of(cls, mesh: Any, layout: str) -> "Spot":
        """By the name of a layout."""
        return cls(mesh, LAYOUTS.get(layout))

    def use(self) -> Any:
        """The context in which this layout's programs are traced and run."""
        return jax.set_mesh(self.mesh) if self.rules else contextlib.nullcontext()

    def laid(self, tree: Any) -> Any:
        """Shapes of arrays that lie so."""
        if not self.rules:
            return tree
        laid = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)  # noqa: E731
        return jax.tree.map(laid, tree, self.rules.of(tree))

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """The shape of an array that is split as the batch is."""
        to = jax.NamedSharding(self.mesh, sharding.pspec(self.rules.B)) if self.rules else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=to)

    def model(self, config: DecoderConfig) -> Decoder:
        """A decoder of shapes."""
        return self.laid(_shapes(config))

    def maker(self, create: Any) -> Any:
        """`create`, jitted: every array is made where it lies."""
        return self.rules.maker(create) if self.rules else jax.jit(create)


class Weights:
    """Random weights, by programs that are compiled from shapes like all others."""

    def __init__(self, spot: Spot, config: DecoderConfig, compiler: "Compiler", copied: bool):
        self.spot, self.config, self.compiler = spot, config, compiler
        # `copied` from one device, where they are made.
        self.made_at = dataclasses.replace(spot, rules=None) if copied else spot
        layers = config.attention.num_hidden_layers
        self.name = f"weights of {layers} layers"

    def decoder(self, program: Any) -> Decoder:
        """`random_decoder`, whose programs `program(number, create)` stand for."""

        class Makers:
            """In the place of `Rules`, of which `random_decoder` asks programs alone."""

            number = 0

            def maker(self, create):
                self.number += 1
                return program(self.number, create)

        with self.made_at.use():
            makers: Any = Makers()
            return random_decoder(self.config, sharding=makers, **TYPES)

    def compile(self) -> None:
        """Adds the programs; a model of shapes passes through them."""

        def program(number, create):
            def shapes(key):
                name = f"{self.name}, {number}"
                if name not in self.compiler.futures:  # equal layers share one
                    self.compiler.add(name, self.made_at.maker(create), key)
                return jax.eval_shape(create, key)

            return shapes

        self.decoder(program)

    def made(self) -> Decoder:
        """The decoder."""
        started = time.perf_counter()
        self.compiler.say(f"{self.name}: makes them")
        model = self.decoder(lambda number, _: self.compiler[f"{self.name}, {number}"])
        if self.made_at != self.spot:
            with self.spot.use():
                model = jax.device_put(model, self.spot.rules.of(model))
        jax.block_until_ready(model)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model))
        taken = time.perf_counter() - started
        self.compiler.say(f"{self.name}: made in {taken:.1f} s, {held / 1e9:.2f} GB a device")
        return model


@functools.cache
def _shapes(config: DecoderConfig) -> Decoder:
    """A decoder of shapes: seconds for a whole model, so it is made once."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **TYPES))


class Compiler:
    """Programs that compile beside each other, by name: those that are added first, first.

    `threads` is this process's share of the cores.
    """

    def __init__(self, say: Any, threads: int):
        self.say, self.futures, self.tuned = say, {}, []
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        # XLA would take all cores for every program: its own threads compile parts of one.
        self.flags = {"xla_gpu_force_compilation_parallelism": str(max(1, threads // 2))}

    def add(self, name: str, jitted: Any, *given: Any, tuned: bool = False, **fixed: Any) -> None:
        """Traces a program here, and compiles it in a thread.

        What is not timed need not be `tuned`: most of a compilation for a GPU is XLA's trials of
        kernels for matrix products.
        """
        flags = self.flags if tuned else self.flags | {"xla_gpu_autotune_level": "0"}
        self.tuned += [name] if tuned else []
        started = time.perf_counter()
        try:
            lowered = jitted.lower(*given, **fixed)
        except Exception as error:
            self.futures[name] = concurrent.futures.Future()
            self.futures[name].set_exception(error)
            return
        traced = time.perf_counter() - started

        def compiled():
            started = time.perf_counter()
            program = lowered.compile(compiler_options=flags)
            taken = time.perf_counter() - started
            self.say(f"{name}: traced in {traced:.1f} s, compiled in {taken:.1f} s")
            return program, traced + taken

        self.futures[name] = self.pool.submit(compiled)

    def wait(self, until: float) -> None:
        """Until every program is there or has failed; those that are not tuned, till a time.

        One that still compiles then is given up. It keeps a core, but nothing of a device.
        """
        concurrent.futures.wait([self.futures[name] for name in self.tuned])
        concurrent.futures.wait(self.futures.values(), timeout=max(0, until - time.time()))
        self.pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, name: str) -> Any:
        """A program.

        Raises:
            TimeoutError: it was given up.
            Exception: what its tracing or compilation has raised.
        """
        future = self.futures.get(name)
        if future is None or future.cancelled() or not future.done():
            raise TimeoutError(f"{name}: not compiled in time")
        return future.result()[0]

    def seconds(self, name: str) -> float:
        """Of tracing and of compilation."""
        return self.futures[name].result()[1]


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def block(bound, cache, token, *, steps: int):
    """Greedy steps in one program: the new cache and token."""

    def one(_, carry):
        cache, token = carry
        logits, cache = bound.model.decode(token, cache)
        best = sharding.move(logits, *sharding.spec(token)[:1]).argmax(-1).astype(jnp.int32)
        return cache, sharding.beside(best, token)

    return lax.fori_loop(0, steps, one, (cache, token))


@dataclasses.dataclass
class Steps:
    """Decode steps of one layout at one batch."""

    spot: Spot
    config: DecoderConfig
    rows: int
    slots: int
    held: int
    options: argparse.Namespace
    compiler: Compiler
    name: str
    moved: dict[str, Any] = dataclasses.field(default_factory=dict)
    form: dict[str, float] = dataclasses.field(default_factory=dict)

    def compile(self) -> None:
        """Adds the programs that fill a cache and that decode."""
        with self.spot.use():
            model = self.spot.model(self.config)
            shapes = jax.eval_shape(lambda: model.init_cache(self.rows, self.slots))

            def filled():
                def some(x):
                    ramp = lax.broadcasted_iota(jnp.int32, x.shape, 1)
                    for axis in (0, 2):
                        ramp = ramp * 31 + lax.broadcasted_iota(jnp.int32, x.shape, axis)
                    return ((ramp * 40503 >> 4) % 255 - 127).astype(x.dtype) / 100

                cache = model.init_cache(self.rows, self.slots)
                length = jnp.full_like(cache.length, self.held)
                return cache.replace(stores=jax.tree.map(some, cache.stores), length=length)

            self.compiler.add(f"{self.name}, cache", self.spot.maker(filled))
            token = self.spot.rows(self.rows, 1)
            given = mla_jax.bind(model), self.spot.laid(shapes), token
            self.compiler.add(self.name, block, *given, tuned=True, steps=self.options.steps)

    def read(self) -> None:
        """Reads what a compiled step sends, and what it has to send."""
        spot, steps = self.spot, self.options.steps
        if spot.rules:
            text = self.compiler[self.name].as_text()
            kinds = links.by_kind(links.collectives(text, spot.mesh.size))
            self.moved = {
                kind: (count / steps, sent / steps) for kind, (count, sent) in kinds.items()
            }
            self.form = dict(placement(
                self.config, mesh=dict(spot.mesh.shape), sharding=spot.rules,
                batch_size=self.rows, length=self.slots,
            ).link_bytes)  # fmt: skip

    def timed(self, model: Decoder) -> dict[str, Any]:
        """Seconds of a step (median of --blocks blocks), and what one device sends in a step.

        Raises:
            ArithmeticError: a row overflowed.
        """
        steps, spot, program = self.options.steps, self.spot, self.compiler[self.name]
        say = self.compiler.say
        with spot.use():
            say(f"{self.name}: fills a cache")
            bound, cache = mla_jax.bind(model), self.compiler[f"{self.name}, cache"]()
            token = cache.beside(jnp.zeros((self.rows, 1), jnp.int32))
            jax.block_until_ready(cache)
            say(f"{self.name}: runs for the first time")
            cache, token = jax.block_until_ready(program(bound, cache, token))
            say(f"{self.name}: is timed")
            taken = []
            for _ in range(self.options.blocks):
                started = time.perf_counter()
                cache, token = jax.block_until_ready(program(bound, cache, token))
                taken.append((time.perf_counter() - started) / steps)
            if bool(np.asarray(cache.overflowed).any()):
                raise ArithmeticError("a row overflowed: its slots are too few")
        memory = program.memory_analysis()
        return {
            "seconds": statistics.median(taken), "best": min(taken),
            "compile_s": self.compiler.seconds(self.name),
            "moved": self.moved, "least": sum(self.form.values()), "form": self.form,
            "temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
        }  # fmt: skip


def shortened(config: DecoderConfig, layers: int | None, heads: int | None) -> DecoderConfig:
    """The config with fewer layers, or other heads."""
    changes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    given = {name: value for name, value in changes.items() if value}
    return config.replace(attention=config.attention.replace(**given))


def fitting(spot: Spot, config: DecoderConfig, limit: float | None) -> int:
    """How many layers fit with 0.65 of the memory for weights, as float32 widens a layer's."""
    whole = config.attention.num_hidden_layers
    if limit is None:
        return min(whole, 4)

    def held(layers):
        with spot.use():
            shapes = jax.tree.leaves(spot.model(shortened(config, layers, None)))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes)

    dense = config.first_k_dense_replace
    base = held(dense + 1)
    each = held(dense + 2) - base
    return max(dense + 1, min(whole, dense + 1 + int((0.65 * limit - base) // each)))
