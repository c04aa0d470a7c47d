"""Where the demo's models are: the only place that knows how a folder holds one."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from mla_jax.config import MLAConfig
from mla_jax.models import Decoder, DecoderConfig
from mla_jax.ops.dispatch import Implementation

_TRAINING = "training.json"


def save(model: Decoder, folder: str | os.PathLike) -> None:
    """Writes a model to `folder`: its parameters by orbax, its config as JSON."""
    folder = pathlib.Path(folder).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        parameters = nnx.to_pure_dict(nnx.state(model))
        checkpointer.save(folder / "parameters", parameters, force=True)
    _write_json(folder / "config.json", dataclasses.asdict(model.config))


def load(folder: str | os.PathLike, implementation: Implementation = None) -> Decoder:
    """Reads a model that `save` wrote.

    Raises:
        FileNotFoundError: no model in `folder`.
    """
    folder = pathlib.Path(folder).absolute()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model that `mla-jax demo --save` wrote.")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = DecoderConfig(**fields | {"attention": MLAConfig(**fields["attention"])})
    model = Decoder(config, implementation=implementation, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "parameters", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(model, state)
    return model


def save_training(folder: str | os.PathLike, *, done: int, steps: int) -> None:
    """Notes beside a saved model how many of its training's steps are done."""
    _write_json(pathlib.Path(folder) / _TRAINING, {"done": done, "steps": steps})


def load_training(folder: str | os.PathLike) -> tuple[int, int]:
    """Steps done and steps meant of a saved model's training; (0, 0) where nothing is noted."""
    file = pathlib.Path(folder) / _TRAINING
    if not file.is_file():
        return 0, 0
    noted = json.loads(file.read_text(encoding="utf-8"))
    return noted["done"], noted["steps"]


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes beside and renames: a process that ends meanwhile leaves the old file."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(value, indent=2), encoding="utf-8")
    beside.replace(file)
