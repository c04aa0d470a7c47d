"""Compiles the TPU path for every generation without a TPU, and reads libtpu's static figures.

Needs `libtpu` (pip install --group tpu-aot). For each generation: the decode kernel, a layer's
whole decode step (donated), the same step on XLA, prefills of 4096 tokens, and a training step of
them. Checked: it compiles, with libtpu's linter on the kernel; the cache is aliased; decode copies
nothing of its size; prefill and training make no array of T x T or T x S scores of all heads.
Printed: scoped VMEM, HBM arguments and temporaries, and static cycles: the critical path of the
final program by libtpu's own profiler, with lengths known at compile time. That is an estimate, not
a measurement on hardware; the time to expect is at least max(cycles / clock, bytes / (0.85
bandwidth)).

    python benchmarks/aot_tpu.py              the tables; --json FILE keeps the rows
    python benchmarks/aot_tpu.py --short      a few shapes per generation, the kernels linted; of it
                                              --kernels, --programs and --sparse are parts
    python benchmarks/aot_tpu.py --tune       measures block sizes for configs/tuning/tpu.toml
    python benchmarks/aot_tpu.py --on-device  on a TPU: checks and times the same shapes, and
                                              attention of the expanded form
"""

import argparse
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

import aot_attention  # beside this file

# Generation: topology, jax's device_kind, clock in GHz, HBM GB/s and bf16 TFLOP/s of a JAX device.
GENERATIONS = {
    "v5e": ("v5e:2x2", "TPU v5 lite", 1.50, 819, 197),
    "v5p": ("v5p:2x2x1", "TPU v5", 1.75, 2765, 459),
    "v6e": ("v6e:2x2", "TPU v6 lite", 1.75, 1638, 918),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x", 2.20, 3690, 1153.5),
}
PRESETS = [
    ("deepseek_v3", 128), ("deepseek_v3", 16), ("deepseek_v2_lite", 16), ("kimi_k2", 64),
    ("glm_4_7_flash", 20),
]  # fmt: skip
KERNELS = [
    {"batch": 8, "slots": 4096, "heads": 128},
    {"batch": 16, "slots": 4096, "heads": 16},
    {"batch": 2, "slots": 32768, "heads": 128},
    {"batch": 8, "slots": 32768, "heads": 16},
    {"batch": 8, "slots": 4096, "heads": 128, "tokens": 4},
    {"batch": 16, "slots": 4096, "heads": 16, "tokens": 4},
    {"batch": 34, "slots": 4096, "heads": 16, "uneven": True},
    {"batch": 17, "slots": 4096, "heads": 128, "uneven": True},
    {"batch": 64, "slots": 512, "heads": 16},
]
LINTED = [(2, 16, 1), (1, 64, 2)]  # B, N, T of the short form, on so many slots
LINTED_SLOTS = 1024  # to pages of one block only it objects without need, as `unpoison` says
LIMIT = 300  # seconds for the profiler
LINT = {
    "xla_tpu_enable_llo_linter": True,
    "xla_tpu_llo_linter_analyze_tpu_custom_calls": True,
    "xla_tpu_llo_linter_targets": ".*",
}


def ragged(row):
    """The length of a row among ragged ones of 4096 slots: 2,000 on average, from 115 to 3990."""
    return (row * 1237 + 500) & 4095


def lengths_of(shape):
    """Slots of each row of a shape."""
    rows = range(shape["batch"])
    return [ragged(row) if shape.get("uneven") else shape["slots"] for row in rows]


def environment(folder):
    """Variables that libtpu reads when it is loaded; with a folder, the profiler writes there."""
    flags = ""
    if folder is not None:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder} --xla_jf_dump_to={folder}"
        flags += " --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*utilization$"
    return {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-4",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flags,
    }  # fmt: skip


def compiled(fn, args, generation, *, lint=False, **jit_options):
    """`fn` compiled for one chip of a generation."""
    import jax
    from jax._src.mesh import AbstractDevice  # not public
    from jax.experimental import topologies
    from jax.sharding import AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(GENERATIONS[generation][0], platform="tpu").devices[0]
    here = SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    abstract = AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        lowered = jax.jit(fn, **jit_options).trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.compile(compiler_options=LINT if lint else None)


def kernel(generation, *, batch, slots, heads, tokens=1, dtype="bfloat16", uneven=False, **changes):
    """The kernel call alone, lengths known at compile time, and its plan."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from mla_jax.ops import tpu
    from mla_jax.ops.tpu import kernel as kernel_module

    kind = GENERATIONS[generation][1]
    plan = tpu.make_plan(batch, tokens * heads, slots, jnp.dtype(dtype).itemsize, kind)
    if changes:
        plan = dataclasses.replace(plan, vmem_bytes=60 * 2**20, **changes)
    shapes = ((batch, tokens, heads, 512), (batch, tokens, heads, 64))
    shapes += ((batch, slots, 512), (batch, slots, 64))
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    launch = functools.partial(
        kernel_module.launch, lengths=None, scale=192**-0.5, plan=plan,
        known=ragged if uneven else None,
    )  # fmt: skip
    return launch, args, plan


def profile(generation, options):
    """Runs in a child: compiles the kernel under the profiler, prints what it found as JSON."""
    folder, found = os.environ["AOT_FOLDER"], {"cycles": None}
    if "prefill" in options:
        launch, args = aot_attention.prefill(
            options["prefill"], options["heads"], options["scaled"]
        )
        text = compiled(launch, args, generation).as_text()
        within, sums = aot_attention.inside_loops(text), {"once": 0, "piece": 0}
        for name in glob.glob(f"{folder}/*profile.textproto"):
            with open(name) as file:
                match = re.search(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', file.read())
            if match and not match[1].startswith("mla_attention"):
                sums["piece" if match[1] in within else "once"] += int(match[2])
        print("@" + json.dumps(sums | {"slots": aot_attention.piece_slots(args)}))
        return
    if "which" in options:
        launch, args, _ = aot_attention.kernel(GENERATIONS[generation][1], **options)
    else:
        launch, args, plan = kernel(generation, **options)
        found["block"] = plan.block
    found["vmem"] = vmem(compiled(launch, args, generation).as_text())
    for name in glob.glob(f"{folder}/*mla_*profile.textproto"):
        with open(name) as file:
            match = re.search(r'hlo_op_name: "mla_[^"]*"\s+estimated_cycles: (\d+)', file.read())
        found["cycles"] = int(match[1]) if match else None
    for name in glob.glob(f"{folder}/*mla_*final_hlo-static-per-bundle-utilization.txt"):
        with open(name) as file:
            lines = file.read().split("\n")
        units = [unit.strip() for unit in lines[1].split(",")]
        rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
        sums = dict(zip(units, map(sum, zip(*rows, strict=True)), strict=True))
        found["spills"] = sums["VSTORE:SPILL"]
    print("@" + json.dumps(found))


def static(generation, options):
    """`profile` in a child process: where libtpu's profiler meets what it lacks, it aborts.

    Or it does not end, and takes ever more memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | environment(folder) | {"AOT_FOLDER": folder}
        command = [sys.executable, __file__, "--profile", generation, json.dumps(options)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"abort": f"no end after {LIMIT} s"}
    for line in done.stdout.splitlines():
        if line.startswith("@"):
            return json.loads(line[1:])
    why = [line for line in done.stderr.splitlines() if "failed" in line or "Error" in line]
    return {"abort": (why[0] if why else done.stderr[-200:])[-200:]}


def vmem(text):
    """Largest scoped VMEM of a kernel in a compiled program, in MiB."""
    sizes = [0]
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            match = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', line)
            sizes.append(sum(int(part["size"]) for part in json.loads(match[1])) if match else 0)
    return round(max(sizes) / 2**20, 1)


def cache_copies(text, batch, slots):
    """Copies and transposes of a cache array in a compiled program."""
    shape = re.compile(rf"= \w+\[{batch},({slots},\d+|\d+,{slots})\]\S* (copy|transpose)\(")
    return [line.strip()[:160] for line in text.splitlines() if shape.search(line)]


def scores(text, heads, tokens, slots):
    """Arrays in a compiled program as large as the scores of all heads, of T x T or of T x S."""
    found = set()
    for shape in re.findall(r"\w+\[([\d,]+)\]", text):
        sizes = [int(size) for size in shape.split(",")]
        pairs = sizes.count(tokens) > 1 or (tokens in sizes and slots in sizes)
        if pairs and math.prod(sizes) >= heads * tokens * min(tokens, slots):
            found.add(shape)
    return sorted(found)


def step(
    generation, preset, heads, *, implementation=None, batch=64, slots=8192, tokens=None,
    training=False, **changes,
):  # fmt: skip
    """A layer's decode step, or prefill of `tokens`, donated; what must hold is asserted.

    Training takes the gradients of a layer's parameters and input, without a cache. `changes` are
    of the preset.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import mla_jax

    config = mla_jax.MLAConfig.from_preset(preset).replace(num_attention_heads=heads, **changes)
    layer = nnx.eval_shape(
        lambda: mla_jax.MultiHeadLatentAttention(
            config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, implementation=implementation,
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    cache = jax.eval_shape(lambda: layer.init_cache(batch, slots))
    x = jax.ShapeDtypeStruct((batch, tokens or 1, config.hidden_size), jnp.bfloat16)

    def run(layer, x, cache):
        return layer.prefill(x, cache) if tokens else layer.decode(x, cache)

    def train(layer, x):
        loss = lambda layer, x: layer(x).astype(jnp.float32).sum()  # noqa: E731
        return nnx.grad(loss, argnums=(0, 1))(layer, x)

    if training:
        program = compiled(train, (layer, x), generation)
    else:
        program = compiled(run, (layer, x, cache), generation, donate_argnums=(2,))
    memory, text = program.memory_analysis(), program.as_text()
    mib = lambda size: round(size / 2**20, 1)  # noqa: E731
    size = batch * slots * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    assert training or memory.alias_size_in_bytes >= size, "the cache is not donated"
    copies = [] if training else cache_copies(text, batch, slots)
    if tokens and implementation is None:
        assert "mla_attention" in text, "the kernel was not chosen"
        found = scores(text, heads, tokens, slots)
        assert not found, found
    if not tokens and implementation is None:
        assert "tpu_custom_call" in text, "the kernel was not chosen"
        assert not copies, copies
        assert memory.temp_size_in_bytes < size / 4, "temporaries as large as the cache"
    return {
        "arguments": mib(memory.argument_size_in_bytes),
        "temporaries": mib(memory.temp_size_in_bytes),
        "aliased": mib(memory.alias_size_in_bytes), "vmem": vmem(text), "copies": len(copies),
    }  # fmt: skip


def sparse(generation, *, batch=16, slots=65536, tokens=None):
    """A step of DeepSeek-V3.2's layer that chooses tokens, on XLA: temporaries are asserted."""
    from mla_jax import MLAConfig

    row = step(
        generation, "deepseek_v32", 128, implementation="xla", batch=batch, slots=slots,
        tokens=tokens,
    )  # fmt: skip
    heads = MLAConfig.from_preset("deepseek_v32").index_n_heads
    products = batch * (tokens or 1) * heads * slots * 4 / 2**20  # of all index heads and slots
    # A prompt's patterns and mixed latents, 1 GiB here, and what is gathered for some queries.
    assert row["temporaries"] < max(512, products / 16), (row, products)
    return row


def linted(generation):
    """The kernels with the linter and dynamic lengths: the largest scoped VMEM of decode, in MiB.

    One shape of decode is on a dense cache, the other on pages, which come in through a table.
    """
    import jax
    import jax.numpy as jnp

    from mla_jax.ops.tpu import kernel as kernel_module
    from mla_jax.ops.tpu.planning import LANES

    sizes = []
    for paged, (batch, heads, tokens) in enumerate(LINTED):
        _, args, plan = kernel(
            generation, batch=batch, slots=LINTED_SLOTS, heads=heads, tokens=tokens
        )
        fn = functools.partial(kernel_module.launch, scale=192**-0.5, plan=plan)
        args = [*args, jax.ShapeDtypeStruct((batch, tokens), jnp.int32)]
        of_cache = batch, LINTED_SLOTS
        if paged:
            count, launch = LINTED_SLOTS // LANES, fn
            of_cache = batch * count, LANES
            pool = [jax.ShapeDtypeStruct((*of_cache, x.shape[2]), x.dtype) for x in args[2:4]]
            args = [*args[:2], *pool, args[4], jax.ShapeDtypeStruct((batch, count), jnp.int32)]
            fn = lambda p, q, c, k, n, t: launch(p, q, c, k, n, table=t)  # noqa: B023, E731
        text = compiled(fn, args, generation, lint=True).as_text()
        assert not cache_copies(text, *of_cache)
        sizes.append(vmem(text))
    for which, tokens in aot_attention.LINTED:
        kind, widths = GENERATIONS[generation][1], (128, 128, 128)  # 64 would be copied before
        launch, args, _ = aot_attention.kernel(
            kind, which, tokens, heads=1, widths=widths, known=False
        )
        compiled(launch, args, generation, lint=True)
    return max(sizes)


def short(options):
    """The kernels linted, a layer's decode step, and one that chooses among its slots."""
    every = not (options.kernels or options.programs or options.sparse)
    for generation in options.generations:
        found = []
        if options.kernels or every:
            found.append(f"{linted(generation)} MiB of VMEM")
        if options.programs or every:
            # Narrow and of one block: wider ones take twice as long, to no other end.
            step(generation, "deepseek_v2_lite", 16, batch=2, slots=1024, hidden_size=256)
            found.append("no copy of the cache")
        if options.sparse or every:
            chosen = sparse(generation)["temporaries"]
            found.append(f"{chosen} MiB of temporaries with a choice among 16 x 65,536 slots")
        print(f"{generation}: compiles, {', '.join(found)}")


def record(options, name, keys, row):
    """Puts a row into the JSON file, in place of the one that agrees on `keys`."""
    if not options.json:
        return
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    rows = kept.setdefault(name, [])
    same = [i for i, old in enumerate(rows) if all(old[key] == row[key] for key in keys)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    options.json.write_text(json.dumps(kept, indent=1) + "\n")


def kernels(options):
    """Static cycles of the kernel."""
    print("| | B, S, N, T | block | cycles | per 1k slots | HBM at 85% | MXU | us | of floor "
          "| VMEM MiB | spills |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for generation in options.generations:
        _, kind, clock, bandwidth, tera = GENERATIONS[generation]
        for shape in KERNELS:
            batch, slots, heads = shape["batch"], shape["slots"], shape["heads"]
            tokens, lengths = shape.get("tokens", 1), lengths_of(shape)
            total, many = sum(lengths), "ragged" if shape.get("uneven") else slots
            name = f"{generation} | {batch}, {many}, {heads}"
            hbm = total * 576 * 2 / (0.85 * bandwidth)  # ns
            mxu = 2 * total * heads * tokens * 1088 / (tera * 1e3)
            found = static(generation, shape)
            cycles = found.get("cycles")
            if not cycles:
                print(f"| {name}, {tokens} | | profiler fails | | {hbm * clock:.0f} | "
                      f"{mxu * clock:.0f} | | | | |", flush=True)  # fmt: skip
                print(found.get("abort"), file=sys.stderr)
                continue
            # The kernel copies latents by 8 and rotary keys by 128 slots.
            read = sum(512 * -(-n // 8) * 8 + 64 * -(-n // 128) * 128 for n in lengths) / 576
            time, floor = max(cycles / clock, hbm * read / total), max(hbm, mxu)
            columns = [
                f"{name}, {tokens}", found["block"], cycles, f"{cycles * 1024 / total:.0f}",
                f"{hbm * clock:.0f}", f"{mxu * clock:.0f}", f"{time / 1e3:.1f}",
                f"{floor / time:.2f}", found["vmem"], found["spills"],
            ]  # fmt: skip
            print("|", " | ".join(map(str, columns)), "|", flush=True)
            row = {"kind": kind, "shape": shape, "us": time / 1e3, "cycles": cycles}
            record(options, "kernels", ("kind", "shape"), row)


def programs(options):
    """Programs of a layer: what they take, and whether all compile."""
    print("| | program | arguments MiB | aliased MiB | temporaries MiB | VMEM MiB | cache copies |")
    print("|---|---|---|---|---|---|---|")
    refused = []
    for generation in options.generations:
        for preset, heads in PRESETS:
            for what, changes in (
                ("decode", {}),
                ("decode on xla", {"implementation": "xla"}),
                ("prefill 4096", {"tokens": 4096, "batch": 1}),
                ("prefill 4096 on 28,672", {"tokens": 4096, "batch": 1, "slots": 32768}),
                ("training 4096", {"tokens": 4096, "batch": 1, "training": True}),
            ):
                name = f"{preset}, {heads} heads, {what}"
                try:
                    found = step(generation, preset, heads, **changes)
                except Exception as error:  # libtpu's and ours: the table names them all
                    refused.append(f"{generation} {name}: {error}")
                    print(f"| {generation} | {name} | refused |", flush=True)
                    continue
                columns = ("arguments", "aliased", "temporaries", "vmem", "copies")
                print(f"| {generation} | {name} | {' | '.join(str(found[c]) for c in columns)} |",
                      flush=True)  # fmt: skip
                row = {"generation": generation, "program": name, **found}
                record(options, "programs", ("generation", "program"), row)
        for what, changes in (
            ("decode, 16 x 65536", {}),
            ("prefill 4096 on 28672", {"tokens": 4096, "batch": 1, "slots": 32768}),
        ):
            name = f"deepseek_v32, 128 heads, a choice of 2048, {what}"
            try:
                found = sparse(generation, **changes)
            except Exception as error:
                refused.append(f"{generation} {name}: {error}")
                print(f"| {generation} | {name} | refused |", flush=True)
                continue
            columns = ("arguments", "aliased", "temporaries", "vmem", "copies")
            print(f"| {generation} | {name} | {' | '.join(str(found[c]) for c in columns)} |",
                  flush=True)  # fmt: skip
            row = {"generation": generation, "program": name, **found}
            record(options, "programs", ("generation", "program"), row)
    if refused:
        sys.exit("\n".join(refused))


def on_device(options):
    """On a TPU: the kernel's shapes checked and timed, beside their static times.

    Elsewhere it tries the same code on one short shape.
    """
    import decode  # beside this file
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    name, shapes = "pallas_tpu", KERNELS
    if device.platform != "tpu":
        print("This is no TPU: XLA on a short shape.")
        name, shapes = options.implementation, [{"batch": 2, "slots": 256, "heads": 16}]
    rows = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["kernels"]
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    print("| B, S, N, T | us | static us | error | lse error | repeatable |")
    print("|---|---|---|---|---|---|")
    wrong = []
    for shape in shapes:
        batch, slots, heads = shape["batch"], shape["slots"], shape["heads"]
        tokens, lengths = shape.get("tokens", 1), lengths_of(shape)
        title = f"{batch}, {'ragged' if shape.get('uneven') else slots}, {heads}, {tokens}"
        guess = sum(lengths) * 576 * 2 / 1e12
        got = decode.measure(
            name, (batch, slots, heads, tokens), lengths, jnp.dtype("bfloat16"), guess, options.last
        )
        known = [r["us"] for r in rows if r["kind"] == device.device_kind and r["shape"] == shape]
        expected = f"{known[0]:.1f}" if known else "-"
        print(f"| {title} | {got['seconds'] * 1e6:.1f} | {expected} | {got['error']:.1e} | "
              f"{got['lse_error']:.0e} | {got['repeatable']} |", flush=True)  # fmt: skip
        if not (got["error"] < 2**-7 and got["lse_error"] < 1e-3 and got["repeatable"]):
            wrong.append(title)
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    print()
    wrong += aot_attention.on_device(options.last, kept.get("attention", []))
    if wrong:
        sys.exit(f"wrong: {'; '.join(wrong)}")


def tune(options):
    """Measures sizes of blocks and pieces; writes what is better by 1% and more to the table."""
    from mla_jax.config import configs_dir

    path = configs_dir() / "tuning" / "tpu.toml"
    text = path.read_text(encoding="utf-8")
    for generation in options.generations:
        _, kind, clock, bandwidth, _ = GENERATIONS[generation]
        for heads, batch in ((16, 16), (128, 8)):
            found = {}
            for block, piece in itertools.product((1024, 2048, 4096), (128, 256, 512, 1024)):
                shape = {"slots": 4096, "heads": heads, "block": block, "piece": piece}
                cost = 0
                for rows in ({"batch": batch}, {"batch": 2 * batch, "uneven": True}):
                    got = static(generation, shape | rows).get("cycles") or math.inf  # it aborts
                    least = sum(lengths_of(shape | rows)) * 576 * 2 / (0.85 * bandwidth) * clock
                    # A tenth of the cycles too: where memory is the limit they are optimistic.
                    cost += max(got, least) + got / 10
                print(f"{generation}, {heads} heads, {block}, {piece}: {cost:.0f}", flush=True)
                found[block, piece] = cost
            best = min(found, key=found.__getitem__)
            keys = [f"{name}_of_{heads}_queries" for name in ("block", "piece")]
            now = found.get(tuple(tomllib.loads(text)[kind][key] for key in keys), math.inf)
            if now <= 1.01 * found[best]:
                print(f"{generation}, {heads} heads: the table keeps its values")
                continue
            for key, value in zip(keys, best, strict=True):
                text = re.sub(rf'(\["{kind}"\][^\[]*{key} = )\d+', rf"\g<1>{value}", text)
    path.write_text(text, encoding="utf-8")


def main():
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=list(GENERATIONS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="the kernel's table only")
    parser.add_argument("--attention", action="store_true", help="the expanded form's table only")
    parser.add_argument("--programs", action="store_true", help="the layer's table only")
    parser.add_argument("--sparse", action="store_true", help="of --short, a choice of slots only")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--on-device", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--last", type=float, default=0.06, help="seconds of a timed loop")
    parser.add_argument("--implementation", default="xla", help="of --on-device without a TPU")
    parser.add_argument("--profile", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        profile(options.profile[0], json.loads(options.profile[1]))
        return
    if options.on_device:
        on_device(options)
        return
    os.environ.update(environment(None))
    try:
        import libtpu  # noqa: F401  # pyrefly: ignore
    except ImportError:
        print("libtpu is not installed (pip install --group tpu-aot): nothing compiled.")
        return
    if options.short:
        short(options)
    elif options.tune:
        tune(options)
    else:
        only = options.programs or options.kernels or options.attention
        if options.kernels or not only:
            kernels(options)
            print()
        if options.attention or not only:
            chosen = {name: GENERATIONS[name] for name in options.generations}
            keys = ("kind", "which", "tokens", "heads")
            aot_attention.table(chosen, static, lambda row: record(options, "attention", keys, row))
            print()
            aot_attention.prefills(chosen, static)
            print()
        if options.programs or not only:
            programs(options)


if __name__ == "__main__":
    main()
