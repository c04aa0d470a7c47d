"""Times one layer's routed experts, forward and with their backward; prints a Markdown table.

Device time of a jitted loop (see decode.py), backends in turn, so that a chip at its power limit
treats them alike. Per number of tokens and backend: microseconds of the forward pass, TB/s of the
chosen experts' weights and TFLOP/s of their products; the same with the gradients of x, of the
router's weights and of all kernels, which count as three forwards; the difference from experts
gathered one by one (8 tokens) and, where that fits, of the gradients from XLA's in float32; and
whether two runs agree bit for bit. `tokamax` is a peer where its package is installed: three of its
`ragged_dot`.
"""

import argparse

import jax
import jax.numpy as jnp
from decode import timer  # beside this file
from flax import nnx

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.models import DecoderConfig
from mla_jax.ops.experts import routed_experts, xla

CHECKED = 2048  # tokens up to which float32 gradients are made for comparison


def tokamax_experts(x, experts, weights, gate, up, down):
    """The same through tokamax's ragged products on sorted rows."""
    import tokamax

    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=len(gate)).astype(jnp.int32)
    rows = x[order // experts.shape[1]]
    dot = lambda a, b: tokamax.ragged_dot(a, b, sizes, implementation="mosaic")  # noqa: E731
    hidden = jax.nn.silu(dot(rows, gate).astype(jnp.float32)) * dot(rows, up)
    own = dot(hidden.astype(x.dtype), down)[jnp.argsort(order)]
    return (own.reshape(*experts.shape, -1) * weights[..., None]).sum(1).astype(x.dtype)


def passes(backend):
    """(forward, forward with gradients) of a backend: functions of experts, dy and the arrays."""

    def forward(experts, dy, x, *rest):
        if backend == "tokamax":
            return tokamax_experts(x, experts, *rest)
        return routed_experts(x, experts, *rest, implementation=backend)

    def both(experts, dy, *arrays):
        y, pull = jax.vjp(lambda *a: forward(experts, dy, *a), *arrays)
        return y, pull(dy)

    return forward, both


def off(found, expected):
    """Relative Frobenius error."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def measure(f, arrays, guess, seconds):
    """(seconds of a call, whether two runs agree, the result)."""
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *arrays))
    taken, (one, two) = timer(lambda state: (state[0], f(*state[0])), guess, seconds)(
        (arrays, blank)
    )
    agree = jax.tree.map(lambda a, b: bool((a == b).all()), one[1], two[1])
    return taken, all(jax.tree.leaves(agree)), one[1]


def main():
    """Runs every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek_v2_lite")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 1000, 16384])
    parser.add_argument("--backends", nargs="+", default=["pallas_gpu"])
    parser.add_argument("--param-dtype", default="bfloat16")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.1, help="a timed loop lasts so long")
    options = parser.parse_args()
    config = DecoderConfig.from_preset(options.preset).replace(n_shared_experts=0)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.dtype(options.param_dtype)}

    @jax.jit
    def make():
        key = jax.random.key(0, impl="unsafe_rbg")
        return nnx.state(MixtureOfExperts(config, **types, rngs=nnx.Rngs(key)))

    mlp = nnx.eval_shape(lambda: MixtureOfExperts(config, **types, rngs=nnx.Rngs(0)))
    nnx.update(mlp, make())
    kernels = tuple(k[...] for k in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    one = sum(kernel[0].size for kernel in kernels)  # weights of one expert
    print("| tokens | backend | forward us | TB/s | TFLOP/s | + backward us | TFLOP/s | off by | "
          "gradients off by | repeatable |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for count in options.tokens:
        keys = jax.random.split(jax.random.key(1), 2)
        x, dy = (jax.random.normal(k, (count, kernels[0].shape[1]), jnp.bfloat16) for k in keys)
        experts, weights = jax.jit(lambda mlp, x: mlp.router(x))(mlp, x)
        arrays = (experts, dy, x, weights, *kernels)
        distinct, few = len(set(experts.ravel().tolist())), min(count, 8)
        flops = 2 * experts.size * one
        right = jax.jit(xla.by_pair)(x[:few], experts[:few], weights[:few], kernels)
        gradients = None
        if count <= CHECKED and not options.forward_only:
            wide = (a.astype(jnp.float32) for a in arrays[1:])
            gradients = jax.jit(passes("xla")[1])(experts, *wide)[1]
        for backend in options.backends:
            cells = [count, backend]
            try:
                forward, both = passes(backend)
                guess = max(distinct * 2 * one / 2e12, flops / 4e14)
                taken, agree, y = measure(forward, arrays, guess, options.seconds)
                cells += [f"{taken * 1e6:.1f}", f"{2 * distinct * one / taken / 1e12:.2f}",
                          f"{flops / taken / 1e12:.0f}"]  # fmt: skip
                error = f"{off(y[:few], right):.1e}"
                if options.forward_only:
                    cells += ["", "", error, "", agree]
                else:
                    taken, same, (_, found) = measure(both, arrays, 4 * guess, options.seconds)
                    far = "" if gradients is None else " ".join(
                        f"{off(a, b):.1e}" for a, b in zip(found, gradients, strict=True)
                    )  # fmt: skip
                    cells += [f"{taken * 1e6:.1f}", f"{3 * flops / taken / 1e12:.0f}", error, far,
                              agree and same]  # fmt: skip
            except Exception as failure:  # one backend that fails leaves the others' lines
                cells.append(f"{type(failure).__name__}: {failure}"[:300].replace("\n", " "))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
