"""Times a whole decoder with random weights on the default device: prefill and decode steps.

Per batch: seconds to the first token (the median of three runs after the first, of which one makes
XLA's graphs of kernels), milliseconds per decode step, both without compilation, which is printed
apart; the floor of a step, which is what it must read over the rate of a copy measured in the same
run; and where a step's time goes, by named scope, from a trace of the profiler.

What a step must read: the cache; all weights but the embedding (a row per token) and the routed
experts; of those what B tokens choose of E when choices are uniform, E (1 - (1 - K/E)^B).

Decode steps run in blocks inside one program, as in `generate`: the host hears of them per block.
A block is one graph of kernels, which XLA makes in its first two runs, before those that are timed.
The profiler sees no loop within a graph, so that its trace is of a block that is compiled without.
Beside them stands a loop in Python over `mla_jax.bind(model)`, a program a step.
A line is printed as soon as it is known, and a batch that fails does not end the run.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from decode import alone, ceilings  # beside this file
from flax import nnx

import mla_jax
from mla_jax import target
from mla_jax.generation import Sampling, loop, prefill
from mla_jax.generation.drafts import PromptLookup
from mla_jax.layers.quantised import Kept
from mla_jax.models import DecoderConfig, random_decoder

SCOPES = {  # the first that an operation's name contains
    "router": ("router",),
    "shared expert": ("shared_expert",),
    "experts": ("experts",),
    "head": ("head",),
    "attention core": ("latent_attention", "expanded_attention", "plan"),
    "attention projections": ("queries", "latents", "rope", "w_uk", "w_uv", "kv_b_proj", "o_proj"),
    "cache append": ("cache_append",),
    "dense MLP, norms": ("mlp",),
}
_FIRST = 3  # blocks before those that are timed
PLAIN = {"drafter": PromptLookup(0), "sampling": Sampling()}


def say(text: str) -> None:
    """Prints with the seconds since the start, at once."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.perf_counter()


def weights(model, batch):
    """{what: bytes that a decode step of `batch` rows reads}, experts as expected."""
    config, total = model.config, collections.Counter()
    state = nnx.to_flat_state(nnx.state(model))
    for path, leaf in zip(state.paths, state.leaves, strict=True):
        names = set(map(str, path))
        if "embed" in names and not config.tie_word_embeddings:
            continue
        if isinstance(leaf, Kept):  # a copy of a part that is counted
            continue
        routed = "mlp" in names and leaf.ndim == 3
        if routed:
            share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
            total["experts"] += leaf[...].nbytes * share
        else:
            kind = ("shared expert" if "shared" in names else "attention" if "attention" in names
                    else "head" if "head" in names else "other")  # fmt: skip
            total[kind] += leaf[...].nbytes
    return dict(total)


def active(model):
    """Parameters that one token multiplies, the head's apart: it sees a prompt's last token."""
    config, count = model.config, 0.0
    state = nnx.to_flat_state(nnx.state(model))
    for path, leaf in zip(state.paths, state.leaves, strict=True):
        names = set(map(str, path))
        if ("scale" in names and leaf.ndim > 1) or isinstance(leaf, Kept):
            continue
        routed = "mlp" in names and leaf.ndim == 3
        share = config.num_experts_per_tok / config.n_routed_experts if routed else 1
        count += 0 if names & {"embed", "head"} else leaf.size * share
    return count


def scope_of(name: str) -> str:
    """The scope that an operation's path of names belongs to."""
    return next((s for s, parts in SCOPES.items() if any(p in name for p in parts)), "other")


def scopes(text: str) -> dict[str, str]:
    """{instruction: scope} of a compiled module, by its own name or by what it fuses."""
    computations: dict[str, collections.Counter] = {}
    found, fused, inside = {}, {}, ""
    for line in text.splitlines():
        opened = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if opened:
            inside = opened[1]
            computations[inside] = collections.Counter()
            continue
        made = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if not made:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%?([\w.\-]+)", line)
        if name:
            found[made[1]] = scope_of(name[1])
            computations[inside][found[made[1]]] += 1
        elif called:
            fused[made[1]] = called[1]
    for instruction, computation in fused.items():
        most = computations.get(computation, collections.Counter()).most_common(1)
        found[instruction] = most[0][0] if most else "other"
    return found


def calls(text: str) -> dict[str, list[str]]:
    """{Pallas kernel: the scopes of its calls, in the order of a compiled module}.

    In a trace of a graph, as XLA makes of a step, all calls of a kernel have its name alone.
    """
    found = collections.defaultdict(list)
    for path in re.findall(r' custom-call\(.*op_name="([^"]*)"', text):
        *scope, kernel, _ = ["", *path.split("/")]  # Pallas calls a kernel in a scope of its name
        found[kernel].append(scope_of("/".join(scope)))
    return found


def profile(run, text, steps):
    """Milliseconds of a step by scope, kernels' own and between them, from a trace of `run()`."""
    from jax.profiler import ProfileData

    known, ordered = scopes(text), calls(text)
    known |= {re.sub(r"\W", "_", name): scope for name, scope in known.items()}  # kernels' names
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        data = ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
    events = []
    for plane in data.planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if not line.name.startswith("Stream" if gpu else "tf_XLA"):
                continue
            for event in line.events:
                own = {str(key): value for key, value in event.stats}
                name = own.get("hlo_op", "")
                if not gpu and (not name or name.startswith(("while", "call", "conditional"))):
                    continue
                events.append((event.start_ns, event.duration_ns, event.name, name))
    taken, unknown, named, turns = (collections.Counter() for _ in range(4))
    total = collections.Counter(event for _, _, event, _ in events)
    for _, duration, event, name in sorted(events):
        own = ordered.get(event.removesuffix("_mosaic_gpu_kernel"), [])
        if own and total[event] % len(own) == 0:
            scope = own[turns[event] % len(own)]
            turns[event] += 1
        else:
            scope = known.get(name) or known.get(event) or scope_of(event)
        if scope == "other":
            unknown[event[:60]] += duration
        taken[scope] += duration
        named[scope, event[:60], name] += duration
    each = {scope: ns / steps / 1e6 for scope, ns in taken.most_common()}
    first, last = min(event[0] for event in events), max(sum(event[:2]) for event in events)
    each["between kernels"] = max(0.0, (last - first) / steps / 1e6 - sum(each.values()))
    return {
        "scopes": each, "kernels": len(events) / steps,
        "other": {name: ns / steps / 1e6 for name, ns in unknown.most_common(8)},
        "longest": [[*names, ns / steps / 1e3] for names, ns in named.most_common()],
    }  # fmt: skip


def prefilled(bound, batch, slots, options, result):
    """Logits and states of the prompts' last tokens, their tokens, and a cache that holds them."""
    model, prompt = bound.model, options.prompt_tokens
    random = np.random.default_rng(0)
    words = model.config.vocab_size
    prompts = random.integers(0, words, (batch, prompt), np.int32)
    width, dtype = model.config.attention.hidden_size, jnp.dtype(options.dtype)
    none = np.zeros(batch, np.int32)
    if options.steps_only:
        cache = model.init_cache(batch, slots, options.cache_dtype)

        def numbers(path, x):
            drawn = jax.random.normal(jax.random.key(x.size, impl="unsafe_rbg"), x.shape)
            scales = "scale" in jax.tree_util.keystr(path)
            return (jnp.exp2(jnp.round(drawn)) if scales else drawn).astype(x.dtype)

        draw = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, numbers))
        cache = cache.replace(stores=draw(cache.stores), length=jnp.full_like(cache.length, prompt))
        # Rows go on with words of their own, else all would choose the same experts.
        ends = draw(jnp.zeros((batch, words), jnp.float32)), jnp.zeros((batch, width), dtype)
        return ends, prompts, cache
    seconds = []
    for run in range(4):
        cache = jax.block_until_ready(model.init_cache(batch, slots, options.cache_dtype))
        ends = jnp.zeros((batch, words), jnp.float32), jnp.zeros((batch, width), dtype)
        started = time.perf_counter()
        ends, cache, _ = jax.block_until_ready(
            prefill.prefill(bound, list(prompts), cache, (), PLAIN["drafter"], none, ends)
        )
        seconds.append(time.perf_counter() - started)
        if run == 0:
            result["prefill_compile_s"] = seconds[0]
            say(f"batch {batch}: prefill compiled and ran in {seconds[0]:.1f} s")
            if seconds[0] > options.again:
                break
    taken = statistics.median(seconds[1:] or seconds)
    result["prefill_s"] = seconds[1:]
    flops = 2 * active(model) * batch * prompt
    result |= {"first_token_s": taken, "prefill_tflops": flops / taken / 1e12}
    say(f"batch {batch}: first token after {taken:.3f} s, {batch * prompt / taken:,.0f} tokens/s, "
        f"{flops / taken / 1e12:.0f} TFLOP/s in matrices; runs of "
        + ", ".join(f"{1e3 * each:.1f}" for each in seconds[1:]) + " ms")  # fmt: skip
    return ends, prompts, cache


def begin(bound, batch, options, result):
    """A compiled block of steps, and what it is given."""
    prompt, block = options.prompt_tokens, options.block
    slots = -(-(prompt + 1 + block * (2 * options.blocks + _FIRST + 3)) // 128) * 128
    ends, prompts, cache = prefilled(bound, batch, slots, options, result)
    held = cache.nbytes
    text = np.zeros((batch, slots), np.int32)
    text[:, :prompt] = prompts
    stops, least = np.zeros(0, np.int32), np.full(batch, prompt, np.int32)
    writing, _ = loop.begin(
        ends, text, least, np.zeros(batch, np.int32), np.full(batch, slots, np.int32), None, stops,
        jax.random.key(0), cache, (), logprobs=False, samples=1, **PLAIN,
    )  # fmt: skip
    del ends, cache
    started = time.perf_counter()
    compiled = lambda run_block: (  # noqa: E731
        run_block.lower(bound, writing, stops, least, steps=block, **PLAIN).compile()
    )
    step = compiled(loop.block_for(target.current().platform))
    traced = None if options.no_profile else compiled(loop.run_block)
    compiling = time.perf_counter() - started
    text, memory = step.as_text(), step.memory_analysis()
    copies = [line for line in re.findall(r"= (\S+) copy\(", text) if str(slots) in line]
    result |= {
        "decode_compile_s": compiling, "cache_bytes": held,
        "whiles": len(re.findall(r" while\(", text)), "cache_copies": len(copies),
        "aliased_bytes": memory.alias_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
    }  # fmt: skip
    say(f"batch {batch}: decode compiled in {compiling:.1f} s: {result['whiles']} while "
        f"loop for {block} steps, cache {held / 1e9:.2f} GB of which aliased "
        f"{memory.alias_size_in_bytes / 1e9:.2f} GB, {len(copies)} copies of it, temporaries "
        f"{memory.temp_size_in_bytes / 1e6:.0f} MB")  # fmt: skip
    return step, traced, writing, stops, least, slots


def measure(bound, batch, options, copy, result, begun):
    """Fills `result` with the figures of one batch, as they come; `begun` is of `begin`."""
    model, prompt, block = bound.model, options.prompt_tokens, options.block
    step, traced, writing, stops, least, slots = begun
    held = result["cache_bytes"]
    with alone():  # processes side by side compile meanwhile
        for _ in range(_FIRST):
            writing, *_ = jax.block_until_ready(step(bound, writing, stops, least))
        started = time.perf_counter()
        for _ in range(options.blocks):  # the device works through them, the host does not wait
            writing, *_ = step(bound, writing, stops, least)
        jax.block_until_ready(writing)
        taken = (time.perf_counter() - started) / options.blocks / block
    context = prompt + block * (_FIRST + options.blocks / 2)
    read = weights(model, batch)
    read["cache"] = held * context / slots
    floor = sum(read.values()) / copy
    result |= {
        "step_s": taken, "tokens_per_s": batch / taken, "read_bytes": read, "floor_s": floor,
        "fraction": floor / taken,
    }  # fmt: skip
    say(f"batch {batch}: {taken * 1e3:.3f} ms a step, {batch / taken:,.0f} tokens/s; reads "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in read.items())
        + f" GB: floor {floor * 1e3:.3f} ms, {floor / taken:.2f} of it reached")  # fmt: skip
    if not options.no_profile:
        state = [writing]

        def run():
            state[0] = jax.block_until_ready(traced(bound, state[0], stops, least))[0]

        run()
        with alone():
            result["profile"] = profile(run, traced.as_text(), block)
        say(f"batch {batch}: {result['profile']['kernels']:.0f} kernels a step, ms: " + ", ".join(
            f"{scope} {ms:.3f}" for scope, ms in result["profile"]["scopes"].items()))  # fmt: skip
        say(f"batch {batch}: other: {result['profile']['other']}")
        for scope, kernel, name, us in result["profile"]["longest"][: options.longest]:
            print(f"{us:10.2f} us a step  {scope:24} {kernel} ({name})", flush=True)
        writing = state[0]
    if options.steps_only:
        return
    cache, token = writing.cache, jnp.zeros((batch, 1), jnp.int32)
    pick = jax.jit(lambda logits: logits.argmax(-1).astype(jnp.int32))
    logits, cache = bound.decode(token, cache)
    token = jax.block_until_ready(pick(logits))
    called, started, steps = 0.0, time.perf_counter(), block * options.blocks
    for _ in range(steps):
        before = time.perf_counter()
        logits, cache = bound.decode(token, cache)
        called += time.perf_counter() - before
        # What is let go leaves its address to the next: XLA then keeps its graph of kernels.
        del token
        token = pick(logits)
        del logits
    jax.block_until_ready(token)
    each = (time.perf_counter() - started) / steps
    result |= {"python_step_s": each, "python_call_s": called / steps}
    say(f"batch {batch}: a loop in Python takes {each * 1e3:.3f} ms a step, a call of it "
        f"{called / steps * 1e3:.3f}; {each / result['step_s']:.2f} of the program's")  # fmt: skip


def main():
    """Runs every batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek_v2_lite")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--block", type=int, default=16, help="decode steps in one program")
    parser.add_argument("--blocks", type=int, default=8, help="that are timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", help="rounded to this form and kept so: float8_e4m3fn, int8")
    parser.add_argument("--cache-dtype", help="of the latents in the cache, such as float8_e4m3fn")
    parser.add_argument("--implementation", help="backend of the attention core")
    parser.add_argument("--layers", type=int, help="fewer than the preset has, to try things")
    parser.add_argument("--again", type=float, default=1e9,
                        help="prefill once only where it compiles longer than this")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no batch after these")
    parser.add_argument("--steps-only", action="store_true",
                        help="neither prefill, the cache holds random numbers, nor the loop in "
                        "Python; batches compile side by side")  # fmt: skip
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--longest", type=int, default=0, help="print so many kernels of a step")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here, batch by batch")
    options = parser.parse_args()
    config = DecoderConfig.from_preset(options.preset)
    if options.layers:
        shorter = config.attention.replace(num_hidden_layers=options.layers)
        config = config.replace(attention=shorter)
    kind = jax.devices()[0].device_kind
    copy, matmul = ceilings(0.06)
    say(f"{kind}, jax {jax.__version__}: {copy / 1e12:.2f} TB/s copy, "
        f"{matmul / 1e12:.0f} TFLOP/s matmul")  # fmt: skip
    started = time.perf_counter()
    model = random_decoder(
        config, dtype=options.dtype, param_dtype=options.dtype,
        implementation=options.implementation, weights=options.weights,
    )  # fmt: skip
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    ready, size = time.perf_counter() - started, sum(leaf.nbytes for leaf in leaves)
    say(f"{options.preset}: {size / 1e9:.2f} GB of weights ready in {ready:.1f} s")
    rows = []
    table = {"device": kind, "jax": jax.__version__, "copy": copy, "matmul": matmul,
             "preset": options.preset, "prompt": options.prompt_tokens, "ready_s": ready,
             "weight_bytes": size, "weights": options.weights,
             "cache_dtype": options.cache_dtype, "rows": rows}  # fmt: skip
    bound, begun = mla_jax.bind(model), {}
    results = {batch: {"batch": batch} for batch in options.batches}
    if options.steps_only:  # all compile at once
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for batch, result in results.items():
                begun[batch] = pool.submit(begin, bound, batch, options, result)
    for batch, result in results.items():
        if time.perf_counter() - STARTED > options.seconds:
            say(f"batch {batch}: no time left")
            break
        rows.append(result)
        try:
            measure(
                bound, batch, options, copy, result,
                begun.pop(batch).result() if begun else begin(bound, batch, options, result),
            )  # fmt: skip
        except Exception as error:
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if options.json:
            options.json.write_text(json.dumps(table, indent=2))
    print("\n| batch | first token s | ms a step | tokens/s | floor ms | fraction | Python ms |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for row in filter(lambda row: "step_s" in row, rows):
        first, python = row.get("first_token_s"), row.get("python_step_s")
        print(f"| {row['batch']} | {'-' if first is None else f'{first:.3f}'} | "
              f"{row['step_s'] * 1e3:.3f} | {row['tokens_per_s']:,.0f} | "
              f"{row['floor_s'] * 1e3:.3f} | {row['fraction']:.2f} | "
              f"{'-' if python is None else f'{python * 1e3:.3f}'} |")  # fmt: skip


if __name__ == "__main__":
    main()
