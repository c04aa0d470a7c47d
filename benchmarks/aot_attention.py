"""What `aot_tpu.py` compiles and counts of attention in the expanded form: forward and backward.

The profiler follows no number that is read at run time, so that for it the kernels are given their
runs of blocks as they are for causal self-attention. All heads are alike: a few are compiled, on a
chip with two cores as many for each, and cycles are scaled to all of them.
"""

import functools

SHAPES = [(4096, 16), (4096, 128)]  # T and N, one row
HEADS = 2  # that are compiled
WIDTHS = (128, 64, 128)  # H, P, V
LINTED = [("forward", 256), ("backward", 256)]  # the kernel and T of the short form


def kernel(kind, which, tokens, heads=HEADS, widths=WIDTHS, known=True, **changes):
    """A kernel on arrays as it takes them, and these; `known` gives it the runs of blocks."""
    import jax
    import jax.numpy as jnp

    from mla_jax.ops.tpu.attention import backward, forward, plan

    nope, rope, value = widths
    sizes = plan.make_sizes(tokens, tokens, 2, kind)
    if changes:
        sizes = tuple(each._replace(**changes) for each in sizes)
    bounds = () if known else ("end", "start", "id")
    shape = plan.Shape(
        1, tokens, tokens, heads, nope, rope, value, "bfloat16", bounds, not known, *sizes
    )
    queries, keys = (1, heads, tokens), (1, heads, tokens)
    of = {"q0": (*queries, nope), "q1": (*queries, rope), "k0": (*keys, nope)}
    of |= {"k1": (1, tokens, rope), "v": (*keys, value)}
    arrays = {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in of.items()}
    if which == "backward":
        arrays["d_out"] = jax.ShapeDtypeStruct((*queries, value), jnp.bfloat16)
        arrays["statistics"] = jax.ShapeDtypeStruct((1, heads, 2, tokens), jnp.float32)
    count = tokens // (sizes[0] if which == "forward" else sizes[1]).rows
    run = jax.ShapeDtypeStruct((plan.RUN * count,), jnp.int32)
    args = plan.Plan(run, run, None, None), arrays
    if not known:
        ids = jax.ShapeDtypeStruct((1, 1, tokens), jnp.int32)
        rows = jax.ShapeDtypeStruct((1, 3, tokens), jnp.int32)
        args = plan.Plan(run, run, rows, ids), arrays

    def of_queries(row, block):
        return 0, 0, block, block + 1

    def of_slots(row, block):
        return block, block + 1, count, count

    if which == "forward":
        call = functools.partial(forward.forward, known=of_queries if known else None)
    else:
        call = functools.partial(backward.backward, known=of_slots if known else None)
    return (lambda plan, arrays: call(arrays, plan, shape)), args, sizes


def operations(which, tokens, heads, widths=WIDTHS):
    """Useful multiply-adds of causal self-attention."""
    nope, rope, value = widths
    each = nope + rope + value if which == "forward" else 3 * (nope + rope) + 2 * value
    return heads * tokens * (tokens + 1) // 2 * each


def table(generations, static, record):
    """Static cycles of both kernels for every shape: `static(generation, options)` counts them."""
    print("| | kernel | B, T, N | cycles | MXU | of it | us | TFLOP/s | VMEM MiB | spills |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (_, kind, clock, _, tera) in generations.items():
        for which in ("forward", "backward"):
            found = static(name, {"which": which, "tokens": 4096})
            cycles = found.get("cycles")
            if not cycles:
                print(f"| {name} | {which} | 1, 4096 | profiler fails |", flush=True)
                continue
            for tokens, heads in SHAPES:
                every = cycles * heads / HEADS
                work = operations(which, tokens, heads)
                mxu = 2 * work / (tera * 1e3) * clock
                us = every / clock / 1e3
                columns = [
                    name, which, f"1, {tokens}, {heads}", f"{every:.0f}", f"{mxu:.0f}",
                    f"{mxu / every:.2f}", f"{us:.0f}", f"{2 * work / us / 1e6:.0f}",
                    found["vmem"], found["spills"],
                ]  # fmt: skip
                print("|", " | ".join(map(str, columns)), "|", flush=True)
                record({"kind": kind, "which": which, "tokens": tokens, "heads": heads, "us": us})


SCALE = sum(WIDTHS[:2]) ** -0.5


def forward(name, arrays):
    """Causal self-attention by a backend."""
    import mla_jax

    return mla_jax.expanded_attention(*arrays, scale=SCALE, implementation=name)[0]


def both(name, arrays):
    """Its gradients."""
    import jax
    import jax.numpy as jnp

    return jax.grad(lambda arrays: forward(name, arrays).astype(jnp.float32).sum())(arrays)


def context(name, arrays):
    """Attention of a chunk to latents in a cache, all of which it sees."""
    import jax.numpy as jnp

    from mla_jax import ops
    from mla_jax.cache import Dense
    from mla_jax.ops.seen import Seen

    *queries, latent, k_rope, kv_b = arrays
    limits = jnp.full(queries[0].shape[:2], latent.shape[1], jnp.int32)
    store, seen = Dense({"latent": latent, "k_rope": k_rope}), Seen(limits=limits)
    options = {"scale": SCALE, "implementation": name}
    return ops.context_attention(tuple(queries), store, seen, kv_b, **options)[0]


def on_device(last, rows):
    """Checks both kernels and context attention against XLA and times them; says what was wrong.

    Args:
        last: seconds of a timed loop.
        rows: of `table`, whose static times are printed beside.
    """
    import jax
    import jax.numpy as jnp
    from decode import timer  # beside this file

    device, (nope, rope, value), wrong = jax.devices()[0], WIDTHS, []
    native = device.platform == "tpu"
    backend = "pallas_tpu" if native else "xla"
    held, rank = (28672, 512) if native else (256, 32)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)  # noqa: E731

    def error(got, want):
        norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())  # noqa: E731
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        return max(float(norm(a - b) / norm(b)) for a, b in pairs)

    print("| op | us | static us | error beside XLA |\n|---|---|---|---|")
    for tokens, heads in SHAPES if native else [(128, 2)]:
        queries = draw(0, 1, tokens, heads, nope), draw(1, 1, tokens, heads, rope)
        own = draw(2, 1, tokens, heads, nope), draw(3, 1, tokens, rope)
        own += (draw(4, 1, tokens, heads, value),)
        cached = draw(5, 1, held, rank), draw(6, 1, held, rope)
        kv_b = draw(7, rank, heads, nope + value) * rank**-0.5
        for op, arrays in (
            (forward, (*queries, *own)), (both, (*queries, *own)),
            (context, (*queries, *cached, kv_b)),
        ):  # fmt: skip
            ours, xla = (jax.jit(functools.partial(op, name)) for name in (backend, "xla"))
            result = ours(arrays)
            found = error(result, xla(arrays))
            step = lambda state, ours=ours: (state[0], ours(state[0]))  # noqa: E731
            seconds = timer(step, 1e-3, last)((arrays, result))[0]
            kernels = {forward: ["forward"], both: ["forward", "backward"]}.get(op, [])
            known = [
                row["us"] for row in rows
                if (row["kind"], row["tokens"], row["heads"]) == (device.device_kind, tokens, heads)
                and row["which"] in kernels
            ]  # fmt: skip
            expected = f"{sum(known):.0f}" if known and len(known) == len(kernels) else "-"
            on = f" on {held}" if op is context else ""
            title = f"{op.__name__} 1, {tokens}, {heads}{on}"
            print(f"| {title} | {seconds * 1e6:.0f} | {expected} | {found:.1e} |", flush=True)
            if not found < 2e-2:
                wrong.append(title)
    return wrong
