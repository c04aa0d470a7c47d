"""`demo`: seeds, saved models, and a training that is interrupted and goes on."""

import json
import re
import signal
import threading

import jax
import numpy as np
import pytest
from common import drawn
from flax import nnx

from mla_jax import cli, training
from mla_jax.cli import demo, saved
from mla_jax.config import MLAConfig
from mla_jax.models import Decoder, DecoderConfig

QUICK = ("demo", "--batch", "2", "--tokens", "6", "--prompt", "def ", "--temperature", "2")
STEPS = ("--steps", "3")  # the number is known when a step is compiled


@pytest.fixture
def shallow(monkeypatch):
    """`tiny` with one layer, which compiles sooner."""
    config = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1, q_lora_rank=None)
    monkeypatch.setattr(MLAConfig, "from_preset", lambda name: config)
    return config


def test_same_seed_same_text_also_when_loaded(run, tmp_path, shallow):
    folder = str(tmp_path / "model")
    first = run(*QUICK, *STEPS, "--seed", 3, "--save", folder)
    assert first.out.startswith("def ")
    assert run(*QUICK, *STEPS, "--seed", 3, "--quiet") == (first.out, "")
    loaded = run(*QUICK, "--seed", 3, "--load", folder)
    assert loaded.out == first.out
    assert "held-out loss" in first.err
    assert "held-out loss" not in loaded.err  # it was trained to its end
    for line in ("parameters", f"saved to {folder}", "time to first token", "tokens/s",
                 "320 bytes per token", "xla: runs"):  # fmt: skip
        assert line in first.err
    assert "\x1b" not in first.err  # not a terminal: no control codes
    assert max(map(len, first.err.splitlines())) < 120


def test_json(run, shallow):
    out, err = run(*QUICK, *STEPS, "--json", "--quiet")  # the first has rate 0
    found = json.loads(out)
    assert err == ""
    assert (found["prompt"], found["steps"], found["cache_bytes_per_token"]) == ("def ", 3, 320)
    assert found["parameters"] > 1e5
    assert 0 < found["held_out_loss_after"] < found["held_out_loss_before"]


def test_save_and_load_give_identical_logits(tmp_path, rng):
    attention = MLAConfig.from_preset("tiny").replace(
        num_hidden_layers=1,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    )
    config = DecoderConfig(attention=attention, vocab_size=40)
    model = drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    saved.save(model, tmp_path / "model")
    loaded = saved.load(tmp_path / "model")
    tokens = rng.integers(0, 40, (2, 9), np.int32)
    logits = jax.jit(lambda models, tokens: [model(tokens) for model in models])
    assert loaded.config.replace(model_type=model.config.model_type) == model.config
    np.testing.assert_array_equal(*logits([loaded, model], tokens))
    assert saved.load_training(tmp_path / "model") == (0, 0)  # as older folders are
    saved.save_training(tmp_path / "model", done=3, steps=7)
    assert saved.load_training(tmp_path / "model") == (3, 7)


def test_what_was_saved_is_a_checkpoint_that_generate_reads(run, tmp_path, shallow):
    first = run(*QUICK, *STEPS, "--save", tmp_path / "model", "--temperature", 0)
    flags = ("--dtype", "float32", "--max-new-tokens", 6, "--prompt", "def ")
    again = run("generate", "--checkpoint", tmp_path / "model", *flags)
    assert again.out == first.out


def test_an_interrupted_training_is_kept_and_goes_on(run, fails, tmp_path, shallow, monkeypatch):
    folder = tmp_path / "model"
    train = training.train

    def interrupted(model, text, **options):
        for step, loss in enumerate(train(model, text, **options)):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            yield loss

    # Closed with the generator that it wraps, as a plain `for` would close it.
    monkeypatch.setattr(training, "train", interrupted)
    line = fails(*QUICK, *STEPS, "--save", folder, code=130)
    assert line == (
        f"mla-jax: interrupted after 2 of 3 steps, which {folder} keeps: --load {folder} goes on."
    )
    assert saved.load_training(folder) == (2, 3)
    kept = saved.load(folder)
    fresh = Decoder(kept.config, rngs=nnx.Rngs(0))
    same = jax.tree.map(np.array_equal, nnx.state(kept, nnx.Param), nnx.state(fresh, nnx.Param))
    assert not any(jax.tree.leaves(same))
    monkeypatch.setattr(training, "train", train)
    gone_on = run(*QUICK, "--load", folder, "--save", folder)
    assert "the training goes on after step 2 of 3" in gone_on.err
    assert "step 3: loss" in gone_on.err
    assert saved.load_training(folder) == (3, 3)
    assert "step" not in run(*QUICK, "--load", folder).err.split("\n")[0]


def test_without_a_folder_a_signal_interrupts_at_once(fails, shallow, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    assert fails(*QUICK, "--steps", 5, code=130) == "mla-jax: interrupted"


def test_before_the_first_step_there_is_nothing_to_keep(fails, tmp_path, shallow, monkeypatch):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        yield 0.0

    monkeypatch.setattr(training, "train", interrupted)
    assert fails(*QUICK, "--steps", 5, "--save", tmp_path, code=143) == "mla-jax: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_means_it_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with demo._stoppable(True) as stop:
        stop.trained = 1
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(cli.Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with demo._stoppable(True) as stop:
            stop.trained = 1
            signal.raise_signal(signal.SIGINT)
            assert stop.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_cannot_take_signals_and_does_without():
    failed = []

    def inside():
        try:
            with demo._stoppable(True) as stop:
                assert stop.received is None
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert not failed


def test_a_model_that_does_not_fit_is_refused(fails, monkeypatch):
    """As many parameters as DeepSeek-V3's layers have, in fewer of them."""
    wide = MLAConfig.from_preset("deepseek_v3").replace(num_hidden_layers=8, hidden_size=2**16)
    monkeypatch.setattr(MLAConfig, "from_preset", lambda name: wide)
    assert re.search("takes about [0-9,]+ GiB", fails("demo", "--preset", "deepseek_v3"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--preset", "nothing"), "unknown preset 'nothing'"),
        (("--implementation", "cuda"), "implementation='cuda' is not known"),
        (("--load", "/nonexistent/model"), "/nonexistent/model holds no model"),
        (("--tokens", "0"), "at least 1"),
        (("--batch", "0"), "at least 1"),
        (("--steps", "-1"), "at least 0"),
        (("--prompt", ""), "not be empty"),
        (("--tokens", "100000"), "tiny has 1024: ask for fewer"),
        (("--temperature", "-1"), r"temperature=-1\.0: it must be at least 0"),
        (("--save", "/dev/null/model"), "/dev/null/model: Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_flags(fails, args, message):
    assert re.search(message, fails("demo", *args))
