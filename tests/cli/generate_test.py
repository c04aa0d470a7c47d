"""`generate`: texts on standard output, prompts from anywhere, and errors before any work."""

import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest

from mla_jax import generation
from mla_jax.cli.options import Generate
from mla_jax.models import DecoderConfig

RANDOM = ("generate", "--preset", "tiny", "--random-weights", "--dtype", "float32",
          "--max-new-tokens", "9")  # fmt: skip


@pytest.fixture
def shallow(monkeypatch):
    """`tiny` with one layer and no experts, which compiles sooner."""
    config = DecoderConfig.from_preset("tiny")
    attention = config.attention.replace(num_hidden_layers=1, q_lora_rank=None)
    config = DecoderConfig(attention=attention, vocab_size=256, num_nextn_predict_layers=1)
    monkeypatch.setattr(DecoderConfig, "from_preset", lambda name: config)


@pytest.fixture
def weightless(monkeypatch):
    """No weights are made or read."""
    monkeypatch.setattr("mla_jax.cli.generate.load", lambda *arguments: None)


@pytest.fixture
def generated(monkeypatch, weightless):
    """What `generation.generate` is called with; it answers at once."""
    calls = []

    def generate(model, prompts, request, *, tokenizer, on_text, sharding):
        calls.append((prompts, request))
        rows = len(prompts) * request.samples
        for row in range(rows):
            for text in "Hi":
                if on_text is not None:
                    on_text(row, text)
        return generation.Result(
            [[72, 105]] * rows, first_token_seconds=0.1, decode_seconds=0.5, compile_seconds=2.0,
            new_tokens=2 * rows, steps=1, cache_bytes=4096, texts=["Hi"] * rows,
            accepted=0.5 if request.speculate else None,
            logprobs=[[-0.5, -1.0]] * rows if request.logprobs else None,
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


@pytest.mark.parametrize(("count", "draft"), [(3, "prompt"), (2, "mtp")])
def test_accepted_drafts_are_told(run, generated, count, draft):
    err = run(*RANDOM, "--prompt", "one", "--speculate", count, "--draft", draft).err
    assert re.search(rf"drafts accepted +50(\.0)?% of {count} a step, by {draft}", err)


@pytest.mark.slow
def test_drafts_change_no_text(run, shallow):
    text = "abcabcab"
    plain = run(*RANDOM, "--prompt", text)
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


def test_flags_are_the_fields_of_a_request():
    flags = {field.name for field in dataclasses.fields(Generate)}
    asked, drawn = generation.Request, generation.Sampling
    fields = {field.name for field in (*dataclasses.fields(asked), *dataclasses.fields(drawn))}
    assert fields - {"sampling"} <= flags


def test_flags_become_a_request(run, generated):
    run(*RANDOM, "--prompt", "one", "--temperature", 0.5, "--top-k", 3, "--top-p", 0.25, "--seed",
        7, "--speculate", 2, "--draft", "mtp", "--block", 4, "--max-length", 128, "--min-p", 0.1,
        "--repetition-penalty", 1.5, "--stop-strings", "a", "b", "--stop-tokens", 5, "--pages", 4,
        "--samples", 2, "--logprobs")  # fmt: skip
    [(prompts, request)] = generated
    assert prompts == [[111, 110, 101]]
    assert request == generation.Request(
        max_new_tokens=9, max_length=128, seed=7, speculate=2, draft="mtp", block=4,
        stop_strings=("a", "b"), stop_tokens=(5,), pages=4, samples=2, logprobs=True,
        sampling=generation.Sampling(
            temperature=0.5, top_k=3, top_p=0.25, min_p=0.1, repetition_penalty=1.5
        ),
    )  # fmt: skip


def test_a_checkpoint_says_how_it_writes_unless_flags_do(run, generated, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    asks = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 8]}
    (tmp_path / "generation_config.json").write_text(json.dumps(asks))
    command = ("generate", "--checkpoint", tmp_path, "--prompt", "\n", "--max-new-tokens", 2)
    run(*command)
    run(*command, "--temperature", 0, "--stop-tokens", 9)
    (_, own), (_, flagged) = generated
    assert (own.sampling.temperature, own.sampling.top_p) == (0.6, 0.9)
    assert {7, 8} <= set(own.stop_tokens)
    assert (flagged.sampling.temperature, flagged.sampling.top_p) == (0.0, 0.9)
    assert {7, 8, 9} <= set(flagged.stop_tokens)


def test_from_a_checkpoint(run, saved):
    expected = np.load(saved / "expected.npz")
    prompt = bytes(expected["tokens"][0].astype(np.uint8)).decode()  # tokens below 40 are ASCII
    out, err = run(
        "generate",
        "--checkpoint",
        saved,
        "--prompt",
        prompt,
        "--dtype",
        "float32",
        "--max-new-tokens",
        4,
    )
    tokens = expected["greedy"][0, :4].astype(np.uint8)
    assert out == prompt + bytes(tokens).decode() + "\n"
    assert err.startswith(str(saved))


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
    def generate(model, prompts, request, *, tokenizer, on_text, sharding):
        on_text(0, "H")
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
        (("--prompt", "~"), r"prompt 0 has token 126: the model's tokens are 0 to 39"),
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
def test_wrong_flags_are_known_before_weights_are_read(fails, saved, monkeypatch, args, message):
    monkeypatch.setattr("mla_jax.checkpoint.load_decoder", None)
    assert re.search(message, fails("generate", "--checkpoint", saved, *args))


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
