"""Times one layer's routed experts, forward and with their backward; prints a Markdown table.

Device time of a jitted loop (see decode.py), backends in turn, so that a chip at its power limit
treats them alike. Per number of tokens and backend: microseconds of the forward pass, TB/s of the
chosen experts' weights and TFLOP/s of their products; the same with the gradients of x, of the
router's weights and of all kernels, which count as three forwards; the difference from experts
gathered one by one (8 tokens) and, where that fits, of the gradients from XLA's in float32; and
whether two runs agree bit for bit. `tokamax` is a peer where its package is installed: three of its
`ragged_dot`.

With `--weights` kernels are also rounded to forms in which checkpoints keep them, and used as they
are; with `--shared` the shared expert comes along. Then the first rows are compared with float64.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from decode import timer  # beside this file
from flax import nnx

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.models import DecoderConfig
from mla_jax.models.rounding import rounded
from mla_jax.ops.experts import routed_experts, takes_shared, xla
from mla_jax.ops.weights import Weight, matmul

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


def exact_rows(x, experts, weights, kernels, shared):
    """The first rows in float64, from the numbers that the kernels stand for."""

    def numbers(kernel, expert):
        one = (
            kernel.expert(expert).dense(jnp.float32).T
            if isinstance(kernel, Weight)
            else kernel[expert]
        )
        return np.asarray(one, np.float64)

    def gated(row, group, expert):
        gate, up, down = (numbers(kernel, expert) for kernel in group)
        a = row @ gate
        return (a / (1 + np.exp(-a)) * (row @ up)) @ down

    y = np.zeros(x.shape)
    for m, row in enumerate(np.asarray(x, np.float64)):
        for expert, share in zip(np.asarray(experts[m]), np.asarray(weights[m]), strict=True):
            y[m] += float(share) * gated(row, kernels, int(expert))
        if shared is not None:
            y[m] += gated(row, shared, 0)
    return y


def stored(options, mlp):
    """Times and checks every number of tokens with weights in each form."""
    plain = [k[...] for k in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    own = None
    if mlp.shared is not None:
        linears = mlp.shared.gate_proj, mlp.shared.up_proj, mlp.shared.down_proj
        own = [linear.kernel[...][None] for linear in linears]
    print("| tokens | weights | us | TB/s | off by | worst row off by | repeatable |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    turn = jax.jit(lambda kernel, form: rounded(jnp.swapaxes(kernel, 1, 2), form), static_argnums=1)
    made = {}
    for form in options.weights:
        if form == "plain":
            made[form] = plain, own
        else:
            made[form] = [
                [turn(k, form) for k in group] if group else None for group in (plain, own)
            ]
    for count in options.tokens:
        keys = jax.random.split(jax.random.key(count), 2)
        x = jax.random.normal(keys[0], (count, plain[0].shape[1]), jnp.bfloat16)
        experts, weights = jax.jit(lambda mlp, x: mlp.router(x))(mlp, x)
        distinct = jnp.unique(experts)
        for round_ in range(options.rounds):
            for form, (kernels, shared) in made.items():
                shared = shared if options.shared else None
                if shared is not None and not takes_shared(x, experts, weights, kernels, shared):
                    shared = None
                size = (
                    sum(leaf.nbytes for leaf in jax.tree.leaves(kernels))
                    / len(plain[0])
                    * len(distinct)
                )
                size += sum(leaf.nbytes for leaf in jax.tree.leaves(shared))

                def forward(experts, x, weights, kernels, shared):
                    return routed_experts(x, experts, weights, *kernels, shared=shared)

                arrays = (experts, x, weights, kernels, shared)
                try:
                    taken, agree, y = measure(forward, arrays, size / 3e12, options.seconds)
                except Exception as failure:
                    print(
                        f"| {count} | {form} | {type(failure).__name__}: {str(failure)[:300]!r} |",
                        flush=True,
                    )
                    continue
                cells = [count, form, f"{taken * 1e6:.1f}", f"{size / taken / 1e12:.2f}"]
                if not round_:
                    rows = [0, count // 2, count - 1]
                    at = np.array(sorted(set(rows)))
                    right = exact_rows(x[at], experts[at], weights[at], kernels, shared)
                    found = np.asarray(y[at], np.float64)
                    each = np.linalg.norm(found - right, axis=1) / np.linalg.norm(right, axis=1)
                    whole = np.linalg.norm(found - right) / np.linalg.norm(right)
                    cells += [f"{whole:.1e}", f"{each.max():.1e}", agree]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def linears(options):
    """Times and checks single linear maps with weights in each form."""
    print("\n| tokens | K | N | weights | us | TB/s | off by | repeatable |\n"
          "|---|---|---|---|---|---|---|---|")  # fmt: skip
    shapes = itertools.product(options.tokens, (s.split("x") for s in options.linear))
    for count, (inputs, outputs) in ((count, map(int, shape)) for count, shape in shapes):
        if count > 64:
            continue
        keys = jax.random.split(jax.random.key(inputs + outputs + count), 2)
        x = jax.random.normal(keys[0], (count, inputs), jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (outputs, inputs), jnp.bfloat16) * inputs**-0.5
        for form in options.weights:
            weight = (
                kernel.T if form == "plain" else jax.jit(rounded, static_argnums=1)(kernel, form)
            )
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
            # Copies that do not fit the second-level cache together, one a call.
            many = min(24, max(1, int(2e8 / size)))
            leaves = [jax.tree.map(jnp.copy, weight) for _ in range(many)]

            def each(x, *leaves, form=form):
                return [x @ own if form == "plain" else matmul(x, own) for own in leaves]

            taken, agree, ys = measure(each, (x, *leaves), many * size / 3e12, options.seconds)
            numbers = weight.T if form == "plain" else weight.dense(jnp.float32)
            right = np.asarray(x, np.float64) @ np.asarray(numbers, np.float64).T
            far = np.linalg.norm(np.asarray(ys[-1], np.float64) - right) / np.linalg.norm(right)
            print(f"| {count} | {inputs} | {outputs} | {form} | {taken / many * 1e6:.2f} | "
                  f"{size * many / taken / 1e12:.2f} | {far:.1e} | {agree} |",
                  flush=True)  # fmt: skip


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
    parser.add_argument("--weights", nargs="+", help="plain, float8_e4m3fn, int8: forward only")
    parser.add_argument("--shared", action="store_true", help="with the shared expert")
    parser.add_argument("--linear", nargs="*", default=[], metavar="KxN", help="linear maps, too")
    parser.add_argument("--rounds", type=int, default=2, help="in which forms alternate")
    parser.add_argument("--seconds", type=float, default=0.1, help="a timed loop lasts so long")
    options = parser.parse_args()
    config = DecoderConfig.from_preset(options.preset)
    config = config if options.shared else config.replace(n_shared_experts=0)
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.dtype(options.param_dtype)}

    @jax.jit
    def make():
        key = jax.random.key(0, impl="unsafe_rbg")
        return nnx.state(MixtureOfExperts(config, **types, rngs=nnx.Rngs(key)))

    mlp = nnx.eval_shape(lambda: MixtureOfExperts(config, **types, rngs=nnx.Rngs(0)))
    nnx.update(mlp, make())
    if options.weights:
        stored(options, mlp)
        linears(options)
        return
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
