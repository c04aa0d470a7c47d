"""While tests run, what a function is given and returns is compared with its annotations."""

import functools
from typing import Any

import annotations
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

from mla_jax.cache import Cache
from mla_jax.layers.projection import together
from mla_jax.ops.embedding import embed

pytest.importorskip("typeguard")
if jaxtyping.config.jaxtyping_disable:
    pytest.skip("JAXTYPING_DISABLE is set", allow_module_level=True)


def complaint(function, *args):
    """What the checker says; nothing where it is content. `pytest.raises` would turn it off."""
    try:
        function(*args)
    except jaxtyping.TypeCheckError as error:
        return str(error)
    return ""


def turned(x: Float[Array, "B D"]) -> Float[Array, "B D"]:  # which is not true
    return x.T


def optional(length: Int[Array, ""] | int | None) -> tuple[int | None, ...]:
    return ("one",) if length is None else (1, None)  # pyrefly: ignore


def several(*sizes: int) -> None:
    """Each is looked at."""


@pytest.mark.parametrize(
    ("function", "given", "found"),
    [
        (turned, jnp.ones((2, 3)), "the return value of"),
        (turned, jnp.ones((2, 2)), ""),
        (turned, jnp.ones(2), "typechecking parameter 'x'"),
        (optional, None, "the return value of"),
        (optional, 3, ""),
        (optional, jnp.int32(3), ""),
        (optional, jnp.ones(2, int), "typechecking parameter 'length'"),
        (optional, "3", "typechecking parameter 'length'"),
        (several, 1, ""),
        (several, "1", "typechecking parameter 'sizes'"),
    ],
)
def test_an_annotation_that_is_not_true_is_found(function, given, found):
    checked = jaxtyping.jaxtyped(function, typechecker=annotations.typechecked)
    said = complaint(checked, given)
    assert found in said
    assert bool(said) == bool(found)


@pytest.mark.parametrize(
    ("good", "bad", "found"),
    [
        ((np.ones((2, 3)), 1), (np.ones((2, 3)), 2), ""),
        ((np.ones((2, 3)), 1), (np.ones((2, 4)), 1), "the return value of"),
        ((np.ones((2, 3)), 1), (np.ones((2, 3)), None), "the return value of"),
        ((np.ones((2, 3)), 1), (np.ones(2), 1), "typechecking parameter 'x'"),
        ((np.ones((2, 3)), 1), (np.ones((2, 3), int), 1), "typechecking parameter 'x'"),
        ((np.ones((2, 3)), 1, [1]), (np.ones((2, 3)), 1, ["1"]), "typechecking parameter 'more'"),
    ],
    ids=["value", "result's shape", "result's type", "rank", "dtype", "item"],
)
def test_what_is_unlike_the_calls_before_is_compared(good, bad, found):
    def same(
        x: Float[np.ndarray, "B D"], result: Any, more: list[int] | None = None
    ) -> tuple[Float[np.ndarray, "B 3"], int]:
        return x, result

    checked = jaxtyping.jaxtyped(same, typechecker=annotations.typechecked)
    for _ in range(2):
        assert complaint(checked, *good) == ""
    for _ in range(2):  # nor is it taken for a kind that was right
        assert found in (said := complaint(checked, *bad))
        assert bool(said) == bool(found)
    assert complaint(checked, *good) == ""


def test_another_result_of_the_same_values_kinds_is_compared():
    def named(n: int) -> int:
        return n if n < 5 else str(n)  # pyrefly: ignore

    checked = jaxtyping.jaxtyped(named, typechecker=annotations.typechecked)
    assert complaint(checked, 3) == ""
    for _ in range(2):
        assert "the return value of" in complaint(checked, 7)
    assert complaint(checked, 4) == ""


def test_the_package_is_checked():
    table, tokens = jnp.ones((5, 3)), jnp.ones((2, 4), int)
    assert complaint(embed, table, tokens) == ""
    assert "parameter 'tokens'" in complaint(embed, table, tokens[0])
    assert "parameter 'tokens'" in complaint(embed, table, np.ones((2, 4), int))
    assert "parameter 'x'" in complaint(together, jnp.ones(3))


def test_the_package_s_own_errors_come_first():
    make = functools.partial(Cache.init, [], "2")
    assert "parameter 'batch_size'" in complaint(make, 8)
    with pytest.raises(ValueError, match="batch_size='2': batch_size must be a whole number"):
        make(8)
    assert "parameter 'batch_size'" in complaint(make, 8)
