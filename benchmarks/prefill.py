"""Times chunks of a prompt that go into a layer's cache, onto what it holds, on the device at hand.

    python benchmarks/prefill.py                 # the table: both forms where both are of use
    python benchmarks/prefill.py --long 131072   # and a whole prompt through a whole decoder

A case is `layer.prefill` of one row in one program: projections, append, attention to the chunk and
to the cached tokens, output. The cache is donated and set back after each call. Every case runs in
a process of its own, so that all compile at once; a lock lets one of them at a time use the device.
TFLOP/s count the products of the form that is timed. The last column compares the output with that
of the XLA backend, in the form that is not timed, on the chunk's last tokens. Nothing is timed
before all cases are compiled: compilers try their products on the device, too.
"""

import argparse
import dataclasses
import fcntl
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import kernels  # beside this file
import numpy as np
from flax import nnx

LOCK = pathlib.Path(tempfile.gettempdir()) / "benchmark_prefill.lock"
CASES = {  # preset, T, tokens held, forms
    "v3-4096on28672": ("deepseek_v3", 4096, 28672, ("expanded",)),
    "v3-512on28672": ("deepseek_v3", 512, 28672, ("expanded", "absorbed")),
    "v3-128on28672": ("deepseek_v3", 128, 28672, ("expanded", "absorbed")),
    "v3-32on28672": ("deepseek_v3", 32, 28672, ("expanded", "absorbed")),
    "v3-16384on16384": ("deepseek_v3", 16384, 16384, ("expanded",)),
    "v3-4096on0": ("deepseek_v3", 4096, 0, ("expanded",)),
    "v2lite-4096on28672": ("deepseek_v2_lite", 4096, 28672, ("expanded",)),
    "v2lite-512on28672": ("deepseek_v2_lite", 512, 28672, ("expanded", "absorbed")),
    "v2lite-4096on0": ("deepseek_v2_lite", 4096, 0, ("expanded",)),
}


def flops(config, tokens, held, form):
    """Operations of a call: projections, folds or expansion, and every visible pair."""
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    width, low = config.hidden_size, config.q_lora_rank
    query = heads * (nope + rope)
    each = low * (width + query) if low else width * query
    each += width * (rank + rope) + heads * value * width
    own, past = tokens * (tokens + 1) / 2, tokens * held
    if form == "expanded":
        made = (tokens + held) * rank * heads * (nope + value)
        return 2 * (tokens * each + made + (own + past) * heads * (nope + rope + value))
    folds = tokens * rank * heads * (nope + value)
    return 2 * (tokens * each + folds + (own + past) * heads * (2 * rank + rope))


def measure(name, case, options, queue, compiled):
    """Times one case once all are `compiled`; puts lines of the table into `queue`."""
    import mla_jax

    preset, tokens, held, forms = case
    config = mla_jax.MLAConfig.from_preset(preset)
    layer = mla_jax.MultiHeadLatentAttention(
        config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    slots = tokens + held
    x = jax.random.normal(jax.random.key(1), (1, tokens, config.hidden_size), jnp.bfloat16)
    cache = layer.init_cache(1, slots)
    draw = lambda i, like: jax.random.normal(jax.random.key(i), like.shape, like.dtype)  # noqa: E731
    cache = jax.tree.map(lambda a: draw(2, a) if a.ndim == 3 else a, cache)
    cache = dataclasses.replace(cache, length=jnp.full((1,), held, jnp.int32))

    def program(form, implementation):
        def run(state, x, cache):
            layer = nnx.merge(graph, state)
            layer.implementation = implementation
            start = cache.length
            y, cache = layer.prefill(x, cache, form=form)
            return y, dataclasses.replace(cache, length=start)

        return jax.jit(run, donate_argnums=2).lower(state, x, cache).compile()

    programs = {form: program(form, options.implementation) for form in forms}
    check = (
        None if options.no_check else program(forms[-1] if len(forms) > 1 else "absorbed", "xla")
    )
    compiled()
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held_copy = jax.tree.map(jnp.copy, cache)
        if check is not None:
            want = np.asarray(check(state, x, held_copy)[0][:, -16:], np.float64)
        times = {form: [] for form in forms}
        for turn in range(options.rounds + 1):
            for form, run in programs.items():
                y, cache = run(state, x, cache)
                jax.block_until_ready(y)
                started, count = time.perf_counter(), 0
                while count < 3 or time.perf_counter() - started < options.last:
                    for _ in range(3):
                        y, cache = run(state, x, cache)
                    count += 3
                    jax.block_until_ready(y)
                if turn:
                    times[form].append((time.perf_counter() - started) / count)
                got = np.asarray(y[:, -16:], np.float64)
                programs_error = np.nan
                if check is not None:
                    programs_error = np.linalg.norm(got - want) / np.linalg.norm(want)
                times.setdefault(form + " error", []).append(programs_error)
        for form, run in programs.items() if options.profile else ():

            def calls(run=run):
                nonlocal cache
                for _ in range(5):
                    y, cache = run(state, x, cache)
                return y

            queue.put(f"{name}, {form}:\n{kernels.report(calls, 5)}")
    for form, run in programs.items():
        taken, memory = statistics.median(times[form]), run.memory_analysis()
        rate = flops(config, tokens, held, form) / taken / 1e12
        queue.put(
            f"| {name} | {form} | {taken * 1e3:.3f} | {rate:.0f} | "
            f"{memory.temp_size_in_bytes / 2**20:.0f} | {times[form + ' error'][-1]:.1e} |"
        )
    queue.put(None)


def guarded(name, case, options, queue, barrier):
    """`measure`, which says so if it fails."""
    waited = []

    def compiled():
        waited.append(barrier.wait())

    try:
        measure(name, case, options, queue, compiled)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:400]}".replace("\n", " ")
        queue.put(f"| {name} | {text} | | | | |")
        queue.put(None)
        if not waited:
            compiled()


def long_prompt(tokens):
    """A prompt of V2-Lite's shape through the chunks of `generate`: seconds and temporaries."""
    import mla_jax
    from mla_jax.generation import prefill
    from mla_jax.generation.drafts import PromptLookup
    from mla_jax.models import DecoderConfig, random_decoder

    config = DecoderConfig.from_preset("deepseek_v2_lite")
    model = random_decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    bound, drafter = mla_jax.bind(model), PromptLookup(0)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, tokens, np.int32)
    slots = tokens + 128
    for turn in ("with compilation", "again"):
        cache = jax.block_until_ready(model.init_cache(1, slots))
        ends = (jnp.zeros((1, config.vocab_size), jnp.float32),
                jnp.zeros((1, config.attention.hidden_size), jnp.bfloat16))  # fmt: skip
        started = time.perf_counter()
        ends, cache, _ = jax.block_until_ready(
            prefill.prefill(bound, [prompt], cache, (), drafter, np.zeros(1, np.int32), ends)
        )
        taken = time.perf_counter() - started
        print(f"{tokens} tokens of V2-Lite, {turn}: {taken:.2f} s", flush=True)
    chunk = list(prefill.chunks([prompt], prefill.TOKENS))[-1]
    compiled = prefill._chunk.lower(
        bound, chunk.tokens, chunk.following, chunk.lengths, chunk.known, np.int32(0), cache, (),
        ends, drafter=drafter, fresh=False,
    ).compile()  # fmt: skip
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(f"temporaries of the last chunk, {chunk.tokens.shape[1]} tokens: "
          f"{compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB; weights and cache "
          f"{(bound.nbytes if hasattr(bound, 'nbytes') else 0) / 1e9:.1f} and "
          f"{cache.nbytes / 1e9:.1f} GB; peak {peak / 1e9:.1f} GB")  # fmt: skip


def main():
    """Times the cases named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--implementation", help="backend of attention; the default by itself")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--last", type=float, default=0.1, help="seconds of a round")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the kernels that take longest, too")
    parser.add_argument("--long", type=int, help="tokens of a prompt for a whole model")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(max(1, len(options.cases)))
    for name in options.cases:
        context.Process(
            target=guarded, args=(name, CASES[name], options, queue, barrier), daemon=True
        ).start()
    print("| case | form | ms | TFLOP/s | temporaries MiB | apart from XLA |\n"
          "|---|---|---|---|---|---|", flush=True)  # fmt: skip
    running = len(options.cases)
    while running:
        line = queue.get()
        running -= line is None
        if line is not None:
            print(line, flush=True)
    if options.long:
        long_prompt(options.long)


if __name__ == "__main__":
    main()
