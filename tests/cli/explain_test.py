"""`explain`: what `mla_jax.explain` prints for a preset."""

import jax
import pytest

import mla_jax
from mla_jax import sharding, target
from mla_jax.models import DecoderConfig
from mla_jax.ops import dispatch


def test_it_prints_what_the_function_prints(run, capsys):
    flags = {"length": 8192, "queries": 256, "batch": 2, "dtype": "float16"}
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    out = run("explain", "deepseek_v3", *given).out
    config = DecoderConfig.from_preset("deepseek_v3")
    mla_jax.explain(config, batch_size=2, length=8192, queries=256, dtype="float16")
    assert out == capsys.readouterr().out
    assert "expanded (absorbed up to 167 tokens" in out


def test_a_cache_of_fp8_latents(run):
    out = run("explain", "deepseek_v3", "--cache-dtype", "float8_e4m3fn").out
    assert out.splitlines()[0].endswith("bfloat16, float8_e4m3fn latents")
    assert "xla: runs" in out


def choices(config, capsys, **options):
    """What stands under the two ops of the choice: {op: lines}."""
    mla_jax.explain(config, **options)
    said, found, op = capsys.readouterr().out.splitlines(), {}, None
    for line in said:
        if not line.startswith("  "):
            op = line.split()[0] if line.endswith(":") else None
        elif op is not None:
            found.setdefault(op, []).append(line.strip())
    return said, {op: found.get(op) for op in dispatch.CHOICE}


def test_it_says_which_backends_choose_and_attend(capsys):
    h200 = target.Target("gpu", "NVIDIA H200", 9.0, 132)
    v32 = mla_jax.MLAConfig.from_preset("deepseek_v32")
    said, found = choices(v32, capsys, length=65536, device=h200)
    assert "index_scores (64 index heads of 128 channels on 65536 slots):" in said
    assert "best_slots (the best 2048 of 65536 slots):" in said
    assert [found[op][0] for op in dispatch.CHOICE] == ["pallas_gpu: runs"] * 2
    assert any(line.startswith("latent_attention (new tokens to chosen ones)") for line in said)
    _, found = choices(v32, capsys, length=65536, device=h200, dtype="float32")
    assert found["index_scores"][0] == "pallas_gpu: no: takes bfloat16 and float16, not float32"
    assert found["best_slots"][0] == "pallas_gpu: runs"
    _, found = choices(v32, capsys, length=65536, device=h200, implementation="xla")
    assert found == {op: ["xla: runs"] for op in dispatch.CHOICE}
    said, found = choices(v32, capsys, length=2048, device=h200)
    assert found == dict.fromkeys(dispatch.CHOICE)
    assert any("attention is dense and nothing is scored" in line for line in said)
    said, _ = choices(v32.replace(indexer_type="shared"), capsys, length=65536, device=h200)
    assert "index_scores, best_slots: not here, the last layer with an indexer has chosen" in said


def test_it_says_that_split_slots_have_no_choice(capsys):
    v32 = mla_jax.MLAConfig.from_preset("deepseek_v32")
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    rules = sharding.Rules(S="x")
    said, _ = choices(v32, capsys, length=65536, mesh=mesh, sharding=rules)
    assert "index_scores, best_slots: refused, slots S are split over x" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nothing",), "unknown preset 'nothing'"),
        (("tiny", "--dtype", "bf17"), "dtype='bf17' is not a dtype: use e.g. bfloat16."),
        (("tiny", "--dtype", "int8"), "dtype='int8': it must be of floating"),
        (("tiny", "--batch", "0"), "batch_size=0: it must be at least 1"),
    ],
)
def test_wrong_flags(fails, args, message):
    assert message in fails("explain", *args)
