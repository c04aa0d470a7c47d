"""Times loading a synthetic bf16 checkpoint against reading its files, and measures peak memory.

A decoder of a preset's widths, or with --attention its attention layers alone, in as many layers as
reach --gigabytes, in shards of 2 GB. Each load is a process of its own. Before it, and before the
two ways of reading that it is compared with, the system's cache of the files is dropped (cold) or
filled (warm). The files are read in order, through one buffer of 8 MB, and into new memory of
their size, which is what a load takes too where parameters stay on the host.

Peak: resident memory beyond what the process had, less the parameters, in largest layers.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from mla_jax import MLAConfig, MultiHeadLatentAttention, checkpoint
from mla_jax.models import DecoderConfig

BUFFER = 2**23
BF16 = np.dtype(ml_dtypes.bfloat16)


def mlp_shapes(config, layer):
    """{name: shape} of a layer's MLP or experts."""
    width, shapes = config.attention.hidden_size, {}
    parts = {"": config.intermediate_size}
    if config.is_sparse(layer):
        inner = config.moe_intermediate_size
        parts = {f"experts.{e}.": inner for e in range(config.n_routed_experts)}
        parts["shared_experts."] = inner * config.n_shared_experts
        shapes["gate.weight"] = (config.n_routed_experts, width)
        if config.scoring_func == "sigmoid":
            shapes["gate.e_score_correction_bias"] = (config.n_routed_experts,)
    for part, inner in parts.items():
        shapes |= {f"{part}{kernel}_proj.weight": (inner, width) for kernel in ("gate", "up")}
        shapes[f"{part}down_proj.weight"] = (width, inner)
    return {f"mlp.{name}": shape for name, shape in shapes.items()}


def shapes_of(config, size, attention_only):
    """{tensor: shape} of the model, its layers, and the bytes of the largest."""
    layer = MultiHeadLatentAttention(config.attention, param_dtype=BF16, rngs=nnx.Rngs(0))
    attention = {f"self_attn.{name}": value.shape
                 for name, value in checkpoint.attention_tensors(layer).items()}  # fmt: skip
    width, found, layers, largest = config.attention.hidden_size, {}, 0, 0
    if not attention_only:
        found = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"),
                              (config.vocab_size, width))  # fmt: skip
        found["model.norm.weight"] = (width,)
    count = lambda shapes: 2 * sum(map(math.prod, shapes.values()))  # noqa: E731
    while layers == 0 or count(found) + largest <= size:
        own = dict(attention)
        if not attention_only:
            own |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
            own |= mlp_shapes(config, layers)
        found |= {f"model.layers.{layers}.{name}": shape for name, shape in own.items()}
        layers, largest = layers + 1, max(largest, count(own))
    return found, layers, largest


def write(folder, options):
    """Writes the checkpoint; returns the bytes of its largest layer."""
    config = DecoderConfig.from_preset(options.preset)
    shapes, layers, largest = shapes_of(config, options.gigabytes * 1e9, options.attention)
    keys = dataclasses.asdict(config)
    keys |= keys.pop("attention") | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(keys))
    numbers = max(map(math.prod, shapes.values()))
    pool = np.random.default_rng(0).standard_normal(numbers, np.float32).astype(BF16)
    tensors = {name: pool[: math.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    checkpoint.save_tensors(folder, tensors, shard_bytes=2e9)
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # the system does not drop what is not on disk yet
    return largest


def load(folder, attention_only):
    """In a process of its own: prints seconds, parameters' bytes, peak memory beyond the start."""
    checkpoint.place(np.zeros((2, 2)), BF16)  # jax's own memory
    before, started = peak(), time.perf_counter()
    if attention_only:
        with checkpoint.Checkpoint(folder) as files:
            config = MLAConfig.from_hf(files.config)
            make = lambda: MultiHeadLatentAttention(  # noqa: E731
                config, param_dtype=BF16, rngs=nnx.Rngs(0)
            )
            loaded = [nnx.eval_shape(make) for _ in files.layers()]
            for index, layer in enumerate(loaded):
                checkpoint.load_attention(layer, files.attention(index))
    else:
        loaded = checkpoint.load_decoder(folder)
    seconds = time.perf_counter() - started
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(loaded, nnx.Param)))
    print(json.dumps([seconds, size, peak() - before]))


def peak():
    """The process' largest resident memory so far, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def read(files, whole):
    """Seconds to read the files through one buffer, or into new memory of their size."""
    started = time.perf_counter()
    target = memoryview(np.empty(sum(file.stat().st_size for file in files) if whole else BUFFER,
                                 np.uint8))  # fmt: skip
    at = 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(target[at : at + BUFFER]):
                at += count if whole else 0
    return time.perf_counter() - started


def prepare(files, state):
    """Drops or fills the system's cache of the files."""
    # The host of a virtual machine takes free memory away, and returns it slowly.
    size = sum(file.stat().st_size for file in files)
    np.empty(size * 3 // 2, np.uint8)[::4096] = 1
    for file in files:
        with file.open("rb") as opened:
            if state == "cold":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if state == "warm":
        read(files, whole=False)


def main():
    """Writes, measures, removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek_v2_lite")
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--attention", action="store_true", help="attention layers only")
    parser.add_argument("--folder", type=pathlib.Path, help="to write below; the system's if none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return load(options.child, options.attention)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = pathlib.Path(name)
        largest = write(folder, options)
        files = sorted(folder.glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        print(f"{total / 1e9:.2f} GB, largest layer {largest / 1e9:.2f} GB, {os.cpu_count()} cores")
        print("| files | read GB/s | into new memory | load GB/s | of read | of new | layers |")
        print("|---|---|---|---|---|---|---|")
        command = [sys.executable, __file__, "--child", name] + ["--attention"] * options.attention
        for state in ["cold", "warm"] * options.repeat:
            seconds = []
            for whole in (False, True):
                prepare(files, state)
                seconds.append(read(files, whole))
            prepare(files, state)
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            taken, size, beyond = json.loads(out)
            once, new, loaded = (total / 1e9 / each for each in (*seconds, taken))
            rates = (once, new, loaded, loaded / once, loaded / new, (beyond - size) / largest)
            row = " | ".join([state, *(f"{rate:.2f}" for rate in rates)])
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
