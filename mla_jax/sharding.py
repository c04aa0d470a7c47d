"""Where arrays lie on a mesh of devices: mesh axes are given to letters, and types carry them.

    mesh = jax.make_mesh((2, 4), ("data", "model"))  # Explicit axes, which are jax's default
    place = sharding.Rules(B="data", N="model", F="model", W="model", E=("data", "model"))
    with jax.set_mesh(mesh):
        model = jax.device_put(model, place.of(model))
        cache = model.init_cache(8, 4096, sharding=place)

Parameters carry their letters as the logical axes of Flax, and stores say theirs. Under Explicit
axes every array's type says how it is split, so that no code needs to be told a layout: it asks an
array (`spec`), moves it (`move`), and runs what must see a device's own part only in an `island`.

An entry of a spec is the tuple of mesh axes that one dimension is split over.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axes that each letter is split over: none, one or several.

    Data parallelism is B; tensor parallelism N, F and W; expert parallelism E; FSDP D, over the
    axes of B; context parallelism S, whose axes N may have as well (Helix, arXiv 2507.07120).

    Attributes:
        B: rows of a batch, of tokens and of the cache.
        S: slots of the cache. A row's slots go round the devices in blocks of 128.
        N: heads.
        E: routed experts, whose kernels are split by nothing else.
        F: inner size of the dense MLPs and of the shared expert.
        W: words of the vocabulary.
        D: the other axis of kernels, the hidden size or a rank. Kernels are gathered over those of
            its axes that the batch is split over as well.
        A: what q_a_proj sums over, the hidden size of its inputs: the axes of N, or none. Its
            kernel does not move: its inputs and sums do, which is more than moves without A.

    Raises:
        ValueError: an axis that is no name, or one that a letter has twice; other axes for A
            than for N.

    >>> Rules(B="data", N=("data", "model")).N
    ('data', 'model')
    >>> Rules(B=("data", "data"))
    Traceback (most recent call last):
    ValueError: B=('data', 'data'): it must be one name of a mesh axis, or several different ones.
    """

    B: Axes | str = ()
    S: Axes | str = ()
    N: Axes | str = ()
    E: Axes | str = ()
    F: Axes | str = ()
    W: Axes | str = ()
    D: Axes | str = ()
    A: Axes | str = ()

    def __post_init__(self):
        for letter in LETTERS:
            given = getattr(self, letter)
            axes = (given,) if isinstance(given, str) else given or ()
            names = isinstance(axes, tuple | list) and all(isinstance(a, str) and a for a in axes)
            if not names or len(set(axes)) < len(axes):
                raise ValueError(
                    f"{letter}={given!r}: it must be one name of a mesh axis, or several different "
                    "ones."
                )
            object.__setattr__(self, letter, tuple(axes))
        if self.A and self.A != self.N:
            raise ValueError(
                f"A={self.A}: it must have the axes of N={self.N}, or none, because the sums of "
                "q_a_proj go to the heads of q_b_proj."
            )

    def of(self, tree: Any, mesh: Any = None) -> Any:
        """The sharding of every array of a tree: for `jax.device_put`, out_shardings, or orbax.

        Args:
            tree: a module, its state or an optimizer's, a cache, or shapes of these. Arrays whose
                letters nobody has said lie whole on every device.
            mesh: None is the mesh in use (`jax.set_mesh`).

        Returns:
            a tree of the same structure with a `jax.NamedSharding` for every array.

        Raises:
            ValueError: no mesh, an axis that it does not have, one that two letters of an array
                have, a dimension that does not divide, or a letter that is not known.
        """
        mesh = in_use() if mesh is None else mesh
        if mesh is None:
            raise ValueError("there is no mesh: call this within jax.set_mesh(mesh), or give one.")

        def one(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if isinstance(x, nnx.Variable):
                letters = x.get_metadata().get("out_sharding") or ()
                return x.replace(self.sharding(letters, x.get_value().shape, mesh, name))
            if lettered(x):
                place = lambda array, own: self.sharding(own, array.shape, mesh, name)  # noqa: E731
                return jax.tree.map(place, x, x.letters)
            return jax.NamedSharding(mesh, jax.P())

        lettered = lambda x: hasattr(type(x), "letters")  # noqa: E731
        leaf = lambda x: isinstance(x, nnx.Variable) or lettered(x)  # noqa: E731
        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=leaf)

    def maker(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """`create`, jitted: every array is made where it lies, never as a whole on one device.

        Args:
            create: makes a module, a state or another tree, such as `lambda key: Decoder(config,
                rngs=nnx.Rngs(key))`.

        Raises:
            ValueError: when it is called: as `of`, for the mesh in use.

        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> with jax.set_mesh(mesh):
        ...     layer = Rules(D="data").maker(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))()
        >>> layer.kernel[...].sharding.mesh == mesh
        True
        """

        @jax.jit
        def made(*args):
            places = self.of(jax.eval_shape(create, *args))
            # With Explicit axes inside, every array would be whole up to the last line.
            return jax.sharding.auto_axes(create, out_sharding=places)(*args)

        return made

    def sharding(
        self, letters: Sequence[str | None], shape: Sequence[int], mesh: Any, name: str = "array"
    ) -> jax.NamedSharding:
        """The sharding of one array, by the letters of its dimensions; None is never split.

        Raises:
            ValueError: see `of`.

        >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
        >>> tuple(Rules(B="data").sharding("BSR", (4, 128, 64), mesh).spec)
        ('data', None, None)
        >>> Rules(B="data").sharding("BSR", (3, 128, 64), mesh, "latent")
        Traceback (most recent call last):
        ValueError: latent: B = 3 does not divide over the 2 devices of B=('data',).
        """
        entries, taken = [], {}
        for letter, size in zip(letters, shape, strict=False):
            axes = self._axes(letter, name)
            for axis in axes:
                if axis not in mesh.shape:
                    have = ", ".join(mesh.axis_names)
                    raise ValueError(f"{letter}={axes}: the mesh has the axes {have}.")
                if axis in taken:
                    raise ValueError(
                        f"{name}: the axis {axis!r} is given to {taken[axis]} and to {letter}, and "
                        f"this array has both, {tuple(letters)}."
                    )
                taken[axis] = letter
            if size % count(mesh, axes):
                raise ValueError(
                    f"{name}: {letter} = {size} does not divide over the {count(mesh, axes)} "
                    f"devices of {letter}={axes}."
                )
            entries.append(axes)
        return jax.NamedSharding(mesh, pspec(*entries))

    def _axes(self, letter: str | None, name: str) -> Axes:
        if letter is None or (len(letter) == 1 and letter not in LETTERS):
            return ()  # such as R or P, which nothing splits
        if letter not in LETTERS:
            raise ValueError(
                f"{name}: {letter!r} is no letter: those that may be split are "
                f"{', '.join(LETTERS)}."
            )
        return getattr(self, letter)


LETTERS = tuple(field.name for field in dataclasses.fields(Rules))


def metadata(*letters: str | None) -> dict[str, Any]:
    """What a parameter is given so that `nnx.get_partition_spec` and `Rules.of` know its letters.

    >>> metadata("D", None)["out_sharding"]
    ('D', None)
    """
    # Eager sharding would want a mesh where a module is made.
    return {"out_sharding": letters, "eager_sharding": False}


def in_use() -> Any:
    """The mesh of `jax.set_mesh`, concrete outside jit; None without one.

    >>> in_use() is None
    True
    """
    abstract = jax.sharding.get_abstract_mesh()
    if not abstract.axis_names:
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # under jit
        return abstract


def spec(x: Any) -> tuple[Axes, ...]:
    """The Explicit mesh axes of every dimension; all () without such a mesh and inside shard_map.

    >>> spec(jax.numpy.ones((2, 3)))
    ((), ())
    """
    entries = tuple(jax.typeof(x).sharding.spec)
    entries += (None,) * (jax.numpy.ndim(x) - len(entries))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def mesh_of(*trees: Any) -> Any:
    """The mesh of the first array whose type has one with Explicit axes; None where none has.

    >>> mesh_of(jax.numpy.ones(3)) is None
    True
    """
    for x in jax.tree.leaves(trees):
        mesh = jax.typeof(x).sharding.mesh
        if explicit(mesh):
            return mesh
    return None


def explicit(mesh: Any) -> Axes:
    """The Explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def pspec(*entries: Axes) -> jax.P:
    """A partition spec.

    >>> tuple(pspec(("data",), (), ("data", "model")))
    ('data', None, ('data', 'model'))
    """
    return jax.P(*(entry or None for entry in entries))


def move(x: Any, *entries: Axes, mesh: Any = None) -> Any:
    """`x` with its dimensions split over these axes, the rest over none; as it is without a mesh.

    A constant's type has no mesh, and wants one that is given.
    """
    entries += ((),) * (jax.numpy.ndim(x) - len(entries))
    mesh = mesh_of(x) or mesh
    if mesh is None or spec(x) == entries:
        return x
    return jax.sharding.reshard(x, jax.NamedSharding(mesh, pspec(*entries)))


def beside(x: Any, other: Any) -> Any:
    """`x` split as another array of as many dimensions is."""
    return move(x, *spec(other))


def whole(tree: Any, like: jax.Array) -> Any:
    """Arrays on every device of the mesh that another array lies on, if it does.

    Each process gives the same. What a loop carries needs this: its types may not change.
    """
    mesh: Any = mesh_of(like)
    if mesh is None:
        return tree
    if isinstance(like, jax.core.Tracer):
        return jax.tree.map(
            lambda x: jax.sharding.reshard(x, jax.NamedSharding(mesh, jax.P())), tree
        )
    place: Any = like.sharding  # whose mesh has devices
    return jax.device_put(tree, jax.NamedSharding(place.mesh, jax.P()))


def without(entry: Axes, *others: Axes) -> Axes:
    """The axes of an entry that none of the others has.

    >>> without(("data", "model"), ("model",))
    ('data',)
    """
    used = {axis for other in others for axis in other}
    return tuple(axis for axis in entry if axis not in used)


def count(mesh: Any, axes: Axes) -> int:
    """How many parts these axes make; without axes there is one, whatever the mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


def island(f: Callable, mesh: Any, in_specs: Any, out_specs: Any) -> Callable:
    """`f` on every device's own parts: within it there is no mesh, and moves are collectives."""
    names = set(explicit(mesh))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names)


def of_rows(f: Callable, x: Any, *more: Any) -> Any:
    """`f(x, *more)` on every device's own part of x, whose last dimension is whole.

    For what XLA's partitioner gathers before it does it, such as `jax.lax.top_k`.

    Args:
        f: gives arrays that begin with the dimensions of x but for the last.
        x: split or not, or without a mesh.
        more: arrays that every device has whole.

    >>> of_rows(lambda x: jax.lax.top_k(x, 1)[1], jax.numpy.array([[3.0, 5.0]]))
    Array([[1]], dtype=int32)
    """
    entries = spec(x)[:-1]
    if not any(entries):
        return f(x, *more)
    rows, mesh = pspec(*entries), mesh_of(x)
    own = island(f, mesh, (rows, *(jax.P() for _ in more)), rows)
    return own(move(x, *entries), *(move(a, mesh=mesh) for a in more))


def varying(tree: Any, axes: Axes) -> Any:
    """Inside an island: arrays that may differ between devices along these axes.

    Derivatives with respect to what is whole along an axis are then summed over it where it enters,
    not within a kernel's own rule.
    """

    def one(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying")

    return jax.tree.map(one, tree)
