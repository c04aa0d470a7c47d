"""A process of mesh.py: it compiles, waits for its turn, computes and times.

Programs are compiled from shapes, so that nothing but XLA's trials of kernels runs on a device
before the turn: a process that waits has no weights, and none waits for another in a collective.
Tracing takes one thread; compilers run beside it. What is found goes through a pipe to the first
process, which compares, prints and keeps it.
"""

import argparse
import os
import threading
import time
import traceback
from typing import Any

import jax
from mesh_layout import ONE, Compiler, Spot, Steps, Weights, fitting, shortened  # beside this file
from mesh_values import Values  # beside this file

from mla_jax import sharding
from mla_jax.models import DecoderConfig


class Job:
    """What one process does: `before` all have compiled, and in its `turn`."""

    def __init__(
        self, part: str, layout: str, options: argparse.Namespace, threads: int, send: Any
    ):
        self.part, self.layout, self.options, self.send = part, layout, options, send
        devices = jax.devices()[: options.devices or options.simulated]
        self.mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
        self.compiler = Compiler(self.say, threads)
        self.say("has its devices")
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

    def before(self, until: float) -> None:
        """Traces and compiles everything: weights and steps first, whose times matter most.

        Values that are not compiled at the time `until` are given up.
        """
        options, both = self.options, ("float32", "bfloat16")
        shapes, short = [self.layout], self.config
        if options.values_layers:
            fewer = min(options.values_layers, self.config.attention.num_hidden_layers)
            short = shortened(self.config, fewer, None)
        self.weights = {}
        if self.part == "large":
            shapes = ["tensor", "wide", "helix"]
            for name in shapes:
                forms = both if name == "tensor" else both[1:]
                given = Spot.of(self.mesh, name), short, self.compiler, forms, f"{name}, values"
                values = Values(*given)
                self.values.append((name, values))
            shapes = shapes[1:]
        elif self.part == "layout" and "values" in options.parts:
            forms = both if self.layout == ONE else both[1:]
            values = Values(self.spot, short, self.compiler, forms, "values")
            self.values.append((self.layout, values))
        for name in shapes:
            self.steps += self.batches(name)
        jobs = [steps for _, steps in self.steps] + [values for _, values in self.values]
        for config in dict.fromkeys(job.config for job in jobs):
            self.weights[config] = Weights(self.spot, config, self.compiler, options.copied)
        for job in [*self.weights.values(), *jobs]:
            if not isinstance(job, Values) or time.time() < until:
                self.say(f"traces {job.name}")
                self.trying("tracing", job.compile)
        self.say("has traced all")
        self.compiler.wait(until)
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

    def turn(self, text: Any) -> None:
        """Makes the weights, times and computes, alone on the devices.

        `text` is what the values are computed of, where another process has written it.
        """
        model, config = None, None
        for name, job in [*self.steps, *self.values]:
            if job.config != config:
                model = None  # its memory is wanted
                model, config = self.weights[job.config].made(), job.config
                if self.part == "large":
                    layers = config.attention.num_hidden_layers
                    self.send("row", {"part": "large", "layout": "-", "layers": layers})
            started = time.perf_counter()
            if isinstance(job, Steps):
                row = {"part": self.row_part, "layout": name, "batch": job.rows}
                found = self.trying(f"{job.rows} rows", job.timed, model, **row)
                if found is not None:
                    self.send("row", {**row, "slots": job.slots, **found})
            elif text is None and "float32" not in job.forms:
                self.send("failure", {"part": self.part, "layout": name, "what": "values",
                                      "failure": "what is right is not known"})  # fmt: skip
            else:
                found = self.trying("values", job.found, model, text)
                if found is not None:
                    self.send("values", {"as": name, **found})
                if found is not None and "float32" in found:
                    text = found["float32"]["words"][:, :-1]
            self.say(f"{job.name}: took {time.perf_counter() - started:.1f} s")


def work(
    part: str, layout: str, options: argparse.Namespace, threads: int, until: float, pipe: Any
) -> None:
    """A process of mesh.py: it sends (kind, what), and waits for a text between its two halves."""
    if options.simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.simulated)
    lock = threading.Lock()  # compilers' threads say what they have done

    def send(kind, what):
        with lock:
            pipe.send((kind, what))

    try:
        job = Job(part, layout, options, threads, send)
        job.before(until)
        send("ready", None)
        job.turn(pipe.recv())
    except Exception as error:
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        send("failure", {"part": part, "layout": layout, "what": "process", "failure": first})
    send("done", None)
    os._exit(0)  # at once: its memory is wanted by the next one
