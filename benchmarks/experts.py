"""Times one layer's mixture of experts, with the Hopper kernel and the ways through XLA.

Device time of a jitted loop (see decode.py). Per number of tokens: microseconds, TB/s of the chosen
experts' weights, TFLOP/s of their products, and the difference from experts gathered one by one.
Each way runs on its own: one that fails leaves the others' lines.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from decode import timer  # beside this file
from flax import nnx

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.models import DecoderConfig


def main():
    """Runs every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek_v2_lite")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 16384])
    parser.add_argument("--ways", nargs="+", default=["_grouped", "_xla"])
    options = parser.parse_args()
    config = DecoderConfig.from_preset(options.preset).replace(n_shared_experts=0)
    types = {"precision": None, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

    @jax.jit
    def make():
        key = jax.random.key(0, impl="unsafe_rbg")
        return nnx.state(MixtureOfExperts(config, **types, rngs=nnx.Rngs(key)))

    mlp = nnx.eval_shape(lambda: MixtureOfExperts(config, **types, rngs=nnx.Rngs(0)))
    nnx.update(mlp, make())
    one = sum(leaf[0].nbytes for leaf in mlp._kernels())
    for count in options.tokens:
        x = jax.random.normal(jax.random.key(1), (count, mlp.gate_proj.shape[1]), jnp.bfloat16)
        experts, weights = jax.jit(lambda mlp, x: mlp.router(x))(mlp, x)
        distinct, few = len(set(experts.ravel().tolist())), min(count, 8)
        expected = jax.jit(lambda m, *a: m._by_pair(*a))(
            mlp, x[:few], experts[:few], weights[:few]
        ).astype(jnp.float32)  # fmt: skip
        for name in options.ways:
            plain = "_sorted" if count > 256 else "_all_experts" if count > 5 else "_by_pair"
            way = getattr(MixtureOfExperts, plain if name == "_xla" else name)

            def step(state, way=way):
                mlp, x, experts, weights, _ = state
                return mlp, x, experts, weights, way(mlp, x, experts, weights)

            try:
                blank = jnp.zeros(x.shape, jax.eval_shape(way, mlp, x, experts, weights).dtype)
                guess = max(distinct * one / 2e12, count * experts.shape[1] * one / 2e14)
                start = (mlp, x, experts, weights, blank)
                taken, (state, _) = timer(functools.partial(step), guess, 0.05)(start)
            except Exception as error:
                print(f"{count} tokens, {name}: {error}"[:300], flush=True)
                continue
            off = jnp.linalg.norm(state[4][:few].astype(jnp.float32) - expected)
            flops = count * experts.shape[1] * one  # two operations per weight of two bytes
            print(f"{count} tokens, {name}: {taken * 1e6:.1f} us, {distinct} experts, "
                  f"{distinct * one / taken / 1e12:.2f} TB/s, {flops / taken / 1e12:.0f} TFLOP/s, "
                  f"off by {off / jnp.linalg.norm(expected):.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
