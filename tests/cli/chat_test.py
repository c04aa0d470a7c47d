"""`chat`: turns, streaming, the cache between turns, and errors before any work."""

import io
import json

import pytest
from common import PLAIN, drawn
from flax import nnx

from mla_jax import generation
from mla_jax.checkpoint import load_decoder
from mla_jax.cli.chat import Conversation
from mla_jax.generation import prefill
from mla_jax.models import Decoder, DecoderConfig

FLOAT = ("--dtype", "float32", "--max-new-tokens", "5")


@pytest.fixture
def said(monkeypatch):
    """Makes standard input hold these lines."""

    def said(*lines):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return said


def shared(one, other):
    """How many tokens two texts begin with alike."""
    return next(n for n in range(len(one), -1, -1) if one[:n] == other[:n])


def check_turns(model, tokenizer, request, messages, contents, turns, cut=()):
    """Checks turns against whole conversations, each by a cache of its own; all the messages."""
    messages, held = list(messages), []
    for number, (turn, content) in enumerate(zip(turns, contents, strict=True)):
        messages.append({"role": "user", "content": content})
        prompt = tokenizer.chat(messages)
        result = generation.generate(model, [prompt], request, tokenizer=tokenizer)
        messages.append({"role": "assistant", "content": result.texts[0]})
        known = 0 if number in cut else shared(held, prompt)
        held = prompt + result.tokens[0][:-1]
        assert turn == (len(prompt) - known, len(held))
    return messages


def test_only_new_tokens_are_prefilled_and_the_answers_are_those_of_whole_conversations(
    run, said, saved
):
    contents = (' "', "&'", "!")
    said(contents[0], "", *contents[1:])
    args = ("--checkpoint", saved, "--system", "  ", *FLOAT, "--json", "--quiet")
    found = json.loads(run("chat", *args).out)
    model = load_decoder(saved, dtype="float32")
    tokenizer = generation.Tokenizer.from_checkpoint(saved)
    defaults = generation.GenerationDefaults.from_checkpoint(saved)
    request = generation.Request(max_new_tokens=5, max_length=128, stop_tokens=defaults.stop_tokens)
    turns = [(turn["prefilled"], turn["held"]) for turn in found["turns"]]
    system = [{"role": "system", "content": "  "}]
    messages = check_turns(model, tokenizer, request, system, contents, turns)
    assert found["messages"] == messages
    assert all(prefilled < held / 2 for prefilled, held in turns[1:])


def test_answers_are_on_standard_output(run, said, saved):
    said("!", "$")
    out, err = run("chat", "--checkpoint", saved, *FLOAT)
    said("!", "$")
    messages = json.loads(run("chat", "--checkpoint", saved, *FLOAT, "--json").out)["messages"]
    assert out == f"{messages[1]['content']}\n{messages[3]['content']}\n"
    assert err.count("tokens prefilled") == 2


def test_a_conversation_that_outgrows_the_cache_is_prefilled_anew(saved, monkeypatch):
    monkeypatch.setattr(prefill, "WIDTHS", (128,))  # another would be two more programs
    config = DecoderConfig(attention=PLAIN, vocab_size=128, intermediate_size=20)
    model = drawn(lambda: Decoder(config, precision="highest", rngs=nnx.Rngs(0)))
    tokenizer = generation.Tokenizer.from_checkpoint(saved)
    request = generation.Request(max_new_tokens=5)
    whole = generation.Request(max_new_tokens=5, max_length=1024)  # as the last turn's
    contents = ("a" * 100, "b" * 100, "c" * 100)
    talk, turns = Conversation(model, tokenizer, request, [], room=1), []
    for content in contents:
        _, prefilled = talk.say(content, None)
        turns.append((prefilled, talk.held))
    messages = check_turns(model, tokenizer, whole, [], contents, turns, cut=(2,))
    assert talk.messages == messages


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give the model, as --checkpoint"),
        (("--checkpoint", "/nonexistent/model"), "/nonexistent/model is neither"),
        (("--checkpoint", "saved", "--top-p", "0"), "top_p=0"),
        (("--checkpoint", "saved", "--stop-strings", ""), "stop_strings has an empty string"),
        (("--checkpoint", "bare"), "has no chat template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_flags(fails, saved, tmp_path, args, message):
    for file in saved.iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).symlink_to(file)
    places = {"saved": saved, "bare": tmp_path}
    assert message in fails("chat", *(places.get(arg, arg) for arg in args))
