"""Rows, their lengths and their room: the same on slots of their own and on pages."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def make(kind, batch=3, slots=SLOTS, layers=2, pages=None, dtype=None):
    pages = (pages or batch * slots // PAGE) if kind == "paged" else None
    return Cache.init([Mixer()] * layers, batch, slots, dtype, pages)


def append(cache, counts, first=1.0, tokens=None):
    """The cache with counts[b] more tokens in row b, numbered from `first` on over all rows."""
    batch = cache.batch_size
    if tokens is None:
        counts = np.asarray(counts, np.int32)
        tokens = max(1, int(counts.max()))
    number = first + jnp.arange(batch * tokens, dtype=jnp.float32).reshape(batch, tokens, 1)
    step, stores = Step.begin(cache, tokens, counts), []
    for index, store in enumerate(cache.stores):
        new = {k: jnp.broadcast_to(number, (batch, tokens, w)) + index for k, w in WIDTHS.items()}
        view = step.view(store).write(step.place, **new)
        stores.append(view.pool if isinstance(view, Paged) else view)
    return cache.end(stores, step)


def numbers(cache, row, layer=0):
    """What a row holds, by all of its store's arrays, which agree."""
    held = jax.device_get(cache.view(cache.stores[layer]).block(0, cache.max_length))
    length = int(cache.length[row])
    for name, width in WIDTHS.items():
        np.testing.assert_array_equal(
            held[name][row, :length], np.repeat(held["latent"][row, :length, :1], width, 1)
        )
    return (np.asarray(held["latent"][row, :length, 0]) - layer).tolist()


def rows(cache):
    first, second = (
        [numbers(cache, b, layer) for b in range(cache.batch_size)] for layer in (0, 1)
    )
    assert first == second
    check_pages(cache)
    return first


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
def test_new_tokens_go_behind_each_row(kind):
    cache = append(append(make(kind), COUNTS), [2, 2, 2], first=1000.0)
    assert cache.length.tolist() == [6, 2, PAGE + 2]
    assert rows(cache)[:2] == [[1, 2, 3, 4, 1000, 1001], [1002, 1003]]
    assert rows(cache)[2] == [*range(1 + 2 * PAGE, 1 + 3 * PAGE), 1004, 1005]
    assert not cache.overflowed.any()
    assert cache.nbytes == 2 * 3 * SLOTS * (3 + 2) * 4


@KINDS
def test_a_full_row_drops_what_does_not_fit_and_says_so(kind):
    cache = append(make(kind), [SLOTS - 1, 3, 0])
    with pytest.raises(ValueError, match=rf"rows \[0\] would hold \[{SLOTS + 1}\] tokens.*max_len"):
        append(cache, [2, 2, 2])
    after = jax.jit(lambda cache: append(cache, np.array([2, 2, 2]), first=5000.0))(cache)
    assert after.length.tolist() == [SLOTS, 5, 2]
    assert after.overflowed.tolist() == [True, False, False]
    assert rows(after)[0] == [*range(1, SLOTS), 5000]
    assert after.truncate(SLOTS).overflowed.tolist() == [True, False, False]  # lacks one still
    assert after.truncate(SLOTS - 1).overflowed.tolist() == [False, False, False]
    assert after.reset().overflowed.tolist() == [False] * 3


def test_rows_that_find_no_page_drop_what_does_not_fit_and_say_so():
    cache = append(make("paged", pages=3), [PAGE, 1, 0])
    with pytest.raises(ValueError, match=r"rows \[2\] would hold \[2\] .* 2 more pages"):
        append(cache, [1, 0, 2])
    after = jax.jit(lambda cache: append(cache, np.array([1, 0, 2]), first=5000.0))(cache)
    assert after.length.tolist() == [PAGE + 1, 1, 0]
    assert after.overflowed.tolist() == [False, False, True]
    assert rows(after)[0] == [*range(1, PAGE + 1), 5000]
    assert rows(append(after.reset(jnp.array([True, False, False])), [0, 0, 2]))[2] != []


@KINDS
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_truncate_forgets_the_last_tokens(kind, jit):
    cut = jax.jit(Cache.truncate) if jit else Cache.truncate
    cache = append(make(kind), [PAGE + 2, 3, 0])
    short = cut(cache, jnp.array([PAGE, 9, 9]))
    assert rows(short) == [rows(cache)[0][:PAGE], rows(cache)[1], []]
    assert rows(cut(short, 2)) == [rows(cache)[0][:2], rows(cache)[1][:2], []]


@KINDS
@pytest.mark.parametrize("row_kind", ["dense", "paged"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_insert_puts_a_row_in_the_place_of_another(kind, row_kind, jit):
    insert = jax.jit(Cache.insert) if jit else Cache.insert
    cache = append(make(kind), COUNTS)
    row = append(make(row_kind, batch=1), [PAGE + 1], first=700.0)
    row = row.replace(overflowed=jnp.array([True]))
    new = insert(cache, row, 1)
    assert rows(new) == [rows(cache)[0], rows(row)[0], rows(cache)[2]]
    assert new.overflowed.tolist() == [False, True, False]
    again = insert(new, append(make(row_kind, batch=1), [2], first=9.0), 1)
    assert rows(again)[1] == [9, 10]
    assert again.overflowed.tolist() == [False, False, False]


@KINDS
def test_insert_refuses_an_index_that_is_no_row(kind):
    cache, row = append(make(kind), COUNTS), append(make(kind, batch=1), [2])
    for wrong in (-1, 3):
        same = jax.jit(Cache.insert)(cache, row, wrong)
        assert rows(same) == rows(cache)
        with pytest.raises(ValueError, match=f"index={wrong}: this cache has rows 0 to 2"):
            cache.insert(row, wrong)


@KINDS
@pytest.mark.parametrize("length", [None, 0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_fork_gives_rows_a_prefix(kind, length):
    cache = append(make(kind, pages=9), [PAGE + 5, 3, PAGE + 1])
    new = jax.jit(Cache.fork)(cache, 0, jnp.array([True, False, True]), length)
    prefix = rows(cache)[0][:length]
    assert rows(new) == [*rows(cache)[:2], prefix]
    if kind == "paged":  # whole pages are shared
        assert int(new.pages.uses.max()) == (2 if len(prefix) >= PAGE else 1)
    grown = append(new, [1, 0, 2], first=8000.0)
    assert rows(grown)[0] == [*rows(cache)[0], 8000.0]
    assert rows(grown)[2] == [*prefix, 8004.0, 8005.0]
    gone = grown.reset(jnp.array([True, False, False]))
    assert rows(gone) == [[], *rows(grown)[1:]]


def test_fork_and_truncate_without_a_page_for_the_copy():
    cache = append(make("paged", pages=2), [PAGE + 5, 0, 0])
    both = jnp.array([False, True, True])
    with pytest.raises(ValueError, match=r"pages run out: rows \[1, 2\] need a copy"):
        cache.fork(0, both)
    new = jax.jit(Cache.fork)(cache, 0, both)
    assert new.length.tolist() == [PAGE + 5, PAGE, PAGE]
    assert new.overflowed.tolist() == [False, True, True]
    check_pages(new)
    with pytest.raises(ValueError, match=r"pages run out: rows \[1\] need a copy"):
        new.truncate(jnp.array([PAGE + 5, 9, PAGE]))
    short = jax.jit(Cache.truncate)(new, jnp.array([PAGE + 5, 9, PAGE]))
    assert short.length.tolist() == [PAGE + 5, 0, PAGE]
    assert short.overflowed.tolist() == [False, True, True]
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
    cache, model = make("paged", pages=8), [[], [], []]
    jitted = {name: jax.jit(getattr(Cache, name)) for name in ("truncate", "fork", "reset")}
    jitted["append"] = jax.jit(functools.partial(append, tokens=90))
    for turn in range(25):
        operation = rng.choice(["append", "truncate", "fork", "reset"])
        if operation == "append":
            counts = rng.integers(0, 90, 3)
            ends = counts + [len(row) for row in model]
            pages = int(cache.pages.available) + int(cache.pages.held().sum())
            if (ends > SLOTS).any() or int((-(-ends // PAGE)).sum()) > pages:
                continue
            cache = jitted["append"](cache, np.int32(counts), 1000.0 * turn)
            for b, count in enumerate(counts):
                model[b] = model[b] + [1000.0 * turn + b * 90 + i for i in range(count)]
        elif operation == "truncate":
            lengths = rng.integers(0, SLOTS, 3)
            if int(cache.pages.available) < 3:
                continue
            cache = jitted["truncate"](cache, lengths)
            model = [row[:length] for row, length in zip(model, lengths, strict=True)]
        elif operation == "fork":
            source, to = int(rng.integers(3)), rng.random(3) < 0.5
            if int(cache.pages.available) < 3:
                continue
            length = int(rng.integers(0, len(model[source]) + 1))
            cache = jitted["fork"](cache, source, to, length)
            prefix = model[source][:length]
            model = [prefix if to[b] and b != source else model[b] for b in range(3)]
        else:
            to = rng.random(3) < 0.4
            cache = jitted["reset"](cache, to)
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
        cache, jax.eval_shape(lambda: make(kind)), append(make(kind), COUNTS)
    )
    many = jax.tree.map(lambda x: x[None], cache)
    cut = jax.vmap(lambda cache: cache.truncate(1))(many)
    assert cut.length.tolist() == [[1, 0, 1]]
    for held in (cache, cache.replace(fresh=True)):
        data = export.export(jax.jit(lambda cache: cache.truncate(1)))(held).serialize()
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
    pages, held = Pages.init(batch_size=3, per_row=2, count=4).grow(jnp.array([1, 2, 2]))
    assert held.tolist() == [1, 2, 1]
    assert sorted(pages.table.ravel().tolist()) == [0, 1, 2, 3, 4, 4]
    assert pages.shrink(jnp.array([1, 0, 1])).available == 2


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
        "row.latent is bfloat16",
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
    store, at = make(kind).view(make(kind).stores[0]), jnp.zeros((3, 1), jnp.int32)
    new = {name: jnp.ones((3, 1, width)) for name, width in WIDTHS.items()}
    with pytest.raises(ValueError, match="write was given latent: this store holds "):
        store.write(at, latent=new["latent"])
    with pytest.raises(ValueError, match=r"k_rope has shape \(3, 1, 3\)"):
        store.write(at, latent=new["latent"], k_rope=new["latent"])
    with pytest.raises(ValueError, match="latent is bfloat16, the cache holds float32"):
        store.write(at, **(new | {"latent": new["latent"].astype(jnp.bfloat16)}))
    with pytest.raises(AttributeError, match="no 'keys'"):
        _ = store.keys
    assert dataclasses.replace(store).latent.shape[-1] == 3


@pytest.mark.parametrize("slot", [0, 5, 7, 8, 11])
def test_the_only_token_is_written_on_a_gpu_as_elsewhere(slot, monkeypatch, rng):
    """Into a slot that there is; of one behind the last nothing is written."""
    names = {"latent": 4, "k_rope": 2}
    store = Dense({k: jnp.asarray(rng.standard_normal((1, 8, w))) for k, w in names.items()})
    new = {k: jnp.asarray(rng.standard_normal((1, 1, w))) for k, w in names.items()}
    gpu = target.Target("gpu", "NVIDIA H200", 9.0, 132)
    monkeypatch.setattr(target, "current", lambda: gpu)
    write = lambda store, new: store.write(jnp.array([[slot]]), **new)  # noqa: E731
    assert str(jax.make_jaxpr(write)(store, new)).count(" concatenate[") == len(names)
    made = write(store, new)
    for name, held in store.arrays.items():
        right = np.array(held)
        right[:, slot : slot + 1] = new[name][:, : max(0, 8 - slot)]
        np.testing.assert_array_equal(made.arrays[name], right)
