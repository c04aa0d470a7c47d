"""The command `mla-jax`: a demo that trains and decodes, generation, costs, and what would run."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mla_jax import checkpoint, costs, generation, training
from mla_jax.checkpoint.decoder import decoder_config
from mla_jax.config import MLAConfig
from mla_jax.generation.steps import _check_sampling, decode_loop, prefill_step, sample
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.ops import dispatch

_STEPS = 350


@dataclasses.dataclass
class Demo:
    """Train a small byte-level model on Python's standard library, then let it write.

    Attributes:
        preset: attention of every layer, one of configs/models.
        steps: optimizer steps; 350 where nothing is loaded, else 0.
        batch: windows of a step.
        seed: of initialization, data and sampling. The same seed gives the same text.
        implementation: backend of the attention core; chosen where not given.
        prompt: what the text goes on from.
        tokens: bytes to generate.
        temperature: of sampling; 0 takes the most likely byte.
        save: folder to write the model to.
        load: folder to read a model from, instead of initializing one.
    """

    preset: str = "tiny"
    steps: int | None = None
    batch: int = 8
    seed: int = 0
    implementation: str | None = None
    prompt: str = "def read(self, path):\n    "
    tokens: int = 256
    temperature: float = 0.6
    save: pathlib.Path | None = None
    load: pathlib.Path | None = None


@dataclasses.dataclass
class Costs:
    """What a step of decoding costs, for MLA's forms and for MHA, GQA and MQA of the same heads.

    Attributes:
        preset: one of configs/models.
        device: one of configs/devices.toml.
        context: tokens that every row holds.
        batch: rows.
        queries: new tokens of a row.
    """

    preset: Annotated[str, tyro.conf.Positional]
    device: str = "h200"
    context: int = 32768
    batch: int = 1
    queries: int = 1


@dataclasses.dataclass
class Explain:
    """Which form and backend would run here, and why the others would not.

    Attributes:
        preset: one of configs/models.
        length: slots of the cache.
        batch: rows.
        queries: new tokens of a row.
        dtype: of the cache and the computation.
    """

    preset: Annotated[str, tyro.conf.Positional]
    length: int = 4096
    batch: int = 1
    queries: int = 1
    dtype: str = "bfloat16"


@dataclasses.dataclass
class Generate:
    """Continue prompts with a model from a checkpoint, or at real shapes with random weights.

    Attributes:
        checkpoint: folder (or, with huggingface_hub, repo id) of a model of DeepSeek's shape.
        preset: a whole model of configs/models, with --random-weights.
        random_weights: initialize the preset at random, to measure speed.
        prompt: what to continue; several make a batch.
        prompt_tokens: instead of a prompt, this many random tokens in each of --batch rows.
        batch: rows of random tokens, or copies of a single prompt.
        max_new_tokens: of each row.
        max_length: slots of the cache; what is needed where not given.
        dtype: of parameters, computation and cache.
        temperature: of sampling; 0 is greedy.
        top_k: draw among the k most likely tokens.
        top_p: draw among the likeliest tokens that reach this probability together.
        seed: of sampling, random weights and random tokens.
        speculate: tokens to draft and verify at once.
        draft: by looking the text's end up in it, or by the model's multi-token prediction.
        block: decode steps in one program, after which text is shown.
        implementation: backend of the attention core; chosen where not given.
    """

    checkpoint: str | None = None
    preset: str | None = None
    random_weights: bool = False
    prompt: list[str] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    batch: int = 1
    max_new_tokens: int = 128
    max_length: int | None = None
    dtype: str = "bfloat16"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    speculate: int = 0
    draft: Literal["prompt", "mtp"] = "prompt"
    block: int = 16
    implementation: str | None = None


def main(args: list[str] | None = None) -> None:
    """Runs a subcommand; a wrong argument ends with its one-line error and exit status 2."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "generate": Generate, "costs": Costs, "explain": Explain},
        args=args, prog="mla-jax",
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        if isinstance(command, Demo):
            _demo(command, console)
        elif isinstance(command, Generate):
            _generate(command, console)
        elif isinstance(command, Costs):
            _costs(command, console)
        else:
            _explain(command)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"mla-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _demo(options: Demo, console: Console) -> None:
    if options.tokens < 1 or options.batch < 1 or (options.steps or 0) < 0 or not options.prompt:
        raise ValueError("tokens and batch must be at least 1, steps at least 0, prompt not empty.")
    _check_sampling(None, jax.random.key(0), options.temperature, None, None)
    if options.save is not None:  # before training, so that a folder that cannot be is known
        options.save.mkdir(parents=True, exist_ok=True)
    if options.load is not None:
        model = load(options.load, options.implementation)
    else:
        attention = MLAConfig.from_preset(options.preset)
        config = DecoderConfig(attention=attention, tie_word_embeddings=True)
        _check_memory(config)
        model = Decoder(config, implementation=options.implementation, rngs=nnx.Rngs(options.seed))
    attention = model.config.attention
    slots = len(options.prompt.encode()) + options.tokens
    if slots > attention.max_position_embeddings:
        raise ValueError(
            f"prompt and tokens need {slots} positions, {options.preset} has "
            f"{attention.max_position_embeddings}: ask for fewer tokens."
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(
        f"{count / 1e6:.2f} M parameters, {attention.num_hidden_layers} layers of "
        f"{attention.num_attention_heads} heads on {jax.devices()[0].device_kind}"
    )
    text = training.standard_library_text()
    steps = options.steps
    if steps is None:
        steps = 0 if options.load is not None else _STEPS
    if steps:
        _train(model, text, steps, options, console)
    if options.save is not None:
        save(model, options.save)
        console.print(f"saved to {options.save}")
    _write(model, options, console)


def _train(model, text, steps, options, console) -> None:
    held_out = 16 * 129  # bytes that held_out_loss reads
    before = training.held_out_loss(model, text)
    losses = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.2f} bits per byte"),
    )  # fmt: skip
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with progress:
        task = progress.add_task("training", total=steps, loss=before)
        for loss in training.train(
            model, text[:-held_out], steps=steps, batch=options.batch, seed=options.seed
        ):
            losses.append(loss)
            progress.update(task, advance=1, loss=loss)
            if not console.is_terminal and (len(losses) % 50 == 0 or len(losses) == steps):
                console.print(f"step {len(losses)}: loss {loss:.2f} bits per byte")
    after = training.held_out_loss(model, text)
    console.print(f"held-out loss {before:.2f} before, {after:.2f} bits per byte after training")


def _write(model, options, console) -> None:
    attention = model.config.attention
    prompt = jnp.asarray(np.frombuffer(options.prompt.encode(), np.uint8)[None], jnp.int32)
    slots = prompt.shape[1] + options.tokens
    keys = jax.random.split(jax.random.key(options.seed))

    def generate():
        started = time.perf_counter()
        logits, cache = prefill_step(model, prompt, model.init_cache(1, slots))
        first = sample(logits[:, -1], keys[0], temperature=options.temperature)
        first.block_until_ready()
        prefilled = time.perf_counter()
        written = first[:, None]
        if options.tokens > 1:
            more, _, cache = decode_loop(
                model, first, cache, steps=options.tokens - 1, key=keys[1],
                temperature=options.temperature,
            )  # fmt: skip
            written = jnp.concatenate([written, more], axis=1)
        written.block_until_ready()
        return written, prefilled - started, time.perf_counter() - prefilled

    started = time.perf_counter()
    generate()
    compiled = time.perf_counter() - started
    written, first_token, rest = generate()
    console.rule("text")
    console.out(options.prompt + bytes(np.asarray(written[0], np.uint8)).decode(errors="replace"))
    console.rule("decoding")
    itemsize = jnp.dtype(model.blocks[0].attention.param_dtype).itemsize
    ours = costs.cache_bytes(attention, 1, 1, width=itemsize)
    theirs = costs.cache_bytes(attention, 1, 1, "mha", width=itemsize)
    table = Table(show_header=False, box=None)
    table.add_row("time to first token", f"{first_token * 1e3:.1f} ms")
    if options.tokens > 1:
        table.add_row("decoding", f"{(options.tokens - 1) / rest:,.0f} tokens/s")
    table.add_row("compiling, once", f"{compiled - first_token - rest:.1f} s")
    table.add_row("cache", f"{ours:,} bytes per token ({theirs:,} for MHA: {theirs / ours:.1f}x)")
    console.print(table)
    dispatch.explain(attention, length=slots, dtype="float32")


def _generate(options: Generate, console: Console) -> None:
    _check_generate(options)
    config, tokenizer, path = _source(options)
    prompts = _prompts(options, tokenizer, config.vocab_size)
    slots = generation._slots(
        config, prompts, options.max_new_tokens, options.max_length, options.speculate
    )
    _check_backend(options, config, len(prompts), slots)
    model = _model(options, config, path, console)
    alone = len(prompts) == 1 and not options.prompt_tokens
    shown: list[list[int]] = [[] for _ in prompts]

    def stream(row: int, tokens: list[int]) -> None:
        before = tokenizer.decode(shown[row])
        shown[row] += tokens
        # A character may be several tokens: what is not whole yet is shown with the next ones.
        fresh = tokenizer.decode(shown[row])
        print(fresh[len(before) :], end="", flush=True)

    if alone:
        console.rule("text")
        print(options.prompt[0], end="", flush=True)
    result = generation.generate(
        model, prompts, max_new_tokens=options.max_new_tokens, max_length=options.max_length,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=options.seed, stop_tokens=() if options.random_weights else config.eos_token_ids,
        speculate=options.speculate, draft=options.draft, block=options.block,
        on_tokens=stream if alone else None,
    )  # fmt: skip
    if alone:
        print()
    elif not options.prompt_tokens:
        for row, tokens in enumerate(result.tokens):
            console.rule(f"text {row}")
            console.out(options.prompt[row % len(options.prompt)] + tokenizer.decode(tokens))
    console.rule("decoding")
    longest = max(map(len, prompts))
    table = Table(show_header=False, box=None)
    table.add_row("rows, prompt tokens, new", f"{len(prompts)}, {longest}, {result.new_tokens}")
    table.add_row("time to first token", f"{result.first_token_seconds * 1e3:,.1f} ms")
    if result.steps:
        each = result.decode_seconds / result.steps * 1e3
        table.add_row("decoding", f"{result.tokens_per_second:,.1f} tokens/s, {each:.2f} ms/step")
    if result.accepted is not None:
        drafts = f"{result.accepted:.1%} of {options.speculate} a step, by {options.draft}"
        table.add_row("drafts accepted", drafts)
    table.add_row("compiling, once", f"{result.compile_seconds:.1f} s")
    table.add_row("cache", f"{result.cache_bytes / 2**20:,.1f} MiB")
    console.print(table)
    dispatch.explain(
        config.attention, batch_size=len(prompts), length=slots, queries=1 + options.speculate,
        dtype=options.dtype,
    )  # fmt: skip


def _check_backend(options: Generate, config: DecoderConfig, rows: int, slots: int) -> None:
    """Raises NotImplementedError where the backend asked for cannot decode this here."""
    backend = dispatch.serving("latent_attention", options.implementation)
    schedule = lambda lengths: dispatch.decode_schedule(  # noqa: E731
        config.attention, lengths, slots=slots, queries=1 + options.speculate,
        dtype=options.dtype, implementation=backend,
    )  # fmt: skip
    jax.eval_shape(schedule, jax.ShapeDtypeStruct((rows,), jnp.int32))


def _check_generate(options: Generate) -> None:
    """What the flags alone say: weights may take minutes to read."""
    if (options.checkpoint is None) == (options.preset is None):
        raise ValueError("give one of --checkpoint FOLDER and --preset NAME --random-weights.")
    if options.preset is not None and not options.random_weights:
        raise ValueError("a preset has no weights: add --random-weights, or --checkpoint.")
    if options.checkpoint is not None and options.random_weights:
        raise ValueError("--random-weights is for a --preset: a checkpoint has its own.")
    if options.prompt_tokens < 0 or options.batch < 1 or options.seed < 0:
        raise ValueError("--prompt-tokens and --seed must be at least 0, --batch at least 1.")
    if bool(options.prompt) == bool(options.prompt_tokens):
        raise ValueError("give --prompt TEXT, or --prompt-tokens NUMBER.")
    if options.batch > 1 and len(options.prompt) > 1:
        raise ValueError(
            f"--batch {options.batch} copies one prompt: here are {len(options.prompt)}, which are "
            "a batch."
        )
    _check_dtype(options.dtype)
    dispatch.check_implementation(options.implementation)
    generation._check_flags(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p,
        options.speculate, options.draft, options.block,
    )  # fmt: skip


def _source(options: Generate) -> tuple[DecoderConfig, generation.Tokenizer, pathlib.Path | None]:
    """The model's config, its tokenizer, and where its weights are, if they are anywhere."""
    if options.checkpoint is None:
        assert options.preset is not None
        return DecoderConfig.from_preset(options.preset), generation.Tokenizer(), None
    with checkpoint.Checkpoint(options.checkpoint) as files:
        config, path = decoder_config(files), files.path
    folder = path if path.is_dir() else path.parent
    return config, generation.Tokenizer.from_checkpoint(folder), path


def _model(options: Generate, config: DecoderConfig, path: pathlib.Path | None, console):
    """The decoder, and a line about it."""
    mtp = options.draft == "mtp"
    given = {"dtype": options.dtype, "implementation": options.implementation, "mtp": mtp}
    started = time.perf_counter()
    if path is not None:
        model, source = checkpoint.load_decoder(path, **given), options.checkpoint
    else:
        model = random_decoder(config, seed=options.seed, param_dtype=options.dtype, **given)
        source = f"{options.preset}, random weights"
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(
        f"{source}: {sum(leaf.size for leaf in leaves) / 1e9:.3f} G parameters, "
        f"{sum(leaf.nbytes for leaf in leaves) / 2**30:.2f} GiB, ready in "
        f"{time.perf_counter() - started:.1f} s on {jax.devices()[0].device_kind}"
    )
    return model


def _prompts(options: Generate, tokenizer, vocabulary: int) -> list[list[int]]:
    if options.prompt_tokens:
        random = np.random.default_rng(options.seed)
        shape = (options.batch, options.prompt_tokens)
        return random.integers(0, vocabulary, shape).tolist()
    prompts = tokenizer.encode(options.prompt)
    return prompts * options.batch if len(prompts) == 1 else prompts


def _check_dtype(name: str) -> None:
    try:
        known = jnp.dtype(name) in (jnp.bfloat16, jnp.float16, jnp.float32)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={name!r}: use bfloat16, float16 or float32.")


def _check_memory(config: DecoderConfig) -> None:
    """Refuses a model whose training would not fit this machine, where that is known."""
    shapes = jax.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
    need = 20 * sum(leaf.size for leaf in jax.tree.leaves(shapes))  # 5 x float32: Adam and copies
    statistics = jax.devices()[0].memory_stats() or {}
    have = statistics.get("bytes_limit")
    if have is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if have is not None and need > 0.8 * have:
        raise ValueError(
            f"training this preset takes about {need / 2**30:,.0f} GiB in float32, here are "
            f"{have / 2**30:,.0f} GiB: use a smaller preset, such as tiny."
        )


def save(model: Decoder, folder: str | os.PathLike) -> None:
    """Writes a model to `folder`: its parameters by orbax, its config as JSON."""
    folder = pathlib.Path(folder).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        checkpointer.save(folder / "parameters", parameters, force=True)
    config = json.dumps(dataclasses.asdict(model.config), indent=2)
    (folder / "config.json").write_text(config, encoding="utf-8")


def load(folder: str | os.PathLike, implementation: str | None = None) -> Decoder:
    """Reads a model that `save` wrote.

    Raises:
        FileNotFoundError: no model in `folder`.
    """
    folder = pathlib.Path(folder).absolute()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model that `mla-jax demo --save` wrote.")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = DecoderConfig(**fields | {"attention": MLAConfig(**fields["attention"])})
    model = Decoder(config, implementation=implementation, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "parameters", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(model, state)
    return model


def _costs(options: Costs, console: Console) -> None:
    config, device = MLAConfig.from_preset(options.preset), costs.device(options.device)
    rows = costs.table(
        config, device, context=options.context, batch=options.batch, queries=options.queries
    )
    table = Table(
        title=f"{options.preset}: {options.queries} token(s) in {options.batch} row(s) of "
        f"{options.context:,} on {options.device}, bf16",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    columns = ("attention", "GiB", "KiB/token", "read", "GFLOP", "op/byte", "us", "bound")
    for header in columns:
        table.add_column(header, justify="left" if header == "attention" else "right", no_wrap=True)

    def short(number):
        return f"{number:,.1f}" if number < 1000 else f"{number:,.0f}"

    for row in rows:
        table.add_row(
            row.kind, short(row.cache_bytes / 2**30) + ("" if row.fits else "!"),
            short(row.cache_bytes_per_token / 2**10), f"{row.numbers_read:,}",
            short(row.core.flops / 1e9), f"{row.core.intensity:,.0f}",
            short(row.core_seconds * 1e6), row.bound,
        )  # fmt: skip
    console.print(table)
    console.print(
        "GiB: cache of all layers, ! = more than the device has; read: numbers a context\n"
        "token and layer; operations and roofline time: attention core of one layer."
    )
    print(f"absorbed up to {costs.crossover_queries(config, options.context):.0f} new tokens per "
          "row, expanded above")  # fmt: skip
    until = costs.queries_until_slower(config, device)
    print(f"slower than MHA's core above {until:.1f} new tokens per row on long contexts")


def _explain(options: Explain) -> None:
    try:
        jnp.dtype(options.dtype)
    except TypeError as error:
        raise ValueError(f"dtype={options.dtype!r} is not a dtype: use e.g. bfloat16.") from error
    dispatch.explain(
        MLAConfig.from_preset(options.preset), batch_size=options.batch, length=options.length,
        queries=options.queries, dtype=options.dtype,
    )  # fmt: skip
