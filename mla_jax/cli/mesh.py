"""Where a command runs: the processes that work together, the mesh, and what it splits."""

import contextlib
import math
import os
import sys
from collections.abc import Generator, Mapping
from typing import Any

import jax

from mla_jax import sharding
from mla_jax.cli.options import Generate


def join(distributed: str | None) -> None:
    """Makes this process one of several, by what it is told or by what its cluster says.

    Args:
        distributed: "ADDRESS:PORT,COUNT,INDEX"; "" asks the cluster; None is a process of its own.

    Raises:
        ValueError: it is neither, or there is no cluster that JAX knows.
    """
    if distributed is None:
        return
    if not distributed:
        jax.distributed.initialize()
        return
    parts = distributed.split(",")
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise ValueError(
            f"--distributed {distributed}: it must be ADDRESS:PORT,COUNT,INDEX, such as "
            "10.0.0.1:1234,4,0 for the first of 4 processes, or nothing where a cluster says so."
        )
    jax.distributed.initialize(parts[0], int(parts[1]), int(parts[2]))


def mesh_of(options: Generate) -> tuple[Any, sharding.Rules | None]:
    """The mesh and the rules that the flags ask for; None and None without them.

    Raises:
        ValueError: sizes that are not those of the devices, rules without a mesh, or a letter that
            there is not.
    """
    if options.mesh is None:
        if options.place is not None:
            raise ValueError("--place says how a mesh splits arrays: give its axes by --mesh too.")
        if jax.process_count() > 1:
            raise ValueError("--distributed needs --mesh and --place: what do the others do?")
        return None, None
    count = math.prod(options.mesh.values())
    if count != jax.device_count():
        axes = ",".join(f"{name}={size}" for name, size in options.mesh.items())
        raise ValueError(
            f"--mesh {axes} has {count} devices: here are {jax.device_count()} of "
            f"{jax.process_count()} process(es)."
        )
    rules = rules_of(options.mesh, options.place)
    return jax.make_mesh(tuple(options.mesh.values()), tuple(options.mesh)), rules


def rules_of(
    mesh: Mapping[str, int], place: Mapping[str, tuple[str, ...]] | None
) -> sharding.Rules:
    """The rules that --place gives for the axes of --mesh.

    Raises:
        ValueError: a letter or an axis that there is not.
    """
    place = place or {}
    unknown = sorted(set(place) - set(sharding.LETTERS))
    if unknown:
        raise ValueError(
            f"--place: {', '.join(unknown)} is no letter: those that may be split are "
            f"{', '.join(sharding.LETTERS)}."
        )
    for letter, axes in place.items():
        for axis in axes:
            if axis not in mesh:
                raise ValueError(
                    f"--place {letter}={axis}: the mesh has the axes {', '.join(mesh)}."
                )
    return sharding.Rules(**place)


@contextlib.contextmanager
def used(mesh: Any) -> Generator[None]:
    """Within it the mesh is in use, and of several processes only the first one speaks."""
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        if jax.process_index():
            silent = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silent))
            if sys.stderr is not None:
                stack.enter_context(contextlib.redirect_stderr(silent))
        yield
