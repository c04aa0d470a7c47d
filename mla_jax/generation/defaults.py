"""How a checkpoint's own files say that it writes."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from mla_jax.families import read_json
from mla_jax.generation.files import checkpoint_folder
from mla_jax.generation.sampling import check_sampling

_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json asks for, and the tokens that end a text.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: of `sample`.
        stop_tokens: those of config.json, beside its `text_config` too, and those of
            generation_config.json.

    >>> GenerationDefaults.of({"eos_token_id": 1}, {"eos_token_id": [2, 1], "temperature": 0.6})
    ... # doctest: +NORMALIZE_WHITESPACE
    GenerationDefaults(temperature=0.6, top_k=None, top_p=None, min_p=None,
                       repetition_penalty=None, stop_tokens=(1, 2))
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_tokens: tuple[int, ...] = ()

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "GenerationDefaults":
        """Reads them from a checkpoint's folder, a file in it, or a repo id.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a value that cannot be; the message names key and file.
        """
        folder = checkpoint_folder(path)
        files = [folder / "config.json", folder / "generation_config.json"]
        config, generation = (read_json(file) if file.is_file() else {} for file in files)
        return cls.of(config, generation, where=str(folder))

    @classmethod
    def of(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any], where: str = ""
    ) -> "GenerationDefaults":
        """Takes them from the two files' objects.

        do_sample says whether the temperature and what follows it count. Where it is left out, they
        do if there is a temperature. A value that changes nothing, such as top_k 0, becomes None.

        Args:
            config: config.json.
            generation: generation_config.json.
            where: what to call their folder in an error.

        Raises:
            ValueError: a value that cannot be; the message names key and file.
        """
        file = str(pathlib.Path(where, "generation_config.json"))
        given = {key: value for key, value in generation.items() if value is not None}
        values: dict[str, Any] = {}
        if given.get("repetition_penalty", 1.0) != 1:
            values["repetition_penalty"] = given["repetition_penalty"]
        if given.get("do_sample", "temperature" in given):
            values["temperature"] = given.get("temperature", 1.0)
            for key, nothing in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                if given.get(key, nothing) != nothing:
                    values[key] = given[key]
        config_file = str(pathlib.Path(where, "config.json"))
        stops = _tokens(config, config_file)
        for key in _LANGUAGE_MODELS:
            if isinstance(inner := config.get(key), Mapping):
                stops += _tokens(inner, f"{config_file}, {key}")
        stops += _tokens(generation, file)
        found = cls(**values, stop_tokens=tuple(dict.fromkeys(stops)))
        try:
            check_sampling(None, jax.random.key(0), **found.sampling)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `sample`.

        >>> GenerationDefaults(temperature=0.6, top_p=0.95).sampling
        ... # doctest: +NORMALIZE_WHITESPACE
        {'temperature': 0.6, 'top_k': None, 'top_p': 0.95, 'min_p': None,
         'repetition_penalty': None}
        """
        fields = dataclasses.asdict(self)
        del fields["stop_tokens"]
        return fields


def _tokens(config: Mapping[str, Any], where: str) -> list[int]:
    """The ids under eos_token_id: none, one or a list."""
    value = config.get("eos_token_id")
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"{where}: eos_token_id={value!r} must be a token or a list of them.")
    return tokens.copy()
