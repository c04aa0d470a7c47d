"""`generate`: texts on standard output, prompts from anywhere, and errors before any work."""

import io
import json
import pathlib
import re

import numpy as np
import pytest

from mla_jax import generation
from mla_jax.checkpoint import load_decoder
from mla_jax.models import DecoderConfig

CHECKPOINT = pathlib.Path(__file__).parents[1] / "testdata" / "decoders" / "deepseek_v3"
SAVED = ("generate", "--checkpoint", str(CHECKPOINT))
RANDOM = ("generate", "--preset", "tiny", "--random-weights", "--dtype", "float32",
          "--max-new-tokens", "9")  # fmt: skip


@pytest.fixture
def shallow(monkeypatch):
    """`tiny` with one layer, which compiles sooner."""
    config = DecoderConfig.from_preset("tiny")
    config = config.replace(attention=config.attention.replace(num_hidden_layers=1))
    monkeypatch.setattr(DecoderConfig, "from_preset", lambda name: config)


@pytest.fixture
def bytes_are_words(monkeypatch):
    """The checkpoint of the tests has 40 words and no tokenizer."""
    made = generation.Tokenizer.bytes()
    monkeypatch.setattr(generation.Tokenizer, "from_checkpoint", lambda path: made)


@pytest.fixture
def weightless(monkeypatch):
    """No weights are made or read."""
    monkeypatch.setattr("mla_jax.cli.generate._model", lambda *arguments: None)


@pytest.fixture
def generated(monkeypatch, weightless):
    """What `generation.generate` is called with; it answers at once."""
    calls = []

    def generate(model, prompts, **options):
        calls.append((prompts, options))
        for row, _ in enumerate(prompts):
            for token in (72, 105):
                if options["on_tokens"] is not None:
                    options["on_tokens"](row, [token])
        return generation.Result(
            [[72, 105]] * len(prompts), first_token_seconds=0.1, decode_seconds=0.5,
            compile_seconds=2.0, new_tokens=2 * len(prompts), steps=1, cache_bytes=4096,
        )  # fmt: skip

    monkeypatch.setattr(generation, "generate", generate)
    return calls


@pytest.fixture
def standard_input(monkeypatch):
    """Makes standard input hold these bytes."""

    def standard_input(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return standard_input


def test_one_text_is_streamed(run, shallow):
    text = "abcabcab"
    plain = run(*RANDOM, "--prompt", text)
    assert plain.err.startswith("tiny, random weights: ")
    for line in ("parameters, ", "time to first token", "tokens/s", "ms/step", "KiB", "xla: runs"):
        assert line in plain.err
    assert plain.out.startswith(text)
    assert plain.out.endswith("\n")
    drafted = run(*RANDOM, "--prompt", text, "--speculate", 3, "--block", 2)
    assert re.search(r"drafts accepted +[\d.]+% of 3 a step, by prompt", drafted.err)
    predicted = run(*RANDOM, "--prompt", text, "--speculate", 2, "--draft", "mtp")
    assert re.search(r"drafts accepted +[\d.]+% of 2 a step, by mtp", predicted.err)
    assert plain.out == drafted.out == predicted.out


def test_quiet(run, generated):
    assert run(*RANDOM, "--prompt", "one", "--quiet") == ("oneHi\n", "")


def test_a_batch(run, generated):
    out, err = run(*RANDOM, "--prompt", "one", "another")
    assert out == "oneHi\nanotherHi\n"
    assert "text 0\n" in err
    assert "text 1\n" in err
    assert run(*RANDOM, "--prompt", "one", "--batch", 2, "--quiet").out == "oneHi\noneHi\n"


def test_random_tokens_have_no_text(run, generated):
    out, err = run(*RANDOM, "--prompt-tokens", 12, "--batch", 3)
    assert out == ""
    assert re.search(r"rows, prompt tokens, new +3, 12, 6", err)


def test_json(run, generated):
    out, err = run(*RANDOM, "--prompt", "one", "--json", "--quiet")
    found = json.loads(out)
    assert err == ""
    row = {"prompt": "one", "prompt_tokens": 3, "tokens": [72, 105], "text": "Hi"}
    assert found.pop("rows") == [row]
    assert found == {
        "new_tokens": 2, "steps": 1, "accepted": None, "first_token_seconds": 0.1,
        "decode_seconds": 0.5, "compile_seconds": 2.0, "tokens_per_second": 2.0,
        "cache_bytes": 4096,
    }  # fmt: skip
    found = json.loads(run(*RANDOM, "--prompt-tokens", 4, "--batch", 2, "--json").out)
    assert [(row["prompt"], row["prompt_tokens"]) for row in found["rows"]] == [(None, 4)] * 2


def test_flags_become_arguments(run, generated):
    run(*RANDOM, "--prompt", "one", "--temperature", 0.5, "--top-k", 3, "--top-p", 0.25, "--seed",
        7, "--speculate", 2, "--draft", "mtp", "--block", 4, "--max-length", 128)  # fmt: skip
    [(prompts, options)] = generated
    assert prompts == [[111, 110, 101]]
    assert callable(options.pop("on_tokens"))
    assert options == {
        "max_new_tokens": 9, "max_length": 128, "temperature": 0.5, "top_k": 3, "top_p": 0.25,
        "seed": 7, "speculate": 2, "draft": "mtp", "block": 4, "stop_tokens": (),
    }  # fmt: skip


def test_from_a_checkpoint(run, bytes_are_words):
    expected = np.load(CHECKPOINT / "expected.npz")
    prompt = bytes(expected["tokens"][0].astype(np.uint8)).decode()  # tokens below 40 are ASCII
    out, err = run(*SAVED, "--prompt", prompt, "--dtype", "float32", "--max-new-tokens", 4)
    model = load_decoder(CHECKPOINT, dtype="float32")
    tokens = generation.generate(model, [list(prompt.encode())], max_new_tokens=4).tokens[0]
    assert out == prompt + bytes(tokens).decode() + "\n"
    assert err.startswith(str(CHECKPOINT))


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"once\n", "once"), (b"once", "once"), (b"once\r\n", "once"), (b"a\n\n", "a\n"),
        ("\u00e9 \U0001f600".encode(), "\u00e9 \U0001f600"), (b"  a ", "  a "),
    ],
)  # fmt: skip
def test_prompts_from_standard_input_and_files(
    run, generated, standard_input, tmp_path, content, prompt
):
    standard_input(content)
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert run(*RANDOM, "--prompt", "-").out == prompt + "Hi\n"
    assert run(*RANDOM, "--prompt-file", file).out == prompt + "Hi\n"
    standard_input(content)
    run(*RANDOM, "--prompt", "a", "-", "--prompt-file", file, file)
    encoded = list(prompt.encode())
    assert generated[-1][0] == [[97], encoded, encoded, encoded]


def test_a_prompt_that_cannot_be_read(fails, standard_input, tmp_path):
    standard_input(b"\xff\xfe")
    assert "standard input is not UTF-8 text" in fails(*RANDOM, "--prompt", "-")
    standard_input(b"\n")
    assert "standard input holds no text" in fails(*RANDOM, "--prompt", "-")
    assert "may be given once" in fails(*RANDOM, "--prompt", "-", "-")
    missing = tmp_path / "missing.txt"
    assert fails(*RANDOM, "--prompt-file", missing) == (
        f"mla-jax: {missing}: No such file or directory"
    )
    assert fails(*RANDOM, "--prompt-file", tmp_path).endswith("Is a directory")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FloatingPointError("row 0, step 3: the logits are not finite."),
         "mla-jax: row 0, step 3: the logits are not finite."),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmany more lines"),
         "mla-jax: RuntimeError: RESOURCE_EXHAUSTED: out of memory"),
        (ValueError("no such thing"), "mla-jax: no such thing"),
        (KeyError("layer"), "mla-jax: KeyError: 'layer'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_an_error_in_the_run_is_one_line(fails, weightless, monkeypatch, error, line):
    def generate(model, prompts, on_tokens, **options):
        on_tokens(0, [72])
        raise error

    monkeypatch.setattr(generation, "generate", generate)
    assert fails(*RANDOM, "--prompt", "a", code=1) == line


@pytest.mark.parametrize(
    ("args", "message"),
    [
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
            r"implementation='pallas_gpu'",
        ),
        (
            (
                "--prompt",
                "\n",
                "--max-new-tokens",
                "9",
                "--implementation",
                "latent_attention=cudnn",
            ),
            r"implementation='cudnn' does not serve latent_attention",
        ),
        (("--prompt", ""), r"none may be empty"),
        (("--random-weights", "--prompt", "a"), r"--random-weights is for a --preset"),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_flags_are_known_before_weights_are_read(
    fails, bytes_are_words, monkeypatch, args, message
):
    monkeypatch.setattr("mla_jax.checkpoint.load_decoder", None)
    assert re.search(message, fails(*SAVED, *args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give one of --checkpoint FOLDER and --preset"),
        (("--preset", "tiny"), "add --random-weights"),
        (("--preset", "axk1", "--random-weights", "--prompt", "a"), "'axk1' describes the atten"),
        (("--checkpoint", "/nonexistent/model", "--prompt", "a"), "/nonexistent/model is neither"),
        (("--preset", "tiny", "--random-weights"), "give --prompt TEXT"),
    ],
)
def test_wrong_models(fails, args, message):
    assert message in fails("generate", *args)


def test_a_checkpoint_without_a_tokenizer(fails):
    assert "has no tokenizer" in fails(*SAVED, "--prompt", "a")
