"""The flags of every command, as dataclasses. Nothing here needs JAX: help and errors are quick."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import pathlib
import sys
import types
import typing
from collections.abc import Generator, Sequence
from typing import Any, Literal, NoReturn

import mla_jax

_BACKENDS = "backend of attention instead of a choice, for all ops or as OP=NAME,..."


class BadFlags(Exception):
    """What the command line asks for cannot be; its message says what would be right."""


@contextlib.contextmanager
def judging_flags() -> Generator[None]:
    """Whatever is refused inside was asked for by flags: nothing has been computed yet."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        raise BadFlags(error) from error


def _implementation(text: str) -> str | dict[str, str]:
    """A backend's name for all ops, or OP=NAME for some: latent_attention=xla,..."""
    if "=" not in text:
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {op.strip(): name.strip() for op, _, name in pairs}


def _sizes(text: str) -> dict[str, int]:
    """The axes of a mesh: data=8,model=8."""
    sizes = {}
    for name, value in _pairs(text, "data=8,model=8"):
        if not value.isdecimal() or not int(value):
            raise argparse.ArgumentTypeError(f"{name}={value}: a size is a number of devices.")
        sizes[name] = int(value)
    return sizes


def _axes(text: str) -> dict[str, tuple[str, ...]]:
    """The axes of letters: B=data,E=data+model."""
    return {name: tuple(value.split("+")) for name, value in _pairs(text, "B=data,E=data+model")}


def _pairs(text: str, example: str) -> list[tuple[str, str]]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = [(name.strip(), value.strip()) for name, _, value in pairs]
    names = [name for name, _ in found]
    if not all(name and value for name, value in found) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: write it like {example}.")
    return found


def _flag(default: Any, text: str, **more: Any) -> Any:
    """A field that becomes `--its-name`; `more` is for argparse's `add_argument`."""
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _positional(text: str) -> Any:
    """A field that is given by its place."""
    return dataclasses.field(metadata={"help": text})


@dataclasses.dataclass(kw_only=True)
class Output:
    """How a command answers that has a result for programs too."""

    json: bool = _flag(False, "print one JSON object on standard output, nothing else there")
    quiet: bool = _flag(False, "print nothing on standard error but errors")


@dataclasses.dataclass(kw_only=True)
class Compiling(Output):
    """How a command that compiles programs answers, and what it keeps of them."""

    compilation_cache: bool = _flag(
        True,
        "keep compiled programs for the next run, in JAX_COMPILATION_CACHE_DIR or the user's cache "
        "folder",
        action=argparse.BooleanOptionalAction,
    )


@dataclasses.dataclass(kw_only=True)
class Demo(Compiling):
    """Train a small byte-level model on Python's standard library, then let it write.

    Ctrl-C ends the training; with --save what was trained so far is kept, and --load goes on with
    it.
    """

    preset: str = _flag("tiny", "attention of every layer: one of `mla-jax presets`")
    steps: int | None = _flag(
        None, "optimizer steps; by default 350, or with --load those that an interrupted run left"
    )
    batch: int = _flag(8, "windows of a step")
    seed: int = _flag(0, "of initialization, data and sampling; the same seed gives the same text")
    implementation: str | dict[str, str] | None = _flag(
        None, _BACKENDS, type=_implementation, metavar="NAME"
    )
    prompt: str = _flag("def read(self, path):\n    ", "what the text goes on from", metavar="TEXT")
    tokens: int = _flag(256, "bytes to generate")
    temperature: float = _flag(0.6, "of sampling; 0 takes the most likely byte")
    save: pathlib.Path | None = _flag(None, "folder to write the model to", metavar="FOLDER")
    load: pathlib.Path | None = _flag(
        None, "folder to read a model from, instead of initializing one", metavar="FOLDER"
    )


@dataclasses.dataclass(kw_only=True)
class Writing(Compiling):
    """How text is written: fields of `generation.Request` and `generation.Sampling`.

    None stands for what the checkpoint's generation_config.json says.
    """

    max_new_tokens: int = _flag(128, "of each row")
    max_length: int | None = _flag(None, "slots of the cache instead of what is needed")
    temperature: float | None = _flag(
        None, "of sampling; 0 is greedy (default: the checkpoint's own, else 0)"
    )
    top_k: int | None = _flag(None, "draw among the k most likely tokens")
    top_p: float | None = _flag(
        None, "draw among the likeliest tokens that reach this probability together"
    )
    min_p: float | None = _flag(
        None, "draw among tokens at least this many times as likely as the likeliest"
    )
    repetition_penalty: float | None = _flag(
        None, "above 1, makes tokens that were there before less likely"
    )
    seed: int = _flag(0, "of sampling, random weights and random tokens")
    stop_strings: list[str] = _flag([], "texts that end a row", metavar="TEXT")
    stop_tokens: list[int] = _flag([], "tokens that end a row, beside the checkpoint's own")
    speculate: int = _flag(0, "tokens to draft and verify at once")
    draft: Literal["prompt", "mtp"] = _flag(
        "prompt",
        "by looking the text's end up in it, or by the model's multi-token prediction",
    )
    block: int = _flag(16, "decode steps in one program, after which a single text is shown")
    dtype: str = _flag("bfloat16", "of parameters, computation and cache")
    cache_dtype: Literal["float8_e4m3fn", "int8"] | None = _flag(
        None, "of the cache's latents, which then have scales and take a byte a number"
    )
    weights: Literal["dequantised", "as-stored"] = _flag(
        "dequantised", "what becomes of a checkpoint's quantised weights when they are read"
    )
    implementation: str | dict[str, str] | None = _flag(
        None, _BACKENDS, type=_implementation, metavar="NAME"
    )


@dataclasses.dataclass(kw_only=True)
class Generate(Writing):
    """Continue prompts with a model from a checkpoint, or at real shapes with random weights."""

    checkpoint: str | None = _flag(
        None, "folder (or, with huggingface_hub, repo id) of a model of DeepSeek's shape"
    )
    preset: str | None = _flag(None, "a whole model of `mla-jax presets`, with --random-weights")
    random_weights: bool = _flag(
        False,
        "initialize the preset at random, to measure speed",
        action=argparse.BooleanOptionalAction,
    )
    prompt: list[str] = _flag(
        [], "what to continue; several make a batch; - reads one from standard input",
        metavar="TEXT",
    )  # fmt: skip
    prompt_file: list[pathlib.Path] = _flag(
        [], "files that hold a prompt each; a last line break is not part of it", metavar="FILE"
    )
    prompt_tokens: int = _flag(
        0, "instead of a prompt, this many random tokens in each of --batch rows"
    )
    batch: int = _flag(1, "rows of random tokens, or copies of a single prompt")
    samples: int = _flag(1, "continuations of every prompt")
    pages: int | None = _flag(
        None, "pages of 128 slots that all rows share, instead of slots of their own"
    )
    logprobs: bool = _flag(False, "with --json, the log probabilities of the new tokens too")
    mesh: dict[str, int] | None = _flag(
        None, "axes of a mesh of all devices, such as data=8,model=8", type=_sizes,
        metavar="AXIS=SIZE,...",
    )  # fmt: skip
    place: dict[str, tuple[str, ...]] | None = _flag(
        None,
        "the axes that letters are split over, such as B=data,N=model,E=data+model: B rows, S "
        "slots, N heads, E experts, F inner size of MLPs, W words, D other axis of kernels",
        type=_axes, metavar="LETTER=AXIS+...,...",
    )  # fmt: skip
    distributed: str | None = _flag(
        None,
        "run as one of several processes, each started with the same flags: those that the cluster "
        "says, or COUNT in all of which this is number INDEX",
        nargs="?", const="", metavar="ADDRESS:PORT,COUNT,INDEX",
    )  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Chat(Writing):
    """Converse with a model: every line of standard input is a turn, by the model's own template.

    The cache is kept between turns, so that only new tokens are prefilled.
    """

    checkpoint: str = _flag(
        "", "folder (or, with huggingface_hub, repo id) of a model with a chat template"
    )
    system: str | None = _flag(None, "what the model is told before the first turn", metavar="TEXT")


@dataclasses.dataclass(kw_only=True)
class Costs(Output):
    """What a step of decoding costs, for MLA's forms and for MHA, GQA and MQA of the same heads."""

    preset: str = _positional("one of `mla-jax presets`")
    device: str = _flag("h200", "one of `mla-jax devices`")
    context: int = _flag(32768, "tokens that every row holds")
    batch: int = _flag(1, "rows")
    queries: int = _flag(1, "new tokens of a row")
    cache_dtype: Literal["float8_e4m3fn", "int8"] | None = _flag(
        None, "of MLA's cached latents, with scales"
    )
    weight_dtype: Literal["float8_e4m3fn", "int8", "int4"] | None = _flag(
        None, "of all weights, with scales"
    )
    mesh: dict[str, int] | None = _flag(
        None, "what each device of a mesh holds and sends, such as data=8,model=8", type=_sizes,
        metavar="AXIS=SIZE,...",
    )  # fmt: skip
    place: dict[str, tuple[str, ...]] | None = _flag(
        None, "the axes that letters are split over, as in `mla-jax generate`", type=_axes,
        metavar="LETTER=AXIS+...,...",
    )  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Explain:
    """Which form and backend would run here, and why the others would not."""

    preset: str = _positional("one of `mla-jax presets`")
    length: int = _flag(4096, "slots of the cache")
    batch: int = _flag(1, "rows")
    queries: int = _flag(1, "new tokens of a row")
    dtype: str = _flag("bfloat16", "of the cache and the computation")
    cache_dtype: Literal["float8_e4m3fn", "int8"] | None = _flag(
        None, "of the cache's latents, with scales"
    )


@dataclasses.dataclass(kw_only=True)
class Presets(Output):
    """The released models that are built in, and what each makes."""


@dataclasses.dataclass(kw_only=True)
class Devices(Output):
    """The accelerators that `costs` knows, with their peak rates."""


Options = Demo | Generate | Chat | Costs | Explain | Presets | Devices
COMMANDS: dict[str, type[Options]] = {
    "demo": Demo, "generate": Generate, "chat": Chat, "costs": Costs, "explain": Explain,
    "presets": Presets, "devices": Devices,
}  # fmt: skip

# What a word behind a command that takes flags alone was probably meant as.
_INSTEAD = {
    "generate": ["--checkpoint FOLDER --prompt TEXT"], "chat": ["--checkpoint FOLDER"],
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise BadFlags(f"{message} ({self.prog} --help lists what there is)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if sys.stdout is not None:
            sys.stdout.flush()  # here a pipe that nobody reads can still be told
        super().exit(status, message)


class _Version(argparse.Action):
    """Prints the versions that a report of a fault needs."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
        print(f"mla-jax {mla_jax.__version__} ({others})")
        parser.exit()


def parse(args: Sequence[str] | None = None) -> Options:
    """The command and its flags.

    Args:
        args: the words after the program's name; None takes the process's own.

    Raises:
        BadFlags: what cannot be parsed; its message is one line.
        SystemExit: after --help or --version.

    >>> parse(["costs", "deepseek_v3", "--batch", "8"]).batch
    8
    >>> parse(["costs", "deepseek_v3", "--bach", "8"])
    Traceback (most recent call last):
    mla_jax.cli.options.BadFlags: --bach is no flag. Did you mean --batch? (mla-jax costs --help ...
    """
    parser = _Parser(prog="mla-jax", description=mla_jax.__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS,
        help="print the version and exit",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: _add_command(commands, name, cls) for name, cls in COMMANDS.items()}
    words = [_hyphens(word) for word in (sys.argv[1:] if args is None else args)]
    found, unknown = parser.parse_known_args(words)
    if unknown:
        parser = parsers[found.command]
        flags = [_name(field) for field in dataclasses.fields(COMMANDS[found.command])]
        name = unknown[0].partition("=")[0]
        close, what = difflib.get_close_matches(name, flags, n=1), "flag"
        if not name.startswith("-"):
            what, close = "argument of this command", close or _INSTEAD.get(found.command)
        parser.error(f"{name} is no {what}." + (f" Did you mean {close[0]}?" if close else ""))
    values = vars(found)
    return COMMANDS[values.pop("command")](**values)


def _hyphens(word: str) -> str:
    """--max_new_tokens is --max-new-tokens."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _add_command(commands, name: str, cls: type[Options]) -> _Parser:
    fields = dataclasses.fields(cls)
    places = "".join(f" {field.name.upper()}" for field in fields if _is_positional(field))
    parser = commands.add_parser(
        name, help=(cls.__doc__ or "").split("\n")[0], description=cls.__doc__, allow_abbrev=False,
        usage=f"mla-jax {name}{places} [FLAGS]",
    )  # fmt: skip
    own = [field for field in fields if field.name in vars(cls).get("__annotations__", {})]
    for field in own + [field for field in fields if field not in own]:
        _add_flag(parser, field)
    return parser


def _add_flag(parser: _Parser, field: dataclasses.Field) -> None:
    more: dict[str, Any] = dict(field.metadata)
    kind = next(kind for kind in _kinds(field.type) if kind is not types.NoneType)
    if _is_positional(field):
        parser.add_argument(field.name, type=kind, metavar=field.name.upper(), **more)
        return
    default = [] if field.default is dataclasses.MISSING else field.default
    if kind is bool:
        more.setdefault("action", "store_true")
    elif typing.get_origin(kind) is list:
        more |= {"type": typing.get_args(kind)[0], "nargs": "+", "action": "extend"}
    elif typing.get_origin(kind) is Literal:
        more["choices"] = typing.get_args(kind)
    else:
        more.setdefault("type", kind)
        more.setdefault("metavar", {int: "N", float: "X"}.get(kind, "NAME"))
    if default is not None and default != [] and kind is not bool:
        shown = repr(default) if "\n" in str(default) else default
        more["help"] += f" (default: {shown})"
    parser.add_argument(_name(field), default=default, **more)


def _is_positional(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _name(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)
