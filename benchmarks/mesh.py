"""Checks and times a decoder with random weights on 2, 4 or 8 accelerators of one host.

Four parts, each printed as it goes:
    values   every layout against one device: a mixture of experts, logits of ragged prompts and
             of steps that follow, and a greedy text; what is right is said below;
    steps    milliseconds of a decode step at every batch behind --context tokens, of one device
             and of every layout; what it sends over the links, by its compiled program and by the
             closed form (`mla_jax.placement`); and efficiency, the time of one device over n times
             that of n;
    long     one row of --long slots, split over the devices, and on one device;
    large    DeepSeek-V3's shape with as many layers as fit: logits of split rows and of split slots
             against those of split heads, and the same times.

Layouts, all on one axis of n devices ("-" in the table: the rows do not divide):
    tensor   heads, MLPs, vocabulary, experts; every device has all rows
    helix    slots of the cache, and all weights by heads, experts and words
    wide     rows, experts, and the weights of attention by heads
    expert   rows and experts; the weights of attention whole everywhere
    data     rows; weights whole everywhere

Every layout has a process. In a wave (values and steps; then long and large) all of them compile
side by side from shapes, each with its share of the cores, and then each has the devices to itself
for a turn: it makes its weights, times, computes and ends. So nothing compiles while something is
timed, and one model is in memory. One that compiles for longer than --limit seconds, or whose turn
is longer than --turn seconds, as that of a collective that waits for ever, is ended; the others go
on. Values alone that are not compiled after 0.8 of --limit are given up, and steps are timed.
Programs of values are compiled without XLA's trials of kernels, those of steps with them.

What is right in bfloat16: the sums of a layout are those of one device in another order, some of
them rounded once more, so that its error against the same weights in float32 may be twice one
device's own. Rounding also tips the choice between two experts that score nearly alike, and then
logits are elsewhere by as much as the experts differ, on one device as on several. So the whole
model is compared with routers of zeros: all scores are equal, every token takes the first experts,
and nothing can tip. All compute logits of one text, the greedy one of float32, and the norm of the
error is compared. A layout's choice of the next word, at every place of this text and where its
own greedy text leaves it, may be behind the best by 2 x 2 times the largest error of one device's
logits: both logits err, each twice as much at most. The experts are compared apart, one layer of
them with the router that it has, which is in float32 and is given the same numbers in every layout:
n devices round a part of each sum, and round again as they add the parts, so that sqrt(n) half
units of the last place, 2^-9, may come to one device's error. A token that goes astray among m
shows as sqrt(1 / m).

What fails is reported, the others run, and the exit code is 1.

    python benchmarks/mesh.py --json mesh.json
    python benchmarks/mesh.py --small     8 simulated CPU devices, a model of two small layers

NVLink multicast is switched off unless NCCL_NVLS_ENABLE says otherwise, and XLA's own collective
kernels stay off.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from multiprocessing import connection
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # one process at a time is large

import jax
import numpy as np
from mesh_layout import LAYOUTS, ONE  # beside this file
from mesh_work import work  # beside this file

STARTED = time.perf_counter()
SMALL = {
    "simulated": 8, "preset": "tiny", "heads": 8, "layers": 2, "batches": [1, 8], "context": 100,
    "steps": 2, "blocks": 2, "long": 2048, "large": "tiny", "large_layers": 2,
}  # fmt: skip


def say(text: str) -> None:
    """Prints with the seconds since the start, at once."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


class Report:
    """What was found, kept in a file as it comes, and what failed."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.failed = options, []
        self.kept: dict[str, Any] = {
            "jax": jax.__version__, "preset": options.preset, "context": options.context,
            "link": options.link, "rows": [],
        }  # fmt: skip
        self.wanted: dict[str, dict[str, Any]] = {}  # what is right, by part

    def add(self, **row: Any) -> None:
        """Keeps one row."""
        self.kept["rows"].append(row)
        self.keep()

    def keep(self) -> None:
        """Writes the file."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.kept, indent=1) + "\n")

    def failure(self, part: str, layout: str, what: str, failure: str, **row: Any) -> None:
        """Prints and keeps what failed."""
        say(f"{part}, {layout}, {what}: FAILED: {failure}")
        self.failed.append(f"{part}, {layout}, {what}")
        self.add(part=part, layout=layout, what=what, failure=failure, **row)

    def heard(self, part: str, layout: str, kind: str, what: Any) -> None:
        """Takes a message of a process."""
        if kind == "say":
            say(f"{part}, {layout}: {what}")
        elif kind == "head":
            self.kept |= what
            self.keep()
        elif kind == "failure":
            self.failure(**what)
        elif kind == "row":
            self.row(what)
        elif kind == "values":
            self.values(part, what.pop("as"), what)

    def text(self, part: str) -> Any:
        """What float32 has written, for a process that has no float32."""
        wanted = self.wanted.get(part)
        return wanted and wanted["float32"]["words"][:, :-1]

    def row(self, row: dict[str, Any]) -> None:
        """Keeps one measurement and prints it, with its efficiency where one device is known."""
        if "seconds" in row:
            for other in self.kept["rows"]:
                same = all(other.get(key) == row[key] for key in ("part", "batch"))
                if same and other["layout"] == ONE != row["layout"] and "seconds" in other:
                    row["efficiency"] = other["seconds"] / row["seconds"] / self.kept["devices"]
            self.tell(row)
        self.add(**row)

    def tell(self, row: dict[str, Any]) -> None:
        """Prints one measurement."""
        sent = sum(sent for _, sent in row["moved"].values())
        kinds = ", ".join(
            f"{count:.0f} {kind} {sent / 1e6:.3f} MB"
            for kind, (count, sent) in sorted(row["moved"].items())
        )
        say(f"{row['part']}, {row['layout']}, {row['batch']} rows of {row['slots']:,} slots: "
            f"{row['seconds'] * 1e3:.3f} ms a step (best {row['best'] * 1e3:.3f}), "
            f"{row['batch'] / row['seconds']:,.0f} tokens/s"
            + (f", efficiency {row['efficiency']:.2f}" if "efficiency" in row else "")
            + f"; temporaries {row['temporaries'] / 1e6:.0f} MB"
            + (f"; sends {sent / 1e6:.3f} MB a step, {sent / self.options.link * 1e3:.3f} ms at "
               f"the links' rate, {row['least'] / 1e6:.3f} MB by the closed form: {kinds}"
               if row["moved"] else ""))  # fmt: skip

    def values(self, part: str, layout: str, found: dict[str, Any]) -> None:
        """Compares what a layout computed with what is right, and keeps both errors."""
        if "float32" in found:
            self.wanted[part] = found
            own = off(found["bfloat16"]["logits"], found["float32"]["logits"])
            say(f"{part}, {layout}: bfloat16's own error {own:.2e}")
            return
        wanted, table = self.wanted.get(part), "values" if part == "layout" else part
        if wanted is None:
            self.failure(table, layout, "values", "what is right is not known")
            return
        right, mine, one = wanted["float32"], found["bfloat16"], wanted["bfloat16"]
        error, own = off(mine["logits"], right["logits"]), off(one["logits"], right["logits"])
        given = zip(mine["experts"], one["experts"], right["experts"], strict=True)
        experts = [(off(x, y), off(o, y)) for x, o, y in given]
        row = {"error": error, "own": own, "experts": experts, **words(mine, right)}
        row["bound"] = 4 * float(np.abs(one["logits"] - right["logits"]).max())
        good = (
            error <= 2 * own
            and row["lost"] <= row["bound"]
            and all(x <= o + math.sqrt(self.kept["devices"]) * 2**-9 for x, o in experts)
        )
        if found["fingerprint"] != wanted["fingerprint"]:
            good = False
            say(f"{table}, {layout}: OTHER WEIGHTS than one device's; --copied copies these")
        say(f"{table}, {layout}: {_values(row)}")
        self.add(part=table, layout=layout, **row)
        if not good:
            self.failure(table, layout, "values", "wrong: see the line above")

    def summary(self) -> None:
        """The tables: a line for every layout, a column for every batch; and the values."""
        timed = [row for row in self.kept["rows"] if "batch" in row]
        for part in dict.fromkeys(row["part"] for row in timed):
            mine = [row for row in timed if row["part"] == part]
            batches = sorted({row["batch"] for row in mine})
            heads = (f"batch {b}: ms, MB sent (closed form), efficiency" for b in batches)
            print(f"\n| {part} | " + " | ".join(heads) + " |\n|---|" + "---|" * len(batches))
            names = {row["layout"] for row in mine}
            for name in (name for name in (ONE, *LAYOUTS) if name in names):
                cells = []
                for batch in batches:
                    found = [r for r in mine if (r["layout"], r["batch"]) == (name, batch)]
                    cells.append(_cell(found[-1]) if found else "-")
                print(f"| {name} | {' | '.join(cells)} |")
        checked = [row for row in self.kept["rows"] if "own" in row]
        if checked:
            print("\n| values | error, one device's | experts' error, one device's | words as "
                  "float32's | farthest word, bound |\n|---|---|---|---|---|")  # fmt: skip
        for row in checked:
            experts = ", ".join(f"{a:.1e}, {b:.1e}" for a, b in row["experts"])
            print(f"| {row['part']}, {row['layout']} | {row['error']:.2e}, {row['own']:.2e} | "
                  f"{experts} | {row['same']} of {row['words']} | {row['lost']:.2e}, "
                  f"{row['bound']:.2e} |")  # fmt: skip
        print(flush=True)


def off(a, b) -> float:
    """Relative distance of two arrays."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def words(mine: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """How far a layout's words are from float32's best ones at the worst, and how many are these.

    Its own text counts up to the word where it leaves float32's: what follows has another past.
    """
    logits, text = right["logits"], right["words"]
    chosen = np.take_along_axis(logits, mine["logits"].argmax(2)[..., None], 2)[..., 0]
    lost, same = float((logits.max(2) - chosen).max()), 0
    for row, (own, other) in enumerate(zip(mine["words"], text, strict=True)):
        at = int(np.append(own != other, True).argmax())
        same += at
        if at < len(own):
            lost = max(lost, float(logits[row, at].max() - logits[row, at, own[at]]))
    return {"same": same, "words": text.size, "lost": lost}


def _values(row: dict[str, Any]) -> str:
    """One comparison in words."""
    experts = ", ".join(f"{mine:.2e} (one device {own:.2e})" for mine, own in row["experts"])
    return (f"error {row['error']:.2e} (one device {row['own']:.2e}), of experts {experts}; "
            f"{row['same']} of {row['words']} words as float32's, the farthest "
            f"{row['lost']:.2e} from the best (bound {row['bound']:.2e})")  # fmt: skip


def _cell(row: dict[str, Any]) -> str:
    """One measurement in the table; "-" where the rows do not divide."""
    if "seconds" not in row:
        return "failed" if "failure" in row else "-"
    sent, share = sum(sent for _, sent in row["moved"].values()) / 1e6, row.get("efficiency")
    return (f"{row['seconds'] * 1e3:.3f}, {sent:.2f} ({row['least'] / 1e6:.2f}), "
            + (f"{share:.2f}" if share else "-"))  # fmt: skip


class Child:
    """A process of a wave: it compiles, is ready, has its turn, and is done."""

    def __init__(self, part: str, layout: str, options: argparse.Namespace, threads: int):
        self.part, self.layout, self.options = part, layout, options
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        until = time.time() + 0.8 * options.limit
        given = part, layout, options, threads, until, theirs
        self.process = context.Process(target=work, args=given, daemon=True)
        self.process.start()
        theirs.close()
        self.state = "compiles"
        self.since = time.perf_counter()

    def enters(self, state: str) -> None:
        """Prints how long the state took that ends, and begins another."""
        now = time.perf_counter()
        say(f"{self.part}, {self.layout}: {self.state} for {now - self.since:.1f} s, then {state}")
        self.state, self.since = state, now

    def late(self) -> bool:
        """Whether it works longer than it may; waiting does not count."""
        limits = {"compiles": self.options.limit, "has its turn": self.options.turn}
        return time.perf_counter() - self.since > limits.get(self.state, math.inf)

    def ends(self, report: Report) -> None:
        """Ends the process; one that is not done has failed."""
        self.process.kill()
        if self.state != "done":
            how = "given up" if self.late() else "its process died"
            after = time.perf_counter() - self.since
            report.failure(self.part, self.layout, self.state, f"{how} after {after:.0f} s")
        if self.state != "compiles":  # the next turn wants its memory
            self.process.join(10)
        self.state = "done"


def wave(jobs: list[tuple[str, str]], options: argparse.Namespace, report: Report) -> None:
    """Runs jobs (part, layout): all compile side by side, then each has its turn."""
    say("side by side: " + "; ".join(f"{part}, {layout}" for part, layout in jobs))
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // len(jobs))
    children = [Child(part, layout, options, threads) for part, layout in jobs]
    while children := [child for child in children if child.state != "done"]:
        if all(child.state == "waits" for child in children):
            children[0].enters("has its turn")
            try:
                children[0].pipe.send(report.text(children[0].part))
            except OSError:
                children[0].ends(report)
                continue
        pipes = {child.pipe: child for child in children}
        for pipe in connection.wait(list(pipes), timeout=1):
            child = pipes[pipe]
            try:
                kind, what = pipe.recv()
            except (EOFError, OSError):
                child.ends(report)
                continue
            if kind in ("ready", "done"):
                child.enters({"ready": "waits"}.get(kind, kind))
            else:
                report.heard(child.part, child.layout, kind, what)
            if kind == "done":
                child.ends(report)
        for child in children:
            if child.late():
                child.ends(report)


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
    add("--values-layers", type=int,
        help="of the part values; all by default, and 1 may have no experts")  # fmt: skip
    add("--heads", type=int, help="instead of the preset's, which n may not divide")
    add("--batches", type=int, nargs="+", default=[1, 8, 64])
    add("--context", type=int, default=4096, help="tokens that every row holds")
    add("--steps", type=int, default=32, help="decode steps in one program")
    add("--blocks", type=int, default=5, help="programs that are timed")
    add("--long", type=int, default=2**20, help="slots of the one long row; 0 is none")
    add("--large", default="deepseek_v3", help="preset of the part large")
    add("--large-layers", type=int, help="instead of as many as fit")
    add("--large-batches", type=int, nargs="+", default=[8, 64])
    add("--memory", type=float, help="bytes of a device for the part large, less than it says")
    add("--copied", action="store_true", help="make weights on one device and copy them")
    add("--link", type=float, default=450e9, help="bytes a second that a device sends")
    add("--threads", type=int, help="that compile, of a process; its share of the cores by default")
    add("--limit", type=float, default=400, help="seconds of compilation")
    add("--turn", type=float, default=100, help="seconds of a turn")
    add("--json", type=pathlib.Path, help="write the figures here as they come")
    if parser.parse_args().small:
        parser.set_defaults(**SMALL)
    options = parser.parse_args()
    if options.simulated:  # whose times say nothing
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true"
        )
    report = Report(options)
    waves: list[list[tuple[str, str]]] = [[], []]
    if {"values", "steps"} & set(options.parts):
        waves[0] = [("layout", name) for name in (ONE, *options.layouts)]
    if "long" in options.parts and options.long:
        split = [name for name in options.layouts if LAYOUTS[name].S]
        waves[1] = [("long", name) for name in (ONE, *split)]
    if "large" in options.parts:
        waves[1].append(("large", options.large))
    for jobs in filter(None, waves):
        started = time.perf_counter()
        wave(jobs, options, report)
        report.summary()
        say(f"these took {time.perf_counter() - started:.0f} s")
    if report.failed:
        sys.exit("failed: " + "; ".join(report.failed))


if __name__ == "__main__":
    main()
