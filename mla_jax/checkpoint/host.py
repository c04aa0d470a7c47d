"""The host's copy engine: from views of files to jax arrays, each device its own part only.

A part is made once, in C order, in its last dtype, aligned so that jax on a CPU takes it over.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from mla_jax.sharding import Rules

THREADS = min(8, os.cpu_count() or 1)
_WORTH_THREADS = 2**22  # bytes
_ROWS = 64  # of 2 bytes: two lines of a cache
_ALIGNMENT = 64  # bytes: what jax needs to take an array over on a CPU

Index = tuple[slice, ...]
Sharding = jax.sharding.Sharding
Shardings = (
    Rules | Sharding | Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Sharding | None]
)


def place(host: np.ndarray, dtype, sharding: Sharding | None = None) -> jax.Array:
    """A host array, of any strides, as a jax array; with a sharding only its parts are copied.

    >>> import jax.numpy as jnp
    >>> place(np.ones((2, 3)), jnp.bfloat16).dtype
    dtype(bfloat16)
    """

    def fill(out, index):
        copy(host[index], out, THREADS if out.nbytes >= _WORTH_THREADS else 1)

    return build(host.shape, dtype, sharding, fill)


def build(
    shape: tuple[int, ...],
    dtype,
    sharding: Sharding | None,
    fill: Callable[[np.ndarray, Index], None],
) -> jax.Array:
    """A jax array that is made part by part, without a copy of the whole on the host.

    Args:
        shape: of the array.
        dtype: of the array; without x64 a 64-bit one becomes the one of 32.
        sharding: where it goes; None is the default device.
        fill: called with an empty part and its place, a slice with start and stop per axis.

    >>> def fill(out, index):
    ...     out[...] = index[0].start
    >>> build((2, 3), np.float32, None, fill).shape
    (2, 3)
    """
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))  # x64 may narrow it

    def part(index):
        bounds = tuple(slice(*i.indices(size)[:2]) for i, size in zip(index, shape, strict=True))
        out = empty(tuple(i.stop - i.start for i in bounds), dtype)
        fill(out, bounds)
        return out

    if sharding is None:
        # The array is nobody else's: on a CPU it becomes the jax array, without a second one.
        whole = part((slice(None),) * len(shape))
        return jax.block_until_ready(jax.device_put(whole, may_alias=True))
    alike: dict[tuple, list[jax.Device]] = {}  # devices that hold the same part share it
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        key = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        alike.setdefault(key, []).append(device)
    arrays = []
    for key, devices in alike.items():  # one part after the other is on the host
        own = part(tuple(slice(*bounds) for bounds in key))
        arrays += jax.block_until_ready([jax.device_put(own, device) for device in devices])
        del own
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


def fetch(array: jax.Array, index: int | None = None) -> np.ndarray:
    """An array, or its part at an index of the first axis, from whichever devices hold it.

    Unlike np.asarray this keeps no copy of the whole with the array. Of an array that several
    processes hold together each gets it, and all must ask for the same at the same time.

    >>> import jax.numpy as jnp
    >>> fetch(jnp.arange(6).reshape(3, 2), 1)
    array([2, 3], dtype=int32)
    """
    if not array.is_fully_addressable:
        return np.asarray(_gathered(array, index).addressable_data(0))
    out = np.empty(array.shape if index is None else array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        if index is None:
            out[shard.index] = np.asarray(shard.data)
            continue
        start, stop, _ = shard.index[0].indices(array.shape[0])
        if start <= index < stop:
            out[shard.index[1:]] = np.asarray(shard.data[index - start])
    return out


def _gathered(array: jax.Array, index: int | None) -> jax.Array:
    """What `fetch` gives, on every device."""
    mesh = array.sharding.mesh  # pyrefly: ignore

    def part(array):
        return array if index is None else lax.index_in_dim(array, index, 0, keepdims=False)

    with jax.set_mesh(mesh):
        whole = jax.NamedSharding(mesh, jax.P())
        explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
        gather = jax.sharding.auto_axes(part, out_sharding=whole) if explicit else part
        return jax.jit(gather, out_shardings=whole)(array)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A C-ordered array, aligned as jax wants it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    raw = raw[-raw.ctypes.data % _ALIGNMENT :][:size]
    return raw.view(dtype).reshape(shape)


def copy(host: np.ndarray, out: np.ndarray, threads: int = 1) -> None:
    """Copies an array of any strides into a C-ordered one."""
    source, target = (_bits(host), _bits(out)) if host.dtype == out.dtype else (host, out)
    if host.ndim < 2 or host.size == 0 or host.flags.c_contiguous:
        target[...] = source
        return
    # A transposed kernel: written 64 of torch's rows at a time, which stays in cache and is several
    # times as fast as numpy's own order.
    for shape in ((host.shape[0], -1), (-1, host.shape[-1])):
        try:  # the heads' axis and the channels' are one in the file
            source = source.reshape(shape, copy=False)
            target = target.reshape(shape)
            break
        except ValueError:
            continue
    axis = int(np.argmax(source.strides))
    rows = source.shape[axis]
    share = -(-rows // (_ROWS * threads)) * _ROWS

    def part_of(first):
        for start in range(first, min(first + share, rows), _ROWS):
            part = (slice(None),) * axis + (slice(start, min(start + _ROWS, first + share)),)
            target[part] = source[part]

    each(part_of, range(0, rows, share), threads)


def each(work: Callable, items, threads: int = THREADS) -> None:
    """Calls `work` on every item; numpy lets other threads run while it copies."""
    if threads == 1:
        for item in items:
            work(item)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, items))


def sharding_of(sharding: Shardings | None, path: str, parameter: Any) -> Sharding | None:
    """Where one parameter goes."""
    if isinstance(sharding, Rules):
        return sharding.of({path: parameter})[path].get_value()
    if callable(sharding):
        return sharding(path, parameter.shape)
    return sharding.get(path) if isinstance(sharding, Mapping) else sharding


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as plain integers, which numpy copies faster than ml_dtypes' numbers."""
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return array.view(kinds[array.dtype.itemsize])
