"""The Hopper kernels of the experts, interpreted on the CPU, against float64; and planted bugs.

Tolerances count roundings to bfloat16. One is off by at most 2^-8, evenly spread, so by
2^-8 / 3^0.5 in the mean square; n that are independent add up to (n / 3)^0.5 2^-8. A factor that
passes through silu and its slope counts four times, as these change by up to twice its relative
error.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, relative, slow
from experts_oracle import gradients, loop, problem
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.experts import grouped, hopper, ring, routed_experts
from mla_jax.ops.experts.tiles import make_tiles

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# Of hidden, of the experts' outputs, of y; of a, b, t or of da, db, of dx in rows and in tokens.
ROUNDINGS = {"y": 3, "x": 4 + 1 + 1 + 1 + 1, "weights": 4 + 1, "gate": 4 + 1 + 1 + 1,
             "up": 4 + 1 + 1 + 1, "down": 4 + 1 + 1 + 1}  # fmt: skip


def tolerance(roundings):
    return (roundings / 3) ** 0.5 * 2.0**-8


TRACED = grouped.gate_up, grouped.product, grouped.gradient


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape).astype(jnp.bfloat16))


jitted_tiles = jax.jit(make_tiles, static_argnums=(1, 2, 3))


def layout(sizes, rows, spare=0):
    """Tiles of experts with these numbers of tokens, and unused ones behind."""
    experts = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:, None]
    tiles = jitted_tiles(experts, len(sizes), rows)
    more = lambda x, count, value: jnp.asarray(np.pad(x, (0, count), constant_values=value))  # noqa: E731
    return tiles._replace(
        token=more(tiles.token, spare * rows, len(experts)), owner=more(tiles.owner, spare, 0)
    )


def each_tile(tiles, rows):
    """(rows of a tile in use, its expert)."""
    for j in range(int(np.asarray(tiles.used)[0])):
        yield slice(j * rows, (j + 1) * rows), int(np.asarray(tiles.owner)[j])


def check_product(rows, transposed, rng):
    """Two pairs summed; an odd number of blocks of columns; an expert without tokens."""
    tiles = layout((3, 0, rows + 1), rows, spare=1)
    x = [normal(rng, len(tiles.token), 128) for _ in range(2)]
    shape = (3, 384, 128) if transposed else (3, 128, 384)
    kernels = [normal(rng, *shape) for _ in range(2)]
    plan = grouped.Plan(rows, 2, INTERPRET)
    y = grouped.product(x, kernels, tiles, plan=plan, transposed=transposed)
    y = np.asarray(jax.block_until_ready(y), np.float64)
    letters = "rk,nk->rn" if transposed else "rk,kn->rn"
    for own, expert in each_tile(tiles, rows):
        pairs = [
            (np.asarray(a, np.float64)[own], np.asarray(kernel, np.float64)[expert])
            for a, kernel in zip(x, kernels, strict=True)
        ]
        assert relative(y[own], sum(np.einsum(letters, *pair) for pair in pairs)) < tolerance(1)


@pytest.mark.parametrize(
    ("rows", "transposed"),
    [
        (grouped.FEW, True), (grouped.MANY, False),
        slow(grouped.FEW, False), slow(grouped.MANY, True),
    ],
)  # fmt: skip
def test_tiles_times_their_experts(rows, transposed, rng):
    check_product(rows, transposed, rng)


def check_gate_up(rows, rng):
    """Hidden from float32 products, which are rounded only where they are saved."""
    tiles = layout((3, 0, rows + 1), rows)
    x = normal(rng, len(tiles.token), 128)
    eighth = jnp.bfloat16(0.125)
    gate, up = (jnp.asarray(np.asarray(normal(rng, 3, 128, 256)) * eighth) for _ in range(2))
    plan = grouped.Plan(rows, 2, INTERPRET)
    made = grouped.gate_up(x, gate, up, tiles, plan=plan, save=True)
    made = [np.asarray(array, np.float64) for array in jax.block_until_ready(made)]
    for own, expert in each_tile(tiles, rows):
        a, b = (np.asarray(x, np.float64)[own] @ np.asarray(k, np.float64)[expert]
                for k in (gate, up))  # fmt: skip
        for found, right in zip(made, (a / (1 + np.exp(-a)) * b, a, b), strict=True):
            assert relative(found[own], right) < tolerance(1)


@pytest.mark.parametrize("rows", [slow(grouped.FEW), grouped.MANY])
def test_gated_products(rows, rng):
    check_gate_up(rows, rng)


@pytest.mark.parametrize(
    ("rows", "widths", "count", "dtype"),
    [
        slow(grouped.FEW, (128, 384), 1, "float32"),  # the op's, with kernels in float32
        (grouped.MANY, (256, 128), 2, "float16"),
        slow(grouped.FEW, (128, 384), 1, "bfloat16"),
        slow(grouped.MANY, (128, 384), 1, "float32"),
    ],
)
def test_gradients_of_kernels(rows, widths, count, dtype, rng):
    """An expert without tokens, one with more than a tile; NaN in tiles that nobody uses."""
    tiles = layout((3, 0, rows + 65), rows, spare=1)
    plan = grouped.Plan(rows, 2, INTERPRET)
    dead = (np.arange(len(tiles.token)) // rows >= np.asarray(tiles.used)[0])[:, None]
    x, *y = (
        jnp.asarray(np.where(dead, jnp.bfloat16(np.nan), normal(rng, len(tiles.token), width)))
        for width in (widths[0], *[widths[1]] * count)
    )
    made = grouped.gradient(x, y, tiles, plan=plan, dtype=jnp.dtype(dtype))
    made = jax.block_until_ready(made)
    # Float32 sums over 2 rows tiles err by less than their number of roundings, of 2^-24.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2 * rows * 2.0**-24}[dtype]
    for found, own in zip(made, y, strict=True):
        expected = np.zeros((3, *widths))
        for at, expert in each_tile(tiles, rows):
            expected[expert] += np.asarray(x, np.float64)[at].T @ np.asarray(own, np.float64)[at]
        assert found.dtype == dtype
        assert not np.asarray(found, np.float32)[1].any()  # the expert without tokens
        assert relative(found, expected) < unit


def both(arrays, experts, dy):
    """The output and all gradients through the public op."""
    y, pull = jax.vjp(lambda x, *rest: routed_experts(x, experts, *rest), *arrays)
    return y, *pull(dy)


def run(arrays, experts, dy, rows, monkeypatch, program=both):
    """Of `both`, interpreted: kernels that other calls share, and what is between them."""
    monkeypatch.setattr(hopper, "tile_rows", lambda call: rows)
    with plgpu.force_gpu_interpret_mode():
        return jax.block_until_ready(program(arrays, experts, dy))


def check(found, arrays, experts, dy):
    expected = (loop(experts, *arrays), *gradients(experts, dy, *arrays))
    for (name, roundings), own, right in zip(ROUNDINGS.items(), found, expected, strict=True):
        assert relative(own, right) < tolerance(roundings), name
        if name in ("gate", "up", "down"):
            unused = np.setdiff1d(np.arange(len(right)), experts)
            assert not np.asarray(own, np.float32)[unused].any(), name


@pytest.mark.parametrize(
    ("tokens", "routing", "rows", "kernels"),
    [
        (150, "one", grouped.MANY, "float32"),  # small() is spread over experts, in bfloat16
        slow(1, "spread", grouped.FEW, "bfloat16"),
        slow(70, "few", grouped.FEW, "float32"),
        slow(150, "one", grouped.MANY, "bfloat16"),
        slow(37, "spread", grouped.MANY, "float32"),
    ],
)
def test_the_public_op_and_its_gradients(tokens, routing, rows, kernels, monkeypatch):
    """Chosen in the interpreter without being named; kernels of two dtypes; filled tiles or not."""
    arrays, experts = problem(
        tokens, count=5, chosen=1 if routing == "one" else 2, widths=(128, 256), routing=routing,
        dtype=jnp.bfloat16,
    )  # fmt: skip
    x, weights, *own = arrays
    arrays = (x, weights, *(kernel.astype(kernels) for kernel in own))
    dy = normal(np.random.default_rng(1), *x.shape)
    # No other case has its shapes: one program is less work than one for each operation.
    found = run(arrays, experts, dy, rows, monkeypatch, jax.jit(lambda *given: both(*given)))
    check(found, arrays, experts, dy)
    assert [a.dtype for a in found] == [jnp.bfloat16, *(a.dtype for a in arrays)]


def small():
    """What the tests below share, kernels included: arrays, experts and dy."""
    arrays, experts = problem(20, count=3, chosen=2, widths=(128, 128), dtype=jnp.bfloat16)
    return arrays, experts, normal(np.random.default_rng(1), *arrays[0].shape)


@functools.cache
def program_of_bugs():
    """Of `both`, with the number of a bug in `OP` as an argument, 0 for none."""

    @jax.jit
    def run(bug, arrays, experts, dy):
        def made(*arguments):
            right = tiles = make_tiles(*arguments)
            for number, changes in enumerate(OP.values(), 1):
                for name, change in changes.items():
                    wrong = jnp.where(bug == number, change(getattr(right, name)), 0)
                    kept = jnp.where(bug == number, 0, getattr(tiles, name))
                    tiles = tiles._replace(**{name: wrong + kept})
            return tiles

        with mock.patch.object(hopper, "make_tiles", made):
            return both(arrays, experts, dy)

    return run


def run_with(bug, monkeypatch):
    program = functools.partial(program_of_bugs(), bug)
    return run(*small(), grouped.FEW, monkeypatch, program)


def test_two_runs_agree_bit_for_bit(monkeypatch):
    one, two = (run_with(0, monkeypatch) for _ in range(2))
    check(one, *small())
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_interpreter_cannot_hide(monkeypatch):
    """Named in the interpreter it still refuses what the kernel does not take."""
    arrays, experts = problem(4, count=4, chosen=2, widths=(128, 128))
    with (
        plgpu.force_gpu_interpret_mode(),
        pytest.raises(NotImplementedError, match="takes bfloat16 and float16, not float32"),
    ):
        routed_experts(arrays[0], experts, *arrays[1:], implementation="pallas_gpu")


REAL = {"column": grouped._column, "copy": ring.Ring.copy, "product": grouped.product}
PRODUCT = {
    "second_block_is_the_first": (
        grouped, "_column",
        lambda n, b, blocks, total, apart: REAL["column"](n, 0, blocks, total, apart),
    ),
    "operand_of_another_stage": (
        ring.Ring, "copy",
        lambda self, source, operand, slot: REAL["copy"](
            self, source, operand, slot ^ int(operand == 0)
        ),
    ),
}  # fmt: skip
OP = {
    "tiles_of_a_neighbour": {"owner": lambda owner: (owner + 1) % 3},
    "last_tile_left_out": {"used": lambda used: used - 1},
    "gradient_of_one_tile_less": {"needed": lambda needed: jnp.maximum(needed - 1, 0)},
    "gradient_of_a_neighbours_tile": {"needed": lambda needed: needed + 1},
}


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("bug", gate(PRODUCT, 1))
def test_bugs_planted_in_the_kernels_are_noticed(bug, monkeypatch, rng):
    monkeypatch.setattr(*PRODUCT[bug])
    # Only many rows have two blocks of columns.
    rows = grouped.MANY if bug == "second_block_is_the_first" else grouped.FEW
    with pytest.raises(AssertionError):
        check_product(rows, False, rng)


@pytest.mark.usefixtures("traced_anew")
def test_a_room_written_while_it_is_copied_is_noticed(monkeypatch, rng):
    monkeypatch.setattr(grouped.plgpu, "wait_smem_to_gmem", lambda *arguments, **options: None)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
            check_product(grouped.MANY, False, rng)
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.mark.usefixtures("traced_anew")
def test_gate_and_up_that_change_places_are_noticed(monkeypatch, rng):
    def copy(self, source, operand, slot):
        REAL["copy"](self, source, (0, 2, 1)[operand], slot)

    monkeypatch.setattr(ring.Ring, "copy", copy)
    with pytest.raises(AssertionError):
        check_gate_up(grouped.FEW, rng)


@pytest.mark.parametrize("bug", gate(OP, 2))
def test_bugs_planted_in_the_tiles_are_noticed(bug, monkeypatch):
    found = run_with(1 + list(OP).index(bug), monkeypatch)
    with pytest.raises(AssertionError):
        check(found, *small())


@pytest.mark.slow  # a product of either kind is compared in test_tiles_times_their_experts
def test_a_kernel_that_is_not_transposed_is_noticed(monkeypatch):
    monkeypatch.setattr(
        grouped, "product", lambda *a, transposed=False, **options: REAL["product"](*a, **options)
    )
    with pytest.raises(AssertionError, match=r"weights|x"):
        check(run(*small(), grouped.FEW, monkeypatch), *small())
