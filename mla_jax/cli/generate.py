"""`mla-jax generate`: continues prompts. What its flags mean is up to `generation.generate`."""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax import checkpoint, generation, target
from mla_jax.checkpoint.decoder import decoder_config
from mla_jax.cli.options import Generate, judging_flags
from mla_jax.cli.terminal import BYTES, PARAMETERS, Terminal, quantity
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.ops import dispatch


def generate(options: Generate) -> None:
    """Prints the texts, and how fast they came.

    Raises:
        FloatingPointError: the model made a number that is not finite.
    """
    terminal = Terminal(quiet=options.quiet, json=options.json)
    with judging_flags():
        _check(options)
        texts = _texts(options, terminal)
        config, tokenizer, path = _source(options)
        prompts = _prompts(options, texts, tokenizer, config.vocab_size)
        arguments = _arguments(options, config)
        slots = generation._slots(
            config, prompts, options.max_new_tokens, options.max_length, options.speculate
        )
        _check_backend(options, config, prompts, slots)
    model = _model(options, config, path, terminal)
    texts = texts * len(prompts) if len(texts) == 1 else texts
    alone = len(texts) == 1 and not terminal.json
    stream = _Stream(terminal, tokenizer.stream(prompts[0]), texts[0]) if alone else None
    with terminal.working("compiling") as report:
        if stream is not None:
            stream.before = report.stop
        try:
            result = generation.generate(model, prompts, on_tokens=stream, **arguments)
        finally:
            if stream is not None:
                stream.finish()
    written = [
        _continuation(tokenizer, prompt, tokens)
        for prompt, tokens in zip(prompts, result.tokens, strict=True)
    ]
    if stream is None and not terminal.json:
        for row, text in enumerate(texts):
            terminal.note(f"text {row}")
            terminal.answer(text + written[row])
    _report(options, result, prompts, slots, config, terminal)
    terminal.answer_json({
        "rows": [
            {"prompt": texts[row] if texts else None, "prompt_tokens": len(prompt),
             "tokens": tokens, "text": text}
            for row, (prompt, tokens, text) in enumerate(
                zip(prompts, result.tokens, written, strict=True)
            )
        ],
        "new_tokens": result.new_tokens, "steps": result.steps, "accepted": result.accepted,
        "first_token_seconds": result.first_token_seconds,
        "decode_seconds": result.decode_seconds, "compile_seconds": result.compile_seconds,
        "tokens_per_second": result.tokens_per_second, "cache_bytes": result.cache_bytes,
    })  # fmt: skip


def _arguments(options: Generate, config: DecoderConfig) -> dict[str, Any]:
    """What `generation.generate` is told, beside model, prompts and where tokens go."""
    return {
        "max_new_tokens": options.max_new_tokens, "max_length": options.max_length,
        "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
        "seed": options.seed, "speculate": options.speculate, "draft": options.draft,
        "block": options.block,
        "stop_tokens": () if options.random_weights else config.eos_token_ids,
    }  # fmt: skip


class _Stream:
    """Shows one text as its tokens come, the prompt with the first of them."""

    def __init__(self, terminal: Terminal, text: generation.TextStream, prompt: str):
        self._terminal, self._text, self._prompt = terminal, text, prompt
        self.begun = False
        self.before = lambda: None  # called before anything is shown

    def __call__(self, row: int, tokens: list[int]) -> None:
        if not self.begun:
            self.before()
            self.begun = True
            self._terminal.answer(self._prompt, end="")
        self._terminal.answer(self._text.push(tokens), end="")

    def finish(self) -> None:
        """Ends the line, so that what follows, an error too, begins one."""
        if self.begun:
            self._terminal.answer(self._text.finish())


def _continuation(tokenizer: generation.Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of the tokens as it follows the prompt's."""
    stream = tokenizer.stream(prompt)
    return stream.push(tokens) + stream.finish()


def _check(options: Generate) -> None:
    """What the flags alone say: weights may take minutes to read."""
    if (options.checkpoint is None) == (options.preset is None):
        raise ValueError("give one of --checkpoint FOLDER and --preset NAME --random-weights.")
    if options.preset is not None and not options.random_weights:
        raise ValueError("a preset has no weights: add --random-weights, or --checkpoint.")
    if options.checkpoint is not None and options.random_weights:
        raise ValueError("--random-weights is for a --preset: a checkpoint has its own.")
    if options.prompt_tokens < 0 or options.batch < 1 or options.seed < 0:
        raise ValueError("--prompt-tokens and --seed must be at least 0, --batch at least 1.")
    count = len(options.prompt) + len(options.prompt_file)
    if bool(count) == bool(options.prompt_tokens):
        raise ValueError(
            "give --prompt TEXT, or --prompt-tokens NUMBER, or --prompt-file FILE for a text."
        )
    if options.batch > 1 and count > 1:
        raise ValueError(
            f"--batch {options.batch} copies one prompt: here are {count}, which are a batch."
        )
    _check_dtype(options.dtype)
    dispatch.normalized(options.implementation)
    generation._check_flags(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p,
        options.speculate, options.draft, options.block,
    )  # fmt: skip


def _check_backend(
    options: Generate, config: DecoderConfig, prompts: list[list[int]], slots: int
) -> None:
    """Raises NotImplementedError where a backend that is named cannot do this here."""
    if options.implementation is None:
        return
    # One layer, of which nothing is computed, asks what all of them would ask.
    shallow = config.replace(attention=config.attention.replace(num_hidden_layers=1))
    longest = max(map(len, prompts))

    def steps():
        model = Decoder(
            shallow, dtype=options.dtype, param_dtype=options.dtype,
            implementation=options.implementation, rngs=nnx.Rngs(0),
        )  # fmt: skip
        cache = model.init_cache(len(prompts), slots).as_fresh()
        model.extend(jnp.zeros((len(prompts), longest), jnp.int32), cache)
        cache = model.init_cache(len(prompts), slots)
        model.extend(jnp.zeros((len(prompts), 1 + options.speculate), jnp.int32), cache)

    jax.eval_shape(steps)


def _check_dtype(name: str) -> None:
    try:
        known = jnp.dtype(name) in (jnp.bfloat16, jnp.float16, jnp.float32)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={name!r}: use bfloat16, float16 or float32.")


def _texts(options: Generate, terminal: Terminal) -> list[str]:
    """The prompts: as given, from standard input, and from files; none of random tokens."""
    if options.prompt.count("-") > 1:
        raise ValueError("--prompt - may be given once: standard input is read once.")
    given = [_standard_input(terminal) if text == "-" else text for text in options.prompt]
    return given + [_decode(path.read_bytes(), str(path)) for path in options.prompt_file]


def _standard_input(terminal: Terminal) -> str:
    if sys.stdin is None:
        raise ValueError("--prompt -: there is no standard input.")
    if sys.stdin.isatty():
        terminal.note("reading the prompt until Ctrl-D")
    return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(read: bytes, where: str) -> str:
    """UTF-8 without a last line break, which editors and `echo` add."""
    try:
        text = read.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError(f"{where} holds no text: a prompt must not be empty.")
    return text


def _source(options: Generate) -> tuple[DecoderConfig, generation.Tokenizer, pathlib.Path | None]:
    """The model's config, its tokenizer, and where its weights are, if they are anywhere."""
    if options.checkpoint is None:
        assert options.preset is not None
        return DecoderConfig.from_preset(options.preset), generation.Tokenizer.bytes(), None
    with checkpoint.Checkpoint(options.checkpoint) as files:
        config, path = decoder_config(files), files.path
    folder = path if path.is_dir() else path.parent
    return config, generation.Tokenizer.from_checkpoint(folder), path


def _model(
    options: Generate, config: DecoderConfig, path: pathlib.Path | None, terminal: Terminal
) -> Decoder:
    """The decoder, and a line about it."""
    mtp = options.draft == "mtp"
    given: dict[str, Any] = {
        "dtype": options.dtype,
        "implementation": options.implementation,
        "mtp": mtp,
    }
    started = time.perf_counter()
    if path is not None:
        with terminal.working("reading weights"):
            model, source = checkpoint.load_decoder(path, **given), options.checkpoint
            leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    else:
        with terminal.working("making weights"):
            model = random_decoder(config, seed=options.seed, param_dtype=options.dtype, **given)
            leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
        source = f"{options.preset}, random weights"
    terminal.note(
        f"{source}: {quantity(sum(leaf.size for leaf in leaves), PARAMETERS)}, "
        f"{quantity(sum(leaf.nbytes for leaf in leaves), BYTES, 1024)}, ready in "
        f"{time.perf_counter() - started:.1f} s on {target.current().kind}"
    )
    return model


def _prompts(
    options: Generate, texts: list[str], tokenizer: generation.Tokenizer, vocabulary: int
) -> list[list[int]]:
    if options.prompt_tokens:
        random = np.random.default_rng(options.seed)
        shape = (options.batch, options.prompt_tokens)
        return random.integers(0, vocabulary, shape).tolist()
    prompts = tokenizer.encode(texts)
    return prompts * options.batch if len(prompts) == 1 else prompts


def _report(
    options: Generate, result: generation.Result, prompts: list[list[int]], slots: int,
    config: DecoderConfig, terminal: Terminal,
) -> None:  # fmt: skip
    """How fast it went, and by what."""
    rows = [
        (
            "rows, prompt tokens, new",
            f"{len(prompts)}, {max(map(len, prompts))}, {result.new_tokens}",
        ),
        ("time to first token", f"{result.first_token_seconds * 1e3:,.1f} ms"),
    ]
    if result.steps:
        each = result.decode_seconds / result.steps * 1e3
        rows.append(("decoding", f"{result.tokens_per_second:,.1f} tokens/s, {each:.2f} ms/step"))
    if result.accepted is not None:
        drafts = f"{result.accepted:.1%} of {options.speculate} a step, by {options.draft}"
        rows.append(("drafts accepted", drafts))
    rows.append(("compiling, once", f"{result.compile_seconds:.1f} s"))
    rows.append(("cache", quantity(result.cache_bytes, BYTES, 1024)))
    terminal.note("")
    terminal.notes(rows)
    terminal.explain(
        config.attention, batch_size=len(prompts), length=slots, queries=1 + options.speculate,
        dtype=options.dtype, implementation=options.implementation,
    )  # fmt: skip
