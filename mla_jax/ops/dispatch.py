"""Which backend serves a call, and why the others do not.

An op has backends by name, in order of preference. A backend is a module with a function of the
op's name, `op(queries, store, seen, call)`, and `why_not(call, target) -> str | None`;
`context_attention` is called with `kv_b=` too, the weights that expand latents. A backend that cuts
its work once for all layers of a step has `plan(seen, call)`, whose result comes back in
`seen.plan`. Adding one is that module and a line in `_BACKENDS`.

Letters: B batch, T query tokens, S cache slots, N heads.
"""

import dataclasses
import functools
import importlib
import types
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from mla_jax import target
from mla_jax.cache import Store
from mla_jax.ops import mesh
from mla_jax.ops.seen import Seen

Attended = tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]

_BACKENDS: dict[str, dict[str, str]] = {
    "latent_attention": {
        "pallas_gpu": "mla_jax.ops.hopper",
        "pallas_tpu": "mla_jax.ops.tpu",
        "xla": "mla_jax.ops.xla",
        "reference": "mla_jax.ops.reference",
    },
    "expanded_attention": {
        "pallas_gpu": "mla_jax.ops.hopper.attention.backend",
        "cudnn": "mla_jax.ops.cudnn",
        "pallas_tpu": "mla_jax.ops.tpu.attention",
        "xla": "mla_jax.ops.xla",
        "reference": "mla_jax.ops.reference",
    },
    "context_attention": {
        "pallas_gpu": "mla_jax.ops.hopper.context",
        "pallas_tpu": "mla_jax.ops.tpu.context",
        "xla": "mla_jax.ops.xla",
        "reference": "mla_jax.ops.reference",
    },
    "index_scores": {
        "pallas_gpu": "mla_jax.ops.hopper.indexing",
        "xla": "mla_jax.ops.xla_choice",
    },
    "best_slots": {
        "pallas_gpu": "mla_jax.ops.hopper.indexing",
        "xla": "mla_jax.ops.xla_choice",
    },
}
CHOICE = ("index_scores", "best_slots")  # what sparse attention does before it attends
OPS = tuple(op for op in _BACKENDS if op not in CHOICE)  # the attention cores
IMPLEMENTATIONS = tuple(dict.fromkeys(name for names in _BACKENDS.values() for name in names))
# What a dict may name: also the experts of a whole model, which `ops.experts` dispatches.
_NAMES = {op: tuple(names) for op, names in _BACKENDS.items()}
_NAMES["routed_experts"] = ("pallas_gpu", "ragged", "xla")

# A backend's name for all ops, or one for each op that is named (pairs where it must be hashable).
Implementation = str | Mapping[str, str] | tuple[tuple[str, str], ...] | None


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call: a backend says by it whether it can serve.

    Attributes:
        op: "latent_attention", "expanded_attention", "context_attention", or one of `CHOICE`.
        batch, queries, slots, heads: B, T, S, N.
        key_dims: widths of the two parts of a key, (R, P) or (H, P); (I, 0) of an index key.
        value_dim: R or V; K of `best_slots`.
        dtype: of the operands.
        options: names of what is asked for beyond plain causal attention, sorted.
        store: "dense" or "paged".
        scale: softmax temperature.
        soft_cap: scores become soft_cap tanh(scores / soft_cap); None leaves them.
        precision: of the matmuls, as in jax.lax.dot; kernels ignore it.
        layout: how a mesh with Explicit axes splits the call; None without one.
        encoding: in what the store holds latents, with scales; None is in the operands' dtype.
    """

    op: str
    batch: int
    queries: int
    slots: int
    heads: int
    key_dims: tuple[int, int]
    value_dim: int
    dtype: str
    options: tuple[str, ...] = ()
    store: str = "dense"
    scale: float = 1.0
    soft_cap: float | None = None
    precision: Any = None
    layout: mesh.Layout | None = None
    encoding: str | None = None

    @property
    def part(self) -> "Call":
        """What one device is asked: all that a backend ever sees."""
        return self if self.layout is None else self.layout.part(self)


def normalized(implementation: Implementation) -> dict[str, str]:
    """The backend of each op that `implementation` names.

    One name is of all attention cores, and of sparse attention's choice if it has such a backend.

    Raises:
        ValueError: a backend or an op that does not exist.

    >>> normalized({"latent_attention": "xla"})
    {'latent_attention': 'xla'}
    >>> normalized("cuda")
    Traceback (most recent call last):
    ValueError: implementation='cuda' is not known: it must be None (choose), one of pallas_gpu, ...
    """
    if implementation is None:
        return {}
    if isinstance(implementation, str):
        serves = [op for op in CHOICE if implementation in _BACKENDS[op]]
        named = dict.fromkeys((*OPS, *serves), implementation)
    elif isinstance(implementation, Mapping | tuple):
        named = dict(implementation)
    else:
        named = {"": str(implementation)}
    known = (*IMPLEMENTATIONS, *_NAMES["routed_experts"])
    for op, name in named.items():
        if op not in _NAMES or name not in known:
            raise ValueError(
                f"implementation={implementation!r} is not known: it must be None (choose), one of "
                f"{', '.join(IMPLEMENTATIONS)}, or a dict from {', '.join(_NAMES)} to a backend."
            )
    return named


def frozen(implementation: Implementation) -> str | tuple[tuple[str, str], ...] | None:
    """The same, checked and hashable, as modules keep it."""
    named = normalized(implementation)
    return tuple(named.items()) if isinstance(implementation, Mapping) else implementation


def report(call: Call, device: target.Target) -> list[tuple[str, str | None]]:
    """Every backend of the call's op, in order of preference, and why it cannot serve, or None."""
    return [(name, _why_not(name, call.part, device)) for name in _BACKENDS[call.op]]


def choose(call: Call, implementation: Implementation = None) -> str:
    """The name of the backend that serves a call: the one that is named, or the first that can.

    Raises:
        ValueError: an implementation that does not exist.
        NotImplementedError: the one that is named cannot serve; the message says why.
    """
    call, name = call.part, normalized(implementation).get(call.op)
    device = target.current()
    if name is None:
        return next(name for name, reason in report(call, device) if reason is None)
    if name not in _BACKENDS[call.op]:
        raise NotImplementedError(
            f"implementation={name!r} does not serve {call.op}: use one of "
            f"{', '.join(_BACKENDS[call.op])}, or name a backend for each op, as in "
            f"implementation={{'{_op_of(name)}': {name!r}}}."
        )
    reason = _why_not(name, call, device)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r}: {reason}")
    return name


def plan(seen: Seen, call: Call, implementation: Implementation = None) -> Seen:
    """`seen` with the plan of the backend that would serve the call: once a step for all layers.

    It is `seen` itself where that backend plans nothing, or a plan is there.
    """
    module = _module(_BACKENDS[call.op][choose(call, implementation)])
    if seen.plan is not None or not hasattr(module, "plan"):
        return seen
    with jax.named_scope("plan"):
        if call.layout is None:
            return dataclasses.replace(seen, plan=module.plan(seen, call))
        return dataclasses.replace(seen, plan=mesh.plan(module.plan, seen, call))


def attend(
    queries: tuple[Array, Array],
    store: Store,
    seen: Seen,
    call: Call,
    implementation: Implementation = None,
    **more: Array,
) -> Attended:
    """Runs the call's op by the backend that serves it; on a mesh, on every device's own part."""
    if call.layout is not None:
        run = functools.partial(attend, implementation=implementation)
        return mesh.attend(run, queries, store, seen, call, **more)
    name = choose(call, implementation)
    module = _module(_BACKENDS[call.op][name])
    with jax.named_scope(f"{call.op}.{name}"):
        return getattr(module, call.op)(queries, store, seen, call, **more)


def choice(
    operands: Any, store: Store | None, seen: Seen, call: Call, implementation: Implementation
) -> Array:
    """Runs one of `CHOICE` by the backend that serves it, on what one device has."""
    name = choose(call, implementation)
    module = _module(_BACKENDS[call.op][name])
    with jax.named_scope(f"{call.op}.{name}"):
        return getattr(module, call.op)(operands, store, seen, call)


def _op_of(name: str) -> str:
    return next(op for op, names in _BACKENDS.items() if name in names)


def _why_not(name: str, call: Call, device: target.Target) -> str | None:
    # A kernel's module says whether it serves without Pallas, which takes longer to import than the
    # rest of this package; only on the kernel's own device does it ask whether Pallas is there.
    return _module(_BACKENDS[call.op][name]).why_not(call, device)


@functools.cache
def _module(name: str) -> types.ModuleType:
    return importlib.import_module(name)
