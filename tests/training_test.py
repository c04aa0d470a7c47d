"""Training: the corpus is deterministic, the loss falls, and seeds decide everything."""

import jax
import numpy as np
import pytest
from common import PLAIN, drawn
from flax import nnx

from mla_jax import training
from mla_jax.models import Decoder, DecoderConfig

OPTIONS = {"steps": 20, "batch": 4, "length": 32, "learning_rate": 1e-2, "seed": 3}
HELD_OUT = {"batch": 4, "length": 32}


def _model():
    config = DecoderConfig(attention=PLAIN.replace(hidden_size=32), intermediate_size=48)
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def text():
    return training.standard_library_text(0.2)


def test_text_is_python_and_the_same_every_time(text):
    assert text.dtype == np.uint8
    assert len(text) == 200_000
    assert b"\nimport " in text.tobytes()
    np.testing.assert_array_equal(text, training.standard_library_text(0.2))


@pytest.fixture(scope="module")
def trained(text):
    """A model and its losses; a few of another length or rate would be another program."""
    model = _model()
    return model, list(training.train(model, text[: -4 * 33], **OPTIONS))


def test_loss_falls_and_held_out_follows(text, trained):
    model, losses = trained
    before = training.held_out_loss(_model(), text, **HELD_OUT)
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < losses[0] - 1.5
    assert training.held_out_loss(model, text, **HELD_OUT) < before - 1.5


def test_seed_decides_the_parameters(text, trained):
    again = _model()
    assert list(training.train(again, text[: -4 * 33], **OPTIONS)) == trained[1]
    params = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (trained[0], again))
    for left, right in zip(*params, strict=True):
        np.testing.assert_array_equal(left, right)
    other = training.train(_model(), text[: -4 * 33], **OPTIONS | {"seed": 4})
    assert next(other) != trained[1][0]


def test_a_training_that_was_interrupted_goes_on_where_it_was(text, trained):
    text = text[: -4 * 33]
    model = _model()
    begun = training.train(model, text, **OPTIONS)
    losses = [next(begun) for _ in range(11)]
    begun.close()  # the model has the parameters of eleven steps now
    kept = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    rest = training.train(model, text, **OPTIONS, done=11)
    losses.append(next(rest))  # of those parameters, on the twelfth window
    rest.close()
    assert losses == trained[1][:12]
    # Adam's first step moves by the rate, to which weight decay adds a twentieth of a parameter
    # that is about 1; after two steps of warming up and nine more the cosine is half way from 1e-2
    # down to 1e-3.
    moved = jax.tree.map(
        lambda a, b: np.abs(a - np.asarray(b)).max(), kept, nnx.state(model, nnx.Param)
    )
    assert 0.99 < max(jax.tree.leaves(moved)) / 5.5e-3 < 1.1
    assert len(list(training.train(model, text, **OPTIONS, done=11))) == 9
    assert list(training.train(model, text, **OPTIONS, done=20)) == []


def test_loss_is_of_the_next_byte_in_bits():
    tokens = np.arange(3, 9, dtype=np.int32)[None]
    knows_next = lambda given: 50.0 * jax.nn.one_hot(given + 1, 256)  # noqa: E731
    knows_nothing = lambda given: jax.numpy.zeros((*given.shape, 256))  # noqa: E731
    loss = jax.jit(training.loss_bits, static_argnums=0)
    assert float(loss(knows_next, tokens)) < 1e-6
    assert abs(float(loss(knows_nothing, tokens)) - 8) < 1e-5


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match="text has 9 bytes"):
        next(training.train(_model(), np.zeros(9, np.uint8), steps=1, length=16))
