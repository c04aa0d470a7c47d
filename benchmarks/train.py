"""Times a training step of a decoder with adamw; prints a line of a Markdown table per case.

A preset's shape, cut to a few layers, with random weights: parameters and the optimizer's state in
float32, the computation in bfloat16, the loss `models.training_loss`, whose logits exist for
--chunk tokens at once. --save says what every layer keeps for its backward pass
(`mla_jax.remat_policy`). Time is that of a chain of steps, each of which needs the one before, so
that dispatch does not count; the median of five chains. TFLOP/s are the model's own: three times
the forward pass's products (a token's own experts, causal attention), whatever is computed anew.
Memory is the compiled step's, arguments included, as the compiler plans it, and the device's peak
where it tells.

Cases: `dense` has a gated MLP in every layer, `experts` the preset's mixtures, and `packed` four
texts in every row.
"""

import argparse
import functools
import itertools
import statistics
import time
from typing import get_args

import jax
import jax.numpy as jnp
import kernels  # beside this file
import optax
from decode import alone  # beside this file
from flax import nnx

from mla_jax.layers.remat import Save
from mla_jax.models import DecoderConfig, random_decoder, training_loss

CASES = ("dense", "experts", "dense packed", "experts packed")


def shape(preset: str, layers: int, case: str) -> DecoderConfig:
    """The config of a case."""
    config = DecoderConfig.from_preset(preset)
    config = config.replace(attention=config.attention.replace(num_hidden_layers=layers))
    if case.startswith("experts"):
        return config
    return config.replace(
        n_routed_experts=None, num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=0
    )


def forward_flops(config: DecoderConfig, params, length: int) -> float:
    """Operations of the forward pass for a token, in the mean over a text of `length` tokens."""
    total = 0.0
    for path, leaf in nnx.to_flat_state(params):
        if leaf.ndim < 2 or path[0] == "embed":
            continue
        experts = leaf.ndim == 3 and path[-1] in ("gate_proj", "up_proj", "down_proj")
        chosen = config.num_experts_per_tok / leaf.shape[0] if experts else 1
        total += 2 * leaf.size * chosen
    attention = config.attention
    widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    seen = (length + 1) / 2
    return total + 2 * seen * attention.num_attention_heads * widths * attention.num_hidden_layers


def main():
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek_v2_lite")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="of a chain")
    parser.add_argument("--cases", nargs="+", default=["dense", "experts"], choices=CASES)
    saves = ["everything", *get_args(Save)]
    parser.add_argument("--save", nargs="+", default=saves[:1], choices=saves)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens whose logits exist at once")
    parser.add_argument("--profile", action="store_true", help="the kernels that take longest, too")
    options = parser.parse_args()
    tokens = options.batch * options.length
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.preset}, "
          f"{options.layers} layers, {options.batch} x {options.length} tokens\n\n"
          "| case | saved | ms | tokens/s | TFLOP/s | compiled GB | peak GB | loss, first and last "
          "|\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for case, save in itertools.product(options.cases, options.save):
        config = shape(options.preset, options.layers, case)
        model = random_decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.float32)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        del model
        optimizer = optax.adamw(1e-4)
        state = jax.jit(optimizer.init)(params)
        given = jax.random.randint(
            jax.random.key(1), (options.batch, options.length + 1), 0, config.vocab_size
        )
        segments = None
        if case.endswith("packed"):
            place = jnp.arange(options.length + 1)[None] * 4 // (options.length + 1)
            segments = jnp.broadcast_to(place, given.shape)
        more = {"remat": None if save == "everything" else save, "chunk": options.chunk}

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, rest, given, graphdef=graphdef, segments=segments, more=more,
                 optimizer=optimizer):  # fmt: skip
            def loss(params):
                model = nnx.merge(graphdef, params, rest)
                return training_loss(model, given, segment_ids=segments, **more)[0]

            value, slopes = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(slopes, state, params)
            return optax.apply_updates(params, updates), state, value

        flops = 3 * tokens * forward_flops(config, params, options.length)
        compiled = step.lower(params, state, rest, given).compile()
        memory = compiled.memory_analysis()
        planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        times, losses = [], []
        with alone():  # processes side by side compile meanwhile
            for _ in range(6):
                started = time.perf_counter()
                for _ in range(options.steps):
                    params, state, value = compiled(params, state, rest, given)
                losses.append(float(value))
                times.append((time.perf_counter() - started) / options.steps)
        taken = statistics.median(times[1:])
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(f"| {case} | {save} | {taken * 1e3:.1f} | {tokens / taken:.0f} | "
              f"{flops / taken / 1e12:.0f} | {planned / 1e9:.1f} | {peak / 1e9:.1f} | "
              f"{losses[0]:.3f} {losses[-1]:.3f} |",
              flush=True)  # fmt: skip
        if options.profile:

            def steps(compiled=compiled, rest=rest, given=given):
                nonlocal params, state
                for _ in range(3):
                    params, state, value = compiled(params, state, rest, given)
                return value

            print(kernels.report(steps, 3, most=40), flush=True)
        del params, state


if __name__ == "__main__":
    main()
