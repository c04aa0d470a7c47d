"""`mla-jax chat`: a conversation, by the model's own template. The cache is kept between turns."""

import sys
from typing import Any

from mla_jax import generation
from mla_jax.cli.generate import check_writing, load, read_source, request
from mla_jax.cli.options import Chat, judging_flags
from mla_jax.cli.terminal import Terminal
from mla_jax.generation.request import cache_length


def chat(options: Chat) -> None:
    """Answers every line of standard input.

    Raises:
        FloatingPointError: the model made a number that is not finite.
    """
    terminal = Terminal(quiet=options.quiet, json=options.json)
    with judging_flags():
        if not options.checkpoint:
            raise ValueError("give the model, as --checkpoint FOLDER.")
        if sys.stdin is None:
            raise ValueError("there is no standard input, whose lines are the turns.")
        check_writing(options)
        config, tokenizer, path = read_source(options.checkpoint)
        if not tokenizer.has_chat_template:
            raise ValueError(
                f"{options.checkpoint} has no chat template: `mla-jax generate` continues texts."
            )
        asked = request(options, generation.GenerationDefaults.from_checkpoint(path))
        begun: list[dict[str, Any]] = []
        if options.system is not None:
            begun.append({"role": "system", "content": options.system})
        tokenizer.chat([*begun, {"role": "user", "content": "?"}])  # a system prompt it refuses
    model = load(options, config, path, terminal)
    talk = Conversation(model, tokenizer, asked, begun)
    turns: list[dict[str, Any]] = []
    while (line := _read(terminal)) is not None:
        if not line:
            continue
        shown = False

        def show(row: int, text: str) -> None:
            nonlocal shown
            report.stop()
            shown = True
            terminal.answer(text, end="")

        with terminal.working("thinking") as report:
            try:
                result, prefilled = talk.say(line, show)
            finally:
                if shown:
                    terminal.answer()
        if not shown:
            terminal.answer()
        turns.append({
            "prefilled": prefilled, "held": talk.held, "new_tokens": result.new_tokens,
            "first_token_seconds": result.first_token_seconds,
            "tokens_per_second": result.tokens_per_second,
        })  # fmt: skip
        terminal.note(
            f"{prefilled} tokens prefilled, {result.new_tokens} new, {talk.held} in the cache; "
            f"first after {result.first_token_seconds * 1e3:,.1f} ms, then "
            f"{result.tokens_per_second:,.1f} tokens/s"
        )
    terminal.answer_json({"messages": talk.messages, "turns": turns})


class Conversation:
    """Turns of a user and a model, and the cache that holds them.

    Attributes:
        messages: of all roles, as the template takes them.

    Args:
        model: as in `generation.generate`.
        tokenizer: with a chat template.
        request: of every turn.
        messages: that are there already, such as a system prompt.
        room: tokens that the cache has slots for at least, where the model has the positions; it is
            made anew, for twice the conversation, when it is full.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: generation.Tokenizer,
        request: generation.Request,
        messages: list[dict[str, Any]],
        room: int = 2048,
    ):
        self.messages = list(messages)
        self._model, self._tokenizer, self._request = generation.bind(model), tokenizer, request
        self._limit, self._room = generation.positions(model), room
        self._tokens: list[int] = []
        self._cache: generation.Cache | None = None

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    def say(self, content: str, on_text: Any) -> tuple[generation.Result, int]:
        """Takes the user's turn; the model's, and how many tokens were prefilled for it."""
        said = [*self.messages, {"role": "user", "content": content}]
        prompt = self._tokenizer.chat(said)
        rest, cache = prompt, self._cache
        need = len(prompt) + self._request.max_new_tokens + self._request.speculate
        if cache is not None and need <= cache.max_length:
            cache, (rest,) = generation.resume(cache, [self._tokens], [prompt])
            asked = self._request
        else:
            cache = None  # a longer one is filled anew
            wanted = max(self._room, 2 * need)
            slots = cache_length(max(need, min(wanted, self._limit or wanted)), self._limit)
            asked = generation.Request.of(
                self._request, max_length=self._request.max_length or slots
            )
        self._cache, self._tokens = None, []  # donated
        result = generation.generate(
            self._model, [rest], asked, tokenizer=self._tokenizer, cache=cache,
            on_text=on_text,
        )  # fmt: skip
        assert result.cache is not None
        assert result.texts is not None
        self._cache, self._tokens = result.cache, [*prompt, *result.tokens[0][:-1]]
        self.messages = [*said, {"role": "assistant", "content": result.texts[0]}]
        return result, len(rest)


def _read(terminal: Terminal) -> str | None:
    """The next line of standard input; None at its end."""
    if sys.stdin.isatty() and not terminal.quiet:
        print("> ", end="", file=sys.stderr, flush=True)
    read = sys.stdin.buffer.readline()
    if not read:
        return None
    try:
        return read.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from error
