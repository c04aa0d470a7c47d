"""Chats: the template of the checkpoint, in transformers' surroundings, sandboxed."""

import datetime
import sys

import pytest
import tiny_tokenizers as tiny

from mla_jax.generation import Tokenizer, chat

USER = {"role": "user", "content": "Hello 你好"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m.role == 'system' %}\n"
    "{{ m.content }}\n"
    "    {% else %}\n"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n"
    "    {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(folder, template=TEMPLATE, **settings):
    tiny.byte_level().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | settings
    if template is not None:
        config["chat_template"] = template
    tiny.write_json(folder / "tokenizer_config.json", config)
    return Tokenizer.from_checkpoint(folder)


def shown(own, *arguments, **options):
    return own.decode(own.chat(*arguments, **options), skip_special_tokens=False)


def test_a_conversation(tmp_path):
    own = tokenizer(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, USER]
    messages += [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Bye"}]
    text = (
        "<s>Be brief.\n<user>Hello 你好</s>\n<assistant>Hi!</s>\n<user>Bye</s>\n"  # no block's line
    )
    assert own.has_chat_template
    assert shown(own, messages) == text + "<assistant>"
    assert shown(own, messages, add_generation_prompt=False) == text
    tokens = own.chat(messages)
    assert tokens.count(tiny.SPECIAL.index("<s>")) == 1  # the template's, and no other
    assert tokens.count(tiny.SPECIAL.index("</s>")) == 3
    assert tokens == own.encode([text + "<assistant>"], special_tokens=False)[0]


def test_a_template_without_bos_gets_none(tmp_path):
    own = tokenizer(tmp_path, "{{ messages[0].content }}")
    assert own.chat([USER]) == own.encode(["Hello 你好"], special_tokens=False)[0]
    assert own.chat([USER]) != own.encode(["Hello 你好"])[0]


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        # blocks leave no lines; loops have break and continue
        ("  {% if true %}\na\n  {% endif %}\nb", {}, "a\nb"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "02"),
        # JSON without escapes, and transformers' options
        ("{{ tools | tojson }}", {"tools": [{"b": "<é你>", "a": 1}]}, '[{"b": "<é你>", "a": 1}]'),
        ("{{ tools | tojson(indent=1, sort_keys=true) }}", {"tools": [{"b": 2, "a": 1}]},
         '[\n {\n  "a": 1,\n  "b": 2\n }\n]'),
        ("{{ tools | tojson(separators=(',', ':')) }}", {"tools": [{"a": 1}]}, '[{"a":1}]'),
        ("{% generation %}x{% endgeneration %}y", {}, "xy"),
        ("{{ 'thinks' if enable_thinking else 'not' }}", {"enable_thinking": True}, "thinks"),
        ("{{ 'thinks' if enable_thinking else 'not' }}", {}, "not"),
        ("{{ tools is none }}{{ documents is defined }}", {}, "TrueFalse"),
        ("{{ messages[0].content }}", {}, "Hello 你好"),
    ],
)  # fmt: skip
def test_surroundings_are_those_of_transformers(template, options, expected):
    assert chat.render(template, [USER], **options) == expected


def test_the_date():
    text = chat.render("{{ strftime_now('%Y-%m-%d') }}", [USER])
    assert abs(datetime.date.fromisoformat(text) - datetime.date.today()).days <= 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses .*: roles must alternate"),
        ("{% for %}", "the chat template, line 1"),
        ("{{ ''.__class__.__mro__ }}", "refuses .*unsafe"),
        ("{{ messages.append(1) }}", "refuses .*unsafe"),
        ("{{ messages[0].content + 1 }}", "cannot use this conversation: TypeError"),
        ("{{ range(10 ** 9) | length }}", "cannot use this conversation: OverflowError"),
        ("{{ messages[0].nothing.more }}", "refuses .*no attribute"),
        ("{% include 'file' %}", "cannot use|refuses"),
    ],
)
def test_a_template_that_refuses_or_must_not(template, message):
    with pytest.raises(ValueError, match=message):
        chat.render(template, [USER])


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    message = {"role": "user", "content": parts}
    assert chat.render("{{ messages[0].content }}", [message]) == "Hello there"
    assert message["content"] is parts


def test_a_call_of_a_tool_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    template = "{{ messages[0].tool_calls[0].function.name }}"
    assert chat.render(template, [call]) == "f"
    assert chat.render(template, [call | {"content": None}]) == "f"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "messages='Hello': it must be a list"),
        ([], r"messages=\[\]: it must be a list of at least one message"),
        (USER, "messages={'role': 'user'.*must be a list"),
        (["Hello"], r"messages\[0\]='Hello': it must have a role"),
        ([USER, {"content": "x"}], r"messages\[1\]={'content': 'x'}: it must have a role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]"),
        ([[USER]], r"messages\[0\]"),
        ([{"role": "user", "content": 5}], r"messages\[0\] has content=5: it must be a text"),
        ([{"role": "user"}], r"messages\[0\].*says nothing"),
        ([{"role": "user", "content": None}], r"messages\[0\].*says nothing"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"part {'type': 'image'}: only"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(tmp_path).chat(messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, [print], 5])
def test_bad_tools(tmp_path, tools):
    with pytest.raises(ValueError, match=r"tools.*must be a"):
        tokenizer(tmp_path).chat([USER], tools)


def test_no_template(tmp_path):
    own = tokenizer(tmp_path, None)
    assert not own.has_chat_template
    with pytest.raises(ValueError, match="has no chat template: give one as chat_template"):
        own.chat([USER])
    assert shown(own, [USER], chat_template="{{ bos_token }}!") == "<s>!"


class TestFiles:
    def test_named_templates(self, tmp_path):
        named = [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ]
        own = tokenizer(tmp_path, [*named, {"name": "rag", "template": "rag!"}])
        assert shown(own, [USER]) == "plain"
        assert shown(own, [USER], []) == "plain"
        assert shown(own, [USER], [{"name": "f"}]) == "tools"
        assert shown(own, [USER], [{"name": "f"}], chat_template="rag") == "rag!"

    def test_only_other_names(self, tmp_path):
        own = tokenizer(tmp_path, [{"name": "rag", "template": "rag!"}])
        with pytest.raises(ValueError, match="no chat template, only those named 'rag'"):
            own.chat([USER])

    def test_files_count_more(self, tmp_path):
        assert shown(tokenizer(tmp_path, "config"), [USER]) == "config"
        tiny.write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
        assert shown(tokenizer(tmp_path, "config"), [USER]) == "json"
        (tmp_path / "chat_template.jinja").write_text("jinja 你", encoding="utf-8")
        assert shown(tokenizer(tmp_path, "config"), [USER]) == "jinja 你"
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
        assert shown(tokenizer(tmp_path, "config"), [USER], [{"name": "f"}]) == "more"

    @pytest.mark.parametrize("template", [5, [5], [{"name": "a"}], [{"name": 1, "template": "x"}]])
    def test_what_is_no_template_is_refused(self, tmp_path, template):
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be"):
            tokenizer(tmp_path, template)


def test_the_names_of_all_special_tokens_are_known(tmp_path):
    more = {"additional_special_tokens": ["<|im_end|>"], "unk_token": {"content": "<unk>"}}
    own = tokenizer(tmp_path, "{{ unk_token }}{{ additional_special_tokens[0] }}", **more)
    assert own.chat([USER]) == [3, 2]


def test_kimi(tmp_path):
    """Its special tokens in a template, and tools in the order in which its code writes them."""
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    )
    tiny.write_tiktoken(tmp_path, chat_template=template)
    own = Tokenizer.from_checkpoint(tmp_path)
    size = len(tiny.ranks())
    tokens = own.chat([{"role": "user", "content": "hi"}])
    user, assistant, middle, end = (size + n for n in (3, 4, 5, 2))
    plain = lambda text: own.encode([text])[0]  # noqa: E731
    assert tokens == [
        user, *plain("user"), middle, *plain("hi"), end, assistant, *plain("assistant"), middle,
    ]  # fmt: skip
    text = shown(
        own, [USER], [{"type": "function", "function": {"name": "f", "a": [{"z": 1, "b": 2}]}}]
    )
    assert text.startswith(
        '[{"function": {"a": [{"b": 2, "z": 1}], "name": "f"}, "type": "function"}]'
    )


def test_jinja_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"chat templates need Jinja: .*mla-jax\[generate\]"):
        chat.render("a template that was not compiled before", [USER])
