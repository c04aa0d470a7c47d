"""Gated MLPs of many experts, each token through its own few: one signature, several backends.

A backend is a module of this folder with `why_not(call, target) -> str | None` and
`run(x, experts, weights, gate, up, down, *, precision, call, target)`; adding one is that file and
one line in `BACKENDS`, which is in order of preference. That of `hopper` takes `shared` and
`chosen` as well.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax import target as targets
from mla_jax.ops.experts import hopper, mesh, ragged, xla
from mla_jax.ops.experts.call import Call as Call
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.guard import alike
from mla_jax.ops.weights import Weight

BACKENDS: dict[str, types.ModuleType] = {"pallas_gpu": hopper, "ragged": ragged, "xla": xla}
IMPLEMENTATIONS = tuple(BACKENDS)


def routed_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    gate: Float[Array, "E D F"] | Weight,
    up: Float[Array, "E D F"] | Weight,
    down: Float[Array, "E F D"] | Weight,
    *,
    precision=None,
    implementation: str | None = None,
    shared: Sequence[Float[Array, "1 _ _"] | Weight] | None = None,
    chosen: Chosen | None = None,
) -> Float[Array, "M D"]:
    """The weighted sum of each token's experts, where an expert is down(silu(gate x) * up x).

    y[m] = sum_k weights[m,k] silu(x[m] gate[e]) * (x[m] up[e]) down[e] with e = experts[m,k]
    (DeepSeekMoE, arXiv 2401.06066, equation 3, with the gated MLP of arXiv 2002.05202).

    Args:
        x: tokens [M D]; their dtype is the computation's.
        experts: each token's experts [M K], below E.
        weights: of these experts [M K].
        gate, up: kernels [E D F] of any floating dtype; they are cast to x's. Or, all three, as a
            checkpoint stores them: a `Weight` [E F D], and down [E D F].
        down: kernels [E F D].
        precision: of the matmuls, as in jax.lax.dot; kernels ignore it.
        implementation: a backend's name ("pallas_gpu", "ragged", "xla"), or None for the first that
            can serve.
        shared: gate, up and down of an expert that every token sees, with an axis of one expert
            and an F of its own: it is added. Only where `takes_shared` says so.
        chosen: what `choose` gave beside these experts, which spares a kernel; or None.

    Returns:
        [M D] in x's dtype; products are accumulated in float32. It differentiates in reverse, with
        respect to x, the weights and the kernels; a kernel's gradient has the kernel's dtype.

    Raises:
        ValueError: shapes or dtypes that do not go together, a backend that is not known, or a
            shared expert that cannot be taken along.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    >>> x, experts = jnp.ones((5, 16)), jnp.array([[0, 2]] * 5)
    >>> gate = up = jnp.full((3, 16, 8), 0.1)
    >>> y = routed_experts(x, experts, jnp.full((5, 2), 0.5), gate, up, jnp.ones((3, 8, 16)))
    >>> y.shape, round(float(y[0, 0]), 3)
    ((5, 16), 17.04)
    >>> routed_experts(x, experts, jnp.ones((5, 3)), gate, up, jnp.ones((3, 8, 16)))
    Traceback (most recent call last):
    ValueError: weights has shape (5, 3): it must be [M K] = (5, 2), as experts.
    """
    kernels = gate, up, down
    _checked(x, experts, weights, *kernels)
    if shared is not None and not takes_shared(
        x, experts, weights, kernels, shared, implementation=implementation
    ):
        raise ValueError("shared: these arguments do not take a shared expert, see takes_shared.")
    run = functools.partial(_run, precision=precision, implementation=implementation)
    if sharding.mesh_of(gate, x) is None:
        return run(x, experts, weights, gate, up, down, shared=shared, chosen=chosen)
    values = gate.values if isinstance(gate, Weight) else gate
    partial = functools.partial(run, partial=bool(sharding.spec(values)[0]))
    return mesh.routed(partial, x, experts, weights, (gate, up, down))


def choose(
    scores: Float[Array, "M E"], count: int, implementation: str | None = None
) -> tuple[Int[Array, "M {count}"], Chosen | None]:
    """Each token's `count` best experts, as `jax.lax.top_k` has them, best first, and their table.

    The table says which experts some token has chosen: it is the argument `chosen` of
    `routed_experts`. A kernel makes both on Hopper for up to 64 tokens and 256 experts, a multiple
    of 8, unless `implementation` names another backend. Where it does not run the table is None.

    >>> choose(jnp.array([[0.1, 0.5, 0.2], [0.5, 0.0, 0.5]]), 2)[0].tolist()
    [[1, 2], [0, 2]]
    """
    if implementation in (None, "pallas_gpu") and sharding.mesh_of(scores) is None:
        made = hopper.choose(scores, count, targets.current())
        if made is not None:
            return made
    return lax.top_k(scores, count)[1], None


def route(
    x: Float[Array, "M D"],
    kernel: Float[Array, "D E"],
    count: int,
    implementation: str | None = None,
) -> tuple[Int[Array, "M {count}"], Float[Array, "M {count}"], Chosen] | None:
    """`choose` of the softmax of x times a router's kernel, in float32, and the scores of that.

    None where no kernel makes all of that of a product in parts: there is one on Hopper, for up to
    16 tokens and 128 experts.
    """
    if implementation not in (None, "pallas_gpu") or sharding.mesh_of((x, kernel)) is not None:
        return None
    return hopper.route(x, kernel, count, targets.current())


def takes_shared(
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    kernels: Sequence[Float[Array, "E _ _"] | Weight],
    shared: Sequence[Float[Array, "1 _ _"] | Weight],
    *,
    implementation: str | None = None,
) -> bool:
    """Whether `routed_experts` with these arguments may be given the shared expert."""
    arrays = (x, *kernels, *shared)
    if sharding.mesh_of(arrays) is not None:
        return False
    call, other = (_checked(x, experts, weights, *group) for group in (kernels, shared))
    target = targets.current()
    backend = _choose(call, target, implementation)
    alike = dataclasses.replace(call, experts=1, widths=other.widths)
    return (
        backend == "pallas_gpu"
        and alike == other
        and hopper.takes_shared(call, target)
        and hopper.takes_shared(other, target)
    )


def gated_mlp(
    x: Float[Array, "*B D"], kernels: Sequence[Float[Array, "1 _ _"] | Weight]
) -> Float[Array, "*B D"] | None:
    """down(silu(gate x) * up x) through a kernel for few tokens; None where none serves.

    Args:
        x: tokens.
        kernels: gate, up and down with an axis of one expert, all of x's dtype, or all as a
            checkpoint stores them.
    """
    tokens, (gate, up, down) = math.prod(x.shape[:-1]), kernels
    if sharding.mesh_of((x, *kernels)) is not None or not isinstance(tokens, int):
        return None
    kinds: set[Any] = {
        (jnp.dtype(k.values.dtype).name, k.block)
        if isinstance(k, Weight)
        else (None if k.dtype == x.dtype else "another dtype")
        for k in (gate, up, down)
    }
    inner = gate.shape[1 if isinstance(gate, Weight) else 2]
    if len(kinds) > 1 or "another dtype" in kinds or x.shape[-1] % 64 or inner % 64:
        return None
    plan = hopper.few_plan(tokens, jnp.dtype(x.dtype).name, kinds.pop(), targets.current())
    if plan is None:
        return None
    with jax.named_scope("gated_mlp.pallas_gpu"):
        given = alike(x.reshape(tokens, -1), tuple(kernels))
        return hopper.gated(plan, *given).reshape(x.shape)


def _run(*operands, precision, implementation, partial=False, shared=None, chosen=None):
    call = dataclasses.replace(_checked(*operands), partial=partial)
    target = targets.current()
    backend = _choose(call, target, implementation)
    more = {"shared": shared, "chosen": chosen} if backend == "pallas_gpu" else {}
    with jax.named_scope(f"routed_experts.{backend}"):
        run = BACKENDS[backend].run
        return run(*operands, precision=precision, call=call, target=target, **more)


def report(call: Call, target: targets.Target) -> list[tuple[str, str | None]]:
    """Every backend in order of preference, with the reason why it cannot serve, or None.

    >>> from mla_jax.target import Target
    >>> call = Call(tokens=8, pairs=48, experts=64, widths=(2048, 1408), dtype="float32")
    >>> for name, reason in report(call, Target("gpu", "NVIDIA H200", 9.0)): print(name, reason)
    pallas_gpu takes bfloat16 and float16, not float32
    ragged needs a TPU, this is NVIDIA H200 (gpu)
    xla None
    """
    return [(name, backend.why_not(call, target)) for name, backend in BACKENDS.items()]


def _choose(call: Call, target: targets.Target, name: str | None) -> str:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"implementation={name!r} is not known for experts: it must be None (choose) or one of "
            f"{', '.join(BACKENDS)}."
        )
    if name is None:
        return next(name for name, reason in report(call, target) if reason is None)
    reason = BACKENDS[name].why_not(call, target)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot serve these experts: {reason}.")
    return name


def _checked(x, experts, weights, gate, up, down) -> Call:
    """The call that these arrays make, or a ValueError that names the argument at fault."""
    found = [isinstance(kernel, Weight) for kernel in (gate, up, down)]
    if any(found) and not all(found):
        raise ValueError("gate, up and down: all three must be a Weight, or none.")
    kept = None
    if all(found):  # in torch's order: [E F D]
        kinds = {(jnp.dtype(k.values.dtype).name, k.block) for k in (gate, up, down)}
        kept = kinds.pop() if len(kinds) == 1 else ("several dtypes or blocks", (None, None))
        gate, up, down = (
            jax.ShapeDtypeStruct((*k.shape[:-2], *k.shape[:-3:-1]), x.dtype)
            for k in (gate, up, down)
        )
    for name, array, letters in (
        ("x", x, "M D"),
        ("experts", experts, "M K"),
        ("gate", gate, "E D F"),
    ):
        if array.ndim != len(letters.split()):
            raise ValueError(f"{name} has shape {array.shape}: it must be [{letters}].")
    (tokens, width), (count, _, inner) = x.shape, gate.shape
    if experts.shape[0] != tokens:
        raise ValueError(f"experts has shape {experts.shape}: it must be [M K] with M = {tokens}.")
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"experts is {experts.dtype}: it must be an integer array.")
    if weights.shape != experts.shape:
        raise ValueError(
            f"weights has shape {weights.shape}: it must be [M K] = {experts.shape}, as experts."
        )
    for name, kernel, shape, letters in (
        ("gate", gate, (count, width, inner), "E D F"),
        ("up", up, (count, width, inner), "E D F"),
        ("down", down, (count, inner, width), "E F D"),
    ):
        if kernel.shape != shape:
            raise ValueError(
                f"{name} has shape {kernel.shape}: it must be [{letters}] = {shape} to go with x "
                f"{x.shape} and gate {gate.shape}."
            )
    for name, array in (("x", x), ("weights", weights), ("gate", gate), ("up", up), ("down", down)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}: it must be floating.")
    dtype = jnp.dtype(x.dtype).name
    return Call(tokens, experts.size, count, (width, inner), dtype, stored=kept)
