"""The block that the device works on while the host reads the one before, and its compilation."""

import functools

import pytest
from common import drawn
from flax import nnx

from mla_jax.generation import generate, loop
from mla_jax.generation.tokenizer import Tokenizer
from mla_jax.models import Decoder, DecoderConfig

PROMPTS = [[1, 2, 3], [4]]


@functools.cache
def model():
    config = DecoderConfig.from_preset("tiny")
    config = config.replace(attention=config.attention.replace(num_hidden_layers=1))
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def written(monkeypatch, **options):
    """The tokens of two rows, and "block" and "tokens" in the order in which they came."""
    events, run = [], loop.block_for("cpu")

    def counted(*arguments, **static):
        events.append("block")
        return run(*arguments, **static)

    monkeypatch.setattr(loop, "block_for", lambda platform: counted)
    on_tokens = lambda row, tokens: events.append("tokens") if row == 0 else None  # noqa: E731
    return generate(model(), PROMPTS, block=2, on_tokens=on_tokens, **options), events


def test_the_device_has_its_next_block_before_the_host_reads_the_last(monkeypatch):
    result, events = written(monkeypatch, max_new_tokens=8)
    first, middle, last = ["tokens", "block"], ["block", "tokens"], ["tokens"]
    assert events == [*first, *middle * 3, *last]  # 1 + 4 x 2 tokens, the last block half used
    assert [len(tokens) for tokens in result.tokens] == [8, 8]
    assert result.steps == 7


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_no_block_is_begun_that_has_nothing_to_do(monkeypatch, tokens, blocks):
    assert written(monkeypatch, max_new_tokens=tokens)[1].count("block") == blocks


def test_rows_that_end_early_are_as_they_were(monkeypatch):
    """A stop token ends both rows: the block that is on its way then writes nothing."""
    whole = written(monkeypatch, max_new_tokens=20)[0].tokens
    stops = [row[4] for row in whole]
    result, _ = written(monkeypatch, max_new_tokens=20, stop_tokens=stops)
    expected = [row[: min(map(row.index, filter(row.__contains__, stops))) + 1] for row in whole]
    assert result.tokens == expected
    assert result.steps == max(map(len, expected)) - 1
    lengths = [len(prompt) + len(row) - 1 for prompt, row in zip(PROMPTS, expected, strict=True)]
    assert result.cache.length.tolist() == lengths


def test_a_stop_string_is_looked_for_before_the_next_block(monkeypatch):
    stops = {"stop_strings": ["no such text"], "tokenizer": Tokenizer.bytes()}
    _, events = written(monkeypatch, max_new_tokens=6, **stops)
    assert events == ["tokens", "block", "tokens", "block", "tokens", "block", "tokens"]


def test_on_gpus_the_loop_is_part_of_a_graph(monkeypatch):
    block_for, kinds = loop.block_for.__wrapped__, {}
    monkeypatch.setattr(
        loop, "_jit_block", lambda _, compiler_options: kinds.update(compiler_options) or print
    )
    assert block_for("cpu") is block_for("tpu") is loop.run_block
    assert block_for("gpu") is not loop.run_block
    assert [value.split(",").count("WHILE") for value in kinds.values()] == [1]
    monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(kinds))}=FUSION")  # the user's word counts
    assert block_for("gpu") is loop.run_block
