"""`mla-jax generate`: continues prompts. What its flags mean is up to `generation.generate`."""

import dataclasses
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
from mla_jax.cli.mesh import join, mesh_of, used
from mla_jax.cli.options import Chat, Generate, Writing, judging_flags
from mla_jax.cli.terminal import BYTES, PARAMETERS, Terminal, quantity
from mla_jax.generation.request import token_rows
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.ops import dispatch
from mla_jax.sharding import Rules


def generate(options: Generate) -> None:
    """Prints the texts, and how fast they came.

    Raises:
        FloatingPointError: the model made a number that is not finite.
    """
    with judging_flags():
        _check(options)
        join(options.distributed)
        mesh, place = mesh_of(options)
    with used(mesh):
        _generate(options, mesh, place)


def _generate(options: Generate, mesh: Any, place: Rules | None) -> None:
    terminal = Terminal(quiet=options.quiet, json=options.json)
    with judging_flags():
        texts = _texts(options, terminal)
        config, tokenizer, path = _source(options)
        defaults = _defaults(options, path)
        prompts = _prompts(options, texts, tokenizer, config.vocab_size)
        asked = request(options, defaults)
        prompts = [row.tolist() for row in token_rows(prompts, config.vocab_size, tokenizer)]
        slots = generation.check_fits(config, prompts, asked, sharding=place)
        _check_backend(options, config, prompts, slots)
    model = load(options, config, path, terminal, place)
    texts = texts * len(prompts) if len(texts) == 1 else texts
    alone = len(texts) == 1 and options.samples == 1 and not terminal.json
    begun = False

    def show(row: int, text: str) -> None:
        nonlocal begun
        if not begun:
            report.stop()
            begun = True  # before anything is written: an interrupt may follow at once
            terminal.answer(texts[0], end="")
        terminal.answer(text, end="")

    with terminal.working("compiling") as report:
        try:
            result = generation.generate(
                model, prompts, asked, tokenizer=tokenizer, on_text=show if alone else None,
                sharding=place,
            )  # fmt: skip
        finally:
            if begun:
                terminal.answer()  # what follows, an error too, begins a line
    written = result.texts or []
    if alone and not begun:
        terminal.answer(texts[0] + written[0])
    if not alone and not terminal.json:
        for row, text in enumerate(written if texts else ()):
            terminal.note(f"text {row}")
            terminal.answer(texts[row % len(texts)] + text)
    _report(options, result, prompts, slots, config, terminal, mesh, place)
    rows: list[dict[str, Any]] = []
    for row, tokens in enumerate(result.tokens):
        prompt = row % len(prompts)
        rows.append({
            "prompt": texts[prompt] if texts else None, "prompt_tokens": len(prompts[prompt]),
            "tokens": tokens, "text": written[row] if texts else tokenizer.decode(tokens),
        })  # fmt: skip
        if result.logprobs is not None:
            rows[-1]["logprobs"] = result.logprobs[row]
    terminal.answer_json({
        "rows": rows,
        "new_tokens": result.new_tokens, "steps": result.steps, "accepted": result.accepted,
        "first_token_seconds": result.first_token_seconds,
        "decode_seconds": result.decode_seconds, "compile_seconds": result.compile_seconds,
        "tokens_per_second": result.tokens_per_second, "cache_bytes": result.cache_bytes,
    })  # fmt: skip


def request(options: Writing, defaults: generation.GenerationDefaults) -> generation.Request:
    """What the flags ask for; what they leave open is the checkpoint's."""
    values: dict[str, Any] = {"stop_tokens": (*defaults.stop_tokens, *options.stop_tokens)}
    for field in dataclasses.fields(generation.Request):
        if field.name not in ("sampling", "stop_tokens") and hasattr(options, field.name):
            values[field.name] = getattr(options, field.name)
    for name, default in defaults.sampling.items():
        given = getattr(options, name)
        values[name] = default if given is None else given
    return generation.Request.of(**values)


def check_writing(options: Writing) -> None:
    """What the flags of writing alone say: weights may take minutes to read."""
    _check_dtype(options.dtype)
    dispatch.normalized(options.implementation)
    request(options, generation.GenerationDefaults())


def _defaults(options: Generate, path: pathlib.Path | None) -> generation.GenerationDefaults:
    if path is None:
        return generation.GenerationDefaults()
    return generation.GenerationDefaults.from_checkpoint(path)


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
    check_writing(options)


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
        cache = model.init_cache(len(prompts), slots, options.cache_dtype).as_fresh()
        model.extend(jnp.zeros((len(prompts), longest), jnp.int32), cache)
        cache = model.init_cache(len(prompts), slots, options.cache_dtype)
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


def read_source(
    repository: str,
) -> tuple[DecoderConfig, generation.Tokenizer, pathlib.Path]:
    """A checkpoint's config, its tokenizer, and where its weights are."""
    with checkpoint.Checkpoint(repository) as files:
        config, path = decoder_config(files), files.path
    folder = path if path.is_dir() else path.parent
    return config, generation.Tokenizer.from_checkpoint(folder), path


def _source(options: Generate) -> tuple[DecoderConfig, generation.Tokenizer, pathlib.Path | None]:
    """The model's config, its tokenizer, and where its weights are, if they are anywhere."""
    if options.checkpoint is None:
        assert options.preset is not None
        return DecoderConfig.from_preset(options.preset), generation.Tokenizer.bytes(), None
    return read_source(options.checkpoint)


def load(
    options: Generate | Chat, config: DecoderConfig, path: pathlib.Path | None, terminal: Terminal,
    place: Rules | None = None,
) -> Decoder:  # fmt: skip
    """The decoder, placed by the rules if there are any, and a line about it."""
    mtp = options.draft == "mtp"
    given: dict[str, Any] = {
        "dtype": options.dtype,
        "implementation": options.implementation,
        "mtp": mtp,
        "sharding": place,
    }
    started = time.perf_counter()
    if path is not None:
        with terminal.working("reading weights") as report:
            given["weights"] = "as stored" if options.weights == "as-stored" else None
            model = checkpoint.load_decoder(path, on_progress=report, **given)
            source = options.checkpoint
            leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    else:
        with terminal.working("making weights"):
            model = random_decoder(config, seed=options.seed, param_dtype=options.dtype, **given)
            leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
        source = f"{getattr(options, 'preset', '')}, random weights"
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
    config: DecoderConfig, terminal: Terminal, mesh: Any, place: Rules | None,
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
        dtype=options.dtype, cache_dtype=options.cache_dtype,
        implementation=options.implementation, mesh=mesh, sharding=place,
    )  # fmt: skip
