"""The command `mla-jax`: a demo that trains and decodes, costs of a preset, and what would run."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mla_jax import costs, training
from mla_jax.config import MLAConfig
from mla_jax.decoding import decode_loop, prefill_step, sample
from mla_jax.models import Decoder, DecoderConfig
from mla_jax.ops import api

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


def main(args: list[str] | None = None) -> None:
    """Runs a subcommand; a wrong argument ends with its one-line error and exit status 2."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "costs": Costs, "explain": Explain}, args=args, prog="mla-jax"
    )
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        if isinstance(command, Demo):
            _demo(command, console)
        elif isinstance(command, Costs):
            _costs(command, console)
        else:
            _explain(command)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        print(f"mla-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _demo(options: Demo, console: Console) -> None:
    if options.tokens < 1 or options.batch < 1 or (options.steps or 0) < 0 or not options.prompt:
        raise ValueError("tokens and batch must be at least 1, steps at least 0, prompt not empty.")
    if options.load is not None:
        model = load(options.load, options.implementation)
    else:
        config = DecoderConfig(attention=MLAConfig.from_preset(options.preset))
        _check_memory(config)
        model = Decoder(config, implementation=options.implementation, rngs=nnx.Rngs(options.seed))
    attention = model.config.attention
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
    if slots > attention.max_position_embeddings:
        raise ValueError(
            f"prompt and tokens need {slots} positions, {options.preset} has "
            f"{attention.max_position_embeddings}: ask for fewer tokens."
        )
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
    api.explain(attention, length=slots, dtype="float32")


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
    api.explain(
        MLAConfig.from_preset(options.preset), batch_size=options.batch, length=options.length,
        queries=options.queries, dtype=options.dtype,
    )  # fmt: skip
