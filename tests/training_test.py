"""Training: the corpus is deterministic, the loss falls, and seeds decide everything."""

import jax
import numpy as np
import pytest
from common import PLAIN
from flax import nnx

from mla_jax import training
from mla_jax.models import Decoder, DecoderConfig


def _model(seed=0):
    config = DecoderConfig(attention=PLAIN.replace(hidden_size=32), intermediate_size=48)
    return Decoder(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def text():
    return training.standard_library_text(0.2)


def test_text_is_python_and_the_same_every_time(text):
    assert text.dtype == np.uint8
    assert len(text) == 200_000
    assert b"\nimport " in text.tobytes()
    np.testing.assert_array_equal(text, training.standard_library_text(0.2))


def test_loss_falls_and_held_out_follows(text):
    model = _model()
    before = training.held_out_loss(model, text, length=32, batch=4)
    losses = list(
        training.train(model, text[: -4 * 33], steps=20, batch=4, length=32, learning_rate=1e-2)
    )
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < losses[0] - 1.5
    assert training.held_out_loss(model, text, length=32, batch=4) < before - 1.5


def test_seed_decides_the_parameters(text):
    def trained(seed):
        model = _model()
        losses = list(training.train(model, text, steps=2, batch=2, length=16, seed=seed))
        return losses, jax.tree.leaves(nnx.state(model, nnx.Param))

    losses, params = trained(1)
    again, same = trained(1)
    assert losses == again
    for left, right in zip(params, same, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_training_that_was_interrupted_goes_on_where_it_was(text):
    options = {"steps": 5, "batch": 2, "length": 16, "seed": 3}
    whole = list(training.train(_model(), text, **options))
    model = _model()
    begun = training.train(model, text, **options)
    losses = [next(begun) for _ in range(3)]
    begun.close()  # the model has the parameters of three steps now
    kept = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    rest = training.train(model, text, **options, done=3)
    losses.append(next(rest))  # of those parameters, on the fourth window
    rest.close()
    assert losses == whole[:4]
    # Adam's first step moves by the rate, to which weight decay adds a twentieth of a parameter
    # that is about 1; after three of five steps the cosine is half way from 6e-3 down to 6e-4.
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), kept, nnx.state(model, nnx.Param))
    assert 0.99 < max(jax.tree.leaves(moved)) / 3.3e-3 < 1.1
    assert len(list(training.train(model, text, **options, done=3))) == 2
    assert list(training.train(model, text, **options, done=5)) == []


def test_loss_is_of_the_next_byte_in_bits():
    tokens = np.arange(3, 9)[None]
    knows_next = lambda given: 50.0 * jax.nn.one_hot(given + 1, 256)  # noqa: E731
    knows_nothing = lambda given: jax.numpy.zeros((*given.shape, 256))  # noqa: E731
    assert float(training.loss_bits(knows_next, tokens)) < 1e-6
    assert abs(float(training.loss_bits(knows_nothing, tokens)) - 8) < 1e-5


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match="text has 9 bytes"):
        next(training.train(_model(), np.zeros(9, np.uint8), steps=1, length=16))
