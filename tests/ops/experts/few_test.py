"""The Hopper kernels for few tokens, interpreted on the CPU, against float64; and planted bugs.

Tolerances count roundings to bfloat16, as in `grouped_test.py`: of hidden states, of an expert's
output, of y. Weights are exact, those of 8 bits too.
"""

import dataclasses
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative, slow
from experts_oracle import gradients, loop, problem
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import target
from mla_jax.layers.quantised import Quantised, maps_of
from mla_jax.ops.experts import (
    choose,
    few,
    gated_mlp,
    hopper,
    products,
    routed_experts,
    takes_shared,
)
from mla_jax.ops.experts.tiles import Chosen, chosen_experts
from mla_jax.ops.hopper import widen
from mla_jax.ops.hopper.order import in_order, restored
from mla_jax.ops.weights import Weight

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
BLOCKS = {"e4m3": (128, 128), "int8": (1, None)}


def tolerance(roundings):
    return (roundings / 3) ** 0.5 * 2.0**-8


# One program, where each of its operations would be one.
dense = jax.jit(lambda stored: stored.dense(jnp.float32))


def weight(kind, shape, rng):
    """A kernel [E K N], or the like [E N K] as it is stored; and its numbers [E K N] in float64."""
    count, inputs, outputs = shape
    if kind == "plain":
        kernel = jnp.asarray(rng.standard_normal(shape) * inputs**-0.5, jnp.bfloat16)
        return kernel, np.asarray(kernel, np.float64)
    if kind == "e4m3":
        values = jnp.asarray(rng.standard_normal((count, outputs, inputs)), jnp.float8_e4m3fn)
        grid = (count, -(-outputs // 128), -(-inputs // 128))
    else:
        values = jnp.asarray(rng.integers(-127, 128, (count, outputs, inputs)), jnp.int8)
        grid = (count, outputs, 1)
    size = inputs**-0.5 / (1 if kind == "e4m3" else 64)
    scale = jnp.asarray(rng.uniform(0.5, 2, grid) * size, jnp.float32)
    made = Weight(values, scale, BLOCKS[kind])
    return made, np.asarray(dense(made), np.float64).swapaxes(1, 2)


def check_products(kind, rng, rows=8, cores=2, interpret=INTERPRET, inner=128, apart=1):
    """Two of three experts and a shared one of another width; places in use, one behind them.

    Hidden states come in the order in which the products behind take them. With `apart` > 1 every
    place has tokens of its own, and the shared expert so many times `rows`. A GPU makes all in one
    kernel as well, which an interpreted thread block does alone and without hidden states to see.
    """
    chosen = Chosen(jnp.array([0, 2, 1]), jnp.array([0, 1, 1, 2]), jnp.zeros(1, jnp.int32))
    counts = (rows,) if apart == 1 else (3 * rows, apart * rows)
    xs = tuple(jnp.asarray(rng.standard_normal((n, 256)), jnp.bfloat16) for n in counts)
    shapes = {"gate": (256, inner), "up": (256, inner), "down": (inner, 256)}
    wide = {"gate": (256, 256), "up": (256, 256), "down": (256, 256)}
    made = {name: weight(kind, (3, *shape), rng) for name, shape in shapes.items()}
    own = {name: weight(kind, (1, *shape), rng) for name, shape in wide.items()}
    groups = tuple((kernels["gate"][0], kernels["up"][0]) for kernels in (made, own))
    plan = few.Plan(rows, cores, interpret)
    down = tuple(kernels["down"][0] for kernels in (made, own))
    hidden = None
    if interpret is None or cores == 1:
        y = jax.block_until_ready(few.gated_mlps(xs, groups, down, chosen, plan=plan))
    if interpret is None or cores > 1:
        together = y if interpret is None else None
        hidden, y = in_two(xs, groups, down, chosen, plan, kind == "e4m3", inner)
        if together is not None:
            np.testing.assert_array_equal(together[0][: 2 * rows], y[0][: 2 * rows])
            np.testing.assert_array_equal(together[1], y[1])
    of_all = ((own, 1, 0, place) for place in range(apart))
    for kernels, part, expert, place in ((made, 0, 0, 0), (made, 0, 2, 1), *of_all):
        at = slice(place * rows, (place + 1) * rows)
        exact = {name: kernel[1][expert] for name, kernel in kernels.items()}
        x = xs[0] if apart == 1 else xs[part][at]
        a, b = (np.asarray(x, np.float64) @ exact[name] for name in ("gate", "up"))
        right, roundings = a / (1 + np.exp(-a)) * b, 2
        if hidden is not None:
            assert relative(hidden[part][at], right) < tolerance(1)
            right, roundings = np.asarray(hidden[part][at], np.float64), 1
        assert relative(y[part][at], right @ exact["down"]) < tolerance(roundings)


def in_two(xs, groups, down, chosen, plan, ordered, inner):
    """Hidden states, in the order of channels, and results of two kernels."""
    order = few.order_of(down)
    assert order == ((128 if inner % 128 == 0 else 64) if ordered else None)
    hidden = jax.block_until_ready(few.gate_up(xs, groups, chosen, plan=plan, order=order))
    y = jax.device_get(few.down(hidden, down, chosen, plan=plan, ordered=ordered))
    hidden = jax.device_get(hidden)
    if ordered:  # back, by the place that every number has taken
        places = [np.argsort(in_order(jnp.arange(h.shape[1]), order)) for h in hidden]
        hidden = [h[:, place] for h, place in zip(hidden, places, strict=True)]
    return hidden, y


@pytest.mark.parametrize(
    ("kind", "inner", "cores", "apart"),
    [
        ("e4m3", 192, 2, 1),
        ("int8", 192, 2, 2),
        ("plain", 128, 1, 1),
        slow("e4m3", 128, 1, 2),
    ],
)
def test_the_products_of_chosen_and_shared_experts(kind, inner, cores, apart, rng):
    check_products(kind, rng, cores=cores, inner=inner, apart=apart)


@pytest.mark.parametrize("order", [None, 64, 128])
def test_both_warpgroups_take_rows_in_order(order, monkeypatch):
    """What is not interpreted: the rows that a GPU's threads read, here by Python's numbers."""
    by_number = types.SimpleNamespace(
        addi=operator.add, muli=operator.mul, andi=operator.and_, shrui=operator.rshift
    )
    utils = types.SimpleNamespace(arith=by_number, c=lambda number, _: number)
    monkeypatch.setattr(widen, "mgpu", types.SimpleNamespace(utils=utils))
    rows = []
    for wg, warp, h, g in np.ndindex(2, 4, 2, 8):
        me = types.SimpleNamespace(thread=128 * wg + 32 * warp + 4 * g, warp=warp, g=g, i32=None)
        eight, place = widen._first_row(me, order)
        rows.append(8 * eight + place + h * (8 if order is None else 2))
    every = jnp.arange(128)
    assert rows == (every if order is None else in_order(every, order)).tolist()


def check_linear(kind, rng, rows=8, cores=4, interpret=INTERPRET, groups=((192,), (64, 192))):
    """Over two parts of K in float32; the last tiles of outputs and inputs are halves."""
    inputs = 512 if kind == "plain" else 448
    x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.bfloat16)
    for widths in groups:
        kernels, exact = zip(*(weight(kind, (1, inputs, n), rng) for n in widths), strict=True)
        made = few.linears(x, kernels, plan=few.Plan(rows, cores, interpret))
        for y, right in zip(jax.block_until_ready(made), exact, strict=True):
            assert relative(y, np.asarray(x, np.float64) @ right[0]) < tolerance(1)


@pytest.mark.parametrize(("kind", "inputs"), [("e4m3", 256), ("int8", 192)])
def test_rows_are_brought_into_order_before_others_are_put_behind(kind, inputs, rng):
    """So nothing is left to do where they are made in order."""
    x = jnp.asarray(rng.standard_normal((5, inputs)), jnp.bfloat16)
    kernels, plan = (weight(kind, (1, inputs, 64), rng)[0],), few.Plan(8, 2)
    np.testing.assert_array_equal(few.padded(x, kernels, plan.rows), jnp.pad(x, ((0, 3), (0, 0))))
    row = few.row_of(kernels)
    given = lambda x: in_order(few.padded(restored(x, row), kernels, plan.rows), row)  # noqa: E731
    assert "transpose" not in jax.jit(given).lower(x).compile().as_text()


def test_a_linear_has_as_many_stages_as_a_thread_block_takes_steps(rng, monkeypatch):
    """116 of four steps each; where there are few thread blocks, as many as there is room for."""
    rings, own = [], products.Ring
    monkeypatch.setattr(products, "Ring", lambda *fields: rings.append(own(*fields)) or rings[-1])
    x = jnp.zeros((8, 2048), jnp.bfloat16)
    kernels = tuple(weight("e4m3", (1, 2048, n), rng)[0] for n in (3072, 576))
    for cores in (132, 2):
        run = lambda x: few.linears(x, kernels, plan=few.Plan(8, cores))  # noqa: B023, E731
        jax.eval_shape(run, x)
    assert [ring.stages for ring in rings] == [4, 12]


@pytest.mark.parametrize(
    ("kind", "widths"), [("plain", (192,)), slow("e4m3", (64, 192)), ("int8", (192,))]
)
def test_a_linear_whose_inputs_are_shared_out(kind, widths, rng):
    check_linear(kind, rng, groups=(widths,))


def test_maps_of_the_same_x_are_one_kernel(monkeypatch, rng):
    """And their derivatives are float64's; one of them has a bias."""
    kernels, exact = zip(*(weight("e4m3", (1, 128, n), rng) for n in (128, 64)), strict=True)
    bias = nnx.Param(jnp.asarray(rng.standard_normal(64), jnp.float32))
    maps = [Quantised(kernels[0].expert(0)), Quantised(kernels[1].expert(0), bias=bias)]
    x = jnp.asarray(rng.standard_normal((2, 3, 128)), jnp.bfloat16)
    asked, own = [], few.linears
    monkeypatch.setattr(few, "linears", lambda *a, **k: asked.append(len(a[1])) or own(*a, **k))

    @jax.jit
    def both(x):
        made, pull = jax.vjp(lambda x: maps_of(x, maps), x)
        return made, *pull(made)

    with plgpu.force_gpu_interpret_mode(), jax.numpy_rank_promotion("allow"):
        made, dx = jax.block_until_ready(both(x))
    assert asked == [2]
    right = [np.asarray(x, np.float64) @ k[0] for k in exact]
    right[1] += np.asarray(bias[...], np.float64)
    for one, two in zip(made, right, strict=True):
        assert relative(one, two) < tolerance(2)
    back = sum(np.asarray(y, np.float64) @ k[0].T for y, k in zip(made, exact, strict=True))
    assert relative(dx, back) < tolerance(4)


@pytest.mark.parametrize("kind", [slow("plain"), "e4m3"])
def test_a_gated_mlp_and_its_derivatives(kind, rng):
    made = [weight(kind, (1, 128, 128), rng) for _ in range(3)]
    x = jnp.asarray(rng.standard_normal((2, 3, 128)), jnp.bfloat16)

    @jax.jit
    def both(x):
        y, pull = jax.vjp(lambda x: gated_mlp(x, [k for k, _ in made]), x)
        return y, *pull(y)

    with plgpu.force_gpu_interpret_mode():
        y, dx = jax.block_until_ready(both(x))
    exact = [k for _, k in made]
    flat, one, first = x.reshape(6, 128), jnp.ones((6, 1)), jnp.zeros((6, 1), int)
    assert relative(y.reshape(6, -1), loop(first, flat, one, *exact)) < tolerance(2)
    right = gradients(first, y.reshape(6, -1), flat, one, *exact)
    assert relative(dx.reshape(6, -1), right[0]) < tolerance(16)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (1, "plain"),
        (70, "e4m3"),
        slow(33, "e4m3"),
        slow(13, "e4m3"),
        slow(64, "plain"),
        slow(33, "int8"),
    ],
)
def test_the_op_is_float64s(tokens, kind, rng):
    """With the shared expert, and with experts that lie elsewhere."""
    (x, weights, *_), experts = problem(
        tokens, count=5, chosen=2, widths=(128, 128), dtype=jnp.bfloat16
    )
    kernels = [weight(kind, (5, 128, 128), rng) for _ in range(3)]
    shared = [weight(kind, (1, 128, 128), rng) for _ in range(3)]
    with plgpu.force_gpu_interpret_mode():
        arrays = [k for k, _ in kernels], [k for k, _ in shared]
        assert takes_shared(x, experts, weights, *arrays) == (tokens <= 64)
        more = {"shared": arrays[1]} if tokens <= 64 else {}
        y = jax.block_until_ready(jax.jit(routed_experts)(x, experts, weights, *arrays[0], **more))
    right = loop(experts, x, weights, *(k for _, k in kernels))
    if tokens > 64:
        assert relative(y, right) < tolerance(3)
        return
    right += loop(jnp.zeros((tokens, 1), int), x, jnp.ones((tokens, 1)), *(k for _, k in shared))
    assert relative(y, right) < tolerance(3)


@pytest.mark.parametrize("kind", [slow("plain"), "e4m3"])
def test_experts_that_lie_elsewhere_are_dropped_and_derivatives_are_float64s(kind, rng):
    (x, weights, *_), experts = problem(
        24, count=4, chosen=2, widths=(128, 128), dtype=jnp.bfloat16
    )
    kernels = [weight(kind, (3, 128, 128), rng) for _ in range(3)]  # the expert 3 lies elsewhere
    stored = None if kind == "plain" else ("float8_e4m3fn", BLOCKS[kind])
    call = hopper.Call(24, 48, 3, (128, 128), "bfloat16", partial=True, stored=stored)
    dy = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode():
        run = lambda x, weights: hopper.run(  # noqa: E731
            x, experts, weights, *(k for k, _ in kernels), precision=None, call=call,
            target=target.current(),
        )  # fmt: skip

        @jax.jit
        def both(x, weights, dy):
            y, pull = jax.vjp(run, x, weights)
            return y, *pull(dy)

        y, dx, dweights = jax.block_until_ready(both(x, weights, dy))
    there = np.asarray(experts) < 3
    shares = jnp.where(there, weights, 0)
    inside = jnp.where(there, experts, 0)
    exact = [k for _, k in kernels]
    assert relative(y, loop(inside, x, shares, *exact)) < tolerance(3)
    right = gradients(inside, dy, x, shares, *exact)
    # XLA's way rounds stored weights, too, and both products: a twice, four times each, b twice,
    # hidden, down, its product, y and dy; dx in the same way.
    plain = kind == "plain"
    assert relative(dx, right[0]) < tolerance(8 if plain else 16)
    assert relative(dweights, np.where(there, right[1], 0)) < tolerance(5 if plain else 15)


def test_the_chosen_experts():
    experts = jnp.array([[4, 1], [7, 4], [9, 9]])  # 9 is none of nine
    chosen = chosen_experts(experts, 9)
    assert chosen.rank[-1] == 3
    assert chosen.owner.shape == (6,)
    assert chosen.owner[:3].tolist() == [1, 4, 7]
    assert chosen.rank[jnp.array([1, 4, 7])].tolist() == [0, 1, 2]


def test_what_the_kernels_serve():
    """Up to 64 tokens with the shared expert, and weights as stored in the forms that they know."""
    call = hopper.Call(8, 48, 64, (2048, 1408), "bfloat16")
    here = target.Target("gpu", "NVIDIA H200", 9.0, 132)
    assert hopper.takes_shared(call, here)
    assert not hopper.takes_shared(dataclasses.replace(call, tokens=65), here)
    kept = dataclasses.replace(call, stored=("float8_e4m3fn", BLOCKS["e4m3"]))
    assert hopper.why_not(kept, here) is None
    rows = lambda call, tokens, k: few.tile_rows(  # noqa: E731
        dataclasses.replace(call, tokens=tokens, pairs=k * tokens)
    )
    assert [rows(call, tokens, 6) for tokens in (1, 33, 64)] == [8, 64, 64]
    assert [rows(kept, tokens, 6) for tokens in (32, 33, 64, 256, 4096)] == [32, 8, 16, 64, 64]
    assert rows(dataclasses.replace(kept, experts=256), 64, 8) == 8
    packed = dataclasses.replace(call, stored=("int4", (1, 32)))
    assert "takes no weights in int4" in hopper.why_not(packed, here)
    assert hopper.few_plan(8, "bfloat16", None, here) is not None
    assert hopper.few_plan(65, "bfloat16", None, here) is None


@pytest.mark.parametrize("kind", ["plain", "e4m3"])
def test_no_tokens_go_another_way(kind, rng):
    """A kernel has nothing to do then, and no shape."""
    kernels = [weight(kind, (2, 128, 128), rng)[0] for _ in range(3)]
    x, experts = jnp.zeros((0, 128), jnp.bfloat16), jnp.zeros((0, 2), jnp.int32)
    alone = [weight(kind, (1, 128, 128), rng)[0] for _ in range(3)]
    with plgpu.force_gpu_interpret_mode():
        assert routed_experts(x, experts, jnp.zeros((0, 2)), *kernels).shape == (0, 128)
        assert gated_mlp(x, alone) is None
        assert choose(jnp.zeros((0, 8)), 2)[0].shape == (0, 2)


def other_place(self, source, operand, slot):
    swapped = (0, 2, 1)[operand] if len(self.operands) == 3 else operand
    REAL(self, source, swapped, slot)


REAL = products.Ring.copy


TRACED = few.gate_up, few.down, few.linears


@pytest.mark.slow  # grouped_test notices it, too
@pytest.mark.usefixtures("traced_anew")
def test_gate_and_up_that_change_places_are_noticed(monkeypatch, rng):
    monkeypatch.setattr(products.Ring, "copy", other_place)
    with pytest.raises(AssertionError):
        check_products("plain", rng)


@pytest.mark.parametrize("check", [slow(check_products), check_linear])
@pytest.mark.usefixtures("traced_anew")
def test_a_scale_of_a_neighbour_is_noticed(check, monkeypatch, rng):
    monkeypatch.setattr(products, "block_of", lambda step, steps, blocks: step * 0)
    with pytest.raises(AssertionError):
        check("e4m3", rng)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("rows", few.ROWS)
@pytest.mark.parametrize("kind", ["plain", "e4m3", "int8"])
def test_products_and_linears_on_a_gpu(kind, rows, rng):
    check_products(kind, rng, rows, 132, None)
    check_products(kind, rng, rows, 132, None, inner=192)
    check_products(kind, rng, rows, 132, None, apart=3)
    check_linear(kind, rng, rows, 132, None)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_every_code_is_its_number_on_a_gpu(kind):
    """Each row of the weights holds one code. That of NaN gives NaN in its own row only."""
    dtype = jnp.float8_e4m3fn if kind == "e4m3" else jnp.int8
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = jnp.zeros((256, 128), dtype).at[:, 5].set(jax.lax.bitcast_convert_type(codes, dtype))
    scale = jnp.ones((2, 1) if kind == "e4m3" else (256, 1), jnp.float32)
    x = jnp.zeros((8, 128), jnp.bfloat16).at[:, 5].set(1)
    (y,) = few.linears(x, (Weight(values, scale, BLOCKS[kind]).stacked(),), plan=few.Plan(8, 132))
    expected = np.broadcast_to(np.asarray(values[:, 5], np.float32), y.shape)
    assert np.isnan(expected).sum() == (16 if kind == "e4m3" else 0)
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected)
