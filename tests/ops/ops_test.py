"""Chain of trust: a float64 loop -> reference -> xla, for both cores; then their properties."""

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, loop_attention, relative, slow
from flax import nnx

import mla_jax
from mla_jax import target
from mla_jax.cache import Dense
from mla_jax.models import DecoderConfig
from mla_jax.ops import dispatch, experts, pieces, xla
from mla_jax.ops.seen import Seen

B, T, S, N, R, P, H, V = 3, 3, 11, 2, 6, 4, 5, 7
SCALE = 0.3
LENGTHS = np.array([11, 0, 5], np.int32)

OPTIONS = {
    "plain": {},
    "full": {"lengths": None},
    "per_query": {"lengths": np.array([[1, 4, 9], [0, 0, 0], [5, 0, 11]], np.int32)},
    "window": {"window": 4},
    "soft_cap": {"soft_cap": 1.5},
    "mask": {"mask": True},
    "segments": {"segment_ids": np.array([[0] * 4 + [1] * 7] * 3, np.int32)},
}


def operands(op, rng, dtype=np.float32):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    if op == "latent_attention":
        latent = draw(B, S, R)
        return (draw(B, T, N, R), draw(B, T, N, P), latent, draw(B, S, P)), latent
    value = draw(B, S, N, V)
    return (draw(B, T, N, H), draw(B, T, N, P), draw(B, S, N, H), draw(B, S, P), value), value


def case(name, rng):
    options = {"lengths": LENGTHS} | OPTIONS[name]
    if "mask" in options:
        options["mask"] = rng.random((B, N, T, S)) < 0.6
    allowed = np.ones((B, N, T, S), bool) if "mask" not in options else options["mask"].copy()
    if "segment_ids" in options:
        ids = options["segment_ids"]
        allowed &= (ids[:, -T:, None] == ids[:, None])[:, None]
    lengths = options["lengths"]
    if lengths is None:
        lengths = np.full(B, S)
    limits = lengths if lengths.ndim == 2 else lengths[:, None] - (T - 1 - np.arange(T))[None]
    return options, limits, allowed


def expected(op, args, value, options, limits, allowed):
    return loop_attention(
        args[:2], args[2:4], value, limits, SCALE, soft_cap=options.get("soft_cap"),
        window=options.get("window"), allowed=allowed,
    )  # fmt: skip


def jaxed(options):
    return {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}


def program(op, implementation, args, options):
    """The op as one program."""
    call = functools.partial(getattr(mla_jax, op), scale=SCALE, implementation=implementation)
    return jax.jit(lambda *args: call(*args, **jaxed(options)))(*map(jnp.asarray, args))


def patched(monkeypatch, op, args, options):
    """The op by XLA, past the jit of its own, whose cache does not see patched sizes."""
    monkeypatch.setattr(xla, op, getattr(xla, op).__wrapped__)
    return program(op, "xla", args, options)


OPS = ["latent_attention", "expanded_attention"]


def in_turn(names, others):
    """All pairs, of which the gate keeps as few as have every name and every other."""
    pairs = itertools.product(enumerate(names), enumerate(others))
    keep = lambda i, j: j == i % len(others)  # noqa: E731
    return [(a, b) if keep(i, j) else slow(a, b) for (i, a), (j, b) in pairs]


@pytest.mark.parametrize(("name", "op"), in_turn(OPTIONS, OPS))
def test_reference_is_the_loop(op, name, rng):
    args, value = operands(op, rng, np.float64)
    options, limits, allowed = case(name, rng)
    out, lse = expected(op, args, value, options, limits, allowed)
    with jax.enable_x64(True):
        got = program(op, "reference", args, options)
    assert got[0].dtype == np.float64
    np.testing.assert_allclose(got[0], out, atol=1e-13)
    np.testing.assert_allclose(got[1], lse, atol=1e-13)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize(("name", "op"), in_turn(OPTIONS, OPS))
def test_xla_is_the_loop(op, name, blocks, rng, monkeypatch):
    if blocks:  # several blocks of queries and slots, the last of each partly over
        monkeypatch.setattr(xla, "_WHOLE_SCORES", 0)
        monkeypatch.setattr(xla, "_BLOCK_SCORES", B * N * 4 * 2)
        monkeypatch.setattr(xla, "_BLOCK_SLOTS", 4)
    args, value = operands(op, rng)
    options, limits, allowed = case(name, rng)
    out, lse = expected(op, args, value, options, limits, allowed)
    got = patched(monkeypatch, op, args, options)
    np.testing.assert_allclose(got[0], out, atol=2e-6)
    np.testing.assert_allclose(got[1], lse, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "implementation"),
    [*((op, "xla") for op in OPS), (OPS[0], "reference"), slow(OPS[1], "reference")],
)
def test_unseen_slots_may_hold_anything(op, implementation, rng):
    args, _ = operands(op, rng)
    call = functools.partial(
        getattr(mla_jax, op), scale=SCALE, lengths=jnp.asarray(LENGTHS),
        implementation=implementation,
    )  # fmt: skip

    @jax.jit
    def results_and_gradients(*arrays):
        (out, lse), pull = jax.vjp(call, *arrays)
        return *call(*arrays), pull((2 * out, jnp.isfinite(lse).astype(lse.dtype)))

    clean = results_and_gradients(*map(jnp.asarray, args))
    for poison in (np.nan, np.inf):
        dirty = list(args[:2])
        for array in args[2:]:
            array = array.copy()
            for b, length in enumerate(LENGTHS):
                array[b, length:] = poison
            dirty.append(array)
        got = results_and_gradients(*map(jnp.asarray, dirty))
        np.testing.assert_allclose(got[0], clean[0], atol=1e-6)
        np.testing.assert_allclose(got[1], clean[1], atol=1e-6)
        assert (np.asarray(got[0])[1] == 0).all()  # a row with nothing to attend to
        assert (np.asarray(got[1])[1] == -np.inf).all()
        for of_clean, of_dirty in zip(clean[2], got[2], strict=True):
            np.testing.assert_allclose(of_dirty, of_clean, atol=2e-5)


def check_nan(out, lse, row):
    """What a NaN has met is NaN, out and log-sum-exp, in this row and nowhere else."""
    bad = np.isnan(np.asarray(lse, np.float32))
    np.testing.assert_array_equal(np.isnan(np.asarray(out, np.float32)).any(-1), bad)
    assert bad[row].all()
    assert not np.delete(bad, row, 0).any()


@pytest.mark.parametrize(("how", "op"), in_turn(["whole", "blocks", "reference"], OPS))
def test_nan_that_is_seen_stays_in_its_row(op, how, rng, monkeypatch):
    if how == "blocks":
        monkeypatch.setattr(xla, "_WHOLE_SCORES", 0)
        monkeypatch.setattr(xla, "_BLOCK_SLOTS", 4)
    args, _ = operands(op, rng)
    args[2][0, 3] = np.nan
    lengths = {"lengths": np.array([[4, 5, 11], [0, 0, 0], [5, 0, 11]], np.int32)}
    if how == "reference":
        got = program(op, how, args, lengths)
    else:
        got = patched(monkeypatch, op, args, lengths)
    check_nan(*got, 0)
    other = tuple(np.zeros_like(array) for array in got)
    whole = jax.jit(mla_jax.merge_attention)(other, got)
    check_nan(*whole, 0)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("heads", [16, 64])
def test_nan_that_is_seen_stays_in_its_row_on_a_gpu(heads, rng):
    """Maxima of a GPU leave NaN out."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    run = functools.partial(
        jax.jit(mla_jax.latent_attention, static_argnames=("scale", "implementation")),
        scale=SCALE, implementation="pallas_gpu",
    )  # fmt: skip
    args = [draw(3, 1, heads, 512), draw(3, 1, heads, 64), draw(3, 9000, 512), draw(3, 9000, 64)]
    for slot in (0, 8999):
        bad = [*args[:2], args[2].at[1, slot, 7].set(jnp.nan), args[3]]
        check_nan(*run(*bad, lengths=jnp.array([70, 9000, 5000])), 1)
    expanded = functools.partial(
        jax.jit(mla_jax.expanded_attention, static_argnames=("scale", "implementation")),
        scale=SCALE, implementation="pallas_gpu",
    )  # fmt: skip
    shapes = (2, 130, 4, 128), (2, 130, 4, 64), (2, 130, 4, 128), (2, 130, 64), (2, 130, 4, 128)
    args = [draw(*shape) for shape in shapes]
    args[2] = args[2].at[1, 0].set(jnp.nan)
    check_nan(*expanded(*args, lengths=jnp.array([130, 130])), 1)


@pytest.mark.parametrize(("name", "op"), in_turn(["plain", "window", "full", "soft_cap"], OPS))
def test_gradients_are_the_reference_s(op, name, rng):
    args, _ = operands(op, rng)
    options = jaxed({"lengths": LENGTHS} | OPTIONS[name])

    def loss(implementation, *arrays):
        out, lse = getattr(mla_jax, op)(
            *arrays, scale=SCALE, implementation=implementation, **options
        )
        return (jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)).sum() + jnp.where(
            jnp.isfinite(lse), lse, 0
        ).sum()

    grads = [
        jax.jit(jax.grad(functools.partial(loss, name), range(len(args))))(*map(jnp.asarray, args))
        for name in ("reference", "xla")
    ]
    for one, two in zip(*grads, strict=True):
        assert relative(two, one) < 5e-6


def test_two_halves_merge(rng):
    args = [jnp.asarray(a) for a in operands("latent_attention", rng)[0]]
    lengths = jnp.asarray(np.array([[9, 10, 11], [0, 0, 0], [2, 3, 4]], np.int32))

    @jax.jit
    def both():
        whole = mla_jax.latent_attention(*args, lengths=lengths, scale=SCALE)
        halves = [
            mla_jax.latent_attention(
                *args[:2], *(a[:, part] for a in args[2:]),
                lengths=jnp.clip(lengths - first, 0, count), scale=SCALE,
            )
            for part, first, count in ((slice(0, 5), 0, 5), (slice(5, 11), 5, 6))
        ]  # fmt: skip
        return whole, mla_jax.merge_attention(*halves)

    whole, merged = both()
    np.testing.assert_allclose(merged[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-6)


def test_long_rows_take_another_softmax(rng, monkeypatch):
    args, value = operands("latent_attention", rng)
    monkeypatch.setattr(xla, "_FUSED_ROW", 4)
    options, limits, allowed = case("plain", rng)
    out, lse = expected("latent_attention", args, value, options, limits, allowed)
    got = patched(monkeypatch, "latent_attention", args, options)
    np.testing.assert_allclose(got[0], out, atol=2e-6)
    np.testing.assert_allclose(got[1], lse, atol=2e-6)


@pytest.mark.parametrize(("dtype", "batch"), in_turn([jnp.bfloat16, jnp.float16], [1, 2]))
def test_half_precision_operands(dtype, batch, rng):
    args, _ = operands("latent_attention", rng)
    args = [jnp.asarray(a[:batch], dtype) for a in args]
    call = functools.partial(
        mla_jax.latent_attention, *args, lengths=jnp.asarray([7, 5][:batch]), scale=SCALE
    )
    (out, lse), exact = jax.jit(lambda: (call(), call(implementation="reference")))()
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    # rounded weights and a rounded result, each within half a unit of the last place
    assert relative(out, exact[0]) < 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(lse, exact[1], atol=1e-5)


def test_no_rotary_channels_and_vmap(rng):
    args = [jnp.asarray(a) for a in operands("latent_attention", rng)[0]]
    args[1], args[3] = args[1][..., :0], args[3][..., :0]
    lengths = jnp.asarray(LENGTHS)
    out, _ = mla_jax.latent_attention(*args, lengths=lengths, scale=SCALE)
    ref = mla_jax.latent_attention(*args, lengths=lengths, scale=SCALE, implementation="reference")
    np.testing.assert_allclose(out, ref[0], atol=1e-6)
    call = functools.partial(mla_jax.latent_attention, scale=SCALE)
    many = jax.vmap(lambda *a: call(*a[:-1], lengths=a[-1]))(*(a[None] for a in (*args, lengths)))
    np.testing.assert_allclose(many[0][0], out, atol=1e-6)


BAD = {
    "float8": (lambda a: a.update(latent=a["latent"].astype(jnp.float8_e4m3fn)), "float8_e4m3fn"),
    "mixed": (
        lambda a: a.update(latent=a["latent"].astype(jnp.bfloat16)),
        "mixed dtypes: .*latent",
    ),
    "width": (lambda a: a.update(latent=a["latent"][..., 1:]), r"latent has shape .*\[B S R\]"),
    "rank": (lambda a: a.update(pattern=a["pattern"][0]), r"pattern has shape .*\[B T N R\]"),
    "rope": (lambda a: a.update(k_rope=a["k_rope"][..., 1:]), "k_rope has shape"),
    "long": (lambda a: a.update(lengths=jnp.array([1, 12, 1])), "go beyond the S = 11"),
    "rows": (lambda a: a.update(lengths=jnp.array([1, 2])), r"lengths has shape \(2,\)"),
    "float": (lambda a: a.update(lengths=jnp.ones(3)), "lengths is float32"),
    "mask": (lambda a: a.update(mask=jnp.full((B, N, T, S), 0.5)), "mask is float32 .*such as 0.5"),
    "mask_shape": (lambda a: a.update(mask=jnp.ones((B, N, T, 3), bool)), "not broadcastable"),
    "window": (lambda a: a.update(window=0), "window=0"),
    "soft_cap": (lambda a: a.update(soft_cap=-1.0), r"soft_cap=-1\.0"),
    "name": (lambda a: a.update(implementation="cuda"), "implementation='cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, rng):
    change, message = BAD[name]
    keys = ("pattern", "q_rope", "latent", "k_rope")
    args = dict(zip(keys, map(jnp.asarray, operands("latent_attention", rng)[0]), strict=True))
    args |= {"lengths": jnp.asarray(LENGTHS), "scale": SCALE}
    change(args)
    with pytest.raises(ValueError, match=message):
        mla_jax.latent_attention(**args)


def test_a_named_backend_that_cannot_serve_says_why(rng):
    args = map(jnp.asarray, operands("expanded_attention", rng)[0])
    with pytest.raises(NotImplementedError, match="'cudnn': needs an NVIDIA GPU"):
        mla_jax.expanded_attention(*args, scale=SCALE, implementation="cudnn")


def test_explain_lists_the_ops_that_a_step_calls(capsys):
    v3 = mla_jax.MLAConfig.from_preset("deepseek_v3")
    mla_jax.explain(v3, batch_size=2, length=8192)
    text = capsys.readouterr().out
    assert "absorbed up to 167 tokens" in text
    assert "latent_attention" in text
    assert "xla: runs" in text
    assert "expanded_attention" not in text
    mla_jax.explain(v3, length=8192, queries=4096, implementation={"context_attention": "xla"})
    text = capsys.readouterr().out
    assert "latent_attention" not in text
    assert "cudnn: no: needs an NVIDIA GPU" in text
    assert text.endswith("before):\n  xla: runs\n")
    mla_jax.explain(v3.replace(sliding_window=4), queries=4096, implementation="cudnn")
    text = capsys.readouterr().out
    assert "expanded_attention" not in text  # a window goes through the cache
    assert "implementation='cudnn' raises an error" in text


def test_limits_clip():
    seen = Seen.of(jnp.array([1, 9]), batch=2, queries=3, slots=8)
    assert seen.limits.tolist() == [[0, 0, 1], [6, 7, 8]]


def test_flax_s_masks_of_zeros_and_ones(rng):
    args = [jnp.asarray(a) for a in operands("latent_attention", rng)[0]]
    mask = nnx.make_attention_mask(jnp.ones((B, T)), jnp.ones((B, S))).at[:, :, :, ::3].set(0)
    assert mask.dtype == jnp.float32
    call = functools.partial(mla_jax.latent_attention, *args, lengths=None, scale=SCALE)
    for got, want in zip(call(mask=mask), call(mask=mask > 0), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_queries_padded_on_the_right_are_the_row_s_last(op, rng):
    """What counts is given to a kernel as the row's last tokens, and taken back to its place."""
    args, _ = operands(op, rng)
    counts, ends = jnp.array([3, 0, 2]), jnp.array([11, 5, 9])
    token = jnp.arange(T)[None]
    limits = jnp.where(token < counts[:, None], (ends - counts)[:, None] + token + 1, 0)
    seen = Seen(limits=limits.astype(jnp.int32), ends=ends, counts=counts)
    queries = [jnp.asarray(a) for a in args[:2]]
    moved = [seen.last(query) for query in queries]
    for query, back in zip(queries, moved, strict=True):
        np.testing.assert_array_equal(seen.first(back), query)
    attend = functools.partial(getattr(mla_jax, op), scale=SCALE)
    rest = [jnp.asarray(a) for a in args[2:]]
    want, want_lse = attend(*queries, *rest, lengths=seen.limits)
    got, got_lse = attend(*moved, *rest, lengths=seen.row_ends)
    some = np.asarray(limits > 0)
    np.testing.assert_allclose(np.asarray(seen.first(got))[some], np.asarray(want)[some], atol=1e-6)
    np.testing.assert_allclose(seen.first(got_lse)[some], want_lse[some], atol=1e-6)


def test_an_implementation_serves_every_op_or_raises():
    names = dispatch.normalized("cudnn")
    assert set(names) == set(dispatch.OPS)
    assert set(dispatch.normalized("pallas_gpu")) == {*dispatch.OPS, *dispatch.CHOICE}
    x = jax.ShapeDtypeStruct((1, 1, MICRO.hidden_size), jnp.float32)

    def asked(implementation, call):
        def made(x):
            return call(
                mla_jax.MultiHeadLatentAttention(
                    MICRO, implementation=implementation, rngs=nnx.Rngs(0)
                ),
                x,
            )

        return jax.eval_shape(made, x)

    decode = lambda layer, x: layer.decode(x, layer.init_cache(1, 8))  # noqa: E731
    with pytest.raises(NotImplementedError, match="'cudnn' does not serve latent_attention: "):
        asked("cudnn", decode)
    singly = {"expanded_attention": "cudnn"}
    asked(singly, decode)  # latent_attention is free to choose
    with pytest.raises(NotImplementedError, match="'cudnn': needs an NVIDIA GPU"):
        asked(singly, lambda layer, x: layer(x))
    for wrong in ({"latent": "xla"}, {"latent_attention": "cuda"}, 3):
        with pytest.raises(ValueError, match=r"implementation=.* is not known"):
            dispatch.normalized(wrong)


def test_a_plan_is_made_of_the_limits_that_it_serves():
    seen = Seen.of(jnp.array([7]), batch=1, queries=1, slots=8)
    planned = dataclasses.replace(seen, plan="a plan")
    assert planned.replace(limits=seen.limits + 1).plan is None


def test_every_backend_of_the_experts_can_be_named():
    for name in experts.IMPLEMENTATIONS:
        assert dispatch.normalized({"routed_experts": name}) == {"routed_experts": name}
    with pytest.raises(ValueError, match=r"implementation=.* is not known"):
        dispatch.normalized({"routed_experts": "cuda"})


def test_explain_covers_a_whole_model_s_experts(capsys):
    lite = DecoderConfig.from_preset("deepseek_v2_lite")
    mla_jax.explain(lite, device=target.Target("gpu", "NVIDIA H200", 9.0, 132))
    text = capsys.readouterr().out
    assert "routed_experts (6 of 64 for each token):\n  pallas_gpu: runs\n" in text
    mla_jax.explain(lite, implementation={"routed_experts": "pallas_gpu"})
    assert "pallas_gpu: no: needs an NVIDIA GPU" in capsys.readouterr().out


def test_pieces_merge_for_any_backend(rng):
    """A piece and a shorter last of a row; the other row sees nothing of the last."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    queries, kv_b = (draw(2, 3, 2, 8), draw(2, 3, 2, 4)), draw(16, 2, 20)
    store = Dense({"latent": draw(2, 200, 16), "k_rope": draw(2, 200, 4)})
    seen = Seen(limits=jnp.array([[130, 131, 200], [0, 1, 90]], jnp.int32))
    call = dispatch.Call(
        "context_attention", 2, 3, 200, 2, (8, 4), 12, "float32", seen.options, scale=0.3
    )
    with mock.patch.multiple(pieces, _WORKSPACE=1, _LEAST=128):
        core = pieces.merging("xla")
        got = jax.jit(
            lambda: pieces.context_attention(queries, store, seen, call, kv_b=kv_b, core=core)
        )()
    options = {"scale": 0.3, "implementation": "reference"}
    want = jax.jit(lambda: mla_jax.ops.context_attention(queries, store, seen, kv_b, **options))()
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
