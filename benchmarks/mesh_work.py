"""A process of mesh.py: it compiles, waits for its turn, computes and times.

Programs are compiled from shapes, so that a process that waits has no weights: it makes them when
the devices are its own. Tracing takes one thread; compilers run beside it. What is found goes
through a pipe to the first process, which compares, prints and keeps it.
"""

import argparse
import os
import tempfile
import threading
import time
import traceback
from typing import Any

import jax
from mesh_layout import ONE, Compiler, Spot, Steps, fitting, shortened  # beside this file
from mesh_values import Values, text  # beside this file

from mla_jax import sharding
from mla_jax.models import DecoderConfig


class Job:
    """What one process does: `before` all have compiled, and in its `turn`."""

    def __init__(self, part: str, layout: str, options: argparse.Namespace, send: Any):
        self.part, self.layout, self.options, self.send = part, layout, options, send
        devices = jax.devices()[: options.devices or options.simulated]
        self.mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
        self.compiler = Compiler(self.say)
        send("head", {"device": devices[0].device_kind, "devices": len(devices)})
        self.values, self.steps = [], []
        large = part == "large"
        spot = Spot.of(self.mesh, "wide" if large else layout)
        config = DecoderConfig.from_preset(options.large if large else options.preset)
        layers = options.layers
        if large:
            limit = (devices[0].memory_stats() or {}).get("bytes_limit")
            layers = options.large_layers or fitting(spot, config, options.memory or limit)
        self.config, self.spot = shortened(config, layers, options.heads), spot

    def say(self, what: str) -> None:
        """Has a line printed."""
        self.send("say", what)

    def trying(self, what: str, run: Any, *given: Any, **row: Any) -> Any:
        """`run(*given)`; an error is printed and sent with the row, and None comes back."""
        try:
            return run(*given)
        except Exception as error:
            traceback.print_exc()
            first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.send("failure", {"part": self.part, "layout": self.layout, **row,
                                  "what": what, "failure": first})  # fmt: skip

    def before(self) -> None:
        """Traces and compiles everything; texts are written meanwhile."""
        options, both = self.options, ("bfloat16", "float32")
        shapes = [self.layout]
        if self.part == "large":
            shapes = ["tensor", "wide", "helix"]
            for name in shapes:
                forms = both if name == "tensor" else both[:1]
                values = Values(Spot.of(self.mesh, name), self.config, self.compiler, forms,
                                f"{name}, ")  # fmt: skip
                self.values.append((name, values))
            shapes = shapes[1:]
        elif self.part == "layout" and "values" in options.parts:
            forms = both if self.layout == ONE else both[:1]
            self.values.append((self.layout, Values(self.spot, self.config, self.compiler, forms)))
        for name in shapes:
            self.steps += self.batches(name)
        for what in [values for _, values in self.values] + [steps for _, steps in self.steps]:
            self.trying("tracing", what.compile)
        # A short model's weights are made by the programs that make the whole one's.
        few = min(options.text_layers, self.config.attention.num_hidden_layers)
        short = shortened(self.config, few, None)
        if self.part == "layout" and "values" in options.parts:
            started = time.perf_counter()
            found = self.trying("text", text, self.spot, short, options.copied)
            if found is not None:
                self.send("text", found)
                self.say(f"text of {few} layers in {time.perf_counter() - started:.1f} s")
        elif self.part != "large":
            self.spot.made(short, self.options.copied)
        self.compiler.wait()
        for name, steps in self.steps:
            row = {"part": self.row_part, "layout": name, "batch": steps.rows}
            self.trying(f"program of {steps.rows} rows", steps.read, **row)

    def batches(self, name: str) -> list[tuple[str, Steps]]:
        """The decode steps that are timed."""
        options, spot, n = self.options, Spot.of(self.mesh, name), self.mesh.size
        more = options.steps * (options.blocks + 1)
        if self.part == "long":
            slots = -(-options.long // (128 * n)) * 128 * n
            sizes = [(1, slots, slots - more)]
        else:
            if self.part == "layout" and "steps" not in options.parts:
                return []
            slots = -(-(options.context + more) // (128 * n)) * 128 * n
            many = options.large_batches if self.part == "large" else options.batches
            sizes = [(rows, slots, options.context) for rows in many]
        found = []
        for rows, slots, held in sizes:
            if spot.rules and rows % sharding.count(self.mesh, spot.rules.B):
                self.send("row", {"part": self.row_part, "layout": name, "batch": rows})
                continue
            given = spot, self.config, rows, slots, held, options, self.compiler
            found.append((name, Steps(*given, f"{name}, {rows} rows of {slots:,} slots")))
        return found

    @property
    def row_part(self) -> str:
        """The table in which times stand."""
        return "steps" if self.part == "layout" else self.part

    def turn(self) -> None:
        """Makes the weights, computes and times, alone on the devices."""
        started = time.perf_counter()
        model = self.spot.made(self.config, self.options.copied)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model))
        layers = self.config.attention.num_hidden_layers
        self.say(f"weights of {layers} layers made in {time.perf_counter() - started:.1f} s, "
                 f"{held / 1e9:.2f} GB a device")  # fmt: skip
        if self.part == "large":
            self.send("row", {"part": "large", "layout": "-", "layers": layers, "held": held})
        for name, values in self.values:
            started = time.perf_counter()
            found = self.trying("values", values.found, model)
            if found is not None:
                self.say(f"values in {time.perf_counter() - started:.1f} s")
                self.send("values", {"as": name, **found})
        for name, steps in self.steps:
            started = time.perf_counter()
            row = {"part": self.row_part, "layout": name, "batch": steps.rows}
            found = self.trying(f"{steps.rows} rows", steps.timed, model, **row)
            if found is not None:
                self.send("row", {**row, "slots": steps.slots, **found})
                self.say(f"{steps.name}: timed in {time.perf_counter() - started:.1f} s")


def work(part: str, layout: str, options: argparse.Namespace, pipe: Any) -> None:
    """A process of mesh.py: it sends (kind, what), and waits for a word between its two halves."""
    # Weights are made by programs that are compiled once, each process its own.
    with tempfile.TemporaryDirectory() as kept:
        jax.config.update("jax_compilation_cache_dir", kept)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        if options.simulated:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", options.simulated)
        lock = threading.Lock()  # compilers' threads say what they have done

        def send(kind, what):
            with lock:
                pipe.send((kind, what))

        try:
            job = Job(part, layout, options, send)
            job.before()
            send("ready", None)
            pipe.recv()
            job.turn()
        except Exception as error:
            traceback.print_exc()
            first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            send("failure", {"part": part, "layout": layout, "what": "process", "failure": first})
        send("done", None)
    os._exit(0)  # at once: its memory is wanted by the next one
