"""How much attention loses by what latents are held in, against float64; needs no accelerator.

    python benchmarks/cache_error.py [--steps 200]

Trains a small byte-level model, takes the latents and the queries of its layers on text that it has
not seen, and attends to the latents as each kind of cache would hold them. Errors are relative, of
the mixed latents of all heads. Then the same with two channels of every latent 100 times the rest
(and these channels of the queries 100 times smaller, so that scores stay as they are); the errors
are those of the other channels.
"""

import argparse
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from mla_jax import MLAConfig, ops, training
from mla_jax.cache.scaled import GROUP, dequantise, quantise
from mla_jax.models import Decoder, DecoderConfig

_CONFIG = MLAConfig(
    hidden_size=128, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=256,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, num_hidden_layers=2,
)  # fmt: skip
_E4M3 = ml_dtypes.float8_e4m3fn
_LARGEST = {"fp8": 448.0, "int8": 127.0}
_OUTLIERS = (7, 131)  # channels, of either group


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    options = parser.parse_args()
    calls = activations(options.steps)
    print("| latents held in | bytes a token (512 + 64) | trained model | two channels x 100 |")
    print("|---|---|---|---|")
    for name, (size, hold) in _KINDS.items():
        plain = max(error(*call, hold) for call in calls)
        outliers = max(error(*spread(*call), hold, _OUTLIERS) for call in calls)
        print(f"| {name} | {size} | {plain:.2e} | {outliers:.2e} |")


def activations(steps: int) -> list[tuple[np.ndarray, ...]]:
    """Pattern, rotary queries, latents and rotary keys of every layer of a trained model."""
    model = Decoder(DecoderConfig(attention=_CONFIG), rngs=nnx.Rngs(0))
    text = training.standard_library_text()
    losses = list(training.train(model, text[:-4096], steps=steps, batch=8, length=128))
    print(f"{steps} steps, loss {losses[-1]:.2f} bits per byte; 8 queries after 1016 tokens\n")
    tokens, calls = jnp.asarray(text[-1024:], jnp.int32)[None], []
    real = ops.attend_latents

    def record(queries, store, seen, **more):
        calls.append((*queries, store.latent, store.k_rope))
        return real(queries, store, seen, **more)

    _, cache = model.extend(tokens[:, :-8], model.init_cache(1, 1024))
    with mock.patch.object(ops, "attend_latents", record):
        model.extend(tokens[:, -8:], cache)
    return [tuple(np.asarray(array, np.float64) for array in call) for call in calls]


def spread(pattern, q_rope, latent, k_rope):
    """The same with outliers."""
    pattern, latent = pattern.copy(), latent.copy()
    pattern[..., list(_OUTLIERS)] /= 100
    latent[..., list(_OUTLIERS)] *= 100
    return pattern, q_rope, latent, k_rope


def error(pattern, q_rope, latent, k_rope, hold, left_out=()) -> float:
    """Relative error of attention to latents that are held so, in channels that are not left out.

    Everything else is exact: what is measured is the cache alone.
    """
    kept = np.setdiff1d(np.arange(latent.shape[-1]), left_out)
    exact = attend(pattern, q_rope, latent, k_rope)[..., kept]
    found = attend(pattern, q_rope, hold(latent), k_rope)[..., kept]
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def attend(pattern, q_rope, latent, k_rope):
    """The absorbed form in float64; query t of T is the last of S - (T-1-t) tokens."""
    scores = np.einsum("BTNR,BSR->BTNS", pattern, latent)
    scores = _CONFIG.scale * (scores + np.einsum("BTNP,BSP->BTNS", q_rope, k_rope))
    tokens, slots = pattern.shape[1], latent.shape[1]
    limits = slots - (tokens - 1 - np.arange(tokens))
    scores = np.where(np.arange(slots) < limits[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BTNS,BSR->BTNR", weights / weights.sum(-1, keepdims=True), latent)


def ours(kind: str) -> Callable:
    """A scale for each token and 128 channels, a power of two."""
    held = {"fp8": "float8_e4m3fn", "int8": "int8"}[kind]

    def hold(latent):
        values = quantise(jnp.asarray(latent, jnp.float32), held)
        return np.asarray(dequantise(*values, jnp.float32), np.float64)

    return hold


def float_scales(kind: str, whole: bool) -> Callable:
    """A float32 scale for each token and 128 channels, or one for everything."""

    def hold(latent):
        groups = latent.reshape(*latent.shape[:-1], -1, GROUP)
        largest = np.abs(groups).max(None if whole else -1, keepdims=True)
        scale = (largest / _LARGEST[kind]).astype(np.float32).astype(np.float64)
        scaled = groups / scale
        rounded = np.round(scaled) if kind == "int8" else scaled.astype(_E4M3).astype(np.float64)
        return (rounded * scale).reshape(latent.shape)

    return hold


_KINDS = {
    "bfloat16": (1152, lambda latent: latent.astype(ml_dtypes.bfloat16).astype(np.float64)),
    "float8_e4m3fn, powers of two (`Scaled`)": (656, ours("fp8")),
    "float8_e4m3fn, float32 scales": (656, float_scales("fp8", whole=False)),
    "float8_e4m3fn, one scale for all": (640, float_scales("fp8", whole=True)),
    "int8, powers of two (`Scaled`)": (656, ours("int8")),
    "int8, float32 scales": (656, float_scales("int8", whole=False)),
    "int8, one scale for all": (640, float_scales("int8", whole=True)),
}

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
