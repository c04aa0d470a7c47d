"""The command line: its output, repeated seeds, round trips, and errors without traceback."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import cli
from mla_jax.models import Decoder, DecoderConfig

_QUICK = ("demo", "--batch", "2", "--tokens", "6", "--prompt", "def ", "--temperature", "2")


_CHECKPOINT = pathlib.Path(__file__).parents[1] / "testdata" / "decoders" / "deepseek_v3"
_SAVED = ("generate", "--checkpoint", str(_CHECKPOINT))
_GENERATE = ("generate", "--preset", "tiny", "--random-weights", "--dtype", "float32",
             "--max-new-tokens", "9")  # fmt: skip


# Flags that are wrong whatever the model is, and what is said of them.
_WRONG = [
    (("--prompt", "a", "--draft", "mtp"), r"draft='mtp' drafts nothing with specul"),
    (("--prompt", "a", "--speculate", "-1"), r"speculate=-1"),
    (("--prompt", "a", "--max-new-tokens", "0"), r"max_new_tokens=0"),
    (("--prompt", "a", "--block", "0"), r"block=0"),
    (("--prompt", "a", "--temperature", "nan"), r"temperature=nan"),
    (("--prompt", "a", "--top-k", "0"), r"top_k=0"),
    (("--prompt", "a", "--top-p", "0"), r"top_p=0"),
    (("--prompt", "a", "--implementation", "cuda"), r"implementation='cuda' is not known"),
    (("--prompt", "a", "--dtype", "int8"), r"dtype='int8': use bfloat16"),
    (("--prompt", "a", "--prompt-tokens", "3"), r"give --prompt TEXT, or --prompt-tokens"),
    (("--prompt", "a", "b", "--batch", "2"), r"--batch 2 copies one prompt"),
    (("--prompt", "a", "--seed", "-1"), r"--seed must be at least 0"),
    (("--prompt-tokens", "-1"), r"--prompt-tokens and"),
    (("--prompt", "~"), r"prompt 0 has token 126: the model has 40 words"),
    (("--prompt", "\n", "--max-length", "4"), r"max_length=4"),
    (("--prompt", "\n", "--max-new-tokens", "200"), r"the model has 128 positions"),
    (
        ("--prompt", "\n", "--max-new-tokens", "9", "--implementation", "pallas_gpu"),
        r"implementation='pallas_gpu': ",
    ),
    (("--prompt", ""), r"none may be empty"),
    (("--random-weights", "--prompt", "a"), r"--random-weights is for a --preset"),
]


def _run(capsys, *args):
    cli.main(list(args))
    return capsys.readouterr().out


def _error(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def _text(out):
    return re.search(r"─ text ─+\n(.*?)\n─+ decoding", out, re.DOTALL).group(1)


def test_same_seed_same_text_also_when_loaded(capsys, tmp_path, monkeypatch):
    shallow = cli.MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)  # compiles sooner
    monkeypatch.setattr(cli.MLAConfig, "from_preset", lambda name: shallow)
    folder = str(tmp_path / "model")
    first = _run(capsys, *_QUICK, "--steps", "2", "--seed", "3", "--save", folder)
    assert _text(first).startswith("def ")
    assert _text(_run(capsys, *_QUICK, "--steps", "2", "--seed", "3")) == _text(first)
    loaded = _run(capsys, *_QUICK, "--seed", "3", "--load", folder)
    assert _text(loaded) == _text(first)
    assert "held-out loss" in first
    assert "held-out loss" not in loaded  # loading trains only where --steps asks for it
    for line in ("time to first token", "tokens/s", "320 bytes per token", "xla: runs"):
        assert line in first
    assert "\x1b" not in first  # not a terminal: no control codes
    assert max(map(len, first.splitlines())) < 120


def test_save_and_load_give_identical_logits(tmp_path, rng):
    attention = cli.MLAConfig.from_preset("tiny").replace(
        num_hidden_layers=1,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    )
    model = Decoder(DecoderConfig(attention=attention, vocab_size=40), rngs=nnx.Rngs(5))
    cli.save(model, tmp_path / "model")
    loaded = cli.load(tmp_path / "model")
    tokens = jnp.asarray(rng.integers(0, 40, (2, 9)), jnp.int32)
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("costs", "deepseek_v33"), r"unknown preset 'deepseek_v33'. Did you mean 'deepseek_v3'"),
        (("explain", "nothing"), r"unknown preset 'nothing'"),
        (("demo", "--preset", "nothing"), r"unknown preset 'nothing'"),
        (("costs", "tiny", "--device", "h20"), r"device='h20'.*Did you mean 'h200'"),
        (("costs", "tiny", "--context", "0"), r"slots=0|context=0|length=0"),
        (("explain", "tiny", "--dtype", "bf17"), r"dtype='bf17'"),
        (("explain", "tiny", "--dtype", "int8"), r"dtype='int8': it must be of floating"),
        (("explain", "tiny", "--batch", "0"), r"batch_size=0: it must be at least 1"),
        (("demo", "--implementation", "cuda"), r"implementation='cuda' is not known"),
        (("demo", "--load", "/nonexistent/model"), r"/nonexistent/model holds no model"),
        (("demo", "--tokens", "0"), r"at least 1"),
        (("demo", "--prompt", ""), r"not empty"),
        (("demo", "--tokens", "100000"), r"tiny has 1024: ask for fewer"),
        (("demo", "--temperature", "-1"), r"temperature=-1\.0: it must be at least 0"),
        (("demo", "--save", "/dev/null/model"), r"/dev/null"),
        (("generate",), r"give one of --checkpoint FOLDER and --preset"),
        (("generate", "--preset", "tiny"), r"add --random-weights"),
        (
            ("generate", "--preset", "axk1", "--random-weights", "--prompt", "a"),
            r"'axk1' describes the attention",
        ),
        (
            ("generate", "--checkpoint", "/nonexistent/model", "--prompt", "a"),
            r"/nonexistent/model is neither",
        ),
        ((*_GENERATE,), r"give --prompt TEXT"),
        (
            (
                *_SAVED,
                "--prompt",
                "\n",
                "--max-new-tokens",
                "4",
                "--speculate",
                "2",
                "--draft",
                "mtp",
            ),
            r"nothing under model\.layers\.3\.,.*draft by prompt lookup",
        ),
        (("demo", "--preset", "deepseek_v3"), r"takes about [\d,]+ GiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(capsys, args, message):
    error = _error(capsys, *args)
    assert re.search(message, error)
    assert error.startswith("mla-jax: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("args", "message"), _WRONG, ids=lambda value: " ".join(value))
def test_wrong_flags_are_known_before_weights_are_read(capsys, monkeypatch, args, message):
    monkeypatch.setattr(cli.checkpoint, "load_decoder", None)
    error = _error(capsys, *_SAVED, *args)
    assert re.search(message, error)
    assert error.startswith("mla-jax: ")


@pytest.mark.parametrize("args", [("costs",), ("costs", "tiny", "--batch", "x"), ("nothing",)])
def test_wrong_usage(capsys, args):
    _error(capsys, *args)


@pytest.fixture
def shallow(monkeypatch):
    config = cli.DecoderConfig.from_preset("tiny")
    config = config.replace(attention=config.attention.replace(num_hidden_layers=1))
    monkeypatch.setattr(cli.DecoderConfig, "from_preset", lambda name: config)


def test_generate_streams_one_text(capsys, shallow):
    text = "abcabcab"
    plain = _run(capsys, *_GENERATE, "--prompt", text)
    assert plain.startswith("tiny, random weights: 0.000 G parameters")
    for line in ("time to first token", "tokens/s", "ms/step", "MiB", "xla: runs"):
        assert line in plain
    drafted = _run(capsys, *_GENERATE, "--prompt", text, "--speculate", "3", "--block", "2")
    assert re.search(r"drafts accepted +[\d.]+% of 3 a step, by prompt", drafted)
    assert _text(drafted) == _text(plain)
    predicted = _run(capsys, *_GENERATE, "--prompt", text, "--speculate", "2", "--draft", "mtp")
    assert re.search(r"drafts accepted +[\d.]+% of 2 a step, by mtp", predicted)
    assert _text(predicted) == _text(plain)
    assert _text(plain).startswith(text)


def test_generate_in_batches(capsys, shallow):
    two = _run(capsys, *_GENERATE, "--prompt", "one", "another")
    assert "text 0" in two
    assert "another" in two.split("text 1")[1]
    random = _run(capsys, *_GENERATE, "--prompt-tokens", "12", "--batch", "3")
    assert re.search(r"rows, prompt tokens, new +3, 12, 27", random)


def test_generate_from_a_checkpoint(capsys):
    expected = np.load(_CHECKPOINT / "expected.npz")
    prompt = bytes(expected["tokens"][0].astype(np.uint8)).decode()  # tokens below 40 are ASCII
    out = _run(
        capsys, "generate", "--checkpoint", str(_CHECKPOINT), "--prompt", prompt, "--dtype",
        "float32", "--max-new-tokens", "4",
    )  # fmt: skip
    assert str(_CHECKPOINT) in out.replace("\n", "")
    assert "cache" in out


def test_costs_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = _run(capsys, "costs", "deepseek_v3", "--device", "h200", "--context", "131072")
    rows = {line.split()[0]: line for line in reversed(out.splitlines()) if line.strip()}
    assert rows["absorbed"].split()[1] == "8.6"
    assert rows["mha"].split()[1] == "488.0!"  # GiB: more than an H200 has
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "…" not in _run(capsys, "costs", "deepseek_v3", "--context", "1000000", "--batch", "8")


def test_explain(capsys):
    out = _run(capsys, "explain", "deepseek_v3", "--queries", "256", "--length", "8192")
    assert "expanded (absorbed up to 167 tokens" in out
    assert "xla: runs" in out
