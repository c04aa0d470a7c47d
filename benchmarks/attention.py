"""Expanded attention on a Hopper GPU: device time and error, ours beside cuDNN and others.

    python benchmarks/attention.py                    # the table
    python benchmarks/attention.py --cases plain-1x4096x128 --kernels

Every case runs in a process of its own, so that all compile at once; a lock lets one of them at a
time use the device. Ours takes a layer's own five arrays, cuDNN (and tokamax and torch, where they
are installed) ready keys of H + P channels: building those is not in its time. Rounds alternate
between the contestants and last long enough for the chip to be warm.
"""

import argparse
import fcntl
import functools
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

LOCK = pathlib.Path(tempfile.gettempdir()) / "benchmark_attention.lock"
WIDTHS = {"v3": (128, 64, 128), "glm": (192, 64, 256), "minicpm": (64, 32, 64)}
CASES = {  # kind, B, T, S, N, widths
    "plain-1x4096x128": ("plain", 1, 4096, 4096, 128, "v3"),
    "plain-4x4096x16": ("plain", 4, 4096, 4096, 16, "v3"),
    "plain-1x16384x128": ("plain", 1, 16384, 16384, 128, "v3"),
    "segments-1x4096x128": ("segments", 1, 4096, 4096, 128, "v3"),
    "window-1x16384x128": ("window", 1, 16384, 16384, 128, "v3"),
    "context-4096on28672x128": ("context", 1, 4096, 28672, 128, "v3"),
    "plain-glm-1x4096x64": ("plain", 1, 4096, 4096, 64, "glm"),
    "plain-minicpm-1x4096x40": ("plain", 1, 4096, 4096, 40, "minicpm"),
}


def operands(batch, tokens, slots, heads, widths, dtype=jnp.bfloat16):
    """Standard normal arrays of a layer, and the cotangent of its output."""
    nope, rope, value = widths
    shapes = [(batch, tokens, heads, nope), (batch, tokens, heads, rope)]
    shapes += [(batch, slots, heads, nope), (batch, slots, rope), (batch, slots, heads, value)]
    shapes += [(batch, tokens, heads, value)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
    return arrays[:5], arrays[5]


def options_of(kind, batch, tokens, slots):
    """What a kind of case asks of our kernel."""
    if kind == "segments":  # eight, with borders off the blocks
        cuts = (np.arange(1, 8) * tokens) // 8 + np.array([13, -9, 5, -21, 33, 7, -3])
        ids = (np.arange(tokens)[:, None] >= cuts).sum(1).astype(np.int32)
        ids = jnp.broadcast_to(jnp.asarray(ids)[None], (batch, tokens))
        return {"segment_ids": (ids, ids)}
    return {"plain": {}, "window": {"window": 4096}, "context": {"causal": False}}[kind]


def pairs(kind, tokens, slots):
    """Query and slot pairs of one head that see each other."""
    if kind == "context":
        return tokens * slots
    if kind == "segments":
        return tokens * tokens // 16
    if kind == "window":
        return sum(min(t + 1, 4096) for t in range(tokens))
    return tokens * (tokens + 1) // 2


def gradients(attend, arrays, cotangent):
    """Forward and backward of a function of arrays."""
    out, pull = jax.vjp(attend, *arrays)
    return out, pull(cotangent)


def contestants(kind, batch, tokens, slots, heads, widths, kernels):
    """{name: (function, arguments)} of what is timed, all on the same numbers."""
    from mla_jax.ops.hopper import attention

    arrays, cotangent = operands(batch, tokens, slots, heads, widths)
    scale = (widths[0] + widths[1]) ** -0.5
    options = options_of(kind, batch, tokens, slots)
    ours = lambda *a: attention.expanded_attention(*a, scale=scale, **options)[0]  # noqa: E731
    found = {
        "ours forward": (ours, arrays),
        "ours both": (functools.partial(gradients, ours), (arrays, cotangent)),
    }
    if kernels:
        found |= parts_of_ours(arrays, cotangent, scale, options)
    if kind not in ("plain", "context"):
        return found
    q_nope, q_rope, k_nope, k_rope, value = arrays
    query = jnp.concatenate([q_nope, q_rope], -1)
    rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    ready = [query, jnp.concatenate([k_nope, rope], -1), value]
    for name, make in {"cudnn": cudnn, "tokamax": tokamax}.items():
        attend = make(scale, kind == "plain")
        if attend is not None:
            found[f"{name} forward"] = (attend, ready)
            found[f"{name} both"] = (functools.partial(gradients, attend), (ready, cotangent))
    return found


def parts_of_ours(arrays, cotangent, scale, options):
    """Our kernels one by one."""
    from mla_jax.ops.hopper import attention
    from mla_jax.ops.hopper.attention import backward, forward, plan

    q_nope, q_rope, _, _, value = arrays
    batch, tokens, slots = *q_nope.shape[:2], value.shape[1]
    options = dict(options)
    window, segments = options.pop("window", None), options.pop("segment_ids", None)
    limits = plan.limits_of(batch, tokens, slots, **options)
    widths = q_nope.shape[-1], q_rope.shape[-1]
    made = attention.plan_for(
        limits, slots, widths, value.shape[-1], window=window, segment_ids=segments
    )
    shape = attention.shape_of(q_nope, q_rope, value, scale, segments is not None)
    named = dict(zip(("q0", "q1", "k0", "k1", "v"), arrays, strict=True))
    padded = (batch, q_nope.shape[2], plan.padded(tokens))
    more = named | {
        "do": cotangent, "lse": jnp.full(padded, 10.0), "delta": jnp.zeros(padded),
    }  # fmt: skip
    return {
        "kernel forward": (lambda a: forward.forward(a, made, shape), (named,)),
        "kernel dq": (lambda a: backward.query_gradient(a, made, shape), (more,)),
        "kernel dkv": (lambda a: backward.key_gradient(a, made, shape), (more,)),
    }


def cudnn(scale, causal):
    """CuDNN's attention on ready arrays, keys and values of unequal widths."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    return lambda q, k, v: fused.dot_product_attention(q, k, v, scale=scale, mask_type=mask)


def tokamax(scale, causal):
    """Tokamax's attention through Mosaic GPU, or None where it is not installed."""
    try:
        import tokamax as library
    except ImportError:
        return None
    return lambda q, k, v: library.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="mosaic"
    )


def timed(program, arguments, count):
    """Seconds a call of `count` calls in a row: the device always has the next one waiting."""
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    for _ in range(count):
        result = program(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def exact(q_nope, q_rope, k_nope, k_rope, value):
    """Causal attention as it is written down, in the operands' precision."""
    scores = jnp.einsum("btnh,bsnh->bnts", q_nope, k_nope)
    scores += jnp.einsum("btnp,bsp->bnts", q_rope, k_rope)
    tokens = scores.shape[-1]
    seen = jnp.arange(tokens)[None] <= jnp.arange(tokens)[:, None]
    scores = jnp.where(seen, scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5, -jnp.inf)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(scores), value)


def errors(queue, tokens=2048, heads=4):
    """Relative errors of results and gradients against float64, ours and cuDNN's."""
    widths = WIDTHS["v3"]
    arrays, cotangent = operands(1, tokens, tokens, heads, widths)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (*arrays, cotangent)]
        want = jax.jit(functools.partial(gradients, exact))(wide[:5], wide[5])
        want = [np.asarray(x) for x in jax.tree.leaves(want)]
    found = contestants("plain", 1, tokens, tokens, heads, widths, False)
    names = ("out", "dq_nope", "dq_rope", "dk_nope", "dk_rope", "dv")
    for name in ("ours", "cudnn"):
        function, arguments = found[f"{name} both"]
        out, got = jax.jit(function)(*arguments)
        got = [np.asarray(x, np.float64) for x in (out, *got)]
        if name == "cudnn":
            out, query, key, value = got
            split = widths[0]
            rope = jnp.asarray(key[..., split:].sum(2), jnp.bfloat16)  # as a layer would have it
            got = [out, query[..., :split], query[..., split:], key[..., :split],
                   np.asarray(rope, np.float64), value]  # fmt: skip
        each = (np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True))
        text = ", ".join(f"{n} {e:.2e}" for n, e in zip(names, each, strict=True))
        queue.put(f"errors of {name} against float64: {text}")
    queue.put(None)


def measure(name, case, kernels, rounds, queue):
    """Times one case; puts lines of the table into `queue`."""
    kind, batch, tokens, slots, heads, widths = case
    widths = WIDTHS[widths]
    work = pairs(kind, tokens, slots) * batch * heads * 2 * (sum(widths))
    count = max(3, min(200, int(0.1 / (work / 400e12))))
    programs = {}
    for label, (function, arguments) in contestants(
        kind, batch, tokens, slots, heads, widths, kernels
    ).items():
        repeat = max(2, count if "both" not in label else count // 3)
        try:
            program = jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            queue.put(f"| {name} | {label} | {type(error).__name__}: {str(error)[:200]} | | |")
            continue
        programs[label] = (program, arguments, repeat)
    times = {label: [] for label in programs}
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(rounds + 1):  # the first warms up
            for label, (program, arguments, repeat) in programs.items():
                times[label].append(timed(program, arguments, repeat))
    for label, seconds in times.items():
        middle = statistics.median(seconds[1:])
        factor = 1 if "forward" in label else 3.5 if "both" in label else 0
        rate = f"{work * factor / middle / 1e12:.0f}" if factor else ""
        spread = " ".join(f"{1e6 * s:.0f}" for s in seconds[1:])
        queue.put(f"| {name} | {label} | {1e6 * middle:.0f} | {rate} | {spread} |")
    queue.put(None)


def guarded(*arguments):
    """`measure`, which says so if it fails."""
    try:
        measure(*arguments)
    except Exception as error:
        arguments[-1].put(f"| {arguments[0]} | {type(error).__name__}: {str(error)[:300]} | | | |")
        arguments[-1].put(None)


def main():
    """Times the cases named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kernels", action="store_true", help="our kernels one by one, too")
    parser.add_argument("--errors", action="store_true", help="against float64, too")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for name in options.cases:
        arguments = (name, CASES[name], options.kernels, options.rounds, queue)
        context.Process(target=guarded, args=arguments, daemon=True).start()
    print("| case | what | us | TFLOP/s | rounds, us |\n|---|---|---|---|---|")
    running = len(options.cases) + options.errors
    if options.errors:
        context.Process(target=errors, args=(queue,), daemon=True).start()
    while running:
        line = queue.get()
        running -= line is None
        if line is not None:
            print(line, flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
