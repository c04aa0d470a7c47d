"""The Hopper kernel against a float64 loop: interpreted here, native where there is a Hopper GPU.

`pytest -m accelerator tests/ops/hopper_test.py` runs the native half on a GPU.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import mla_jax
from mla_jax import target
from mla_jax.cache import Dense
from mla_jax.models.decoder import Decoder, DecoderConfig
from mla_jax.ops import dispatch, hopper
from mla_jax.ops.hopper import kernel, make_schedule, merge
from mla_jax.ops.hopper.schedule import ROW_COST
from mla_jax.ops.seen import Seen

SCALE = 192**-0.5
INTERPRET = plgpu.InterpretGPUParams()
pytestmark = [
    # Infinity in slots that nobody sees meets zero, before the mask.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def make(seed, batch, tokens, slots, heads, rank, rope, lengths, dtype):
    """Standard normal operands; NaN and infinity in every slot past a row's length."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    dead = (np.arange(slots)[None] >= np.asarray(lengths)[:, None])[..., None]
    bad = np.where(np.arange(slots) % 3 == 0, np.inf, np.nan)[None, :, None]
    arrays = [draw(batch, tokens, heads, rank), draw(batch, tokens, heads, rope)]
    arrays += [np.where(dead, bad, draw(batch, slots, width)) for width in (rank, rope)]
    return [jnp.asarray(a, dtype) for a in arrays], jnp.asarray(lengths, jnp.int32)


def loop(arrays, lengths, scale=SCALE):
    """float64, one query token at a time."""
    pattern, q_rope, latent, k_rope = (np.asarray(a, np.float64) for a in arrays)
    out = np.zeros(pattern.shape)
    lse = np.full(pattern.shape[:-1], -np.inf)
    for b, t in np.ndindex(pattern.shape[:2]):
        n = int(lengths[b]) - (pattern.shape[1] - 1 - t)
        if n <= 0:
            continue
        scores = pattern[b, t] @ latent[b, :n].T + q_rope[b, t] @ k_rope[b, :n].T
        top = scale * scores.max(1, keepdims=True)
        weights = np.exp(scale * scores - top)
        out[b, t] = weights @ latent[b, :n] / weights.sum(1, keepdims=True)
        lse[b, t] = top[:, 0] + np.log(weights.sum(1))
    return out, lse


def check(got, want, dtype, tolerance=None):
    """Rounding of the weights, relative to the row's maximum, and of the result: half a unit each.

    The joint error of both, each uniform within half a unit of the last place, is at most 0.8 eps
    of the elements' root mean square; rows with nothing to see are exact.
    """
    out, lse = (np.asarray(x, np.float64) for x in got)
    dead = np.isneginf(want[1])
    assert np.isfinite(out).all()
    assert (np.isneginf(lse) == dead).all()
    assert (out[dead] == 0).all()
    assert relative(out, want[0]) < (tolerance or 0.8 * float(jnp.finfo(dtype).eps))
    # float32 sums of exponentials by approximate instructions
    np.testing.assert_allclose(lse[~dead], want[1][~dead], atol=2e-5)


def attend(arrays, lengths, sms, interpret=INTERPRET):
    tokens, heads = arrays[0].shape[1:3]
    schedule = make_schedule(
        lengths, rows=tokens * heads, slots=arrays[2].shape[1], num_sms=sms, slack=0
    )
    return hopper.decode(*arrays, schedule, scale=SCALE, interpret=interpret)


def interpreted(arrays, lengths, sms):
    # The interpreter's callbacks run operations of their own: nothing else may be dispatched then.
    return jax.block_until_ready(attend(arrays, lengths, sms))


CASES = [  # B, T, S, N, R, P, lengths, multiprocessors
    (3, 1, 136, 16, 128, 32, (135, 0, 65), 2),
    (1, 1, 520, 20, 128, 16, (515,), 5),
    (2, 2, 136, 40, 128, 64, (130, 1), 4),
    (2, 8, 136, 1, 128, 0, (136, 5), 2),
    (1, 1, 136, 128, 256, 64, (135,), 4),
    (3, 1, 72, 80, 128, 16, (64, 72, 63), 3),
    (3, 1, 904, 40, 256, 16, (640, 1, 900), 4),  # the last part of the first row goes on
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-{}-sms{}".format(*c))
def test_interpreted_is_the_loop(case):
    *shape, lengths, sms = case
    dtype = jnp.float16 if shape[3] == 80 else jnp.bfloat16
    arrays, lengths = make(0, *shape, lengths, dtype)
    check(interpreted(arrays, lengths, sms), loop(arrays, lengths), dtype)


def test_many_pieces(monkeypatch):
    monkeypatch.setattr(merge, "_FEW", (2, 4, 4))  # 32 would take a minute
    arrays, lengths = make(4, 1, 1, 520, 2, 256, 0, (515,), jnp.bfloat16)
    check(interpreted(arrays, lengths, 5), loop(arrays, lengths), jnp.bfloat16)


def _mask_without_causality(self, s, slot, length):
    tokenless = types.SimpleNamespace(shape=self.shape._replace(tokens=1), tile=self.tile)
    return REAL["mask"](tokenless, s, slot, length)


REAL = {"mask": kernel._Part.mask, "source_slot": kernel.source_slot, "piece": merge.piece}
PLANTED = {
    "future_token_visible": (kernel._Part, "mask", _mask_without_causality),
    "off_by_one_slot": (
        kernel._Part, "mask",
        lambda self, s, slot, length: REAL["mask"](self, s, slot, length - 1),
    ),
    "dead_values_left": (kernel._Part, "kill_dead_values", lambda self, ref, live: None),
    "dropped_first_block": (
        kernel, "source_slot",
        lambda row, slot, length, slots, total: jnp.where(
            slot == 0, total, REAL["source_slot"](row, slot, length, slots, total)),
    ),
    "wrong_scale": (kernel, "LOG2E", kernel.LOG2E * 1.05),
    "pieces_mixed_up": (
        merge, "piece",
        lambda part, tile, began, shape: REAL["piece"](part & ~1, tile, began & False, shape),
    ),
}  # fmt: skip


@pytest.fixture
def traced_anew():
    """Neither finds a program traced before nor leaves a broken one behind."""
    hopper._call.clear_cache()
    yield
    hopper._call.clear_cache()


@pytest.mark.parametrize("bug", [None, *PLANTED])
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    arrays, lengths = make(1, 2, 2, 296, 3, 128, 16, (70, 290), jnp.bfloat16)
    want = loop(arrays, lengths)
    if bug is None:
        check(interpreted(arrays, lengths, 4), want, jnp.bfloat16)  # parts 2 and 3 share a row
        return
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError):
        check(interpreted(arrays, lengths, 4), want, jnp.bfloat16)


def test_gradients_vmap_and_no_lengths(monkeypatch):
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    arrays, _ = make(2, 2, 1, 64, 2, 128, 16, (64, 64), jnp.bfloat16)

    def loss(attend, *arrays):
        out, lse = attend(*arrays)
        return (
            jnp.sin(out.astype(jnp.float32)) * jnp.arange(out.size).reshape(out.shape)
        ).sum() + lse.sum()

    full = jnp.full(2, 64, jnp.int32)
    ours = lambda *arrays: attend(arrays, full[: len(arrays[0])], 2)  # noqa: E731
    theirs = functools.partial(mla_jax.latent_attention, lengths=None, scale=SCALE)
    grads = [
        jax.block_until_ready(jax.grad(functools.partial(loss, f), (0, 1, 2, 3))(*arrays))
        for f in (ours, theirs)
    ]
    for one, two in zip(*grads, strict=True):
        assert relative(one, two) < 2 * float(jnp.finfo(jnp.bfloat16).eps)
    each = jax.vmap(lambda p, q, c, k: ours(p[None], q[None], c[None], k[None]))(*arrays)
    want = loop(arrays, np.array([64, 64]))
    check([x[:, 0] for x in each], want, jnp.bfloat16)


def test_shard_map(monkeypatch):
    """Types for several devices; the interpreter runs one device at a time."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    arrays, lengths = make(3, 2, 1, 72, 3, 128, 16, (70, 65), jnp.bfloat16)
    for devices, interpret in ((2, None), (1, INTERPRET)):
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("x")
        local = jax.shard_map(
            lambda *a: attend(a[:4], a[4], 2, interpret),  # noqa: B023
            mesh=mesh, in_specs=spec, out_specs=spec,
        )  # fmt: skip
        assert jax.eval_shape(local, *arrays, lengths)[0].shape == (2, 1, 3, 128)
    check(jax.jit(local)(*arrays, lengths), loop(arrays, lengths), jnp.bfloat16)


def spec(arrays):
    (batch, tokens, heads, rank), (slots, rope) = arrays[0].shape, arrays[3].shape[1:]
    return dispatch.Call(
        "latent_attention", batch, tokens, slots, heads, (rank, rope), rank,
        arrays[0].dtype.name, ("lengths",), scale=SCALE,
    )  # fmt: skip


def test_the_plan_is_of_the_rows_ends_and_other_backends_need_none(monkeypatch):
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    arrays, lengths = make(5, 2, 1, 136, 3, 128, 16, (65, 130), jnp.bfloat16)
    seen = Seen.of(lengths, batch=2, queries=1, slots=136)
    assert dispatch.plan(seen, spec(arrays), "xla").plan is None
    with plgpu.force_gpu_interpret_mode():
        planned = dispatch.plan(seen, spec(arrays))
        assert planned.plan.lengths.tolist() == [65, 130]
        store = Dense({"latent": arrays[2], "k_rope": arrays[3]})
        got = dispatch.attend(tuple(arrays[:2]), store, planned, spec(arrays), "pallas_gpu")
        check(jax.block_until_ready(got), loop(arrays, lengths), jnp.bfloat16)


def test_rows_padded_on_the_right(monkeypatch):
    """What counts goes to the kernel as the row's last tokens."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    counts, ends = np.array([1, 3, 0]), np.array([65, 130, 9])
    arrays, _ = make(6, 3, 3, 136, 3, 128, 16, ends, jnp.bfloat16)
    limits = np.where(
        np.arange(3) < counts[:, None], (ends - counts)[:, None] + np.arange(3) + 1, 0
    )
    seen = Seen(*map(functools.partial(jnp.asarray, dtype=jnp.int32), (limits, ends, counts)))
    store = Dense({"latent": arrays[2], "k_rope": arrays[3]})
    with plgpu.force_gpu_interpret_mode():
        got = dispatch.attend(tuple(arrays[:2]), store, seen, spec(arrays), "pallas_gpu")
        got = jax.block_until_ready(got)
    for t in range(3):
        one = [arrays[0][:, t : t + 1], arrays[1][:, t : t + 1], *arrays[2:]]
        check([x[:, t : t + 1] for x in got], loop(one, limits[:, t]), jnp.bfloat16)


def test_tuning_tables(tmp_path, monkeypatch):
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "gpu.toml").write_text(
        'device_kind = "NVIDIA X"\n[[latent_attention]]\nrows = 1024\nslack = 7\n'
        "[[latent_attention]]\nrows = 64\nslack = 3\n"
    )
    monkeypatch.setattr(hopper, "configs_dir", lambda: tmp_path)
    hopper.tuned.cache_clear()
    assert hopper.tuned("NVIDIA X", 64)["slack"] == 3
    assert hopper.tuned("NVIDIA X", 65)["slack"] == 7
    assert hopper.tuned("NVIDIA Y", 64) == {}
    hopper.tuned.cache_clear()


@pytest.mark.parametrize("seed", range(12))
def test_the_schedule_covers_every_step_once(seed):
    rng = np.random.default_rng(seed)
    batch, rows = int(rng.integers(1, 40)), int(rng.choice([1, 16, 64, 65, 128, 256, 1024]))
    lengths = rng.integers(0, 3000, batch) * (rng.random(batch) < rng.random())
    if seed % 3 == 0:
        lengths = np.full(batch, rng.integers(1, 3000))
    sms, slack = int(rng.choice([1, 2, 7, 66, 114, 132])), int(rng.choice([0, 2, 9]))
    s = make_schedule(jnp.asarray(lengths), rows=rows, slots=3000, num_sms=sms, slack=slack)
    s = jax.tree.map(np.asarray, s)
    tiles = -(-rows // 64)
    parts = max(1, sms // tiles)
    assert s.part.shape == (parts, 7)
    assert s.arrivals.shape == (batch * tiles,)
    assert not s.arrivals.any()
    steps = np.maximum(1, -(-lengths // 128))
    np.testing.assert_array_equal(s.row_step, np.concatenate([[0], np.cumsum(steps)]))
    begin, end = s.part[:, 0], s.part[:, 1]
    assert begin[0] == 0
    assert end[-1] == steps.sum()
    np.testing.assert_array_equal(begin[1:], end[:-1])
    assert (end >= begin).all()
    many = s.row_parts[1] > s.row_parts[0]
    row_of, parts_of = np.repeat(np.arange(batch), steps), [[] for _ in range(batch)]
    each = -(-(steps.sum() + ROW_COST * batch) // parts)
    most = each + max(slack, ROW_COST - 1)  # a cut may fall into what a row costs to begin
    for p, (lo, hi, first, first_step, length, last, shared) in enumerate(s.part):
        if lo < hi:
            assert (first, last) == (row_of[lo], row_of[hi - 1])
            assert (first_step, length) == (s.row_step[first], lengths[first])
            assert shared == many[last]
            assert hi - lo + ROW_COST * (last - first) <= most
            for row in np.unique(row_of[lo:hi]):
                parts_of[row].append(p)
    for row, of_row in enumerate(parts_of):
        assert of_row == list(range(s.row_parts[0, row], s.row_parts[1, row] + 1))


HOPPER = target.Target("gpu", "NVIDIA H200", 9.0, 132)
SPEC = dispatch.Call("latent_attention", 2, 1, 4096, 128, (512, 64), 512, "bfloat16", ("lengths",))
REFUSED = {
    "float32": ({"dtype": "float32"}, "bfloat16 and float16"),
    "options": ({"options": ("lengths", "mask", "window")}, "not mask, window"),
    "per_query": ({"options": ("lengths per query",)}, "lengths per query"),
    "soft_cap": ({"soft_cap": 2.0}, "no soft_cap"),
    "paged": ({"store": "paged"}, "not paged ones"),
    "rank": ({"key_dims": (496, 64)}, "kv_lora_rank"),
    "rope": ({"key_dims": (512, 24)}, "qk_rope_head_dim"),
    "tokens": ({"queries": 9}, "1 to 8 query tokens"),
    "heads": ({"heads": 129}, "1 to 128 heads"),
    "slots": ({"slots": 4095}, "multiple of 8 slots"),
    "tiny": ({"batch": 1, "slots": 56}, "at least 64 slots"),
    "huge": ({"batch": 2**16, "slots": 2**16}, "32 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve(name):
    change, reason = REFUSED[name]
    assert reason in hopper.why_not(dataclasses.replace(SPEC, **change), HOPPER)


def test_where_it_runs():
    assert hopper.why_not(SPEC, HOPPER) is None
    ampere = dataclasses.replace(HOPPER, capability=8.0)
    assert "9.x (Hopper), this is 8.0" in hopper.why_not(SPEC, ampere)
    assert "needs an NVIDIA GPU" in hopper.why_not(SPEC, target.of(jax.devices("cpu")[0]))
    schedule = make_schedule(jnp.array([3]), rows=1, slots=64, num_sms=2)
    arrays, _ = make(0, 2, 1, 64, 2, 128, 16, (64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="schedule is for 1 rows"):
        hopper.decode(*arrays, schedule, scale=SCALE)


# ---- on a Hopper GPU

WIDTHS = ((512, 64), (256, 64), (256, 32), (128, 32), (512, 0))
HEADS = (1, 16, 20, 40, 64, 80, 96, 128)
NATIVE = [
    (n, 1 + (3 * i + j) % 8, *WIDTHS[(i + j) % 5], ("bfloat16", "float16")[(i + j // 2) % 2])
    for i, n in enumerate(HEADS)
    for j in range(3)
]
NATIVE += [(128, t, 512, 64, "bfloat16") for t in (1, 2, 8)] + [(16, 1, 512, 64, "bfloat16")]


@pytest.fixture
def card():
    device = target.current()
    reason = hopper.why_not(SPEC, device)
    if reason is not None:
        pytest.skip(reason)
    return device


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "N{}-T{}-R{}-P{}-{}".format(*c))
def test_native(case, card):
    heads, tokens, rank, rope, dtype = case
    seed = NATIVE.index(case)
    rng = np.random.default_rng(seed)
    batch, slots = int(rng.integers(1, 7)), int(rng.integers(9, 250)) * 8
    lengths = np.where(
        rng.random(batch) < 0.2, rng.integers(0, 10, batch), rng.integers(0, slots + 1, batch)
    )
    arrays, lengths = make(seed, batch, tokens, slots, heads, rank, rope, lengths, dtype)
    want = loop(arrays, lengths)

    @functools.partial(jax.jit, static_argnames="sms")
    def run(arrays, lengths, sms):
        return attend(arrays, lengths, sms, None)

    got = run(arrays, lengths, card.cores)
    check(got, want, dtype, tolerance=2e-3 if dtype == "bfloat16" else 3e-4)
    again = run(arrays, lengths, card.cores)
    for one, two in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    if seed % 3 == 0:  # few parts: whole rows and long streams
        check(run(arrays, lengths, 8 * -(-tokens * heads // 64)), want, dtype, tolerance=2e-3)


def two_layers():
    """A decoder of DeepSeek-V2-Lite's attention, prompts for it and their lengths."""
    config = mla_jax.MLAConfig.from_preset("deepseek_v2_lite").replace(
        hidden_size=256, num_hidden_layers=2
    )
    model = Decoder(DecoderConfig(attention=config), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (3, 40), 0, 256)
    return model, prompt, jnp.array([40, 1, 17])


@pytest.mark.accelerator
def test_native_in_the_layer(card):
    model, prompt, lengths = two_layers()
    results = []
    for implementation in (None, "xla"):
        for block in model.blocks:
            block.attention.implementation = implementation
        cache = model.init_cache(3, 128)
        logits, cache = mla_jax.prefill_step(model, prompt, cache, lengths)
        logits, cache = mla_jax.decode_step(model, prompt[:, :1], cache)
        text = mla_jax.decode_step.lower(model, prompt[:, :1], cache).compile().as_text()
        assert ("mosaic_gpu" in text) == (implementation is None)
        results.append(np.asarray(logits, np.float64))
    assert relative(*results) < 2e-2


@pytest.mark.accelerator
def test_native_in_a_scan_and_donated(card):
    """Steps inside `lax.scan` equal steps one by one, and no step copies the donated cache."""
    model, prompt, lengths = two_layers()
    texts = jax.random.randint(jax.random.key(1), (3, 9), 0, 256)

    def start():
        cache = model.init_cache(3, 1024)
        return mla_jax.prefill_step(model, prompt, cache, lengths)[1]

    @jax.jit
    def scanned(model, cache):
        def step(cache, token):
            logits, cache = model.decode(token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, texts.T)[1]

    cache, apart = start(), []
    compiled = mla_jax.decode_step.lower(model, texts[:, :1], cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
    latent = "bf16[" + ",".join(map(str, cache.stores[0].latent.shape)) + "]"
    copies = [line for line in compiled.as_text().splitlines()
              if " copy(" in line and latent in line.split("=")[1]]  # fmt: skip
    assert not copies, copies
    for token in texts.T:
        logits, cache = mla_jax.decode_step(model, token[:, None], cache)
        apart.append(logits[:, 0])
    together = scanned(model, start())
    assert relative(together, jnp.stack(apart)) < float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.accelerator
def test_native_under_shard_map(card):
    """Over the rows of a batch, on as many devices as there are."""
    devices = jax.device_count()
    lengths = np.resize((700, 65, 1, 0), 4 * devices)
    arrays, lengths = make(7, 4 * devices, 1, 704, 128, 512, 64, lengths, jnp.bfloat16)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    local = jax.shard_map(
        lambda *a: mla_jax.latent_attention(
            *a[:4], lengths=a[4], scale=SCALE, implementation="pallas_gpu"
        ),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    check(jax.jit(local)(*arrays, lengths), loop(arrays, lengths), jnp.bfloat16, 2e-3)
