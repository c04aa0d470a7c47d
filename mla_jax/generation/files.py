"""The files of a checkpoint that say what its tokens are: its vocabulary, and what is beside it."""

import base64
import dataclasses
import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mla_jax.families import read_json, resolve
from mla_jax.generation import chat
from mla_jax.generation.vocabulary import SentencePiece, Tiktoken, Tokenizers, Vocabulary

FILES = ("tokenizer.json", "tiktoken.model", "tokenizer.model")  # one of them has the vocabulary

# The one pattern of tokenization_kimi.py and tokenization_moonshot.py, for all models whose
# vocabulary is a tiktoken.model: Moonlight, Kimi-VL, Kimi-Linear, Kimi-K2 and later.
_KIMI_PATTERN = "|".join((
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip
_KIMI_SPECIAL = 258  # tokens after the vocabulary that its code names, or calls reserved

_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Classes of transformers that put a BOS before a text unless the file says otherwise.
_BEGIN_BY_DEFAULT = ("LlamaTokenizer", "LlamaTokenizerFast")


def checkpoint_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint's small files: of a path, or of a repo id on the hub.

    Raises:
        FileNotFoundError: neither is there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint_folder(folder) == pathlib.Path(folder)
    True
    """
    found = resolve(path, weights=False)
    return found if found.is_dir() else found.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a checkpoint's files say beside the vocabulary.

    Attributes:
        where: the file that most of it is from.
        named: the special tokens by their roles, as templates know them: "bos_token".
        added: fields of a `tokenizers.AddedToken` by id, of tokens that the vocabulary may lack.
        add_bos, add_eos: whether a text gets them; None is as the vocabulary has it.
        legacy: see `vocabulary.SentencePiece`.
        templates: of chats, by name.
    """

    where: str = ""
    named: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = True
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Settings":
        files = {
            name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
            for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
        }
        config, where = files["tokenizer_config"], folder / "tokenizer_config.json"
        named: dict[str, Any] = {}
        for source in (files["special_tokens_map"], config):
            for role, value in source.items():
                if role.endswith("_token") and (text := _content(value)) is not None:
                    named[role] = text
                if role in ("additional_special_tokens", "extra_special_tokens"):
                    values = list(value.values()) if isinstance(value, Mapping) else value or []
                    named[role] = [text for one in values if (text := _content(one)) is not None]
        added: dict[int, Mapping[str, Any]] = {}
        for name, token in files["added_tokens"].items():
            if not isinstance(token, int):
                raise ValueError(f"{folder / 'added_tokens.json'}: {name!r} has no id: {token!r}.")
            added[token] = {"content": name, "normalized": False}
        for token, value in (config.get("added_tokens_decoder") or {}).items():
            if (
                not token.isdecimal()
                or not isinstance(value, Mapping)
                or ((text := _content(value)) is None)
            ):
                raise ValueError(f"{where}: added_tokens_decoder has {token!r}: {value!r:.80}.")
            flags = {flag: value[flag] for flag in _ADDED_FLAGS if flag in value}
            added[int(token)] = {"content": text} | flags
        by_default = config.get("tokenizer_class") in _BEGIN_BY_DEFAULT and "bos_token" in named
        begins = True if by_default else None
        return cls(
            str(where), named, added, _flag(config, "add_bos_token", where, begins),
            _flag(config, "add_eos_token", where, None),
            _flag(config, "legacy", where, None) is not False,
            chat.read_templates(folder, config),
        )  # fmt: skip

    @property
    def special(self) -> set[str]:
        """Names of all special tokens."""
        lists = [value if isinstance(value, list) else [value] for value in self.named.values()]
        flagged = [token["content"] for token in self.added.values() if token.get("special")]
        return {name for names in lists for name in names}.union(flagged)


def read_vocabulary(folder: pathlib.Path, settings: Settings) -> Vocabulary | None:
    """The vocabulary of the first of `FILES` that is in a folder; None where none is.

    Raises:
        ImportError: the library that reads it is not installed; the message names the extra.
        ValueError: it cannot be read, or contradicts the settings.
    """
    for name in FILES:
        if (folder / name).is_file():
            return _READERS[name](folder / name, settings)
    return None


def _read_tokenizers(file: pathlib.Path, settings: Settings) -> Vocabulary:
    tokenizers = _library("tokenizers", file, "generate")
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file} cannot be read: {error}") from error
    for token, fields in sorted(settings.added.items()):
        name = fields["content"]
        have = library.token_to_id(name)
        if have is None:
            library.add_tokens([tokenizers.AddedToken(**fields)])
            have = library.token_to_id(name)
        if have != token:
            raise ValueError(
                f"{settings.where}: the added token {name!r} is {token}, in {file.name} it is "
                f"{have}."
            )
    return Tokenizers(library, settings.special)


def _library(name: str, file: pathlib.Path, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{file} needs the {name} library: pip install "mla-jax[{extra}]".'
        ) from error


def _read_tiktoken(file: pathlib.Path, settings: Settings) -> Vocabulary:
    tiktoken = _library("tiktoken", file, "tiktoken")
    # tiktoken's own loader would keep a copy by the file's path, and use it when the file changed.
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(word): int(rank) for word, rank in lines}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    size = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{file} cannot be read: it has no token for the byte {missing[0]}.")
    named = {token: own["content"] for token, own in settings.added.items() if token >= size}
    reserved = {token: f"<|reserved_token_{token}|>" for token in range(size, size + _KIMI_SPECIAL)}
    special = {name: token for token, name in (reserved | named).items()}
    library = tiktoken.Encoding(
        file.name, pat_str=_KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    return Tiktoken(library, settings.special)


def _read_sentencepiece(file: pathlib.Path, settings: Settings) -> Vocabulary:
    sentencepiece = _library("sentencepiece", file, "sentencepiece")
    try:
        library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    added = {own["content"]: token for token, own in settings.added.items()}
    return SentencePiece(library, added, settings.special, settings.legacy)


_READERS = {
    "tokenizer.json": _read_tokenizers,
    "tiktoken.model": _read_tiktoken,
    "tokenizer.model": _read_sentencepiece,
}


def _content(value: Any) -> str | None:
    """A token's text, which files write as it is or as an object's content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _flag(config: Mapping[str, Any], key: str, where: pathlib.Path, default: bool | None):
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {key}={value!r} must be true or false.")
    return default if value is None else value
