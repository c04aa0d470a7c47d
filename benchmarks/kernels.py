"""What a program's time goes into: its kernels by name, from a trace of jax's profiler."""

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax


def report(run: Callable[[], Any], calls: int, most: int = 20) -> str:
    """Lines of a table: the kernels that take longest, of `run()`, which makes so many calls.

    Microseconds and kernels are of one call; `span` is from the first kernel's start to the last
    one's end, so that what is left of it beside `busy` is time between kernels.
    """
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        data = ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
    taken, count = collections.Counter(), collections.Counter()
    first, last = float("inf"), 0.0
    for plane in data.planes:
        for line in plane.lines:
            if not plane.name.startswith("/device:GPU") or not line.name.startswith("Stream"):
                continue
            for event in line.events:
                taken[event.name[:60]] += event.duration_ns / calls / 1e3
                count[event.name[:60]] += 1 / calls
                first = min(first, event.start_ns)
                last = max(last, event.start_ns + event.duration_ns)
    lines = [
        f"span {(last - first) / calls / 1e3:.0f} us, busy {sum(taken.values()):.0f} us, "
        f"{sum(count.values()):.0f} kernels"
    ]
    lines += [f"{us:10.1f} us x{count[name]:<6.1f} {name}" for name, us in taken.most_common(most)]
    return "\n".join("    " + line for line in lines)
