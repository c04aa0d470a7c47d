"""A checkpoint's tokenizer, out of all of its files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.families import language_model, read_json
from mla_jax.generation import chat, vocabulary
from mla_jax.generation.files import FILES, Settings, checkpoint_folder, read_vocabulary
from mla_jax.generation.stream import TextStream, token_ids
from mla_jax.plain import Ready


class Tokenizer:
    """Texts to tokens and back.

    Args:
        tokenizer: a `tokenizers.Tokenizer` (whose truncation and padding are switched off), a
            `tiktoken.Encoding` or a `sentencepiece.SentencePieceProcessor`. None takes a text's
            UTF-8 bytes as its tokens, as `bytes` does.

    Raises:
        TypeError: another kind of tokenizer.

    >>> tokenizer = Tokenizer.bytes()
    >>> tokenizer.encode(["MLA", "é"])
    [[77, 76, 65], [195, 169]]
    >>> tokenizer.decode([77, 76, 65])
    'MLA'
    """

    def __init__(self, tokenizer: Any = None, settings: Settings | None = None):
        words = vocabulary.wrap(tokenizer)
        settings = Settings() if settings is None else settings
        self._vocabulary, self._templates = words, settings.templates
        self._named = {**words.named, **settings.named}
        front, back = words.frame
        self._front = self._half(front, settings, "bos", settings.add_bos, slice(0))
        self._back = self._half(back, settings, "eos", settings.add_eos, slice(len(back), None))

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """A tokenizer whose tokens are the text's UTF-8 bytes, for models with 256 words."""
        return cls()

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, vocab_size: int | None = None) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint.

        The vocabulary is tokenizer.json, tiktoken.model (with Kimi's pattern) or sentencepiece's
        tokenizer.model, the first that is there. tokenizer_config.json, special_tokens_map.json and
        added_tokens.json say which tokens are added and special and which frame a text; the chat
        template is in the first of them, or in chat_template.jinja or chat_template.json.

        Args:
            path: the checkpoint's folder or a file in it; or a repo id, of which only these files
                are fetched where `huggingface_hub` is installed.
            vocab_size: the model's number of words; None reads it from config.json. With 256 and
                without a vocabulary the tokens are bytes.

        Raises:
            FileNotFoundError: no such folder, or no vocabulary in it.
            ImportError: the library that reads it is not installed; the message names the extra.
            ValueError: a file that cannot be read, or that contradicts another.

        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = pathlib.Path(folder, "config.json").write_text('{"vocab_size": 256}')
        ...     Tokenizer.from_checkpoint(folder).is_bytes
        True
        """
        folder = checkpoint_folder(path)
        settings = Settings.read(folder)
        words = read_vocabulary(folder, settings)
        if words is None:
            if vocab_size is None and (folder / "config.json").is_file():
                vocab_size = language_model(read_json(folder / "config.json")).get("vocab_size")
            if vocab_size != 256:
                tekken = " tekken.json is not read." if (folder / "tekken.json").is_file() else ""
                raise FileNotFoundError(
                    f"{folder} has no tokenizer: none of {', '.join(FILES)}.{tekken} Copy the "
                    "model's own there; Tokenizer.bytes() is for models whose words are bytes."
                )
        return cls(words, settings)

    @property
    def is_bytes(self) -> bool:
        """Whether tokens are bytes."""
        return isinstance(self._vocabulary, vocabulary.Bytes)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` has a template to use."""
        return bool(self._templates)

    def token(self, text: str) -> int | None:
        """The token that a text is as a whole, such as "<|im_end|>"; None where there is none."""
        return self._vocabulary.token(text)

    def encode(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Token ids of every text. Names of special tokens in it become those tokens.

        Args:
            texts: a list of texts.
            special_tokens: whether a text gets the tokens that frame it, such as BOS, as the
                checkpoint's files say. What a text begins with already is not put there again.

        Raises:
            ValueError: not a list of texts, or half a character in one (a lone surrogate).
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"texts={texts!r:.80}: it must be a list of texts, such as ['Once'].")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{row}]={text!r:.80}: it must be a text.")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"texts[{row}] has a lone surrogate, {text[error.start]!r}, at character "
                    f"{error.start}: it is half a character."
                ) from error
        rows = self._vocabulary.encode(texts)
        return [self._framed(row) for row in rows] if special_tokens else rows

    def decode(self, tokens: Ready | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Args:
            tokens: of one row. One that the vocabulary does not have, and bytes that are no UTF-8,
                are shown as U+FFFD.
            skip_special_tokens: whether special tokens are left out; else they are their names.

        Raises:
            ValueError: not a list of tokens.
        """
        words, hidden = self._vocabulary, self._hidden(skip_special_tokens)
        shown = [token for token in token_ids(tokens) if token not in hidden]
        raw = [words.bytes_of(token) for token in shown]
        if all(one is None for one in raw):
            return words.text_of(shown) if shown else ""
        if None in raw:
            stream = TextStream(words)
            return stream.push(shown) + stream.finish()
        return b"".join(one for one in raw if one is not None).decode(errors="replace")

    def decode_batch(
        self, rows: Ready | Sequence[Ready | Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of every row: see `decode`."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream(
        self,
        prompt_tokens: Ready | Sequence[int] = (),
        *,
        stop_strings: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> TextStream:
        """What shows the text of a row's tokens while they come.

        Args:
            prompt_tokens: what they follow. It is not shown; but a word that begins with a space
                after it has none at the start of a text.
            stop_strings: texts of which the first ends the row's text, without being part of it.
            skip_special_tokens: as in `decode`.

        Returns:
            an object with `push(tokens) -> str` and `finish() -> str`. All that they return is what
            `decode` makes of the prompt and the tokens, less what it makes of the prompt.

        Raises:
            ValueError: not a list of tokens, or an empty stop string.
            TypeError: stop strings that are no texts.
        """
        hidden = self._hidden(skip_special_tokens)
        return TextStream(self._vocabulary, token_ids(prompt_tokens), hidden, stop_strings)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Tokens of a conversation, by the model's own template.

        Args:
            messages, tools, add_generation_prompt, variables: see `chat.render`. The template
                also has the tokenizer's own tokens, such as `bos_token`, by name.
            chat_template: another template, or the name of one of the checkpoint's.

        Returns:
            token ids. Nothing is put around the template's text: it has its own BOS.

        Raises:
            ValueError: no template, or one that refuses the messages.
            ImportError: Jinja is not installed.
        """
        template = chat.choose(self._templates, chat_template, tools)
        if isinstance(self._vocabulary, vocabulary.Tiktoken) and tools is not None:
            tools = _sorted_keys(tools)  # as tokenization_kimi.py does
        text = chat.render(
            template, messages, tools=tools, add_generation_prompt=add_generation_prompt,
            **{**self._named, **variables},
        )  # fmt: skip
        return self.encode([text], special_tokens=False)[0]

    def _hidden(self, skip: bool) -> frozenset[int]:
        return self._vocabulary.special if skip else frozenset()

    def _framed(self, row: list[int]) -> list[int]:
        """A text's tokens in their frame, less what they begin and end with already."""
        front, back = self._front, self._back
        while front and tuple(row[: len(front)]) != front:
            front = front[1:]
        while back and tuple(row[-len(back) :]) != back:
            back = back[:-1]
        before, after = len(self._front) - len(front), len(back)
        return [*self._front[:before], *row, *self._back[after:]]

    def _half(
        self,
        frame: tuple[int, ...],
        settings: Settings,
        kind: str,
        wanted: bool | None,
        place: slice,
    ) -> tuple[int, ...]:
        """Half of a frame with the BOS or EOS that the settings ask for, or without it."""
        name = self._named.get(f"{kind}_token")
        token = None if name is None else self._vocabulary.token(name)
        if wanted and token is None:
            raise ValueError(
                f"{settings.where}: add_{kind}_token is true, and {kind}_token={name!r} is no "
                "token of the vocabulary."
            )
        if wanted is False:
            return tuple(one for one in frame if one != token)
        if wanted and token is not None and token not in frame:
            both = list(frame)
            both[place] = [token]
            return tuple(both)
        return frame


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_sorted_keys(one) for one in value]
    return value
