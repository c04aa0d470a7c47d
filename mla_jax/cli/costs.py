"""`mla-jax costs`, `presets` and `devices`: arithmetic on configs, which needs no JAX."""

import dataclasses
import math
import tomllib
from typing import Any

from mla_jax import costs as arithmetic
from mla_jax.cli.options import Costs, Devices, Presets, judging_flags
from mla_jax.cli.terminal import BYTES, OPERATIONS, SECONDS, Terminal, quantity
from mla_jax.config import MLAConfig, aliases, configs_dir
from mla_jax.config import presets as preset_names


def costs(options: Costs) -> None:
    """Prints the table of `mla_jax.costs.table` for a preset and a device."""
    with judging_flags():
        config, device = MLAConfig.from_preset(options.preset), arithmetic.device(options.device)
        rows = arithmetic.table(
            config, device, context=options.context, batch=options.batch,
            queries=options.queries, cache_dtype=options.cache_dtype,
            weight_dtype=options.weight_dtype,
        )  # fmt: skip
        placed = _placed(options)
    terminal = Terminal(quiet=options.quiet, json=options.json)
    crossover = arithmetic.crossover_queries(config, options.context)
    slower = arithmetic.queries_until_slower(config, device)
    terminal.answer_json({
        "preset": options.preset, "device": options.device, "context": options.context,
        "batch": options.batch, "queries": options.queries, "cache_dtype": options.cache_dtype,
        "weight_dtype": options.weight_dtype,
        "num_hidden_layers": config.num_hidden_layers, "mla_layers": config.mla_layers,
        "crossover_queries": crossover,
        "queries_until_slower": slower if math.isfinite(slower) else None,
        "rows": [_row_json(row, device) for row in rows], "placement": placed,
    })  # fmt: skip
    terminal.paragraph(
        f"{options.preset}: {options.queries:,} new token(s) in {options.batch:,} row(s) of "
        f"{options.context:,} on {options.device}, bf16, {_layers(config)}"
        + (f", latents cached in {options.cache_dtype}" if options.cache_dtype else "")
        + (f", weights in {options.weight_dtype}" if options.weight_dtype else "")
    )
    terminal.answer()
    headers = ("attention", "cache", "per token", "read", "operations", "op/byte", "time", "bound")
    terminal.table(
        headers,
        [
            (
                row.kind,
                quantity(row.cache_bytes, BYTES, 1024) + ("" if row.fits else "!"),
                quantity(row.cache_bytes_per_token, BYTES, 1024), f"{row.numbers_read:,}",
                quantity(row.core.flops, OPERATIONS), f"{row.core.intensity:,.1f}",
                quantity(row.core_seconds * 1e12, SECONDS), row.bound,
            )
            for row in rows
        ],
    )  # fmt: skip
    terminal.answer()
    terminal.paragraph(
        "cache: of all these layers and rows, ! where that is more than the device has; read: "
        "numbers for a context token in one layer; operations, op/byte, time (roofline) and bound: "
        "of the attention core in one layer."
    )
    if crossover >= options.context:
        terminal.paragraph("absorbed for any number of new tokens per row")
    else:
        terminal.paragraph(
            f"absorbed up to {crossover:.0f} new tokens per row, expanded above (by operations)"
        )
    if math.isfinite(slower):
        terminal.paragraph(
            f"slower than MHA's core above {slower:.1f} new tokens per row on long contexts"
        )
    else:
        terminal.paragraph("never slower than MHA's core on long contexts")
    if placed is not None:
        _tell_placed(terminal, options, placed, device)
    for remark in _remarks(config, options.context):
        terminal.paragraph(f"note: {remark}")


def _placed(options: Costs) -> dict[str, Any] | None:
    """What the whole model costs each device of the mesh; None without one.

    Raises:
        ValueError: rules without a mesh, or that do not go with it; a preset of attention alone.
    """
    if options.mesh is None:
        if options.place is not None:
            raise ValueError("--place says how a mesh splits arrays: give its axes by --mesh too.")
        return None
    # Only this needs JAX.
    from mla_jax.cli.mesh import rules_of
    from mla_jax.models.config import DecoderConfig
    from mla_jax.placing import placement

    found = placement(
        DecoderConfig.from_preset(options.preset), mesh=options.mesh,
        sharding=rules_of(options.mesh, options.place), batch_size=options.batch,
        length=options.context, queries=options.queries,
    )  # fmt: skip
    memory = arithmetic.device(options.device).memory_bytes
    return dataclasses.asdict(found) | {
        "bytes": found.bytes, "fits": found.bytes <= 0.9 * memory,
        "rows_that_fit": found.rows_that_fit(memory),
    }  # fmt: skip


def _tell_placed(terminal: Terminal, options: Costs, placed: dict[str, Any], device) -> None:
    """The table of one device of a mesh."""
    size = lambda number: quantity(number, BYTES, 1024)  # noqa: E731
    terminal.answer()
    terminal.paragraph(f"the whole model, each of {placed['devices']} devices:")
    links = {f"links, {name}": sent for name, sent in placed["link_bytes"].items() if sent}
    held = {"weights": placed["weight_bytes"], "cache": placed["cache_bytes"]}
    every = held | links | {"links": sum(links.values())}
    terminal.table(("what", "bytes"), [(name, size(int(value))) for name, value in every.items()])
    terminal.answer()
    verdict = "fits" if placed["fits"] else "does not fit"
    terminal.paragraph(
        f"This {verdict} into 9/10 of {size(device.memory_bytes)}; {placed['rows_that_fit']:,} "
        f"rows of {options.context:,} would. links: what a device sends in a step, at least."
    )


def presets(options: Presets) -> None:
    """Prints what every preset makes."""
    terminal = Terminal(quiet=options.quiet, json=options.json)
    found = [_preset(name) for name in preset_names()]
    terminal.answer_json({"presets": found})
    terminal.table(
        ("preset", "makes", "layers", "MLA", "heads", "latent", "rotary", "cache per token"),
        [
            (
                preset["name"], preset["makes"], str(preset["num_hidden_layers"]),
                str(preset["mla_layers"]), str(preset["num_attention_heads"]),
                str(preset["kv_lora_rank"]), str(preset["qk_rope_head_dim"]),
                quantity(preset["cache_bytes_per_token"], BYTES, 1024),
            )
            for preset in found
        ],
    )  # fmt: skip
    terminal.answer()
    terminal.paragraph(
        "makes: model, for `generate --random-weights` and `mla_jax.models.Decoder`; layer, for "
        "`mla_jax.MultiHeadLatentAttention`, whatever the rest of the model is. MLA: attentions of "
        "this kind in the whole model. Cache in bf16, with index keys where attention is sparse."
    )
    for preset in found:
        if preset["aliases"]:
            terminal.paragraph(f"{preset['name']} is also {', '.join(preset['aliases'])}")


def devices(options: Devices) -> None:
    """Prints the devices of configs/devices.toml."""
    terminal = Terminal(quiet=options.quiet, json=options.json)
    found = list(arithmetic.devices().values())
    terminal.answer_json({
        "devices": [dataclasses.asdict(device) | {"ridge": device.ridge} for device in found]
    })  # fmt: skip
    terminal.table(
        ("device", "TFLOP/s", "TB/s", "memory", "op/byte"),
        [
            (
                device.name, f"{device.flops_per_second / 1e12:,.1f}",
                f"{device.bytes_per_second / 1e12:,.3f}",
                quantity(device.memory_bytes, BYTES, 1024), f"{device.ridge:,.1f}",
            )
            for device in found
        ],
    )  # fmt: skip
    terminal.answer()
    terminal.paragraph(
        "Peak rates of dense bf16 matrix operations and of the main memory; op/byte: operations "
        "per byte above which work is bound by arithmetic."
    )


def _preset(name: str) -> dict[str, Any]:
    """What there is to say of a preset."""
    config = MLAConfig.from_preset(name)
    file = configs_dir() / "models" / f"{name}.toml"
    whole = "decoder" in tomllib.loads(file.read_text(encoding="utf-8"))
    return {
        "name": name,
        "makes": "model" if whole else "layer",
        "aliases": aliases(name),
        "num_hidden_layers": config.num_hidden_layers,
        "mla_layers": config.mla_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "cache_bytes_per_token": arithmetic.cache_bytes(
            config, 1, 1, "absorbed" if config.index_topk is None else "sparse"
        ),
    }


def _layers(config: MLAConfig) -> str:
    layers, ours = config.num_hidden_layers, config.mla_layers
    if ours == layers:
        return f"{layers} layers"
    if ours > layers:
        return f"{ours} attentions in {layers} layers"
    return f"{ours} of {layers} layers"


def _remarks(config: MLAConfig, context: int) -> list[str]:
    """What the numbers leave out."""
    remarks = []
    if config.mla_layers < config.num_hidden_layers:
        remarks.append(
            f"the model's other {config.num_hidden_layers - config.mla_layers} layers are no MLA; "
            "what they hold and do is not counted."
        )
    if config.index_topk is not None:
        remarks.append(
            f"the model attends to {config.index_topk:,} chosen tokens: sparse is its row, with "
            "the index keys that choose as if every layer had them; absorbed attends to all."
        )
    if context > config.max_position_embeddings:
        remarks.append(f"the model has {config.max_position_embeddings:,} positions.")
    return remarks


def _row_json(row: arithmetic.Row, device: arithmetic.Device) -> dict[str, Any]:
    def numbers(part: arithmetic.Costs) -> dict[str, Any]:
        return {
            "flops": part.flops, "bytes": part.bytes, "seconds": part.seconds(device),
            "bound": part.bound(device),
        }  # fmt: skip

    return {
        "kind": row.kind, "numbers_read": row.numbers_read,
        "cache_bytes_per_token": row.cache_bytes_per_token, "cache_bytes": row.cache_bytes,
        "fits": row.fits, "core": numbers(row.core), "layer": numbers(row.layer),
    }  # fmt: skip
