"""Rows, their lengths and their room: the same on slots of their own and on pages."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import emptied
from jax import export

from mla_jax import Cache, Step, target
from mla_jax.cache import PAGE, Dense, Paged, Pages

WIDTHS = {"latent": 3, "k_rope": 2}
SLOTS = 2 * PAGE


class Mixer:
    """What a cache asks of a layer."""

    def init_store(self, batch_size, slots, dtype=None):
        shape = (batch_size, slots)
        return Dense({k: jnp.zeros((*shape, w), dtype or jnp.float32) for k, w in WIDTHS.items()})


def init(kind, batch=3, slots=SLOTS, layers=2, pages=None, dtype=None):
    pages = (pages or (8 if batch == 3 else 2)) if kind == "paged" else None
    return Cache.init([Mixer()] * layers, batch, slots, dtype, pages)


def make(*arguments, **options):
    return emptied(lambda: init(*arguments, **options), 0)


@jax.jit
def _appended(cache, counts, number):
    step, stores = Step.begin(cache, number.shape[1], counts), []
    for index, store in enumerate(cache.stores):
        new = {k: jnp.broadcast_to(number, (*number.shape[:2], w)) + index
               for k, w in WIDTHS.items()}  # fmt: skip
        view = step.view(store).write(step.place, **new)
        stores.append(view.pool if isinstance(view, Paged) else view)
    return cache.end(stores, step)


def append(cache, counts, first=1.0, tokens=None):
    """The cache with counts[b] more tokens in row b, numbered from `first` on over all rows.

    All numbers of tokens are one program: the step has as many as a row has slots.
    """
    tokens = tokens or max(1, int(np.max(counts)))
    number = np.zeros((cache.batch_size, SLOTS, 1), np.float32)
    given = first + np.arange(cache.batch_size * tokens).reshape(-1, tokens, 1)
    number[:, :tokens] = given
    return _appended(cache, np.asarray(counts, np.int32), number)


@jax.jit
def _held(cache):
    return [cache.view(store).block(0, cache.max_length) for store in cache.stores]


_fork, _insert, _reset = (jax.jit(getattr(Cache, name)) for name in ("fork", "insert", "reset"))
_truncate = jax.jit(Cache.truncate)


def rows(cache):
    """What every row holds, by all arrays of both layers' stores, which agree."""
    check_pages(cache)
    found = []
    for index, held in enumerate(jax.device_get(_held(cache))):
        both = np.concatenate([held[name] for name in WIDTHS], -1) - index
        rows = [row[:length] for row, length in zip(both, cache.length.tolist(), strict=True)]
        assert all((row == row[:, :1]).all() for row in rows)
        found.append([row[:, 0].tolist() for row in rows])
    assert len(found) == 1 or found[0] == found[1]
    return found[0]


def check_pages(cache):
    """Every page is free or used, by as many rows as say so; rows have just what they need."""
    if cache.pages is None:
        return
    table, count = np.asarray(cache.pages.table), cache.pages.count
    used = np.bincount(table[table < count], minlength=count)
    np.testing.assert_array_equal(cache.pages.uses, used)
    free = np.asarray(cache.pages.free)[: int(cache.pages.available)]
    assert sorted(free.tolist()) == np.flatnonzero(used == 0).tolist()
    needed = -(-np.asarray(cache.length) // PAGE)
    np.testing.assert_array_equal((table < count).sum(1), needed)
    last = np.asarray(cache.length) // PAGE  # a partly filled page is its row's alone
    for row in np.flatnonzero(np.asarray(cache.length) % PAGE):
        assert used[table[row, last[row]]] == 1


KINDS = pytest.mark.parametrize("kind", ["dense", "paged"])
COUNTS = [4, 0, PAGE]


@KINDS
def test_a_cache_is_empty_at_first(kind):
    chex.assert_trees_all_equal(make(kind), init(kind))


@KINDS
def test_new_tokens_go_behind_each_row(kind):
    cache = append(append(make(kind), COUNTS), [2, 2, 2], first=1000.0)
    assert cache.length.tolist() == [6, 2, PAGE + 2]
    assert rows(cache)[:2] == [[1, 2, 3, 4, 1000, 1001], [1002, 1003]]
    assert rows(cache)[2] == [*range(1 + 2 * PAGE, 1 + 3 * PAGE), 1004, 1005]
    assert not cache.overflowed.any()
    slots = 8 * PAGE if kind == "paged" else 3 * SLOTS
    assert cache.nbytes == 2 * slots * (3 + 2) * 4


@KINDS
def test_a_full_row_drops_what_does_not_fit_and_says_so(kind):
    cache = append(make(kind, pages=3), [SLOTS - 1, 3, 0])
    with pytest.raises(ValueError, match=rf"rows \[0\] would hold \[{SLOTS + 1}\] tokens.*max_len"):
        Step.begin(cache, 2, np.array([2, 2, 0], np.int32))
    after = append(cache, [2, 2, 0], first=5000.0)
    assert after.length.tolist() == [SLOTS, 5, 0]
    assert after.overflowed.tolist() == [True, False, False]
    assert rows(after)[0] == [*range(1, SLOTS), 5000]
    full = _truncate(after, np.int32([SLOTS] * 3))
    assert full.overflowed.tolist() == [True, False, False]  # lacks one still
    assert _truncate(after, np.int32([SLOTS - 1] * 3)).overflowed.tolist() == [False] * 3
    assert _reset(after).overflowed.tolist() == [False] * 3


def test_rows_that_find_no_page_drop_what_does_not_fit_and_say_so():
    cache = append(make("paged", pages=3), [PAGE, 1, 0])
    with pytest.raises(ValueError, match=r"rows \[2\] would hold \[2\] .* 2 more pages"):
        Step.begin(cache, 2, np.array([1, 0, 2], np.int32))
    after = append(cache, [1, 0, 2], first=5000.0)
    assert after.length.tolist() == [PAGE + 1, 1, 0]
    assert after.overflowed.tolist() == [False, False, True]
    assert rows(after)[0] == [*range(1, PAGE + 1), 5000]
    assert rows(append(_reset(after, np.array([True, False, False])), [0, 0, 2]))[2] != []


@KINDS
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_truncate_forgets_the_last_tokens(kind, jit):
    cut = _truncate if jit else Cache.truncate
    cache = append(make(kind, pages=3), [PAGE + 2, 3, 0])
    short = cut(cache, np.int32([PAGE, 9, 9]))
    assert rows(short) == [rows(cache)[0][:PAGE], rows(cache)[1], []]
    two = np.int32([2] * 3) if jit else 2
    assert rows(cut(short, two)) == [rows(cache)[0][:2], rows(cache)[1][:2], []]


@pytest.mark.parametrize(
    ("kind", "row_kind", "jit"),
    [*itertools.product(["dense", "paged"], ["dense", "paged"], [True]), ("paged", "dense", False)],
)
def test_insert_puts_a_row_in_the_place_of_another(kind, row_kind, jit):
    insert = _insert if jit else Cache.insert
    cache = append(make(kind, pages=3), [0, 3, 4])
    row = append(make(row_kind, batch=1), [PAGE + 1], first=700.0)
    row = row.replace(overflowed=jax.device_put(np.array([True])))
    new = insert(cache, row, 1)
    assert rows(new) == [[], rows(row)[0], rows(cache)[2]]
    assert new.overflowed.tolist() == [False, True, False]
    again = insert(new, append(make(row_kind, batch=1), [2], first=9.0), 1)
    assert rows(again)[1] == [9, 10]
    assert again.overflowed.tolist() == [False, False, False]


@KINDS
def test_insert_refuses_an_index_that_is_no_row(kind):
    cache = append(make(kind, pages=3), [4, 0, PAGE])
    row = append(make(kind, batch=1), [2])
    for wrong in (-1, 3):
        same = _insert(cache, row, wrong)
        assert rows(same) == rows(cache)
        with pytest.raises(ValueError, match=f"index={wrong}: this cache has rows 0 to 2"):
            cache.insert(row, wrong)


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("dense", None),  # of pages below
        *itertools.product(["dense", "paged"], [0, 1, PAGE - 1, PAGE, PAGE + 1, PAGE + 5]),
    ],
)
def test_fork_gives_rows_a_prefix(kind, length):
    cache = append(make(kind), [PAGE + 5, 3, PAGE + 1])
    new = _fork(cache, 0, np.array([True, False, True]), length)
    prefix = rows(cache)[0][:length]
    assert rows(new) == [*rows(cache)[:2], prefix]
    if kind == "paged":  # whole pages are shared
        assert int(new.pages.uses.max()) == (2 if len(prefix) >= PAGE else 1)
    grown = append(new, [1, 0, 2], first=8000.0)
    assert rows(grown)[0] == [*rows(cache)[0], 8000.0]
    assert rows(grown)[2] == [*prefix, 8004.0, 8005.0]
    gone = _reset(grown, np.array([True, False, False]))
    assert rows(gone) == [[], *rows(grown)[1:]]


def test_fork_and_truncate_without_a_page_for_the_copy():
    cache = append(make("paged", pages=3), [PAGE + 5, 1, 0])
    both = jax.device_put(np.array([False, True, True]))
    with pytest.raises(ValueError, match=r"pages run out: rows \[2\] need a copy"):
        cache.fork(0, both)
    new = _fork(cache, 0, both)
    assert new.length.tolist() == [PAGE + 5, PAGE + 5, PAGE]
    assert new.overflowed.tolist() == [False, False, True]
    assert rows(new) == [rows(cache)[0], rows(cache)[0], rows(cache)[0][:PAGE]]
    kept = np.int32([PAGE + 5, PAGE + 5, 9])
    with pytest.raises(ValueError, match=r"pages run out: rows \[2\] need a copy"):
        new.truncate(kept)
    short = _truncate(new, kept)
    assert short.length.tolist() == [PAGE + 5, PAGE + 5, 0]
    assert short.overflowed.tolist() == [False, False, True]
    check_pages(short)


@KINDS
def test_some_rows_by_themselves(kind):
    cache = append(make(kind), COUNTS)

    @jax.jit
    def grow(cache):
        part = append(cache.rows(1, 2), np.array([1, 3]), first=600.0)
        return cache.with_rows(1, part)

    new = grow(cache)
    assert rows(new) == [rows(cache)[0], [600], [*rows(cache)[2], 603, 604, 605]]


@KINDS
def test_a_loop_inside_jit_takes_pages_and_gives_them_back(kind):
    @jax.jit
    def run(cache):
        def step(cache, _):
            cache = append(cache, np.array([50, 1, 0]), first=3.0)
            return cache.truncate(cache.length - jnp.array([20, 1, 0])), cache.length

        return jax.lax.scan(step, cache, None, length=6)

    cache, lengths = run(make(kind))
    assert lengths[:, 0].tolist() == [50, 80, 110, 140, 170, 200]
    assert cache.length.tolist() == [180, 0, 0]
    rows(cache)


def test_random_operations_keep_the_pages_right(rng):
    cache, model = make("paged"), [[], [], []]
    for turn in range(25):
        operation = rng.choice(["append", "truncate", "fork", "reset"])
        if operation == "append":
            counts = rng.integers(0, 90, 3)
            ends = counts + [len(row) for row in model]
            pages = int(cache.pages.available) + int((np.asarray(cache.pages.table) < 8).sum())
            if (ends > SLOTS).any() or int((-(-ends // PAGE)).sum()) > pages:
                continue
            cache = append(cache, counts, 1000.0 * turn, tokens=90)
            for b, count in enumerate(counts):
                model[b] = model[b] + [1000.0 * turn + b * 90 + i for i in range(count)]
        elif operation == "truncate":
            lengths = rng.integers(0, SLOTS, 3)
            if int(cache.pages.available) < 3:
                continue
            cache = _truncate(cache, np.int32(lengths))
            model = [row[:length] for row, length in zip(model, lengths, strict=True)]
        elif operation == "fork":
            source, to = int(rng.integers(3)), rng.random(3) < 0.5
            if int(cache.pages.available) < 3:
                continue
            length = int(rng.integers(0, len(model[source]) + 1))
            cache = _fork(cache, source, to, length)
            prefix = model[source][:length]
            model = [prefix if to[b] and b != source else model[b] for b in range(3)]
        else:
            to = rng.random(3) < 0.4
            cache = _reset(cache, to)
            model = [[] if to[b] else model[b] for b in range(3)]
        assert rows(cache) == model
        assert not cache.overflowed.any()


@KINDS
def test_trees_vmap_and_export(kind):
    cache = append(make(kind), COUNTS)
    shapes = jax.tree.map(lambda leaf: leaf.shape, cache)
    assert shapes.length == (3,)
    assert jax.tree.map(lambda leaf: None, cache).overflowed is None
    chex.assert_trees_all_equal_shapes_and_dtypes(
        cache, jax.eval_shape(lambda: init(kind)), append(make(kind), COUNTS)
    )
    many = jax.tree.map(lambda x: np.asarray(x)[None], cache)
    cut = jax.jit(jax.vmap(lambda cache: cache.truncate(1)))(many)
    assert cut.length.tolist() == [[1, 0, 1]]
    for held in (cache, cache.replace(fresh=True)):
        cut = jax.jit(lambda cache: cache.replace(length=jnp.minimum(cache.length, 1)))
        data = export.export(cut)(held).serialize()
        back = export.deserialize(data).call(held)
        assert back.length.tolist() == [1, 0, 1]
        assert back.fresh == held.fresh


@KINDS
def test_donation_takes_the_memory_over(kind):
    cache = append(make(kind), COUNTS)
    held = cache.stores[0].latent
    grow = jax.jit(lambda cache: append(cache, np.array([1, 1, 1])), donate_argnums=0)
    compiled = grow.lower(cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
    grow(cache)
    assert held.is_deleted()


def test_fresh_rows_must_be_empty():
    cache = append(make("dense"), COUNTS)
    assert Step.begin(make("dense").as_fresh(), 2).fresh
    ragged = cache.as_fresh()  # one row is empty: only it may be given tokens
    assert Step.begin(ragged, 2, jnp.array([0, 2, 0])).fresh
    with pytest.raises(ValueError, match=r"as_fresh: rows hold \[4, 0, 128\]"):
        Step.begin(ragged, 2)
    with pytest.raises(ValueError, match="none is empty"):
        append(cache, [0, 1, 0]).as_fresh()
    assert not append(make("dense").as_fresh(), COUNTS).fresh


def test_pages_go_to_the_first_rows_first():
    @jax.jit
    def grow():
        pages, held = Pages.init(batch_size=3, per_row=2, count=4).grow(jnp.array([1, 2, 2]))
        return pages, held, pages.shrink(jnp.array([1, 0, 1]))

    pages, held, shrunk = grow()
    assert held.tolist() == [1, 2, 1]
    assert sorted(np.ravel(pages.table).tolist()) == [0, 1, 2, 3, 4, 4]
    assert int(shrunk.available) == 2


BAD = {
    "lengths_too_long": (
        lambda c: Step.begin(c, 1, jnp.array([2, 0, 0])),
        "between 0 and the 1",
    ),
    "lengths_float": (lambda c: Step.begin(c, 1, jnp.ones(3)), "lengths is float32"),
    "lengths_rows": (lambda c: Step.begin(c, 1, jnp.ones(2, int)), r"lengths .* \[B\] = \(3,\)"),
    "form": (lambda c: Step.begin(c, 1, form="folded"), "form='folded'"),
    "stores": (lambda c: c.end([], Step.begin(c, 1)), "0 stores were given: the cache has 2"),
    "truncate": (lambda c: c.truncate(-1), "at least 0"),
    "insert_rows": (lambda c: c.insert(c, 0), "row has 3 rows"),
    "insert_dtype": (
        lambda c: c.insert(make("dense", batch=1, dtype=jnp.bfloat16), 0),
        r"row\.\w+ is bfloat16",
    ),
    "insert_layers": (
        lambda c: c.insert(make("dense", batch=1, layers=1), 0),
        "1 stores, .* 2",
    ),
    "insert_slots": (lambda c: c.insert(make("dense", 1, 2 * SLOTS), 0), "at most 256 slots"),
    "reset": (lambda c: c.reset(jnp.array([0])), r"it must be bool \[3\]"),
    "fork_rows": (lambda c: c.fork(0, [1]), r"it must be bool \[3\]"),
    "fork_source": (lambda c: c.fork(3, jnp.ones(3, bool)), "source=3: this cache has rows 0 to 2"),
    "fork_length": (lambda c: c.fork(0, jnp.ones(3, bool), 5), "length=5: row 0 holds 4 tokens"),
    "batch": (lambda c: make("dense", 0), "batch_size=0"),
    "true": (lambda c: make("dense", True), "batch_size=True"),
    "max_length": (lambda c: make("dense", 1, 0), "max_length=0"),
    "fraction": (lambda c: make("dense", 1, 1.5), r"max_length=1\.5"),
    "pages": (lambda c: Cache.init([Mixer()], 1, PAGE, pages=0), "pages=0"),
    "page_size": (lambda c: Cache.init([Mixer()], 1, 130, pages=2), "multiple of .*such as 256"),
    "dtype": (
        lambda c: make("dense", 1, 6, dtype=jnp.float8_e5m2),
        "dtype=float8_e5m2: a cache hol",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(append(make("dense"), COUNTS))


@KINDS
def test_a_store_takes_only_what_it_holds(kind):
    store, at = make(kind).view(make(kind).stores[0]), np.zeros((3, 1), np.int32)
    new = {name: np.ones((3, 1, width), np.float32) for name, width in WIDTHS.items()}
    with pytest.raises(ValueError, match="write was given latent: this store holds "):
        store.write(at, latent=new["latent"])
    with pytest.raises(ValueError, match=r"k_rope has shape \(3, 1, 3\)"):
        store.write(at, latent=new["latent"], k_rope=new["latent"])
    with pytest.raises(ValueError, match="latent is bfloat16, the cache holds float32"):
        store.write(at, **(new | {"latent": new["latent"].astype(jnp.bfloat16)}))
    with pytest.raises(AttributeError, match="no 'keys'"):
        _ = store.keys
    assert dataclasses.replace(store).latent.shape[-1] == 3


def test_the_only_token_is_written_on_a_gpu_as_elsewhere(monkeypatch, rng):
    """Into a slot that there is; of one behind the last nothing is written."""
    names = {"latent": 4, "k_rope": 2}
    draw = lambda *shape: jax.device_put(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    store = Dense({k: draw(1, 8, w) for k, w in names.items()})
    new = {k: draw(1, 1, w) for k, w in names.items()}
    gpu = target.Target("gpu", "NVIDIA H200", 9.0, 132)
    monkeypatch.setattr(target, "current", lambda: gpu)
    write = jax.jit(lambda store, at, new: store.write(at, **new))
    slots = [np.array([[slot]], np.int32) for slot in (0, 5, 7, 8, 11)]
    assert str(jax.make_jaxpr(write)(store, slots[0], new)).count(" concatenate[") == len(names)
    for slot in slots:
        made = write(store, slot, new)
        for name, held in store.arrays.items():
            right = np.array(held)
            right[:, slot[0, 0] : slot[0, 0] + 1] = new[name][:, : max(0, 8 - slot[0, 0])]
            np.testing.assert_array_equal(made.arrays[name], right)
