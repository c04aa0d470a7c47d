"""Checks and times a decoder with random weights on 2, 4 or 8 accelerators of one host.

Four parts, each printed as it goes:
    values   every layout against one device: a mixture of experts, logits of ragged prompts and
             of three steps that follow, and a greedy text; what is right is said below;
    steps    milliseconds of a decode step at every batch behind --context tokens, of one device
             and of every layout; what it sends over the links, by its compiled program and by the
             closed form (`mla_jax.placement`); and efficiency, the time of one device over n times
             that of n;
    large    DeepSeek-V3's shape with as many layers as fit: its split rows' logits against those
             of split slots, and the same times;
    long     one row of --long slots, split over the devices, and on one device where that fits.

Layouts, all on one axis of n devices ("-" in the table: the rows do not divide):
    data     rows; weights whole everywhere
    tensor   heads, MLPs, vocabulary, experts; every device has all rows
    expert   rows and experts; the weights of attention whole everywhere
    wide     rows, experts, and the weights of attention by heads
    helix    slots of the cache, and all weights by heads, experts and words

What is right in bfloat16: the sums of a layout are those of one device in another order, some of
them rounded once more, so that its error against the same weights in float32 may be twice one
device's own. Rounding also tips the choice between two experts that score nearly alike, and then
logits are elsewhere by as much as the experts differ, on one device as on several. So the whole
model is compared with routers of zeros: all scores are equal, every token takes the first experts,
and nothing can tip. Of the logits the norm of the error is compared, and a word of the text may be
behind the best by 2 x 2 times the largest error of one device's logits: both logits err, each
twice as much at most. The experts are compared apart, one layer of them with the router that it
has, which is in float32 and is given the same numbers in every layout: n devices round a part of
each sum, and round again as they add the parts, so that sqrt(n) half units of the last place, 2^-9,
may come to one device's error. A token that goes astray among m shows as sqrt(1 / m).

A part that fails is reported, the others run, and the exit code is 1. One that takes longer than
--limit seconds, as a collective does that waits for ever, ends the run: the tables of what there is
are printed first, and --layouts and --parts ask for the rest.

    python benchmarks/mesh.py --json mesh.json
    python benchmarks/mesh.py --small     8 simulated CPU devices, a model of two small layers

NVLink multicast is switched off unless NCCL_NVLS_ENABLE says otherwise, and XLA's own collective
kernels stay off.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import threading
import time
import traceback
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")

import jax
import jax.numpy as jnp
import links  # beside this file
import numpy as np
from flax import nnx
from jax import lax

import mla_jax
from mla_jax import sharding
from mla_jax.generation import generate
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.placing import placement
from mla_jax.sharding import Rules

STARTED = time.perf_counter()
SPLIT: dict[str, Any] = {"N": "x", "F": "x", "W": "x", "E": "x"}
LAYOUTS = {
    "data": Rules(B="x"),
    "tensor": Rules(**SPLIT),
    "expert": Rules(B="x", E="x"),
    "wide": Rules(B="x", **SPLIT),
    "helix": Rules(S="x", **SPLIT),
}
WRITTEN = 24  # words of the greedy text
SMALL = {
    "simulated": 8, "preset": "tiny", "heads": 8, "layers": 2, "batches": [1, 8], "context": 100,
    "steps": 2, "blocks": 2, "long": 2048, "large": "tiny", "large_layers": 2,
}  # fmt: skip


def say(text: str) -> None:
    """Prints with the seconds since the start, at once."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


class Report:
    """What was found, kept in a file as it comes, and what failed."""

    def __init__(self, path: pathlib.Path | None, head: dict[str, Any], limit: float):
        self.path, self.kept, self.failed = path, {**head, "rows": []}, []
        self.limit = limit

    def add(self, **row: Any) -> None:
        """Keeps one row."""
        self.kept["rows"].append(row)
        if self.path:
            self.path.write_text(json.dumps(self.kept, indent=1) + "\n")

    def trying(self, part: str, layout: str, run, *given: Any, limited: bool = True) -> Any:
        """`run(*given)`; an error is reported and kept, and None comes back.

        What consists of parts that are tried themselves is not `limited` in its time.
        """
        watch = threading.Timer(self.limit, self.give_up, (part, layout))
        watch.daemon = True
        if limited:
            watch.start()
        try:
            return run(*given)
        except Exception as error:
            traceback.print_exc()
            first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            say(f"{part}, {layout}: FAILED: {first}")
            self.failed.append(f"{part}, {layout}")
            self.add(part=part, layout=layout, failure=first)
            return None
        finally:
            watch.cancel()

    def give_up(self, part: str, layout: str) -> None:
        """Prints the tables of what is done, and ends the process, which waits for devices."""
        say(f"{part}, {layout}: GIVEN UP after {self.limit:.0f} s")
        self.add(part=part, layout=layout, failure=f"given up after {self.limit:.0f} s")
        self.summary()
        print("failed: " + "; ".join([*self.failed, f"{part}, {layout}"]), flush=True)
        os._exit(1)

    def summary(self) -> None:
        """The tables: a line for every layout, a column for every batch; and the values."""
        timed = [row for row in self.kept["rows"] if "batch" in row]
        for part in dict.fromkeys(row["part"] for row in timed):
            mine = [row for row in timed if row["part"] == part]
            batches = sorted({row["batch"] for row in mine})
            heads = (f"batch {b}: ms, MB sent (closed form), efficiency" for b in batches)
            print(f"\n| {part} | " + " | ".join(heads) + " |\n|---|" + "---|" * len(batches))
            for name in dict.fromkeys(row["layout"] for row in mine):
                cells = []
                for batch in batches:
                    found = [r for r in mine if (r["layout"], r["batch"]) == (name, batch)]
                    cells.append(_cell(found[-1]) if found else "-")
                print(f"| {name} | {' | '.join(cells)} |")
        checked = [row for row in self.kept["rows"] if "own" in row]
        if checked:
            print("\n| values | error, one device's | experts' error, one device's | words as one "
                  "device's | farthest word, bound |\n|---|---|---|---|---|")  # fmt: skip
        for row in checked:
            experts = ", ".join(f"{a:.1e}, {b:.1e}" for a, b in row["experts"])
            print(f"| {row['part']}, {row['layout']} | {row['error']:.2e}, {row['own']:.2e} | "
                  f"{experts} | {row['same']} of {row['words']} | {row['lost']:.2e}, "
                  f"{row['bound']:.2e} |")  # fmt: skip
        sys.stdout.flush()


def _cell(row: dict[str, Any]) -> str:
    """One measurement in the table; "-" where the rows do not divide."""
    if "seconds" not in row:
        return "failed" if "failure" in row else "-"
    sent, share = sum(sent for _, sent in row["moved"].values()) / 1e6, row.get("efficiency")
    return (f"{row['seconds'] * 1e3:.3f}, {sent:.2f} ({row['least'] / 1e6:.2f}), "
            + (f"{share:.2f}" if share else "-"))  # fmt: skip


@dataclasses.dataclass
class Run:
    """The devices, the model that is looked at, and what was asked for."""

    options: argparse.Namespace
    mesh: Any
    report: Report

    @property
    def n(self) -> int:
        """How many devices."""
        return self.mesh.size


def placed(model: Decoder, place: Rules) -> Decoder:
    """The same weights, where the layout has them."""
    return jax.block_until_ready(jax.device_put(model, place.of(model)))


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


@jax.jit
def mixed(layer, x):
    """A mixture of experts."""
    return sharding.move(layer(x))


def mixtures(model, place: Rules | None, run: Run):
    """What the first mixture makes of few and of many tokens, on the host in float32."""
    layer = next((block.mlp for block in model.blocks if hasattr(block.mlp, "router")), None)
    found = []
    for tokens in (1, 136) if layer is not None else ():
        shape = run.n, tokens, model.config.attention.hidden_size
        x = np.random.default_rng(tokens).standard_normal(shape, np.float32)
        x = jnp.asarray(x, jnp.bfloat16)
        if place is not None:
            x = jax.device_put(x, jax.NamedSharding(run.mesh, sharding.pspec(place.B)))
        found.append(np.asarray(mixed(layer, x).astype(jnp.float32)))
    return found


@jax.jit
def forward(model, cache, prompts, counts, more):
    """Logits of a prompt's last tokens [B W], and of three more tokens [B 3 W], one by one."""
    last, cache = model.prefill_last(prompts, cache.as_fresh(), counts)
    after = []
    for at in range(3):
        logits, cache = model.decode(more[:, at : at + 1], cache)
        after.append(logits)
    whole = lambda x: sharding.move(x)  # noqa: E731
    return whole(last), whole(jnp.concatenate(after, axis=1))


def probe(run: Run, config: DecoderConfig):
    """Ragged prompts, a row for every device and one slot behind a border of 128 slots."""
    random = np.random.default_rng(0)
    width = 136
    counts = np.array([width - 7 * i if i else width for i in range(run.n)], np.int32)
    counts[-1] = 1
    words = random.integers(0, config.vocab_size, (run.n, width + 3), np.int32)
    return words[:, :width], counts, words[:, width:]


def logits_of(model, place: Rules | None, given, n: int):
    """Logits of the probe, on the host in float32."""
    slots = 128 * max(2, n)
    rules = {} if place is None else {"sharding": place}
    cache = model.init_cache(n, slots, **rules)
    prompts, counts, more = given
    found = forward(model, cache, prompts, counts, more)
    last, after = (np.asarray(x.astype(jnp.float32)) for x in found)
    return np.concatenate([last[:, None], after], axis=1)


def off(a, b) -> float:
    """Relative distance of two arrays."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def greedy(model, place: Rules | None, prompts):
    """The words that a model writes."""
    rules: dict[str, Any] = {"max_length": 128 * max(2, len(prompts))}  # a block for every device
    rules |= {} if place is None else {"sharding": place}
    return generate(model, prompts, max_new_tokens=WRITTEN, **rules).tokens


def regrets(score, prompts, texts):
    """How far every word is from the best by `score`, a jitted model, given the words before it."""
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.array([[*prompt, *text]], np.int32)
        logits = np.asarray(score(tokens))[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(text)[:, None], axis=1)[:, 0]
        found.append(logits.max(1) - chosen)
    return np.concatenate(found)


@jax.jit
def scored(model, tokens):
    """Logits of a whole text."""
    return sharding.move(model(tokens))


@dataclasses.dataclass
class Wanted:
    """What layouts are compared with: float32's results, bfloat16's errors, and a text.

    Attributes:
        logits: of the probe `given`, in float32.
        own, most: the error of one device's logits in bfloat16, its norm and the largest.
        mixtures: of float32, each with one device's error.
        text: that one device writes behind `prompts`.
        score: logits of a text in float32.
    """

    logits: np.ndarray
    own: float
    most: float
    mixtures: list[tuple[np.ndarray, float]]
    text: list[list[int]]
    prompts: list[list[int]]
    score: Any
    given: Any

    @classmethod
    def of(cls, run: Run, model: Decoder, place: Rules | None = None) -> "Wanted":
        """By one device, or by a layout that stands for it."""
        experts = [
            (wanted, off(found, wanted))
            for wanted, found in zip(
                mixtures(in_float32(model), place, run), mixtures(model, place, run), strict=True
            )
        ]
        given, model = probe(run, model.config), untipped(model)
        wide = in_float32(model)
        wanted = logits_of(wide, place, given, run.n)
        found = logits_of(model, place, given, run.n)
        prompts = [row[:20].tolist() for row in given[0]]
        text = greedy(model, place, prompts)

        def score(tokens):
            with contextlib.nullcontext() if place is None else jax.set_mesh(run.mesh):
                return scored(wide, tokens)

        own, most = off(found, wanted), float(np.abs(found - wanted).max())
        say(f"values: bfloat16's own error {own:.2e}, at most {most:.2e} of a logit; of experts "
            + ", ".join(f"{error:.2e}" for _, error in experts))  # fmt: skip
        return cls(wanted, own, most, experts, text, prompts, score, given)

    def check(self, run: Run, model: Decoder, name: str, part: str, place: Rules) -> None:
        """Prints and keeps what a layout gives.

        Raises:
            ArithmeticError: it is wrong.
        """
        with jax.set_mesh(run.mesh):
            experts = [
                (off(found, wanted), own)
                for found, (wanted, own) in zip(
                    mixtures(model, place, run), self.mixtures, strict=True
                )
            ]
            model = untipped(model)
            found = logits_of(model, place, self.given, run.n)
            text = greedy(model, place, self.prompts)
        error, words = off(found, self.logits), len(self.prompts) * WRITTEN
        same = int((np.array(text) == np.array(self.text)).sum())
        lost, bound = regrets(self.score, self.prompts, text).max(), 4 * self.most
        of_experts = ", ".join(f"{mine:.2e} (one device {own:.2e})" for mine, own in experts)
        say(f"{part}, {name}: error {error:.2e} (one device {self.own:.2e}), of experts "
            f"{of_experts}; {same} of {words} words as one device's, the farthest {lost:.2e} from "
            f"the best (bound {bound:.2e})")  # fmt: skip
        run.report.add(
            part=part, layout=name, error=error, own=self.own, experts=experts, same=same,
            words=words, lost=float(lost), bound=bound,
        )  # fmt: skip
        if not (
            error <= 2 * self.own
            and lost <= bound
            and all(mine <= own + math.sqrt(run.n) * 2**-9 for mine, own in experts)
        ):
            raise ArithmeticError(f"{name} is wrong: see the line above")


def filled(model, rows: int, slots: int, held: int, place: Rules | None):
    """A cache whose rows hold so many tokens, of random numbers."""
    rules = {} if place is None else {"sharding": place}
    cache = model.init_cache(rows, slots, **rules)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache):
        def some(x):
            ramp = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            for axis in (0, 2):
                ramp = ramp * 31 + lax.broadcasted_iota(jnp.int32, x.shape, axis)
            value = ((ramp * 40503 >> 4) % 255 - 127).astype(x.dtype) / 100
            return sharding.move(value, *sharding.spec(x), mesh=sharding.mesh_of(x))

        stores = jax.tree.map(some, cache.stores)
        length = sharding.beside(jnp.full_like(cache.length, held), cache.length)
        return cache.replace(stores=stores, length=length)

    return jax.block_until_ready(fill(cache))


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def block(bound, cache, token, *, steps: int):
    """Greedy steps in one program: the new cache and token."""

    def one(_, carry):
        cache, token = carry
        logits, cache = bound.model.decode(token, cache)
        best = sharding.move(logits, *sharding.spec(token)[:1]).argmax(-1).astype(jnp.int32)
        return cache, sharding.beside(best, token)

    return lax.fori_loop(0, steps, one, (cache, token))


def timed(run: Run, model, rows: int, slots: int, held: int, place: Rules | None):
    """Seconds of a step (median of --blocks blocks), and what one device sends in a step."""
    steps, blocks = run.options.steps, run.options.blocks
    form = {}
    if place is not None:
        form = placement(
            model.config, mesh=dict(run.mesh.shape), sharding=place, batch_size=rows, length=slots
        ).link_bytes
    bound = mla_jax.bind(model)
    cache = filled(model, rows, slots, held, place)
    token = cache.beside(jnp.zeros((rows, 1), jnp.int32))
    started = time.perf_counter()
    program = block.lower(bound, cache, token, steps=steps).compile()
    compiling = time.perf_counter() - started
    text = program.as_text()
    moved = links.by_kind(links.collectives(text, run.n)) if place is not None else {}
    cache, token = jax.block_until_ready(program(bound, cache, token))
    taken = []
    for _ in range(blocks):
        started = time.perf_counter()
        cache, token = jax.block_until_ready(program(bound, cache, token))
        taken.append((time.perf_counter() - started) / steps)
    if bool(np.asarray(cache.overflowed).any()):
        raise ArithmeticError("a row overflowed: its slots are too few")
    memory = program.memory_analysis()
    return {
        "seconds": statistics.median(taken), "best": min(taken), "compile_s": compiling,
        "moved": {kind: (count / steps, sent / steps) for kind, (count, sent) in moved.items()},
        "least": sum(form.values()), "form": dict(form),
        "temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
    }  # fmt: skip


def times(run: Run, part: str, name: str, model, place: Rules | None, batches, alone) -> None:
    """Times every batch, prints and keeps a row for each."""
    options = run.options
    for rows in batches:
        if place is not None and rows % sharding.count(run.mesh, place.B):
            run.report.add(part=part, layout=name, batch=rows)
            continue
        need = options.context + options.steps * (options.blocks + 1)
        slots = -(-need // (128 * run.n)) * 128 * run.n
        given = (run, model, rows, slots, options.context, place)
        if place is None:
            found = run.report.trying(part, f"{name}, {rows} rows", timed, *given)
        else:
            with jax.set_mesh(run.mesh):
                found = run.report.trying(part, f"{name}, {rows} rows", timed, *given)
        if found is None:
            run.report.add(part=part, layout=name, batch=rows, failure="said above")
            continue
        seconds = found["seconds"]
        if place is None:
            alone[rows] = seconds
        efficiency = alone[rows] / seconds / run.n if rows in alone and place else None
        tell(part, name, rows, found, efficiency, options)
        run.report.add(part=part, layout=name, batch=rows, efficiency=efficiency, **found)


def tell(part, name, rows, found, efficiency, options) -> None:
    """Prints one measurement."""
    sent = sum(sent for _, sent in found["moved"].values())
    kinds = ", ".join(
        f"{count:.0f} {kind} {sent / 1e6:.3f} MB"
        for kind, (count, sent) in sorted(found["moved"].items())
    )
    say(f"{part}, {name}, {rows} rows: {found['seconds'] * 1e3:.3f} ms a step (best "
        f"{found['best'] * 1e3:.3f}), {rows / found['seconds']:,.0f} tokens/s"
        + (f", efficiency {efficiency:.2f}" if efficiency else "")
        + f"; temporaries {found['temporaries'] / 1e6:.0f} MB, compiled in "
        f"{found['compile_s']:.1f} s"
        + (f"; sends {sent / 1e6:.3f} MB a step, {sent / options.link * 1e3:.3f} ms at the links' "
           f"rate, {found['least'] / 1e6:.3f} MB by the closed form: {kinds}"
           if found["moved"] else ""))  # fmt: skip


def small(run: Run) -> None:
    """The parts `values` and `steps`, and `long`."""
    options, report = run.options, run.report
    config = shortened(DecoderConfig.from_preset(options.preset), options.layers, options.heads)
    model = jax.block_until_ready(
        random_decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    )
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    say(f"{options.preset}, {config.attention.num_hidden_layers} layers: {size / 1e9:.2f} GB")
    alone: dict[int, float] = {}
    wanted = None
    if "values" in options.parts:
        wanted = report.trying("values", "one device", Wanted.of, run, model)
    if "steps" in options.parts:
        times(run, "steps", "one device", model, None, options.batches, alone)
    if "long" in options.parts and options.long:
        report.trying("long", "one device", long_context, run, model, "one device", None)
    for name in options.layouts:
        place = LAYOUTS[name]
        with jax.set_mesh(run.mesh):
            there = report.trying("placing", name, placed, model, place)
        if there is None:
            continue
        if wanted is not None:
            report.trying("values", name, wanted.check, run, there, name, "values", place)
        if "steps" in options.parts:
            times(run, "steps", name, there, place, options.batches, alone)
        if "long" in options.parts and options.long and place.S:
            with jax.set_mesh(run.mesh):
                report.trying("long", name, long_context, run, there, name, place)
        del there


def long_context(run: Run, model, name: str, place: Rules | None) -> None:
    """One row that fills --long slots but for the steps that are timed."""
    slots = -(-run.options.long // (128 * run.n)) * 128 * run.n
    held = slots - run.options.steps * (run.options.blocks + 1)
    found = timed(run, model, 1, slots, held, place)
    tell("long", f"{name}, {slots:,} slots", 1, found, None, run.options)
    run.report.add(part="long", layout=name, batch=1, slots=slots, **found)


def large(run: Run) -> None:
    """DeepSeek-V3's shape with as many layers as fit: split rows against split slots, and times."""
    options = run.options
    config, place = DecoderConfig.from_preset(options.large), LAYOUTS["wide"]
    limit = options.memory or (run.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    layers = options.large_layers or fitting(run, config, place, limit)
    config = shortened(config, layers, options.heads)
    with jax.set_mesh(run.mesh):
        started = time.perf_counter()
        model = jax.block_until_ready(
            random_decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, sharding=place)
        )
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(nnx.state(model)))
    say(f"large: {options.large} with {layers} layers, {held / 1e9:.2f} GB a device, made in "
        f"{time.perf_counter() - started:.1f} s")  # fmt: skip
    run.report.add(part="large", layout="-", layers=layers, held=held)
    for name in ("wide", "helix"):  # whose weights lie alike
        times(run, "large", name, model, LAYOUTS[name], options.large_batches, {})
    with jax.set_mesh(run.mesh):
        wanted = run.report.trying("large", "reference", Wanted.of, run, model, LAYOUTS["tensor"])
    for name in ("wide", "helix") if wanted is not None else ():
        run.report.trying("large", name, wanted.check, run, model, name, "large", LAYOUTS[name])


def fitting(run: Run, config: DecoderConfig, place: Rules, limit: float | None) -> int:
    """How many layers fit with 0.8 of the memory for weights."""
    whole = config.attention.num_hidden_layers
    if limit is None:
        return min(whole, 4)

    def held(layers):
        shapes = nnx.eval_shape(
            lambda: Decoder(
                shortened(config, layers, None), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        with jax.set_mesh(run.mesh):
            spots = place.of(nnx.state(shapes))
        pairs = zip(jax.tree.leaves(nnx.state(shapes)), jax.tree.leaves(spots), strict=True)
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)

    dense = config.first_k_dense_replace
    base = held(dense + 1)
    each = held(dense + 2) - base
    return max(dense + 1, min(whole, dense + 1 + int((0.8 * limit - base) // each)))


def shortened(config: DecoderConfig, layers: int | None, heads: int | None) -> DecoderConfig:
    """The config with fewer layers, or other heads."""
    changes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    given = {name: value for name, value in changes.items() if value}
    return config.replace(attention=config.attention.replace(**given))


def main() -> None:
    """Runs every part that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, help="how many; all by default")
    add("--simulated", type=int, help="so many simulated CPU devices instead")
    add("--small", action="store_true",
        help=f"a trial without accelerators: {SMALL}, unless said otherwise")  # fmt: skip
    add("--parts", nargs="+", default=["values", "steps", "long", "large"],
        choices=["values", "steps", "long", "large"])  # fmt: skip
    add("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    add("--preset", default="deepseek_v2_lite")
    add("--layers", type=int, help="fewer than the preset has")
    add("--heads", type=int, help="instead of the preset's, which n may not divide")
    add("--batches", type=int, nargs="+", default=[1, 8, 64])
    add("--context", type=int, default=4096, help="tokens that every row holds")
    add("--steps", type=int, default=32, help="decode steps in one program")
    add("--blocks", type=int, default=5, help="programs that are timed")
    add("--long", type=int, default=2**20, help="slots of the one long row; 0 is none")
    add("--large", default="deepseek_v3", help="preset of the part large")
    add("--large-layers", type=int, help="instead of as many as fit")
    add("--large-batches", type=int, nargs="+", default=[8, 64])
    add("--memory", type=float, help="bytes of a device, where it does not say")
    add("--link", type=float, default=450e9, help="bytes a second that a device sends")
    add("--limit", type=float, default=900, help="seconds of a part of a layout; then all ends")
    add("--json", type=pathlib.Path, help="write the figures here as they come")
    if parser.parse_args().small:
        parser.set_defaults(**SMALL)
    options = parser.parse_args()
    if options.simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.simulated)
    devices = jax.devices()[: options.devices or options.simulated]
    mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
    head = {
        "device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__,
        "preset": options.preset, "context": options.context, "link": options.link,
    }  # fmt: skip
    say(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    run = Run(options, mesh, Report(options.json, head, options.limit))
    if set(options.parts) - {"large"}:
        run.report.trying("model", options.preset, small, run, limited=False)
    if "large" in options.parts:
        run.report.trying("large", options.large, large, run, limited=False)
    run.report.summary()
    if run.report.failed:
        sys.exit("failed: " + "; ".join(run.report.failed))


if __name__ == "__main__":
    main()
