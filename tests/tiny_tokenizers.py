"""Small tokenizers of every kind that a checkpoint may have, made by the libraries themselves."""

import base64
import functools
import io
import json
import pathlib
import string
import textwrap

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<s>", "</s>", "<|im_end|>", "<unk>"]
TEXT = pathlib.Path(textwrap.__file__).read_text() + pathlib.Path(string.__file__).read_text()
TEXT += "naïve café, 你好世界。你好吗? Привет, мир! 😀👍🏽 e\u0301\n" * 30


def _frame(library, front="<s>"):
    library.post_processor = processors.TemplateProcessing(
        single=f"{front} $A", special_tokens=[(front, library.token_to_id(front))]
    )
    return library


def byte_level() -> tokenizers.Tokenizer:
    """As DeepSeek, GLM and LongCat have it; one added token is no special one."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([TEXT], trainer)
    library.add_tokens(["<思考>"])
    return _frame(library)


@functools.cache
def _merges() -> tuple[dict, list]:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=90, show_progress=False)
    library.train_from_iterator([TEXT], trainer)
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama-2 and MiniCPM3 have it: sentencepiece's pieces, and bytes for what has none."""
    pieces, merges = _merges()
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.add_special_tokens(SPECIAL)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return _frame(library)


def metaspace() -> tokenizers.Tokenizer:
    """Unigram pieces and nothing for other characters."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    return library


def word_piece() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    library.train_from_iterator([TEXT], trainer)
    return library


def suffixes() -> tokenizers.Tokenizer:
    """A piece that ends a word says so, as in GPT's first vocabulary."""
    library = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    return library


def more_than_byte_level() -> tokenizers.Tokenizer:
    """Bytes of which a further decoder makes something: tokens without a text of their own."""
    library = byte_level()
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("~", "≈")])
    return library


def words() -> tokenizers.Tokenizer:
    """Without a decoder: the library puts spaces between tokens."""
    names = [*SPECIAL, "hello", "world", "?"]
    vocabulary = {name: number for number, name in enumerate(names)}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(SPECIAL)
    return library


@functools.cache
def ranks() -> dict[bytes, int]:
    """A tiktoken vocabulary: bytes, then what merges make of them."""
    own = {bytes([byte]): byte for byte in range(256)}
    longer = ["th", "the", " the", "an", "and", " and", "in", "12", "123", "1234", "  ", "    "]
    longer += ["你好", "你好世界", "世界", "n'", "n't", "文a"]
    for word in longer:
        raw = word.encode()
        for end in range(2, len(raw) + 1):
            own.setdefault(raw[:end], len(own))
    return own


def write_tiktoken(folder: pathlib.Path, **settings) -> None:
    """A folder such as Kimi-K2's: tiktoken.model, and tokenizer_config.json for its names."""
    lines = [base64.b64encode(word) + b" %d" % rank for word, rank in ranks().items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    size = len(ranks())
    names = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"]
    added = {
        str(size + number): {"content": name, "special": True} for number, name in enumerate(names)
    }
    added[str(size + 20)] = {"content": "<think>", "special": False}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", config | settings)


def encoding() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "tiny", pat_str=r"\s*\S+|\s+", mergeable_ranks=ranks(),
        special_tokens={"<s>": len(ranks()), "<|im_end|>": len(ranks()) + 1},
    )  # fmt: skip


@functools.cache
def sentencepiece_model(byte_fallback: bool = True, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=600,
        model_type="bpe", byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=2,
        character_coverage=0.98, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def sentencepiece_processor(**options) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(**options))


def write_json(file: pathlib.Path, value) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
