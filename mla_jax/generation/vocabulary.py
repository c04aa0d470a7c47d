"""Between texts and tokens: UTF-8 bytes, or the tokenizers, tiktoken and sentencepiece libraries.

A `Vocabulary` knows nothing of the tokens that frame a text, except those that its own file says.
It tells two kinds of tokens apart. Most stand for the same bytes wherever they are: all of a
byte-level vocabulary, and the byte tokens by which others spell what they have no piece for. The
text of the rest depends on what is before them: sentencepiece's "▁a" is "a" at the start of a text
and " a" elsewhere.
"""

import abc
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

UNKNOWN = "\ufffd".encode()  # what a token that the vocabulary does not have is shown as
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

# tiktoken's regular expressions overflow the stack on longer texts, and its merges take quadratic
# time in longer runs. Kimi's tokenization_kimi.py splits there, so that these are also its tokens.
_TIKTOKEN_CHARACTERS = 400_000
_TIKTOKEN_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_TIKTOKEN_RUN + 1},}}|\S{{{_TIKTOKEN_RUN + 1},}}")


class Vocabulary(abc.ABC):
    """What texts and tokens are to each other.

    Attributes:
        special: tokens that are no text, such as the one that ends a message.
        frame: tokens that the vocabulary's own file puts before and after a text.
        named: special tokens that the file itself names, by their roles: "bos_token".
    """

    special: frozenset[int] = frozenset()
    named: Mapping[str, str] = types.MappingProxyType({})
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of every text, its special tokens by their names, without the frame."""

    @abc.abstractmethod
    def token(self, text: str) -> int | None:
        """The token that a text is as a whole; None where there is none."""

    @abc.abstractmethod
    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token always stands for; None where its text depends on others."""

    def text_of(self, tokens: list[int]) -> str:
        """The text of tokens without `bytes_of`, the first of them at the start of a text."""
        raise NotImplementedError(f"all tokens of {type(self).__name__} stand for bytes.")


class Bytes(Vocabulary):
    """A text's UTF-8 bytes are its tokens."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def token(self, text: str) -> int | None:
        return None

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else UNKNOWN


class Tokenizers(Vocabulary):
    """A tokenizer of the `tokenizers` library.

    Args:
        library: a `tokenizers.Tokenizer`; its truncation and padding are switched off.
        special: further special tokens, by name; those that it does not have are left out.
    """

    def __init__(self, library: Any, special: Iterable[str] = ()):
        library.no_truncation()
        library.no_padding()
        self._library = library
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        named = [name for name in special if library.token_to_id(name) is not None]
        # The library splits a text at its added tokens only.
        library.add_special_tokens([name for name in named if name not in known])
        self.special = frozenset(
            token for token, added in library.get_added_tokens_decoder().items() if added.special
        ) | {library.token_to_id(name) for name in named}
        self.frame = self._own_frame()
        kinds = _decoder_kinds(library.decoder)
        # Fuse joins what ByteLevel has joined already.
        self._byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._byte_fallback = "ByteFallback" in kinds
        self._known: dict[int, bytes | None] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def token(self, text: str) -> int | None:
        return self._library.token_to_id(text)

    def bytes_of(self, token: int) -> bytes | None:
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def text_of(self, tokens: list[int]) -> str:
        return self._library.decode(tokens, skip_special_tokens=False)

    def _bytes_of(self, token: int) -> bytes | None:
        name = self._library.id_to_token(token)
        if name is None:
            return UNKNOWN
        if self._byte_level:
            if all(character in _BYTES for character in name):
                return bytes(_BYTES[character] for character in name)
            return name.encode()
        byte = _BYTE_TOKEN.fullmatch(name) if self._byte_fallback else None
        return None if byte is None else bytes([int(byte[1], 16)])

    def _own_frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts around a text, from one that it puts no copy of there."""
        for token in range(self._library.get_vocab_size()):
            text = self._library.id_to_token(token)
            inside = self._library.encode(text, add_special_tokens=False).ids if text else []
            whole, size = self._library.encode(text).ids if inside else [], len(inside)
            places = [at for at in range(len(whole)) if whole[at : at + size] == inside]
            if len(places) == 1:
                return tuple(whole[: places[0]]), tuple(whole[places[0] + size :])
        return (), ()


class Tiktoken(Vocabulary):
    """An encoding of the `tiktoken` library.

    Args:
        library: a `tiktoken.Encoding`.
        special: which of its special tokens are no text, by name; None is all.
    """

    def __init__(self, library: Any, special: Iterable[str] | None = None):
        self._library = library
        names = library.special_tokens_set
        chosen = names if special is None else names.intersection(special)
        self.special = frozenset(map(library.encode_single_token, chosen))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [
                token
                for part in _parts(text)
                for token in self._library.encode(part, allowed_special="all")
            ]
            for text in texts
        ]

    def token(self, text: str) -> int | None:
        try:
            return self._library.encode_single_token(text)
        except KeyError:
            return None

    def bytes_of(self, token: int) -> bytes:
        try:
            return self._library.decode_single_token_bytes(token)
        except KeyError:
            return UNKNOWN


class SentencePiece(Vocabulary):
    """A model of the `sentencepiece` library.

    Args:
        library: a `sentencepiece.SentencePieceProcessor`.
        added: tokens beside the model's, by name.
        special: further special tokens, by name; those that it does not have are left out.
        legacy: whether what follows a special token begins with a space as a text does, as
            transformers had it at first.
    """

    def __init__(
        self,
        library: Any,
        added: Mapping[str, int] | None = None,
        special: Iterable[str] = (),
        legacy: bool = True,
    ):
        self._library, self._size = library, library.get_piece_size()
        own = {
            library.id_to_piece(token): token
            for token in range(self._size)
            if library.is_control(token) or library.is_unknown(token)
        }
        self._added = own | dict(added or {})
        named = [token for name in special if (token := self.token(name)) is not None]
        self.special = frozenset(own.values()).union(named)
        self._names = {token: name for name, token in self._added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        ends = {"bos_token": library.bos_id(), "eos_token": library.eos_id()}
        self.named = {role: library.id_to_piece(id) for role, id in ends.items() if id >= 0}
        begin = ends["bos_token"]
        self.frame = ((begin,) if begin >= 0 else (), ())  # as LlamaTokenizer has it
        self._bare: Any = None
        if not legacy:
            # Protocol buffers merge what is appended: here normalizer_spec.add_dummy_prefix=false.
            proto = library.serialized_model_proto() + b"\x1a\x02\x18\x00"
            self._bare = type(library)(model_proto=proto)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def token(self, text: str) -> int | None:
        if text in self._added:
            return self._added[text]
        token = self._library.piece_to_id(text)
        return None if self._library.is_unknown(token) else token

    def bytes_of(self, token: int) -> bytes | None:
        if token in self._names:
            return self._names[token].encode()
        if token >= self._size:
            return UNKNOWN
        if not self._library.is_byte(token):
            return None
        return bytes([int(self._library.id_to_piece(token)[1:-1], 16)])

    def text_of(self, tokens: list[int]) -> str:
        return self._library.decode(tokens)

    def _encode(self, text: str) -> list[int]:
        if self._bare is not None and text:
            text = "▁" + text.replace("▁", " ")
        found: list[int] = []
        for at, part in enumerate(self._split.split(text)):
            if at % 2:
                found.append(self._added[part])
            elif self._bare is None:
                found += self._library.encode(part)
            elif part != "▁" or at:  # a text that begins with a special token has no prefix
                found += self._encode_bare(part)
        return found

    def _encode_bare(self, part: str) -> list[int]:
        if not part.startswith((" ", "▁")):
            return self._bare.encode(part)
        # The library strips a leading space, but not one after other characters.
        before = self._library.id_to_piece(self._library.unk_id())
        return self._bare.encode(before + part)[len(self._bare.encode(before)) :]


def wrap(library: Any) -> Vocabulary:
    """The vocabulary of an object of one of the three libraries; None is bytes.

    A vocabulary is returned as it is.

    Raises:
        TypeError: an object of another kind.
    """
    if library is None:
        return Bytes()
    if isinstance(library, Vocabulary):
        return library
    kinds = {"tokenizers": Tokenizers, "tiktoken": Tiktoken, "sentencepiece": SentencePiece}
    for base in type(library).__mro__:
        module = base.__module__.partition(".")[0]
        if module in kinds:
            return kinds[module](library)
    raise TypeError(
        f"tokenizer is a {type(library).__name__}: it must be a tokenizers.Tokenizer, a "
        "tiktoken.Encoding, a sentencepiece.SentencePieceProcessor, or None for bytes."
    )


def _printable_bytes() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes, as GPT-2 began it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _printable_bytes()


def _decoder_kinds(decoder: Any) -> set[str]:
    """Types of a decoder of the tokenizers library and of all that are inside it."""
    kinds: set[str] = set()
    todo = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while todo:
        one = todo.pop()
        todo += one.get("decoders", [])
        kinds.add(one["type"])
    return kinds - {"Sequence"}


def _parts(text: str) -> Iterator[str]:
    """A text in pieces that tiktoken can take."""
    for start in range(0, len(text), _TIKTOKEN_CHARACTERS):
        piece = text[start : start + _TIKTOKEN_CHARACTERS]
        cuts = [0]
        for run in _LONG_RUN.finditer(piece):
            cuts += range(run.start() + _TIKTOKEN_RUN, run.end(), _TIKTOKEN_RUN)
        for begin, end in zip(cuts, [*cuts[1:], len(piece)], strict=True):
            yield piece[begin:end]
