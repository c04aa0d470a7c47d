"""The routed experts as a float64 loop, and its gradients written out by hand."""

import jax.numpy as jnp
import numpy as np
from common import put


def problem(tokens, *, count, chosen, widths, routing="spread", dtype=jnp.float32, seed=0):
    """((x, weights, gate, up, down), experts): "spread", "few" (3 experts) or all to the "one"."""
    random = np.random.default_rng(seed)
    width, inner = widths
    used = {"spread": count, "few": max(3, chosen), "one": chosen}[routing]
    pick = random.permutation(count)[:used]
    experts = np.stack([random.permutation(pick)[:chosen] for _ in range(tokens)])
    shapes = ((tokens, width), (tokens, chosen), (count, width, inner), (count, width, inner),
              (count, inner, width))  # fmt: skip
    scales = (1, 1, width**-0.5, width**-0.5, inner**-0.5)
    arrays = [scale * random.standard_normal(s) for s, scale in zip(shapes, scales, strict=True)]
    types = (dtype, jnp.float32, dtype, dtype, dtype)
    arrays = tuple(put(a, t) for a, t in zip(arrays, types, strict=True))
    return arrays, put(experts, np.int32)


def loop(experts, x, weights, gate, up, down):
    """The output [M D] in float64, one pair of token and expert at a time."""
    x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
    y, experts = np.zeros(x.shape), np.asarray(experts)
    for m, k in np.ndindex(*experts.shape):
        e = int(experts[m, k])
        a = x[m] @ gate[e]
        y[m] += weights[m, k] * ((a / (1 + np.exp(-a)) * (x[m] @ up[e])) @ down[e])
    return y


def gradients(experts, cotangent, x, weights, gate, up, down):
    """Of sum(y cotangent) with respect to x, weights, gate, up and down, in float64."""
    arrays = [np.asarray(a, np.float64) for a in (x, weights, gate, up, down)]
    x, weights, gate, up, down = arrays
    experts, cotangent = np.asarray(experts), np.asarray(cotangent, np.float64)
    dx, dweights, dgate, dup, ddown = (np.zeros(a.shape) for a in arrays)
    for m, k in np.ndindex(*experts.shape):
        e = int(experts[m, k])
        a, b = x[m] @ gate[e], x[m] @ up[e]
        sigmoid = 1 / (1 + np.exp(-a))
        hidden = a * sigmoid * b
        dhidden = down[e] @ cotangent[m]
        dweights[m, k] = hidden @ dhidden
        ddown[e] += weights[m, k] * np.outer(hidden, cotangent[m])
        dhidden = weights[m, k] * dhidden
        da = dhidden * b * sigmoid * (1 + a * (1 - sigmoid))
        db = dhidden * a * sigmoid
        dgate[e] += np.outer(x[m], da)
        dup[e] += np.outer(x[m], db)
        dx[m] += gate[e] @ da + up[e] @ db
    return dx, dweights, dgate, dup, ddown
