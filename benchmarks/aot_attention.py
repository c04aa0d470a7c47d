"""What `aot_tpu.py` compiles and counts of attention in the expanded form: forward and backward.

The profiler follows no number that is read at run time, so that for it the kernels are given their
runs of blocks as they are for causal self-attention. All heads are alike: a few are compiled, on a
chip with two cores as many for each, and cycles are scaled to all of them.
"""

import functools

import links  # beside this file

SHAPES = [(4096, 16), (4096, 128)]  # T and N, one row
HEADS = 2  # that are compiled
WIDTHS = (128, 64, 128)  # H, P, V
PREFILLS = [("deepseek_v3", 128), ("deepseek_v2_lite", 16)]  # of the widths above, R = 512
NEW, CACHED, SLOTS, RANK = 4096, 28672, 32768, 512  # tokens of a prefill, before it, of the cache
FEW = 8  # heads with which a prefill is compiled
LINTED = [("forward", 256), ("backward", 256)]  # the kernel and T of the short form


def kernel(kind, which, tokens, heads=HEADS, widths=WIDTHS, known=True, **changes):
    """A kernel on arrays as it takes them, and these; `known` gives it the runs of blocks.

    A "piece" is the forward kernel that goes on from the result over other slots, on as many slots
    as queries, all of which they see.
    """
    import jax
    import jax.numpy as jnp

    from mla_jax.ops.tpu.attention import backward, forward, plan

    nope, rope, value = widths
    sizes = plan.make_sizes(tokens, tokens, 2, kind)
    if changes:
        sizes = tuple(each._replace(**changes) for each in sizes)
    bounds = ("end",) if which == "piece" else () if known else ("end", "start", "id")
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
    count = tokens // (sizes[1] if which == "backward" else sizes[0]).rows
    run = jax.ShapeDtypeStruct((plan.RUN * count,), jnp.int32)
    args = plan.Plan(run, run, None, None), arrays
    if which == "piece":
        ends = jax.ShapeDtypeStruct((1, 1, tokens), jnp.int32)
        before = jax.ShapeDtypeStruct((*queries, value), jnp.float32)
        before = before, jax.ShapeDtypeStruct((1, heads, 1, tokens), jnp.float32)

        def every(row, block):
            # A zero that the compiler does not find, so that the branches stay that the kernel has
            # where runs are read.
            zero = 3 * block - block - 2 * block
            return zero, zero, zero + count, zero + count

        go_on = functools.partial(forward.forward, known=every)
        args = plan.Plan(run, run, ends, None), arrays, before
        return (lambda plan, arrays, before: go_on(arrays, plan, shape, before)), args, sizes
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


def prefill(preset, heads, scaled):
    """Attention of a prompt's last 4096 tokens onto 28,672 cached ones, and its arguments.

    It is compiled with a few of a model's heads, `scaled` of them for one, and with pieces of the
    cache as the model has them.
    """
    import jax
    import jax.numpy as jnp

    import mla_jax
    from mla_jax import ops
    from mla_jax.cache import Dense
    from mla_jax.ops import pieces
    from mla_jax.ops.seen import Seen

    pieces._WORKSPACE //= scaled
    config = mla_jax.MLAConfig.from_preset(preset)
    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    options = {"scale": config.scale, "implementation": "pallas_tpu"}

    def run(queries, new, cached, kv_b, limits):
        expand = lambda kernel: jnp.einsum("BSR,RNK->BSNK", new["latent"], kernel)  # noqa: E731
        own = expand(kv_b[..., :nope]), new["k_rope"], expand(kv_b[..., nope:])
        own = ops.expanded_attention(*queries, *own, **options)
        seen = Seen(limits=limits)
        context = ops.context_attention(queries, Dense(cached), seen, kv_b, **options)
        return ops.merge_attention(own, context)[0]

    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    rows = lambda slots: {"latent": array(1, slots, rank), "k_rope": array(1, slots, rope)}  # noqa: E731
    queries = array(1, NEW, heads, nope), array(1, NEW, heads, rope)
    kv_b = array(rank, heads, nope + config.v_head_dim)
    limits = jax.ShapeDtypeStruct((1, NEW), jnp.int32)
    return run, (queries, rows(NEW), rows(SLOTS), kv_b, limits)


def piece_slots(args):
    """Slots of a piece of the cache of `prefill`'s program."""
    from mla_jax.ops import dispatch, pieces

    (q_nope, q_rope), _, cached, kv_b, _ = args
    (_, tokens, heads, nope), rope = q_nope.shape, q_rope.shape[-1]
    call = dispatch.Call(
        "context_attention", 1, tokens, cached["latent"].shape[1], heads, (nope, rope),
        kv_b.shape[-1] - nope, "bfloat16",
    )  # fmt: skip
    return pieces.piece_of(call).slots


def inside_loops(text):
    """Names of the operations of a compiled program that stand in the body of a loop."""
    _, lines = links.computations(text)
    every = [line for body in lines.values() for line in body]
    waiting = [one for line in every if " while(" in line for one in links.called(line)]
    seen = set()
    while waiting:
        if (now := waiting.pop()) not in seen:
            seen.add(now)
            waiting += [one for line in lines.get(now, ()) for one in links.called(line)]
    made = [line.split(" = ")[0] for name in seen for line in lines.get(name, ()) if " = " in line]
    return {before.split()[-1].lstrip("%") for before in made}


def prefills(generations, static):
    """Static time of a prefill's attention beside its products at the rate of the forward kernel.

    Operations beside the kernels are compiled with `FEW` heads and scaled; they take at least what
    they move through HBM at 85% of its rate.
    """
    print("| | model, heads | at the kernel's rate us | kernels us | the rest us | in all |")
    print("|---|---|---|---|---|---|")
    for name, (_, _, clock, bandwidth, _) in generations.items():
        causal, piece = (
            static(name, {"which": which, "tokens": NEW}).get("cycles")
            for which in ("forward", "piece")
        )
        for preset, heads in PREFILLS if causal and piece else []:
            found = static(name, {"prefill": preset, "heads": FEW, "scaled": heads // FEW})
            bound = "" if "once" in found else ">= "  # where the profiler fails: by memory alone
            nope, rope, value = WIDTHS
            pairs = heads * (NEW * CACHED + NEW * (NEW + 1) // 2)
            work = pairs * sum(WIDTHS) + (CACHED + NEW) * RANK * heads * (nope + value)
            rate = operations("forward", NEW, HEADS) / causal  # per cycle
            kernels = (causal + piece * CACHED / NEW) * heads / HEADS
            per_slot = heads * (nope + value) * 2  # bytes of keys and values
            slots = found.get("slots", NEW)
            times = -(-CACHED // slots)
            expanded = (NEW + times * slots) * per_slot
            # Queries are read and written; results are cleared, merged with the chunk's, and laid
            # out anew: 4 + 4, 2, 2 and 4 bytes.
            moved = expanded + NEW * heads * (4 * (nope + rope) + 16 * value)
            least = moved / (0.85 * bandwidth) * clock
            cycles = found.get("once", 0) + times * found.get("piece", 0)
            rest = max(cycles * heads / FEW, least)
            us = [x / clock / 1e3 for x in (work / rate, kernels, rest)]
            columns = [name, f"{preset}, {heads}", *(f"{x:.0f}" for x in us[:2])]
            columns += [f"{bound}{us[2]:.0f}", f"{bound}{(us[1] + us[2]) / us[0]:.2f}"]
            print("|", " | ".join(columns), "|", flush=True)


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
