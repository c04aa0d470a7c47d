"""Streams: every character once in any blocks, in linear time; stop strings."""

import functools
import time

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax.generation import StopStrings, Tokenizer

KINDS = {
    "bytes": lambda: None,
    "byte level": tiny.byte_level,
    "byte fallback": tiny.byte_fallback,
    "metaspace": tiny.metaspace,
    "word piece": tiny.word_piece,
    "suffixes": tiny.suffixes,
    "words": tiny.words,
    "more than byte level": tiny.more_than_byte_level,
    "tiktoken": tiny.encoding,
    "sentencepiece": tiny.sentencepiece_processor,
    "sentencepiece, exact": functools.partial(
        tiny.sentencepiece_processor, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    ),
}  # fmt: skip
SIZES = 1000  # ids up to beyond each of the vocabularies
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(" \n▁aé你😀👍🏽\ufffd~`.'x"), max_size=40),
    st.lists(
        st.sampled_from(["def ", "hello", " world", "  ", "<s>", "<|im_end|>", "你好", "."]),
        max_size=12,
    ).map("".join),
)
BLOCKS = st.lists(st.integers(0, 7), max_size=30)


@functools.cache
def library(kind):
    return KINDS[kind]()


@functools.cache
def tokenizer(kind):
    return Tokenizer(library(kind))


def streamed(stream, tokens, blocks) -> str:
    shown, at = "", 0
    for size in [*blocks, len(tokens)]:
        shown += stream.push(tokens[at : at + size])
        at += size
    return shown + stream.finish()


def own_decode(kind, tokens):
    """What the library itself makes of tokens that stand for a text."""
    if kind == "bytes":
        return bytes(tokens).decode(errors="replace")
    return library(kind).decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=TEXTS, blocks=BLOCKS, skip=st.booleans())
def test_a_text_in_any_blocks_is_the_whole_text(kind, text, blocks, skip):
    if kind == "more than byte level":  # there U+FFFD is taken for a character's beginning
        text = text.replace("\ufffd", "?")
    own = tokenizer(kind)
    [tokens] = own.encode([text], special_tokens=False)
    whole = own.decode(tokens, skip_special_tokens=skip)
    assert streamed(own.stream(skip_special_tokens=skip), tokens, blocks) == whole
    special = own.decode(tokens, skip_special_tokens=False) != own.decode(tokens)
    if not special:
        assert whole == own_decode(kind, tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(before=TEXTS, text=TEXTS, blocks=BLOCKS)
def test_a_stream_goes_on_where_its_prompt_ends(kind, before, text, blocks):
    if kind == "more than byte level":  # there U+FFFD is taken for a character's beginning
        before, text = before.replace("\ufffd", "?"), text.replace("\ufffd", "?")
    own = tokenizer(kind)
    prompt, tokens = own.encode([before, text], special_tokens=False)
    shown = own.decode(prompt)
    whole = own.decode([*prompt, *tokens])
    assert shown + streamed(own.stream(prompt), tokens, blocks) == whole


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "more than byte level"])
@settings(max_examples=20, deadline=None)
@given(tokens=st.lists(st.integers(0, SIZES), max_size=40), blocks=BLOCKS)
def test_any_tokens_in_any_blocks_are_what_they_are_at_once(kind, tokens, blocks):
    own = tokenizer(kind)
    assert streamed(own.stream(), tokens, blocks) == own.decode(tokens)
    assert own.decode_batch([tokens, []]) == [own.decode(tokens), ""]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 500), max_size=40))
def test_byte_level_tokens_decode_as_the_library_has_it(tokens):
    own = tokenizer("byte level")
    for skip in (False, True):
        theirs = library("byte level").decode(tokens, skip_special_tokens=skip)
        assert own.decode(tokens, skip_special_tokens=skip) == theirs


@pytest.mark.parametrize(
    "kind", ["bytes", "byte level", "byte fallback", "tiktoken", "sentencepiece"]
)
def test_a_character_is_shown_with_its_last_token(kind):
    own = tokenizer(kind)
    stream = own.stream()
    [tokens] = own.encode(["a龘你 🦕!"], special_tokens=False)
    shown = [stream.push([token]) for token in tokens]
    assert "".join(shown) == "a龘你 🦕!"  # nothing is left for the end
    assert stream.finish() == ""
    assert any(text == "" for text in shown)  # so that some characters were in parts


@pytest.mark.parametrize("kind", ["byte fallback", "metaspace", "sentencepiece"])
def test_a_continuation_keeps_its_space(kind):
    own = tokenizer(kind)
    prompt, more = own.encode(["Once", "upon a time"], special_tokens=False)
    assert own.stream().push(more) == "upon a time"
    assert own.stream(prompt).push(more) == " upon a time"
    # also after tokens that are nothing by themselves
    # also after tokens that are nothing by themselves
    blank = [*prompt, own.token("<s>"), own.token("▁")]
    assert own.decode(blank) == "Once "
    assert own.stream(blank).push(more) == " upon a time"


def test_what_is_no_character_is_shown_at_the_end():
    stream = Tokenizer.bytes().stream()
    assert stream.push([0xE4, 0xBD]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert Tokenizer.bytes().stream([0xE4]).push([0xBD, 0xA0]) == "你"  # begun in the prompt


def test_broken_bytes_after_whole_ones_lose_nothing():
    own = tokenizer("byte fallback")
    tokens = [own.token(f"<0x{byte:02X}>") for byte in [*"你".encode(), 0xFF]]
    tokens += own.encode(["A"], special_tokens=False)[0][-1:]
    stream = own.stream()
    assert [stream.push([token]) for token in tokens] == ["", "", "你", "\ufffd", "A"]
    # half a character is shown before what follows it
    assert own.decode([tokens[0], tokens[-1], tokens[0]]) == "\ufffdA\ufffd"
    stream = own.stream()
    assert (stream.push(tokens[:2]), stream.push(tokens[-1:])) == ("", "\ufffdA")


def test_a_token_without_text_after_half_a_character():
    library = tiny.more_than_byte_level()
    library.add_tokens(["įðŁ"])  # the last byte of U+F10D, and two bytes of an emoji
    own = Tokenizer(library)
    tokens = [own.token("ï"), own.token("Ħ"), own.token("įðŁ"), 9999]
    stream = own.stream()
    assert stream.push(tokens) + stream.finish() == "\uf10d\ufffd\ufffd"


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["text", "garbage", "spaces", "special"])
def test_time_grows_with_the_number_of_tokens(kind, what):
    """A quadratic stream takes 16 times as long for 4 times the tokens; here it takes 4."""
    own = tokenizer(kind)
    [tokens] = own.encode([tiny.TEXT[:4000]], special_tokens=False)
    if what == "garbage":
        byte = own.token("<0xFF>") or own.token("ÿ") or 0xFF
        tokens = [0xFF if kind in ("bytes", "tiktoken") else byte]
    elif what == "spaces":
        tokens = tokens[:5] + 50 * own.encode([" "], special_tokens=False)[0]
    elif what == "special":
        tokens = [own.token("<s>") or 0]
    tokens = (tokens * (8000 // len(tokens) + 1))[:8000]

    def seconds(tokens):
        stream, begin = own.stream(), time.process_time()
        for at in range(0, len(tokens), 16):
            stream.push(tokens[at : at + 16])
        stream.finish()
        return time.process_time() - begin

    short = min(seconds(tokens[:2000]) for _ in range(2))
    assert any(seconds(tokens) < 8 * short + 0.05 for _ in range(2))


@settings(max_examples=250, deadline=None)
@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 5), max_size=20),
)
def test_stop_strings_end_a_text_where_the_first_is_complete(text, stops, cuts):
    # by brute force: the shortest beginning of the text that ends with one
    ends = [
        (end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    first = min((end for end, _ in ends), default=None)
    found = max((stop for end, stop in ends if end == first), key=len, default=None)
    expected = text if found is None else text[: first - len(found)]
    stop, shown, at = StopStrings(stops), "", 0
    for size in [*cuts, len(text)]:
        piece = text[at : at + size]
        shown += stop.push(piece)
        at += size
        assert expected.startswith(shown)  # never a character of the stop string
        if stop.found is None:
            held = text[:at][len(shown) :]
            longest = max(
                (n for s in stops for n in range(len(s)) if text[:at].endswith(s[:n])), default=0
            )
            assert held == text[:at][at - longest if at < len(text) else len(text) - longest :]
    shown += stop.finish()
    assert (shown, stop.found) == (expected, found)
    assert stop.push("ab") == "" or found is None


def test_stop_strings_take_linear_time():
    text = "a" * 40_000
    begin = time.process_time()
    stop = StopStrings(["a" * 2000 + "b", "a" * 999 + "c"])
    shown = "".join(stop.push(character) for character in text)
    assert (len(shown), stop.finish()) == (38_000, "a" * 2000)
    assert time.process_time() - begin < 5  # quadratic: 80 million steps each, 10 s and more


@pytest.mark.parametrize(
    ("strings", "kind", "message"),
    [
        ([""], ValueError, "empty string"),
        ("", ValueError, "empty string"),
        ([7], TypeError, "stop_strings has 7"),
    ],
)
def test_bad_stop_strings(strings, kind, message):
    with pytest.raises(kind, match=message):
        StopStrings(strings)
    with pytest.raises(kind, match=message):
        Tokenizer.bytes().stream(stop_strings=strings)


def test_one_string_is_one_stop_string():
    stop = StopStrings("###")
    assert (stop.push("a##"), stop.push("b###c"), stop.found) == ("a", "##b", "###")


def test_what_a_stop_string_held_back_is_shown_at_the_end():
    stream = Tokenizer.bytes().stream(stop_strings=["###"])
    assert (stream.push(list(b"a##")), stream.finish(), stream.stopped) == ("a", "##", None)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_a_stream_says_where_a_stop_string_ended_it(block):
    own = tokenizer("byte level")
    stream = own.stream(stop_strings=["\nUser:", "END"])
    [tokens] = own.encode(["Hello 你\nUsers\nUser: what"], special_tokens=False)
    shown = "".join(stream.push(tokens[at : at + block]) for at in range(0, len(tokens), block))
    assert shown + stream.finish() == "Hello 你\nUsers"
    assert stream.stopped == "\nUser:"
    taken = own.decode(tokens[: stream.count])
    assert "\nUser:" in taken
    assert "\nUser:" not in own.decode(tokens[: stream.count - 1])


@pytest.mark.parametrize("tokens", [5, [1.5], [[1], [2]], [[1], [2, 3]], [-1], "ab", [2**31]])
def test_what_is_no_row_of_tokens_is_refused(tokens):
    for use in (
        Tokenizer.bytes().decode,
        Tokenizer.bytes().stream,
        Tokenizer.bytes().stream().push,
    ):
        with pytest.raises(ValueError, match="one row of whole numbers"):
            use(tokens)
