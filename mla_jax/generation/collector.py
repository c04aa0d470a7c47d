"""What the host keeps of new tokens: each row's tokens and text, and whether it has ended."""

import numpy as np

from mla_jax.generation.request import Request


class Collector:
    """Tokens and texts of every row, until a stop token, a stop string or their number ends it."""

    def __init__(self, prompts, request: Request, tokenizer, on_tokens, on_text):
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = np.zeros(len(prompts), bool)
        self._request, self._on_tokens, self._on_text = request, on_tokens, on_text
        self._texts = ["" for _ in prompts]
        self._streams = None
        if tokenizer is not None:
            options = {"stop_strings": request.stop_strings}
            self._streams = [tokenizer.stream(prompt.tolist(), **options) for prompt in prompts]

    def add(self, new) -> None:
        """Takes the tokens that follow; those past a row's end are left out."""
        for row, tokens in enumerate(new):
            if self.ended[row] or not len(tokens):
                continue
            fresh, text = tokens.tolist(), ""
            if self._streams is not None:
                stream = self._streams[row]
                text = stream.push(fresh)
                fresh = fresh[: stream.count - len(self.tokens[row])]
                self.ended[row] = stream.stopped is not None
            self.tokens[row] += fresh
            self.ended[row] |= fresh[-1] in self._request.stop_tokens
            self.ended[row] |= len(self.tokens[row]) >= self._request.max_new_tokens
            if self._streams is not None and self.ended[row]:
                text += self._streams[row].finish()
            self._texts[row] += text
            if self._on_tokens is not None:
                self._on_tokens(row, fresh)
            if self._on_text is not None and text:
                self._on_text(row, text)

    def finish(self) -> list[str] | None:
        """The texts of all rows."""
        return None if self._streams is None else self._texts
