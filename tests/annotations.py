"""The checker that compares values with the package's annotations while tests run.

typeguard 2 is what jaxtyping recommends. It passes over `X | Y` without a look, so here such a
union becomes `typing.Union`, which it checks.
"""

import contextlib
import functools
import inspect
import types
import typing

import jaxtyping


def install(*modules: str) -> None:
    """Has every function of these modules checked at each call; before they are imported.

    The fields of dataclasses are not compared when one is made: jax makes pytrees anew with shapes,
    shardings or None in place of arrays, and a config makes of what it is given what its fields
    say, in `__post_init__`.
    """
    jaxtyped = jaxtyping.jaxtyped

    def functions_only(thing=None, **options):
        if thing is None:
            return functools.partial(functions_only, **options)
        return thing if inspect.isclass(thing) else jaxtyped(thing, **options)

    jaxtyping.jaxtyped = functions_only  # which the hook puts before every class and function
    jaxtyping.install_import_hook(modules, "annotations.typechecked")


def typechecked(function):
    """Typeguard's decorator for a function that jaxtyping has made of another's signature."""
    import typeguard  # the tests' other needs are met on machines that lack it

    hints = function.__annotations__
    function.__annotations__ = {name: spelled(hint) for name, hint in hints.items()}
    return typeguard.typechecked(function)


class _InstanceOf(type):
    """A type whose instances are those of `named`, whatever their fields are."""

    def __instancecheck__(cls, value):
        return isinstance(value, cls.named)


def spelled(hint):
    """The hint with every `X | Y` in it as `Union[X, Y]`, and without a look into named tuples.

    Letters of a named tuple's fields are those of its own module; a function may mean something
    else by them.

    >>> spelled(list[int | None])
    list[typing.Optional[int]]
    """
    if isinstance(hint, types.UnionType):
        return typing.Union[tuple(map(spelled, hint.__args__))]  # noqa: UP007
    if type(hint) is types.GenericAlias:  # Callable[[...], ...] is of a class of its own
        return types.GenericAlias(hint.__origin__, tuple(map(spelled, hint.__args__)))
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _InstanceOf(hint.__name__, (), {"named": hint})
    return hint


@contextlib.contextmanager
def unchecked():
    """Nothing is compared inside, where what is given is wrong on purpose."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
