"""What keeps XLA from gathering the operands of a kernel that it cannot split."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning

from mla_jax.target import PARTITIONED


def unsplit(kernel: Callable[..., Any], name: str, interpret: Any = None) -> Callable[..., Any]:
    """A function of arrays that raises where its operands are split by XLA's partitioner.

    A TPU kernel refuses that itself. One for GPUs would be given all operands whole on every
    device, each of which would then do all the work, without a word. On one device, and within
    `jax.shard_map`, the function is what it was. `jax.vmap` calls it for one element after the
    other: jax has no rule for custom partitioning.

    Args:
        kernel: of positional arrays, or trees of them.
        name: of the kernel, for the message.
        interpret: the parameters of Pallas' interpreter, if it runs the kernel: its callbacks have
            effects, with which jax compiles no custom partitioning, so nothing is guarded.

    Raises:
        NotImplementedError: when the program is compiled, wrapped in jax's own error.
    """
    if interpret is not None:
        return kernel

    def partition(mesh, operands, results):
        split = [x.sharding.spec for x in jax.tree.leaves(operands) if _is_split(x)]
        if split:
            raise NotImplementedError(f"{name}: operands are split as {split}. {PARTITIONED}")
        places = [jax.tree.map(lambda x: x.sharding, tree) for tree in (results, operands)]
        return mesh, kernel, *places

    def whole(mesh, operands, results):
        return jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), results)

    guarded = custom_partitioning(kernel)
    guarded.def_partition(
        partition=partition, infer_sharding_from_operands=whole, sharding_rule=_apart
    )
    guarded = jax.custom_batching.sequential_vmap(guarded)

    # Custom partitioning forgets what its results vary over, which gradients go by.
    return lambda *operands: _over(_axes(operands), guarded(*operands))


def alike(*operands: Any) -> tuple[Any, ...]:
    """Operands, under `jax.shard_map` as ones that vary over all mesh axes that one varies over.

    A way back of one's own leaves gradients apart on every device. What becomes varying before gets
    their sum.
    """
    return _over(_axes(operands), operands)


def varying(x: Any, *operands: Any) -> Any:
    """`x`, under `jax.shard_map` as one that varies over all mesh axes that operands vary over."""
    return _over(_axes(operands), x)


def _axes(tree) -> frozenset[str]:
    """All mesh axes that some array varies over, none outside of `jax.shard_map`."""
    of = lambda x: getattr(getattr(jax.typeof(x), "mat", None), "varying", frozenset())  # noqa: E731
    return frozenset().union(*map(of, jax.tree.leaves(tree)))


def _over(axes: frozenset[str], tree):
    def over(x):
        missing = axes - _axes(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(over, tree)


def _is_split(x) -> bool:
    return not x.sharding.is_fully_replicated


def _apart(mesh, operands, results) -> str:
    """A rule by which no dimension has to do with another, so that all stay split as they are."""
    count = 0

    def letters(kinds):
        nonlocal count
        sides = []
        for kind in kinds:
            sides.append(" ".join(f"d{count + axis}" for axis in range(len(kind.shape))))
            count += len(kind.shape)
        return ", ".join(sides)

    return f"{letters(operands)} -> {letters(results)}"
