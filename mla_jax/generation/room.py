"""Whether prompts and new tokens fit into a cache and a model, before anything is computed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_jax.cache import PAGE, Cache, stripes
from mla_jax.generation import prefill
from mla_jax.generation import request as _request
from mla_jax.generation.request import Request
from mla_jax.sharding import Rules


def check_fits(
    model: Any,
    prompts: Sequence[Any],
    request: Request,
    cache: Cache | None = None,
    sharding: Rules | None = None,
) -> int:
    """The cache's length, after a look at what prompts and new tokens need.

    Args:
        model: whose limits count; or its config.
        prompts: rows of tokens.
        request: what is asked for.
        cache: that the prompts follow, or None.
        sharding: as in `generate`; a length that is nobody's wish is one that it can split.

    Raises:
        ValueError: they do not fit; the message says what they need.

    >>> check_fits(None, [[3, 1, 4]], Request(max_new_tokens=8))
    256
    """
    held = held_tokens(cache, len(prompts) * request.samples)
    lengths = np.tile([len(prompt) for prompt in prompts], request.samples)
    ends = held + lengths + request.max_new_tokens
    longest, limit = int(ends.max()), positions(model)
    need = longest + request.speculate
    if cache is not None:
        slots = cache.max_length
    else:
        step = stripes.step(sharding)
        slots = request.max_length or _request.cache_length(need, limit, step)
    if slots < need or (limit is not None and longest > limit):
        row = int(ends.argmax())
        before = f"{held[row]} held tokens, " if held[row] else ""
        raise ValueError(
            f"max_length={slots}: {before}a prompt of {lengths[row]} tokens, "
            f"{request.max_new_tokens} new ones and {request.speculate} drafts need {need} slots"
            + ("." if limit is None else f"; the model has {limit} positions.")
        )
    if cache is None and request.pages is not None:
        if slots % PAGE:
            raise ValueError(f"max_length={slots}: with pages it must be a multiple of {PAGE}.")
        shared = prefill.shared_prefix([np.asarray(prompt) for prompt in prompts])
        whole = -(-(lengths + request.max_new_tokens + request.speculate) // PAGE)
        own = lengths[: len(prompts)] // PAGE - shared // PAGE  # of a prompt, for all its samples
        pages = int(whole.sum()) - (len(lengths) - 1) * (shared // PAGE)
        pages -= (request.samples - 1) * int(own.sum())
        if pages > request.pages:
            raise ValueError(
                f"pages={request.pages}: prompts, new tokens and drafts need {pages} pages of "
                f"{PAGE} slots."
            )
    return slots


def positions(model: Any) -> int | None:
    """How many positions a model or its config has; None where it does not say.

    >>> import mla_jax
    >>> positions(mla_jax.MLAConfig.from_preset("tiny"))
    1024
    """
    config = getattr(model, "config", model)
    for part in (config, getattr(config, "attention", None)):
        value = getattr(part, "max_position_embeddings", None)
        if isinstance(value, int):
            return value
    return None


def held_tokens(cache: Cache | None, rows: int) -> np.ndarray:
    """Tokens that the rows hold, int32 [B]."""
    if cache is None:
        return np.zeros(rows, np.int32)
    if not isinstance(cache, Cache) or cache.batch_size != rows:
        have = f"{cache.batch_size} rows" if isinstance(cache, Cache) else f"{cache!r:.80}"
        raise ValueError(f"cache: it must be a Cache of {rows} rows, one a prompt; it is {have}.")
    if np.asarray(cache.overflowed).any():
        raise ValueError("cache: rows have overflowed, and lack tokens: truncate or reset them.")
    return np.asarray(cache.length).astype(np.int32)
