"""`explain`: what `mla_jax.explain` prints for a preset."""

import pytest

import mla_jax
from mla_jax.models import DecoderConfig


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
