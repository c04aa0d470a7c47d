"""Safetensors shards and their index, written so that one rename decides between old and new.

A folder that holds a model may be saved over at any time, also while its files are mapped:

1. shards get names that nothing in the folder has, and reach the disk;
2. so does the config, under a name that the new index knows;
3. the index is renamed into place: before, the folder is the old model; from then on, the new one;
4. the config gets its own name, and the old model's shards go.

Whatever is interrupted leaves one whole model, and files that the next save removes.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_jax.checkpoint.shards import DTYPES, INDEX, index_of
from mla_jax.families import read_json

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
# Files that a save leaves for good, or where it was interrupted.
_OURS = re.compile(
    r"model(\.\d+)?-\d{5}-of-\d{5}\.safetensors|model\.safetensors"
    r"|config\.\d+\.json|.*\.partial"
)


class Tensor(NamedTuple):
    """A tensor to be written; its numbers are asked for when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(
    path: str | os.PathLike,
    tensors: Sequence[Tensor],
    *,
    shard_bytes: float = 5e9,
    config: Mapping[str, Any] | None = None,
    together: bool = False,
) -> None:
    """Writes a folder of shards with an index, and a config.json if one is given.

    Args:
        path: the folder, made where it is not there.
        tensors: in the order of the files.
        shard_bytes: a new file starts before one would grow beyond this.
        config: for config.json; None leaves the folder's alone.
        together: all processes call this, for each holds but a part of some tensors: these are
            gathered one by one, the first process writes, and all return when it has.

    Raises:
        ValueError: no tensors, or a dtype that safetensors does not have.
        OSError: the disk is full, or the like. The folder is then the old model still.
    """
    folder = pathlib.Path(path)
    if not together:
        _write(folder, tensors, shard_bytes, config)
        return
    if jax.process_index() == 0:
        _write(folder, tensors, shard_bytes, config)
    else:
        for shard in _shards(tensors, shard_bytes):
            for tensor in _ordered(shard):
                tensor.value()
    multihost_utils.sync_global_devices(f"saved {folder}")


def _ordered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Wide numbers first, so that each begins where its dtype wants it."""
    return sorted(tensors, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)


def _write(folder, tensors, shard_bytes, config) -> None:
    if not tensors:
        raise ValueError(f"there are no tensors to write to {folder}.")
    for tensor in tensors:
        if np.dtype(tensor.dtype) not in _CODES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}: known are {', '.join(DTYPES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    old = _model_of(folder)
    generation = _unused(folder, len(shards))
    files = [_name(generation, i, len(shards)) for i in range(1, len(shards) + 1)]
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": {t.name: file for file, s in zip(files, shards, strict=True) for t in s},
    }
    pending = f"config.{generation}.json"
    if config is not None:
        index["metadata"]["config"] = pending
    made: list[pathlib.Path] = []
    try:
        for file, shard in zip(files, shards, strict=True):
            made.append(folder / file)
            with _durable(folder / file) as out:
                _write_shard(out, shard)
        if config is not None:
            made.append(folder / pending)
            _write_json(folder / pending, config)
        _sync(folder)
        _write_json(folder / INDEX, index)
    except BaseException:
        if not _decided(folder, index):
            _remove(folder, {file.name for file in made})
        raise
    _sync(folder)
    if config is not None:
        os.replace(folder / pending, folder / "config.json")
    _remove(folder, {*old, *_leftovers(folder)} - set(files))


def _shards(tensors: Sequence[Tensor], limit: float) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _name(generation: int, number: int, count: int) -> str:
    """Hugging Face's name of a shard, or one beside it where files have that one."""
    stem = "model" if generation == 0 else f"model.{generation}"
    return f"{stem}-{number:05}-of-{count:05}.safetensors"


def _unused(folder: pathlib.Path, count: int) -> int:
    """The first generation of which the folder has no file, and its index names none."""
    have = {file.name for file in folder.iterdir()}
    with contextlib.suppress(ValueError, FileNotFoundError):
        metadata = read_json(folder / INDEX).get("metadata")
        if isinstance(metadata, Mapping):
            have.add(str(metadata.get("config")))
    generation = 0
    while have & {f"config.{generation}.json",
                  *(_name(generation, i, count) for i in range(1, count + 1))}:  # fmt: skip
        generation += 1
    return generation


def _model_of(folder: pathlib.Path) -> set[str]:
    """Files of the model in a folder. One without an index gets it, so that new shards beside its
    own change nothing.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        known: set[str] = set()
        for path in indices:
            with contextlib.suppress(ValueError):  # a broken one names no files
                table = read_json(path).get("weight_map")
                if isinstance(table, Mapping):
                    known |= {file for file in table.values() if isinstance(file, str)}
        return {file for file in known if pathlib.PurePath(file).name == file}
    try:
        table = index_of(folder)
    except (ValueError, FileNotFoundError):
        return set()  # no model, or one that cannot be read anyway
    names = {name: file.name for name, file in table.items()}
    _write_json(folder / INDEX, {"metadata": {}, "weight_map": names})
    _sync(folder)
    return set(names.values())


def _decided(folder: pathlib.Path, index: Mapping[str, Any]) -> bool:
    """Whether the new index is in place already: an interrupt may come right after its rename."""
    try:
        return read_json(folder / INDEX) == index
    except (OSError, ValueError):
        return False


def _write_shard(out: Any, tensors: Sequence[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = _ordered(tensors)
    start = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _CODES[np.dtype(tensor.dtype)], "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.size],
        }  # fmt: skip
        start += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        value = np.ascontiguousarray(tensor.value())
        if value.dtype != tensor.dtype or value.shape != tensor.shape:
            raise ValueError(
                f"{tensor.name} is {value.dtype} {value.shape}: announced was {tensor.dtype} "
                f"{tensor.shape}."
            )
        out.write(value.reshape(-1).view(np.uint8).data)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    with _durable(path) as out:
        out.write(json.dumps(value, indent=2).encode())


@contextlib.contextmanager
def _durable(path: pathlib.Path) -> Iterator[Any]:
    """A file that has its name only when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _sync(folder: pathlib.Path) -> None:
    """Makes renames durable, where a system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _leftovers(folder: pathlib.Path) -> set[str]:
    return {file.name for file in folder.iterdir() if _OURS.fullmatch(file.name)}


def _remove(folder: pathlib.Path, names: set[str]) -> None:
    for name in names:  # a system that keeps mapped files keeps these: the next save removes them
        with contextlib.suppress(OSError):
            (folder / name).unlink()
