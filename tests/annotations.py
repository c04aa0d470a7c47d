"""The checker that compares values with the package's annotations while tests run."""

import collections.abc
import contextlib
import functools
import inspect
import operator
import types
import typing

import jaxtyping
from jax import export

_SYMBOL = type(export.symbolic_shape("B")[0])
_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def install(*modules: str) -> None:
    """Has the annotated functions of these modules checked at each call; before they are imported.

    The fields of dataclasses are not compared when one is made: jax makes pytrees anew with shapes,
    shardings or None in place of arrays, and a config makes of what it is given what its fields
    say, in `__post_init__`.
    """
    jaxtyped = jaxtyping.jaxtyped

    def functions_only(thing=None, **options):
        if thing is None:
            return functools.partial(functions_only, **options)
        function = getattr(thing, "__func__", getattr(thing, "fget", thing))  # of a method
        bare = inspect.isclass(thing) or not getattr(function, "__annotations__", True)
        if bare or not isinstance(thing, types.FunctionType) or _by_value(thing):
            return thing if bare else jaxtyped(thing, **options)
        return once_a_kind(thing, functools.partial(jaxtyped, **options))

    jaxtyping.jaxtyped = functions_only  # which the hook puts before every class and function
    jaxtyping.install_import_hook(modules, "annotations.typechecked")


def _by_value(function) -> bool:
    """Whether more is looked at than the kinds of values: numbers, or a function's signature."""
    hints = str([*function.__annotations__.values()])
    return any(word in hints for word in ("{", "Callable", "Literal", "type["))


def once_a_kind(function, checker):
    """The function, whose values are compared where they are of kinds that were not seen yet.

    To compare them takes a multiple of the time of most calls, and most are like one before.
    """
    whole, known = checker(function), {}

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        given = kind(args), kind(kwargs)
        if given not in known:
            result = whole(*args, **kwargs)
            known.setdefault(given, set()).add(kind(result))
            return result
        result = function(*args, **kwargs)
        made = kind(result)
        if made not in known[given]:
            checker(functools.wraps(function)(lambda *args, **kwargs: result))(*args, **kwargs)
            known[given].add(made)
        return result

    return checked


def kind(value):
    """What the checker looks at: a type, an array's shape and dtype, a container's items."""
    of = type(value)
    match _part(of):
        case "nothing":
            return of
        case "shape":
            # Sizes of an export are symbols, which cannot be compared with all others.
            sizes = value.shape if all(type(size) is int for size in value.shape) else object()
            return of, sizes, value.dtype
        case "items":
            return of, *map(kind, value)
        case "values":
            return of, *((name, kind(item)) for name, item in value.items())
        case _:
            return value


@functools.cache
def _part(of) -> str:
    """What else of a value of this type is looked at."""
    if issubclass(of, dict):
        return "values"
    if issubclass(of, type):
        return "itself"
    if issubclass(of, (collections.abc.Sequence, collections.abc.Set)):
        return "nothing" if issubclass(of, (str, bytes)) else "items"
    own = of.__module__.startswith("mla_jax")  # these are known by their type
    return "shape" if hasattr(of, "shape") and hasattr(of, "dtype") and not own else "nothing"


def typechecked(function):
    """Compares what a function is given, or what it returns, with its annotations.

    It is one that jaxtyping makes of another's signature: with an annotation of the result once the
    arguments have been compared, else without. `typeguard.check_type` compares; typeguard's
    decorator would look at the arguments twice, which takes a multiple of the time.
    """
    import typeguard  # the tests' other needs are met on machines that lack it

    signature = inspect.signature(function)
    hints = {name: compared(hint) for name, hint in function.__annotations__.items()}
    hints = {name: hint for name, hint in hints.items() if hint is not typing.Any}
    returned = hints.pop("return", None)

    def look(name, value, hint):
        if type(value) is hint or (type(hint) is _InstanceOf and isinstance(value, hint)):
            return  # at once what most are
        typeguard.check_type(name, value, hint, globals={}, locals={})

    @functools.wraps(function)
    def checked(*args, **kwargs):
        result = function(*args, **kwargs)
        if returned is not None:
            look("the return value", result, returned)
            return result
        given = signature.bind(*args, **kwargs).arguments
        for name in filter(given.__contains__, hints):  # in order, as letters are bound
            value = given[name]
            if signature.parameters[name].kind not in _MANY:
                value = (value,)
            for one in value.values() if isinstance(value, dict) else value:
                look(name, one, hints[name])
        return result

    return checked


class _InstanceOf(type):
    """A type whose instances are those of `named`: a class, or several."""

    def __instancecheck__(cls, value):
        return isinstance(value, cls.named)


def compared(hint):
    """The hint as it is compared: without a look into named tuples, and with symbols for int.

    Letters of a named tuple's fields are those of its own module; a function may mean something
    else by them. Under jax.export a size may be a symbol, which jax's own annotations call int.
    """
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, map(compared, hint.__args__))
    if type(hint) is types.GenericAlias:  # Callable[[...], ...] is of a class of its own
        return types.GenericAlias(hint.__origin__, tuple(map(compared, hint.__args__)))
    if hint is int:
        return _InstanceOf("int", (), {"named": (int, _SYMBOL)})
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
