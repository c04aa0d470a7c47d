"""A conversation as the text that a model was trained on, by the model's own template.

A template is a Jinja program out of a checkpoint, so it runs in Jinja's sandbox. Its surroundings
are those that transformers gives it: block tags leave no lines behind, `break` and `continue`, the
`generation` tag (which marks the model's own words for training and changes no text), `tojson`
without escapes, `raise_exception` and `strftime_now`.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.families import read_json


def read_templates(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the one without a name is "default".

    Args:
        folder: of the checkpoint. Its chat_template.jinja counts more than chat_template.json, and
            that more than the settings.
        settings: tokenizer_config.json, with one template or a list of named ones.

    Raises:
        ValueError: a file whose template is none; the message names it.
    """
    found = _named(settings.get("chat_template"), folder / "tokenizer_config.json")
    if (folder / "chat_template.json").is_file():
        file = folder / "chat_template.json"
        found |= _named(read_json(file).get("chat_template"), file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return found


def choose(
    templates: Mapping[str, str], chat_template: str | None, tools: Sequence[Any] | None
) -> str:
    """The template to use.

    Args:
        templates: those of the checkpoint, by name.
        chat_template: the name of one, or a template itself; None is "tool_use" where there are
            tools and a template of that name, else "default".
        tools: those that the conversation has.

    Raises:
        ValueError: there is none.
    """
    if chat_template is not None:
        return templates.get(chat_template, chat_template)
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    named = f", only those named {', '.join(map(repr, templates))}" if templates else ""
    raise ValueError(
        f"the tokenizer has no chat template{named}: give one as chat_template, or encode the "
        "text that the model was trained on."
    )


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: in Jinja.
        messages: the conversation: mappings with a "role" and its "content", a text or a list of
            {"type": "text", "text": ...}; what else a template knows, such as "tool_calls".
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: whether the text ends with what begins the model's next message.
        **variables: for the template, such as `bos_token` or `enable_thinking`.

    Raises:
        ValueError: messages of another form; or the template refuses them, or is no template.
        ImportError: Jinja is not installed.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(template + "{% if add_generation_prompt %}<assistant>{% endif %}",
    ...        [{"role": "user", "content": "Hello"}])
    '<user>Hello<assistant>'
    """
    checked = _checked(messages)
    if tools is not None:
        _check_tools(tools)
    program = _compiled(template)
    from jinja2.exceptions import TemplateError  # there, as the program is

    try:
        return program.render(
            messages=checked, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    except Exception as error:  # of a foreign program: whatever its code runs into
        raise ValueError(
            f"the chat template cannot use this conversation: {type(error).__name__}: {error}"
        ) from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(
            'chat templates need Jinja: pip install "mla-jax[generate]", or jinja2 itself.'
        ) from error

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} is what is inside it."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser):
            line = next(parser.stream).lineno
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(inside, lineno=line)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    known = {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        return environment.from_string(template, globals=known)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template, line {error.lineno}: {error}") from error


def _named(value: Any, file: pathlib.Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping):
        value = [{"name": name, "template": text} for name, text in value.items()]
    found = {}
    for one in value if isinstance(value, Sequence) else [value]:
        named = isinstance(one, Mapping) and {"name", "template"} <= one.keys()
        if not named or not isinstance(one["name"], str) or not isinstance(one["template"], str):
            raise ValueError(
                f"{file}: chat_template must be a text, or a list of objects with a name and a "
                f"template, not {value!r:.80}."
            )
        found[one["name"]] = one["template"]
    return found


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, with lists of text parts as one text."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"messages={messages!r:.80}: it must be a list of at least one message, such as "
            '[{"role": "user", "content": "Hello"}].'
        )
    checked = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where}={message!r:.80}: it must have a role, such as "
                '{"role": "user", "content": "Hello"}.'
            )
        message = dict(message)
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            message["content"] = "".join(_part(part, where) for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"{where} has content={content!r:.80}: it must be a text.")
        elif content is None and set(message) <= {"role", "content"}:
            raise ValueError(f"{where}={message!r:.80}: it says nothing: give it a content.")
        checked.append(message)
    return checked


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise ValueError(
            f'{where} has the part {part!r:.80}: only {{"type": "text", "text": ...}} is read, '
            "since the models here read text alone."
        )
    return part["text"]


def _check_tools(tools: Any) -> None:
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise ValueError(f"tools={tools!r:.80}: it must be a list of JSON schemas.")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(
                f"tools[{number}]={tool!r:.80}: it must be a JSON schema, such as "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
