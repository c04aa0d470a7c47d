"""Text from a model: prompts, chunked prefill, decoding on the device, drafts.

    model = mla_jax.checkpoint.load_decoder(folder)
    tokenizer = Tokenizer.from_checkpoint(folder)
    result = generate(model, ["Once upon a time"], tokenizer=tokenizer, max_new_tokens=64)
    print(result.texts[0])

A model is whatever has

    init_cache(batch, slots, dtype=None, pages=None) -> Cache
    extend(tokens, cache, lengths=None) -> (hidden, cache)
    logits(hidden)

and, to be placed on a mesh, the argument sharding=None of `init_cache` too.

The way of a token: `bound` takes the model's arrays out once; `request` makes rows of the prompts
and `room` asks whether they fit; `prefill` puts the prompts into the cache in chunks of a few
widths; `loop` has `drafts` guess ahead, draws (`sampling`), verifies and writes on the device, in
blocks of steps that are one compiled program with the cache donated. The host hears of tokens a
block at a time: `collector` keeps them, and `stream` makes text of them. Prefill and loop both call
the model's `extend` (`models.Decoder`), which calls its layers (`layers.attention`). A layer writes
the token's latent into the cache (`ops.append`) and asks `ops` for its attention; `ops.dispatch`
picks a backend, and on a Hopper GPU `ops.hopper` picks one of four kernels by shape.

Letters: P prompts, B = P n rows, T tokens of a step, S slots of the cache, W words, K drafts.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mla_jax import target as _target
from mla_jax.cache import Cache
from mla_jax.cache import stripes as _stripes
from mla_jax.generation import bound as _bound
from mla_jax.generation import clock as _clock
from mla_jax.generation import collector as _collector
from mla_jax.generation import drafts, loop, steps
from mla_jax.generation import prefill as _prefill
from mla_jax.generation import request as _request
from mla_jax.generation import room as _room
from mla_jax.generation.bound import Bound as Bound
from mla_jax.generation.bound import bind as bind
from mla_jax.generation.defaults import GenerationDefaults as GenerationDefaults
from mla_jax.generation.request import Request as Request
from mla_jax.generation.room import check_fits as check_fits
from mla_jax.generation.room import positions as positions
from mla_jax.generation.sampling import Sampling as Sampling
from mla_jax.generation.sampling import check_sampling as check_sampling
from mla_jax.generation.sampling import mark_seen as mark_seen
from mla_jax.generation.sampling import sample as sample
from mla_jax.generation.stream import StopStrings as StopStrings
from mla_jax.generation.stream import TextStream as TextStream
from mla_jax.generation.tokenizer import Tokenizer as Tokenizer
from mla_jax.sharding import Rules
from mla_jax.sharding import whole as _whole


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` made.

    With n samples of P prompts there are P n rows: sample j of prompt p is row j P + p.

    Attributes:
        tokens: per row the new tokens, up to and with the one that ended it.
        first_token_seconds: from the start to the first token of all rows, compilation aside.
        decode_seconds: from there to the end.
        compile_seconds: spent compiling.
        new_tokens: of all rows, the first ones included.
        steps: passes of the model after the prefill.
        cache_bytes: of all layers.
        accepted: share of drafted tokens that were right; None without speculation.
        cache: holds all of every row's tokens but the last, for another `generate`.
        logprobs: per row the log probabilities of its new tokens, by the model's own logits,
            before temperature and the like; None unless asked for.
        texts: per row the new text, without a stop string; None without a tokenizer.

    >>> result = Result([[7, 1], [5, 2]], first_token_seconds=0.1, decode_seconds=0.5,
    ...                 compile_seconds=3.0, new_tokens=4, steps=1, cache_bytes=1024)
    >>> result.tokens_per_second  # the first token of each row comes from its prefill
    4.0
    """

    tokens: list[list[int]]
    first_token_seconds: float
    decode_seconds: float
    compile_seconds: float
    new_tokens: int
    steps: int
    cache_bytes: int
    accepted: float | None = None
    cache: Cache | None = dataclasses.field(default=None, repr=False)
    logprobs: list[list[float]] | None = None
    texts: list[str] | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding."""
        after_first = self.new_tokens - len(self.tokens)
        return after_first / self.decode_seconds if self.decode_seconds > 0 else 0.0


def generate(
    model: Any,
    prompts: Any,
    request: Request | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Cache | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    sharding: Rules | None = None,
    **options: Any,
) -> Result:
    """Continues prompts.

    With speculation a greedy text is the same up to rounding: a step over K+1 tokens multiplies
    matrices of another shape than a step over one, and in bfloat16 two words whose logits differ by
    less than that can change places. A sampled text is another draw from the same distribution.

    Programs are compiled for the number of rows, the cache's length (see `request.cache_length`)
    and the widths of a prompt's chunks (128, 512, 2048, 4096 and 8192 tokens): another prompt that
    needs no others compiles nothing.

    Args:
        model: a `models.Decoder`, a `Bound`, or a model of one's own: see the module.
        prompts: tokens as an array [P T], or a list of rows of any lengths, or one row; or a text
            or several, with a tokenizer.
        request: the options, as a `Request`.
        tokenizer: of the model; needed for texts and stop strings, and gives `Result.texts`.
        cache: one that holds something already, such as another call's `Result.cache`, with a row
            for every prompt; donated. The prompts are what follows: each begins with its row's
            last token, which that cache does not hold. Of a drafter it holds nothing, so
            draft="mtp" begins anew with the prompts. None is an empty one.
        on_tokens: called with a row's index and its next tokens as they come.
        on_text: called with a row's index and its next text as it comes; needs a tokenizer.
        sharding: how the mesh in use splits the rows and slots of the cache that is made; the model
            lies where it was placed (`sharding.Rules`).
        **options: of `Request` and `Sampling`, in place of the request's.

    Returns:
        a `Result`.

    Raises:
        ValueError: an option out of range, a prompt that does not fit, a token that is no word, or
            draft="mtp" for a model without a block for it.
        TypeError: an option that there is not.
        FloatingPointError: logits that are not finite; the message names row and step.

    >>> from flax import nnx
    >>> from mla_jax import MLAConfig
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> model = Decoder(DecoderConfig(attention=attention), rngs=nnx.Rngs(0))
    >>> result = generate(model, [[3, 1, 4], [1, 5]], max_new_tokens=4)
    >>> [len(tokens) for tokens in result.tokens], result.cache.length
    ([4, 4], Array([6, 5], dtype=int32))
    >>> more = [[tokens[-1], 9] for tokens in result.tokens]  # both texts go on with token 9
    >>> generate(model, more, max_new_tokens=4, cache=result.cache).cache.length
    Array([11, 10], dtype=int32)
    """
    request = Request.of(request, **options)
    bound = Bound.of(model)
    model = bound.model
    if request.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer, as tokenizer=...")
    if on_text is not None and tokenizer is None:
        raise ValueError("on_text needs the tokenizer, as tokenizer=...")
    if request.draft == "mtp" and getattr(model, "predictor", None) is None:
        raise ValueError(
            "draft='mtp': this model has no block for multi-token prediction: load it by "
            "checkpoint.load_decoder(..., mtp=True), make it with mtp=True, or use draft='prompt'."
        )
    clock = _clock.Clock()
    shape = clock.call(_bound.output_shape, bound)
    words = shape[0].shape[-1]
    prompts = _request.token_rows(prompts, words, tokenizer)
    rows = len(prompts) * request.samples
    held = _room.held_tokens(cache, rows)
    slots = check_fits(model, prompts, request, cache, sharding)
    kind = drafts.MultiToken if request.draft == "mtp" else drafts.PromptLookup
    drafter = kind(request.speculate)
    made_with: dict[str, Any] = {} if sharding is None else {"sharding": sharding}
    if cache is None:
        asked = {"dtype": request.cache_dtype, "pages": request.pages}
        asked = {name: value for name, value in asked.items() if value is not None}
        cache = clock.call(model.init_cache, rows, slots, **asked, **made_with)
    if request.cache_dtype is not None:
        made_with["dtype"] = request.cache_dtype
    state = clock.call(drafter.init, model, rows, slots, **made_with)
    cache_bytes = sum(one.nbytes for one in (cache, *drafter.caches(state)))

    last, cache, state = _prefill.fill(
        bound, prompts, cache, state, drafter, held, shape, request, clock
    )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    prompt_lengths = np.tile(lengths, request.samples)
    text = np.zeros((rows, slots), np.int32)
    for row in range(rows):
        text[row, : prompt_lengths[row]] = prompts[row % len(prompts)]
    seen = None
    if request.sampling.penalizes:
        seen = np.zeros((rows, words), bool)
        for row in range(rows):
            seen[row, text[row, : prompt_lengths[row]]] = True
    stops = np.array(request.stop_tokens, np.int32)
    static: dict[str, Any] = {"drafter": drafter, "sampling": request.sampling}
    goal, key = prompt_lengths + request.max_new_tokens, jax.random.key(request.seed)
    given = _whole((text, prompt_lengths, held, goal, seen, stops, key), cache.length)
    writing, news = clock.call(
        loop.begin, last, *given, cache, state, logprobs=request.logprobs,
        samples=rows // len(last[0]), **static,
    )  # fmt: skip
    del cache, state
    texts = [text[row, : prompt_lengths[row]] for row in range(rows)]
    collector = _collector.Collector(texts, request, tokenizer, on_tokens, on_text)
    passes, begun, before, first_seconds = 0, 0, prompt_lengths, None
    run_block = loop.block_for(_target.current().platform)
    run_block = functools.partial(clock.call, run_block, bound, steps=request.block, **static)
    # The device works on a second block while the host reads one, unless the host may end a row.
    coming, most = collections.deque([news]), 1 if request.stop_strings else 2
    while True:
        tokens, length, active, bad, rounds = jax.device_get(coming.popleft())
        steps.check_finite(bad)
        first_seconds = clock.lap() if first_seconds is None else first_seconds
        collector.add([tokens[row, : length[row] - before[row]] for row in range(rows)])
        passes, before, ended = passes + int(rounds), length, collector.ended
        if not (active & ~ended).any():
            break
        if (active & ended).any():  # by a stop string, which the device knows nothing of
            writing = dataclasses.replace(writing, active=active & ~ended)
        # Every round writes a token of each active row at least. After max_new_tokens - 1 rounds,
        # as the first token came with the prompt, all have ended.
        while len(coming) < most and begun * request.block < request.max_new_tokens - 1:
            writing, news = run_block(writing, stops, prompt_lengths)
            coming.append(news)
            begun += 1
    texts = collector.finish()
    written = np.array([len(tokens) for tokens in collector.tokens], np.int32)
    cache = writing.cache
    ends = prompt_lengths + written
    if (ends < before).any():  # a stop string ended a row before its last tokens
        cache = clock.call(loop.cut, cache, held + ends - 1)
    drafted, right = map(int, writing.drafted)
    logprobs = None
    if writing.logprobs is not None:
        found = np.asarray(writing.logprobs)
        logprobs = [found[row, prompt_lengths[row] : ends[row]].tolist() for row in range(rows)]
    return Result(
        tokens=collector.tokens, first_token_seconds=first_seconds, decode_seconds=clock.lap(),
        compile_seconds=clock.compiling, new_tokens=int(written.sum()), steps=passes,
        cache_bytes=cache_bytes, accepted=right / max(drafted, 1) if request.speculate else None,
        cache=cache, logprobs=logprobs, texts=texts,
    )  # fmt: skip


def score(
    model: Any,
    tokens: Any,
    *,
    tokenizer: Tokenizer | None = None,
    sharding: Rules | None = None,
) -> list[list[float]]:
    """Log probabilities of given texts, each token after those before it.

    Args:
        model: as in `generate`.
        tokens: as the prompts of `generate`.
        tokenizer: of the model; needed for texts.
        sharding: as in `generate`.

    Returns:
        per row a number for every token but the first.

    Raises:
        ValueError: tokens that are no words, or more than the model has positions.
        FloatingPointError: logits that are not finite; the message names row and step.

    >>> from flax import nnx
    >>> from mla_jax import MLAConfig
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> model = Decoder(DecoderConfig(attention=attention), rngs=nnx.Rngs(0))
    >>> [len(row) for row in score(model, [[3, 1, 4], [1, 5]])]
    [2, 1]
    """
    bound = Bound.of(model)
    rows = _request.token_rows(tokens, _bound.output_shape(bound)[0].shape[-1], tokenizer)
    longest, limit = max(map(len, rows)), positions(bound.model)
    if limit is not None and longest > limit:
        raise ValueError(f"tokens: a row has {longest}, and the model {limit} positions.")
    placed = {} if sharding is None else {"sharding": sharding}
    slots = _request.cache_length(longest, limit, _stripes.step(sharding))
    cache = bound.model.init_cache(len(rows), slots, **placed)
    found, bad = _prefill.score_rows(bound, rows, cache)
    steps.check_finite(bad)
    return [found[number, 1 : len(row)].tolist() for number, row in enumerate(rows)]


def resume(
    cache: Cache, held: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]
) -> tuple[Cache, list[list[int]]]:
    """What of whole prompts a cache holds already: for a conversation that is written out anew.

    A chat template makes all of a conversation's tokens at every turn. Most of them are those of
    the turn before, and need no prefill; where they differ, the cache is cut back.

    Args:
        cache: of another call, such as `Result.cache`; donated.
        held: the tokens of its rows: each prompt and what was written, as far as the cache holds
            them (the last token of a row may be there or not).
        prompts: the tokens of every row from the beginning.

    Returns:
        the cache, and what of the prompts it does not hold, at least a token of each: `generate`
        takes both.

    Raises:
        ValueError: other numbers of rows.

    >>> from flax import nnx
    >>> from mla_jax import MLAConfig
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> attention = MLAConfig.from_preset("tiny").replace(num_hidden_layers=1)
    >>> model = Decoder(DecoderConfig(attention=attention), rngs=nnx.Rngs(0))
    >>> prompts = [[3, 1, 4], [1, 5]]
    >>> result = generate(model, prompts, max_new_tokens=4)
    >>> texts = [[*p, *new] for p, new in zip(prompts, result.tokens)]
    >>> cache, rest = resume(result.cache, texts, [[*text[:5], 9, 9] for text in texts])
    >>> cache.length, rest
    (Array([5, 5], dtype=int32), [[9, 9], [9, 9]])
    """
    if not len(held) == len(prompts) == cache.batch_size:
        raise ValueError(
            f"held has {len(held)} rows, prompts {len(prompts)}, the cache {cache.batch_size}: all "
            "must have the same."
        )
    kept = []
    for row, count in enumerate(np.asarray(cache.length)):
        old, new = held[row][:count], prompts[row][:-1]
        pairs = zip(old, new, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
        kept.append(same)
    rest = [list(prompt[same:]) for prompt, same in zip(prompts, kept, strict=True)]
    return loop.cut(cache, np.array(kept, np.int32)), rest
