"""`costs`, `presets` and `devices`: the numbers that are shown, and what is said of them."""

import json
import re

import pytest

from mla_jax import config, costs, models
from mla_jax.config import MLAConfig


def table(out):
    """Rows of a table by their first column; text behind the table may begin with the same word."""
    lines = [line for line in reversed(out.splitlines()) if line]
    return {line.split()[0]: re.split(r"\s{2,}", line) for line in lines}


def test_the_table_of_deepseek_v3(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    out = run("costs", "deepseek_v3", "--device", "h200", "--context", 131072).out
    rows = table(out)
    assert rows["absorbed"][1:5] == ["8.6 GiB", "68.6 KiB", "576", "36.5 GFLOP"]
    assert rows["absorbed"][5:] == ["241.3", "36.9 us", "compute"]
    assert rows["mha"][1:4] == ["488.0 GiB!", "3.8 MiB", "32,768"]  # more than an H200 has
    assert "absorbed up to 170 new tokens" in out
    assert "above 48.5 new tokens" in out
    assert "note:" not in out


def test_latents_in_a_byte_a_number(run):
    out = run("costs", "deepseek_v3", "--cache-dtype", "int8", "--json").out
    rows = {row["kind"]: row["cache_bytes_per_token"] for row in json.loads(out)["rows"]}
    assert rows["absorbed"] == rows["expanded"] == 61 * 656
    assert rows["mha"] == 61 * 32768 * 2
    flags = ("--cache-dtype", "int8", "--weight-dtype", "int4")
    out = " ".join(run("costs", "tiny", *flags).out.split())
    assert "latents cached in int8, weights in int4" in out


@pytest.mark.parametrize(
    ("preset", "layers", "per_token"),
    [
        ("kimi_linear", "7 of 27 layers", "7.9 KiB"),
        ("kimi_k3", "24 of 93 layers", "27.0 KiB"),
        ("ling_3_flash", "7 of 42 layers", "7.9 KiB"),
        ("longcat_flash", "56 attentions in 28 layers", "63.0 KiB"),
        ("longcat_flash_lite", "28 attentions in 14 layers", "31.5 KiB"),
        ("deepseek_v3", "61 layers", "68.6 KiB"),
    ],
)
def test_layers_with_mla_are_counted(run, preset, layers, per_token, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = run("costs", preset).out
    assert f"bf16, {layers}\n" in out
    assert table(out)["absorbed"][2] == per_token
    others = "are no MLA; what they hold and do is not counted" in " ".join(out.split())
    assert others == ("of" in layers)


def test_small_models_have_small_units(run):
    rows = table(run("costs", "tiny", "--context", 5).out)
    assert rows["absorbed"][1:5] == ["3.1 KiB", "640 B", "80", "5.8 kFLOP"]
    assert not any(re.match(r"0(\.0)? ", cell) for row in rows.values() for cell in row)


@pytest.mark.parametrize("preset", ["deepseek_v32", "glm_5", "glm_5_2"])
def test_sparse_attention_is_a_row(run, preset, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = run("costs", preset, "--context", 65536).out
    assert float(table(out)["sparse"][3].replace(",", "")) == 128
    assert "the model attends to 2,048 chosen tokens: sparse is its row" in " ".join(out.split())
    assert "sparse" not in table(run("costs", "deepseek_v3").out)


def test_a_context_beyond_the_model_is_said(run):
    assert "note: the model has 1,024 positions." in run("costs", "tiny").out
    assert "positions" not in run("costs", "tiny", "--context", 1024).out


def test_narrow_latents_are_always_absorbed_and_never_slower(run, monkeypatch):
    narrow = MLAConfig.from_preset("tiny").replace(kv_lora_rank=16, qk_rope_head_dim=0)
    monkeypatch.setattr(MLAConfig, "from_preset", lambda name: narrow)
    out = run("costs", "tiny").out
    assert "absorbed for any number of new tokens per row" in out
    assert "never slower than MHA's core" in out
    found = json.loads(run("costs", "tiny", "--json").out)
    assert found["queries_until_slower"] is None


def test_costs_as_json(run):
    out, err = run("costs", "kimi_linear", "--json", "--batch", 3)
    found = json.loads(out)
    assert err == ""
    assert (found["mla_layers"], found["num_hidden_layers"]) == (7, 27)
    assert (found["batch"], found["queries"]) == (3, 1)
    config, h200 = MLAConfig.from_preset("kimi_linear"), costs.device("h200")
    rows = costs.table(config, h200, context=32768, batch=3)
    for row, shown in zip(rows, found["rows"], strict=True):
        assert shown["kind"] == row.kind
        assert shown["cache_bytes"] == row.cache_bytes
        assert shown["cache_bytes_per_token"] == row.cache_bytes_per_token
        assert (shown["core"]["flops"], shown["core"]["bytes"]) == (row.core.flops, row.core.bytes)
        assert (shown["core"]["seconds"], shown["core"]["bound"]) == (row.core_seconds, row.bound)
        assert shown["layer"]["seconds"] == row.layer_seconds
    assert found["rows"][0]["cache_bytes_per_token"] == 8064


@pytest.mark.parametrize("columns", [24, 40, 70])
@pytest.mark.parametrize("command", [("costs", "deepseek_v3"), ("presets",), ("devices",)])
def test_no_number_is_cut_where_it_is_narrow(run, monkeypatch, command, columns):
    wide = run(*command).out
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = run(*command).out
    numbers = re.compile(r"[\d.,]*\d\b")
    assert sorted(numbers.findall(narrow)) == sorted(numbers.findall(wide))
    assert "…" not in narrow
    # A word that is longer than a line, as a name of Python's may be, is one line.
    assert all(len(line) <= columns or " " not in line for line in narrow.splitlines())


def test_presets_say_what_they_make(run):
    out = run("presets").out
    rows = table(out)
    assert rows["deepseek_v3"][1:] == ["model", "61", "61", "128", "512", "64", "68.6 KiB"]
    assert rows["kimi_linear"][1:5] == ["layer", "27", "7", "32"]
    assert rows["deepseek_v32"][1:] == ["model", "61", "61", "128", "512", "64", "83.9 KiB"]
    assert "deepseek_v3 is also deepseek_r1, deepseek_v3_1" in out


def test_presets_as_json_agree_with_the_models(run):
    found = {row["name"]: row for row in json.loads(run("presets", "--json").out)["presets"]}
    assert tuple(found) == config.presets()
    whole = {name for name, row in found.items() if row["makes"] == "model"}
    assert whole == set(models.decoder_presets())
    for name, row in found.items():
        preset = MLAConfig.from_preset(name)
        assert row["mla_layers"] == preset.mla_layers
        kind = "absorbed" if preset.index_topk is None else "sparse"
        assert row["cache_bytes_per_token"] == costs.cache_bytes(preset, 1, 1, kind)
        for alias in row["aliases"]:
            assert MLAConfig.from_preset(alias) == preset


def test_each_device_of_a_mesh(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    args = ("costs", "tiny", "--context", 256, "--batch", 4, "--mesh", "x=2", "--place", "B=x,E=x")
    found = json.loads(run(*args, "--json").out)["placement"]
    assert found["cache_bytes"] == 2 * 256 * 4 * (64 + 16) * 2  # rows, slots, layers, numbers
    assert found["link_bytes"]["attention"] == 0 < found["link_bytes"]["experts"]
    out = run(*args).out
    assert table(out)["cache"] == ["cache", "320.0 KiB"]
    assert f"{found['rows_that_fit']:,} rows of 256 would" in " ".join(out.split())


def test_devices(run):
    rows = table(run("devices").out)
    assert rows["h200"] == ["h200", "989.0", "4.800", "131.3 GiB", "206.0"]
    assert rows["tpu_v5e"] == ["tpu_v5e", "197.0", "0.819", "16.0 GiB", "240.5"]
    found = json.loads(run("devices", "--json").out)["devices"]
    assert [row["name"] for row in found] == list(costs.devices())
    assert found[0]["memory_bytes"] == 141 * 10**9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("deepseek_v33",), "unknown preset 'deepseek_v33'. Did you mean 'deepseek_v3'"),
        (("tiny", "--device", "h20"), "device='h20'.*Did you mean 'h200'"),
        (("tiny", "--context", 0), "context=0"),
        (("tiny", "--batch", -1), "batch=-1"),
        (("tiny", "--queries", 0), "queries=0"),
        (("tiny", "--place", "B=x"), "give its axes by --mesh too"),
        (("tiny", "--mesh", "x=2", "--place", "B=y"), "--place B=y: the mesh has the axes x"),
        (("tiny", "--mesh", "x=2", "--place", "Z=x"), "--place: Z is no letter"),
        (("tiny", "--mesh", "x=2", "--place", "B=x"), "B = 1 does not divide over the 2 devices"),
    ],
)
def test_wrong_flags(fails, args, message):
    assert re.search(message, fails("costs", *args))
