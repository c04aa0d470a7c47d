"""Tokenizers out of the files of a checkpoint's folder."""

import sys

import numpy as np
import pytest
import tiny_tokenizers as tiny
import tokenizers

from mla_jax.generation import GenerationDefaults, Tokenizer

BOS, EOS, END = (tiny.SPECIAL.index(name) for name in ("<s>", "</s>", "<|im_end|>"))


def write(folder, library=None, **files):
    """A checkpoint's folder with tokenizer.json and other JSON files."""
    if library is not None:
        library.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        tiny.write_json(folder / f"{name}.json", value)
    return folder


def read(folder, library=None, **files):
    return Tokenizer.from_checkpoint(write(folder, library, **files))


class TestFolders:
    def test_no_vocabulary_is_an_error_that_says_so(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer: none of tokenizer\.json, tik"):
            read(tmp_path, config={"vocab_size": 32000})
        with pytest.raises(FileNotFoundError, match="no tokenizer"):
            Tokenizer.from_checkpoint(tmp_path, vocab_size=32000)
        write(tmp_path, tekken={})
        with pytest.raises(FileNotFoundError, match=r"tekken\.json is not read"):
            Tokenizer.from_checkpoint(tmp_path)

    @pytest.mark.parametrize("config", [{"vocab_size": 256}, {"text_config": {"vocab_size": 256}}])
    def test_256_words_are_bytes(self, tmp_path, config):
        assert read(tmp_path, config=config).is_bytes
        assert Tokenizer.from_checkpoint(tmp_path, vocab_size=256).is_bytes
        with pytest.raises(FileNotFoundError):
            Tokenizer.from_checkpoint(tmp_path, vocab_size=257)

    def test_a_vocabulary_counts_more_than_256_words(self, tmp_path):
        assert not read(tmp_path, tiny.words(), config={"vocab_size": 256}).is_bytes

    def test_a_file_stands_for_its_folder(self, tmp_path):
        write(tmp_path, tiny.words(), config={"vocab_size": 9})
        own = Tokenizer.from_checkpoint(tmp_path / "config.json")
        assert own.encode(["hello"]) == [[4]]

    @pytest.mark.parametrize("path", ["none/such/folder", "./none", "none"])
    def test_what_is_not_there_is_never_bytes(self, path):
        with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
            Tokenizer.from_checkpoint(path)

    def test_a_repo_id_fetches_the_small_files(self, tmp_path, monkeypatch):
        hub = pytest.importorskip("huggingface_hub")
        write(tmp_path, tiny.words())
        asked = {}

        def snapshot_download(repo, allow_patterns):
            asked[repo] = allow_patterns
            return str(tmp_path)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        assert Tokenizer.from_checkpoint("some/model").encode(["world"]) == [[5]]
        assert asked == {"some/model": ["*.json", "*.model", "*.jinja"]}

    @pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model", "tokenizer.model"])
    def test_a_broken_file_is_named(self, tmp_path, name):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            Tokenizer.from_checkpoint(tmp_path)

    def test_a_tiktoken_file_without_some_byte_is_refused(self, tmp_path):
        (tmp_path / "tiktoken.model").write_bytes(b"QQ== 0\n")
        with pytest.raises(ValueError, match=r"tiktoken\.model cannot be read: .* byte 0"):
            Tokenizer.from_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("name", "module", "extra"),
        [
            ("tokenizer.json", "tokenizers", "generate"),
            ("tiktoken.model", "tiktoken", "tiktoken"),
            ("tokenizer.model", "sentencepiece", "sentencepiece"),
        ],
    )
    def test_a_library_that_is_missing_is_named_with_its_extra(
        self, tmp_path, monkeypatch, name, module, extra
    ):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"needs the {module} library: .*mla-jax\[{extra}\]"):
            Tokenizer.from_checkpoint(tmp_path)


class TestTokenizersLibrary:
    def test_texts_and_back(self, tmp_path):
        own = read(tmp_path, tiny.byte_level())
        [tokens] = own.encode(["hello 你好 <思考>"])
        assert tokens[0] == BOS
        assert own.decode(tokens) == "hello 你好 <思考>"
        assert own.decode(np.array(tokens)) == "hello 你好 <思考>"
        assert own.decode(tokens, skip_special_tokens=False) == "<s>hello 你好 <思考>"
        assert own.decode_batch([tokens, [END], []]) == ["hello 你好 <思考>", "", ""]
        assert own.decode([END, 99999], skip_special_tokens=False) == "<|im_end|>\ufffd"
        assert own.token("<|im_end|>") == END
        assert own.token("nothing") is None

    def test_saved_truncation_and_padding_are_off(self, tmp_path):
        library = tiny.byte_level()
        library.enable_truncation(8)
        library.enable_padding(pad_id=2, length=8)
        texts = ["a longer text, of more than eight tokens", "b"]
        expected = [e.ids for e in tiny.byte_level().encode_batch(texts)]
        assert len(expected[0]) > 8
        assert len(expected[1]) == 2
        assert read(tmp_path, library).encode(texts) == expected
        assert Tokenizer(library).encode(texts) == expected

    @pytest.mark.parametrize("framed", [True, False])
    @pytest.mark.parametrize("add", [None, True, False])
    def test_bos_once(self, tmp_path, framed, add):
        """Whether the library adds it, the config asks for it, or the text has it."""
        library = tiny.byte_level()
        if not framed:
            library.post_processor = tokenizers.processors.ByteLevel()
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        own = read(tmp_path, library, tokenizer_config=config | {"add_bos_token": add})
        plain = own.encode(["hello"], special_tokens=False)[0]
        assert BOS not in plain
        begins = framed if add is None else add
        assert own.encode(["hello", "<s>hello", ""]) == [
            [BOS] * begins + plain, [BOS, *plain], [BOS] * begins,
        ]  # fmt: skip
        assert own.encode(["<s>hello"], special_tokens=False) == [[BOS, *plain]]

    def test_eos_where_it_is_asked_for(self, tmp_path):
        config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
        own = read(tmp_path, tiny.byte_level(), tokenizer_config=config | {"add_eos_token": True})
        [[*plain, end], again] = own.encode(["hello", "hello</s>"])
        assert end == EOS
        assert again == [*plain, EOS]
        assert own.encode(["hello"], special_tokens=False) == [plain]

    def test_longer_frames_stay(self, tmp_path):
        """As GLM's [gMASK]<sop> does."""
        library = tiny.byte_level()
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> <|im_end|> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS),
                                                              ("<|im_end|>", END)],
        )  # fmt: skip
        own = read(tmp_path, library)
        plain = own.encode(["hello"], special_tokens=False)[0]
        whole = [BOS, END, *plain, EOS]
        assert own.encode(["hello"]) == [whole] == [library.encode("hello").ids]
        assert own.encode(["<s><|im_end|>hello", "<|im_end|>hello</s>"]) == [whole, whole]

    @pytest.mark.parametrize(
        ("config", "begins"),
        [
            ({"tokenizer_class": "LlamaTokenizerFast"}, True),
            ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
            ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
            ({}, False),
        ],
    )
    def test_a_class_of_transformers_adds_bos_by_default(self, tmp_path, config, begins):
        library = tiny.byte_level()
        library.post_processor = tokenizers.processors.ByteLevel()
        own = read(tmp_path, library, tokenizer_config={"bos_token": "<s>"} | config)
        assert (own.encode(["a"])[0][0] == BOS) == begins

    def test_tokens_that_only_the_config_adds(self, tmp_path):
        library = tiny.byte_level()
        size = library.get_vocab_size()
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added = {
            str(size): {"content": "<|tool|>", "special": True} | flags,
            str(size + 1): {"content": "<think>", "special": False} | flags,
        }
        own = read(tmp_path, library, tokenizer_config={"added_tokens_decoder": added})
        [tokens] = own.encode(["<|tool|><think>"], special_tokens=False)
        assert tokens == [size, size + 1]
        assert own.decode(tokens) == "<think>"
        write(tmp_path, added_tokens={"<more>": size + 2})
        assert Tokenizer.from_checkpoint(tmp_path).token("<more>") == size + 2
        added[str(size + 7)] = {"content": "<late>"}
        with pytest.raises(ValueError, match=f"'<late>' is {size + 7}, in tokenizer.json it is"):
            read(tmp_path, tokenizer_config={"added_tokens_decoder": added})

    @pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
    def test_named_tokens_are_special(self, tmp_path, file):
        names = tokenizers.models.WordLevel({"a": 0, "<end>": 1, "<user>": 2, "?": 3}, "?")
        library = tokenizers.Tokenizer(names)
        library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        assert read(tmp_path, library).encode(["a<end>"]) == [[0, 3, 3, 3]]
        named = {"eos_token": {"content": "<end>"}, "additional_special_tokens": ["<user>", "<no>"]}
        own = read(tmp_path, **{file: named})
        assert own.encode(["<user>a<end>"]) == [[2, 0, 1]]
        assert own.decode([2, 0, 1]) == "a"
        assert own.token("<no>") is None  # a token that the model does not have is not made

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"add_bos_token": True}, "add_bos_token is true, and bos_token=None is no token"),
            ({"add_bos_token": True, "bos_token": "<no>"}, "bos_token='<no>' is no token"),
            ({"add_eos_token": "yes"}, "add_eos_token='yes' must be true or false"),
            ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder has 'x'"),
            ({"added_tokens_decoder": {"1": "y"}}, "added_tokens_decoder has '1'"),
            ({"chat_template": 5}, "chat_template must be a text"),
        ],
    )
    def test_impossible_settings(self, tmp_path, config, message):
        with pytest.raises(ValueError, match=r"tokenizer_config\.json.*" + message):
            read(tmp_path, tiny.byte_level(), tokenizer_config=config)


class TestTiktoken:
    def test_ids_as_kimi_counts_them(self, tmp_path):
        tiny.write_tiktoken(tmp_path)
        own = Tokenizer.from_checkpoint(tmp_path)
        size = len(tiny.ranks())
        assert own.encode(["[BOS]<|im_end|><think>"]) == [[size, size + 2, size + 20]]
        assert own.encode([f"<|reserved_token_{size + 257}|>"]) == [[size + 257]]
        assert own.encode(["hi"]) == [[104, 105]]  # no BOS
        assert own.decode([size, 104, size + 20, size + 2]) == "h<think>"
        assert own.decode([size, 104], skip_special_tokens=False) == "[BOS]h"
        assert own.decode([size + 258]) == "\ufffd"
        assert own.token("<|im_end|>") == size + 2
        assert own.token("no such word") is None

    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            ("文a", ["文", "a"]),  # Han characters are apart from others
            ("1234", ["123", "4"]),  # digits by three
            ("don't", ["d", "o", "n't"]),  # a contraction stays in its word
            (" the  and", [" the", " ", " and"]),
            ("你好世界", ["你好世界"]),
            ("you\n\n  a", ["y", "o", "u", "\n", "\n", " ", " a"]),
        ],
    )
    def test_the_pattern(self, tmp_path, text, pieces):
        tiny.write_tiktoken(tmp_path)
        own, ranks = Tokenizer.from_checkpoint(tmp_path), tiny.ranks()
        expected = []
        for piece in pieces:
            raw = piece.encode()
            expected += [ranks[raw]] if raw in ranks else list(raw)
        assert own.encode([text]) == [expected]

    @pytest.mark.unchecked
    def test_long_runs(self, tmp_path):
        """A run of 100,000 characters takes tiktoken minutes, and of a million overflows it."""
        tiny.write_tiktoken(tmp_path)
        own = Tokenizer.from_checkpoint(tmp_path)
        text = "thethe" * 10_000 + " " * 60_000 + "end" + "你好" * 200_000
        [tokens] = own.encode([text])
        assert own.decode(tokens) == text
        # The run of 60,000 is cut after 25,000 and 50,000: in the middle of "the" once each.
        cut = own.encode(["thethe" * 10_000])[0]
        assert cut == [
            *own.encode(["thethe" * 4166 + "thet"])[0],
            *own.encode(["he" + "thethe" * 4166 + "th"])[0],
            *own.encode(["e" + "thethe" * 1666 + "the"])[0],
        ]  # fmt: skip

    def test_a_changed_file_is_read_anew(self, tmp_path):
        tiny.write_tiktoken(tmp_path)
        before = Tokenizer.from_checkpoint(tmp_path).encode(["the"])
        lines = (tmp_path / "tiktoken.model").read_bytes().splitlines()
        (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines[:256]))
        assert before == [[tiny.ranks()[b"the"]]]
        assert Tokenizer.from_checkpoint(tmp_path).encode(["the"]) == [list(b"the")]

    def test_an_encoding_as_it_is(self):
        own = Tokenizer(tiny.encoding())
        size = len(tiny.ranks())
        assert own.encode(["the<|im_end|>"]) == [[tiny.ranks()[b"the"], size + 1]]
        assert own.decode([size, 104, size + 1]) == "h"


class TestSentencePiece:
    def write(self, folder, config=None, **options):
        (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model(**options))
        if config is not None:
            tiny.write_json(folder / "tokenizer_config.json", config)
        return Tokenizer.from_checkpoint(folder)

    def test_texts_and_back(self, tmp_path):
        own, library = self.write(tmp_path), tiny.sentencepiece_processor()
        text = "def wrap(self, text): 龘 你好"
        plain = library.encode(text)
        assert own.encode([text]) == [[library.bos_id(), *plain]]
        assert own.encode(["<s>" + text], special_tokens=True) == [[library.bos_id(), *plain]]
        assert own.encode([text], special_tokens=False) == [plain]
        assert own.decode([library.bos_id(), *plain, library.eos_id()]) == text
        assert own.decode([1, *plain[:2]], skip_special_tokens=False).startswith("<s>")
        assert own.decode([library.get_piece_size()]) == "\ufffd"
        assert Tokenizer(library).encode([text]) == own.encode([text])

    def test_added_tokens_and_no_bos(self, tmp_path):
        size = tiny.sentencepiece_processor().get_piece_size()
        added = {
            "1": {"content": "<s>", "special": True},
            str(size): {"content": "<|im_end|>", "special": True},
            str(size + 1): {"content": "<think>", "special": False},
        }
        own = self.write(tmp_path, {"add_bos_token": False, "added_tokens_decoder": added})
        text = "text<|im_end|><think>"
        [tokens] = own.encode([text])
        assert tokens[-2:] == [size, size + 1]
        assert own.decode(tokens) == "text<think>"
        assert own.decode(tokens, skip_special_tokens=False) == text

    @pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": False}])
    @pytest.mark.parametrize("legacy", [True, False])
    def test_the_space_after_a_special_token(self, tmp_path, legacy, options):
        own = self.write(tmp_path, {"legacy": legacy, "add_bos_token": False}, **options)
        library = tiny.sentencepiece_processor(**options)
        pieces = lambda tokens: "".join(map(library.id_to_piece, tokens))  # noqa: E731
        plain = library.encode("text")
        assert pieces(plain) == "▁text"
        first, second, third = own.encode(["text</s>text", "</s>text", "</s> text"])
        assert first[: len(plain) + 1] == [*plain, library.eos_id()]
        assert pieces(first[len(plain) + 1 :]) == ("▁text" if legacy else "text")
        assert second == first[len(plain) :]
        doubled = legacy and options  # the text's own space, and the one that a text begins with
        assert pieces(third[1:]) == ("▁▁text" if doubled else "▁text")


def test_bytes_on_demand():
    for own in (Tokenizer.bytes(), Tokenizer()):
        assert own.is_bytes
        assert own.encode(["aé", "b"]) == [[97, 195, 169], [98]]
        assert own.decode([97, 195, 169, 300]) == "aé\ufffd"


def test_another_object_is_refused():
    with pytest.raises(TypeError, match="tokenizer is a str: it must be"):
        Tokenizer("tokenizer.json")


@pytest.mark.parametrize(
    "kind", [tiny.byte_level, tiny.encoding, tiny.sentencepiece_processor, None]
)
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "texts='one text': it must be a list of texts"),
        (7, "texts=7"),
        (["a", 7], r"texts\[1\]=7"),
        (["a\ud800"], r"texts\[0\] has a lone surrogate, '\\ud800', at character 1"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(kind, texts, message):
    own = Tokenizer(kind and kind())
    with pytest.raises(ValueError, match=message):
        own.encode(texts)
    assert own.encode([]) == []


class TestDefaults:
    def test_both_files(self, tmp_path):
        config = {"eos_token_id": 7, "text_config": {"eos_token_id": [8, 7]}, "vocab_size": 9}
        generation = {
            "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.1,
            "repetition_penalty": 1.1, "eos_token_id": [3, 8],
        }  # fmt: skip
        write(tmp_path, config=config, generation_config=generation)
        assert GenerationDefaults.from_checkpoint(tmp_path) == GenerationDefaults(
            0.6, 40, 0.95, 0.1, 1.1, stop_tokens=(7, 8, 3)
        )

    def test_no_files(self, tmp_path):
        assert GenerationDefaults.from_checkpoint(tmp_path) == GenerationDefaults()

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1}, {}),
            ({"do_sample": False, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
            ({"do_sample": True}, {"temperature": 1.0}),
            ({"temperature": 0.6, "top_k": 0, "top_p": 1.0}, {"temperature": 0.6}),
            ({"top_p": 0.9}, {}),
            ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1.0}),
            ({"repetition_penalty": 1.0, "eos_token_id": None}, {}),
        ],
    )
    def test_what_counts(self, given, expected):
        assert GenerationDefaults.of({}, given) == GenerationDefaults(**expected)

    @pytest.mark.parametrize(
        ("config", "generation", "message"),
        [
            ({"eos_token_id": "7"}, {}, r"config\.json: eos_token_id='7'"),
            ({"text_config": {"eos_token_id": [True]}}, {}, r"text_config: eos_token_id=\[True\]"),
            ({}, {"eos_token_id": -1}, r"generation_config\.json: eos_token_id=-1"),
            ({}, {"temperature": "hot"}, r"generation_config\.json: temperature=hot"),
            ({}, {"temperature": 1.0, "top_p": 2}, r"generation_config\.json: top_p=2"),
            ({}, {"repetition_penalty": 0}, r"generation_config\.json: repetition_penalty=0"),
        ],
    )
    def test_impossible_values(self, config, generation, message):
        with pytest.raises(ValueError, match=message):
            GenerationDefaults.of(config, generation)
