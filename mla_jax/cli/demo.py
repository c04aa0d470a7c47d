"""`mla-jax demo`: a small byte-level model learns from Python's standard library, then writes."""

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax import costs, target, training
from mla_jax.cli import Interrupted, saved
from mla_jax.cli.options import Demo, judging_flags
from mla_jax.cli.terminal import PARAMETERS, Terminal, quantity
from mla_jax.config import MLAConfig
from mla_jax.generation.steps import decode_loop, prefill_step, sample
from mla_jax.models import Decoder, DecoderConfig

_STEPS = 350
_HELD_OUT = 16 * 129  # bytes that `training.held_out_loss` reads


def demo(options: Demo) -> None:
    """Trains or loads a model, saves it where that is asked for, and prints what it writes."""
    terminal = Terminal(quiet=options.quiet, json=options.json)
    with judging_flags():
        if options.tokens < 1 or options.batch < 1 or (options.steps or 0) < 0:
            raise ValueError("--tokens and --batch must be at least 1, --steps at least 0.")
        if not options.prompt:
            raise ValueError("--prompt must not be empty.")
        # What `sample` would refuse after the training, it refuses now.
        sample(jnp.zeros((1, 1)), jax.random.key(0), temperature=options.temperature)
        if options.save is not None:  # before training, so that a folder that cannot be is known
            options.save.mkdir(parents=True, exist_ok=True)
        done, steps = _steps(options)
        with terminal.working("making the model" if options.load is None else "reading the model"):
            model = _model(options)
        _check_positions(options, model.config.attention)
    attention = model.config.attention
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    terminal.note(
        f"{quantity(count, PARAMETERS)}, {attention.num_hidden_layers} layers of "
        f"{attention.num_attention_heads} heads on {target.current().kind}"
        + (f"; the training goes on after step {done} of {steps}" if 0 < done < steps else "")
    )
    trained = _train(model, done, steps, options, terminal) if done < steps else {}
    written = _write(model, options, terminal)
    terminal.answer_json({"parameters": count, **trained, **written})


def _model(options: Demo) -> Decoder:
    if options.load is not None:
        return saved.load(options.load, options.implementation)
    attention = MLAConfig.from_preset(options.preset)
    config = DecoderConfig(attention=attention, tie_word_embeddings=True)
    _check_memory(config)
    return Decoder(config, implementation=options.implementation, rngs=nnx.Rngs(options.seed))


def _steps(options: Demo) -> tuple[int, int]:
    """Steps that are done already, and steps that are meant to be."""
    if options.steps is not None:
        return 0, options.steps
    return (0, _STEPS) if options.load is None else saved.load_training(options.load)


def _check_positions(options: Demo, attention: MLAConfig) -> None:
    slots = len(options.prompt.encode()) + options.tokens
    if slots > attention.max_position_embeddings:
        raise ValueError(
            f"prompt and tokens need {slots} positions, {options.preset} has "
            f"{attention.max_position_embeddings}: ask for fewer tokens."
        )


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


class _Stop:
    """A signal that asked the training to stop, and whether there is anything to keep by then."""

    received: int | None = None
    trained = 0


@contextlib.contextmanager
def _stoppable(keeps: bool) -> Generator[_Stop]:
    """Lets a signal end the training between two steps, where what was trained is kept.

    A step that is cut in half has donated its parameters already. Before the first step's end there
    is nothing to keep, and a second signal means it: both interrupt at once.
    """
    stop = _Stop()

    def note(received: int, frame: Any) -> None:
        if stop.received is not None or not stop.trained:
            raise Interrupted("interrupted", received)
        stop.received = received

    if not keeps or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.getsignal(each) for each in signals}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # a job in the background does not hear Ctrl-C
            signal.signal(each, note)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _train(
    model: Decoder, done: int, steps: int, options: Demo, terminal: Terminal
) -> dict[str, Any]:
    """Trains and saves; what there is to say of it.

    Raises:
        Interrupted: a signal ended it; what was trained is saved where that was asked for.
    """
    text = training.standard_library_text()
    with terminal.working("compiling"):
        before = training.held_out_loss(model, text)
    losses = training.train(
        model, text[:-_HELD_OUT], steps=steps, batch=options.batch, seed=options.seed, done=done
    )
    first = done
    with _stoppable(options.save is not None) as stop:
        with terminal.working("training") as report, contextlib.closing(losses):
            for loss in losses:
                done += 1
                stop.trained = done - first
                words = f"loss {loss:.2f} bits per byte"
                report(done, steps, words)
                if not terminal.animated and (stop.trained % 50 == 0 or done == steps):
                    terminal.note(f"step {done}: {words}")
                if stop.received is not None and done < steps:
                    break
        if options.save is not None:
            _save(model, options.save, done, steps, terminal)
    if done < steps:
        raise Interrupted(
            f"interrupted after {done} of {steps} steps, which {options.save} keeps: "
            f"--load {options.save} goes on.",
            stop.received or signal.SIGINT,
        )
    with terminal.working("measuring"):
        after = training.held_out_loss(model, text)
    terminal.note(f"held-out loss {before:.2f} before, {after:.2f} bits per byte after training")
    return {"steps": steps, "held_out_loss_before": before, "held_out_loss_after": after}


def _save(model: Decoder, folder: pathlib.Path, done: int, steps: int, terminal: Terminal) -> None:
    with terminal.working("saving"):
        saved.save(model, folder)
        saved.save_training(folder, done=done, steps=steps)
    if done == steps:
        terminal.note(f"saved to {folder}")


def _write(model: Decoder, options: Demo, terminal: Terminal) -> dict[str, Any]:
    """Prints the text, and how fast it came."""
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

    with terminal.working("compiling"):
        started = time.perf_counter()
        generate()
        compiled = time.perf_counter() - started
        written, first_token, rest = generate()
    text = bytes(np.asarray(written[0], np.uint8)).decode(errors="replace")
    terminal.answer(options.prompt + text)
    itemsize = jnp.dtype(model.blocks[0].mixers[0].param_dtype).itemsize
    ours = costs.cache_bytes(attention, 1, 1, width=itemsize)
    theirs = costs.cache_bytes(attention, 1, 1, "mha", width=itemsize)
    speed = (options.tokens - 1) / rest if options.tokens > 1 else None
    terminal.note("")
    terminal.notes([
        ("time to first token", f"{first_token * 1e3:.1f} ms"),
        *([("decoding", f"{speed:,.0f} tokens/s")] if speed is not None else []),
        ("compiling, once", f"{compiled - first_token - rest:.1f} s"),
        ("cache", f"{ours:,} bytes per token ({theirs:,} for MHA: {theirs / ours:.1f}x)"),
    ])  # fmt: skip
    terminal.explain(
        attention, length=slots, dtype="float32", implementation=options.implementation
    )
    return {
        "prompt": options.prompt, "text": text, "first_token_seconds": first_token,
        "tokens_per_second": speed, "compile_seconds": compiled - first_token - rest,
        "cache_bytes_per_token": ours,
    }  # fmt: skip
