"""Files of a checkpoint: a memory-mapped safetensors file, and which file holds which tensor."""

import contextlib
import json
import math
import mmap
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mla_jax.families import read_json

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(\.\d+)?-\d{5}-of-\d{5}\.safetensors")
_READ = 2**23  # bytes read ahead at once


class Shard:
    """One memory-mapped file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with safetensors.safe_open(str(path), framework="np"):
                pass  # raises where the header or the file's length is wrong
        except FileNotFoundError:
            raise
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
            self._start = 8 + size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> set[str]:
        """Of all its tensors."""
        return self._header.keys() - {"__metadata__"}

    def entry(self, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        """dtype, shape and place of a tensor."""
        entry = self._header.get(name)
        if entry is None:
            raise ValueError(f"the index says that {self.path} holds {name}: it does not.")
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name} in {self.path} is {entry['dtype']}: known are {', '.join(DTYPES)}."
            )
        dtype = np.dtype(DTYPES[entry["dtype"]])
        return dtype, tuple(entry["shape"]), self._start + entry["data_offsets"][0]

    def view(self, name: str) -> np.ndarray:
        dtype, shape, start = self.entry(name)
        flat = np.frombuffer(self._map, dtype, math.prod(shape), start)
        return flat.reshape(shape)

    def read_ahead(self, name: str) -> None:
        dtype, shape, start = self.entry(name)
        end = start + math.prod(shape) * dtype.itemsize
        scratch = memoryview(bytearray(min(_READ, end - start)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                count = file.readinto(scratch[: min(_READ, end - start)])
                if not count:
                    return
                start += count

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # advice only: a system may not know it
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)


def index_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor names to files.

    Raises:
        ValueError: an index that cannot be read, or files that hold the same tensor.
        FileNotFoundError: no safetensors here.
    """
    if path.is_file():
        return dict.fromkeys(Shard(path).names(), path)
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        chosen = next((i for i in indices if i.name.startswith("model.")), indices[0])
        table = read_json(chosen).get("weight_map")
        if not isinstance(table, Mapping) or not table:
            raise ValueError(f"{chosen} has no weight_map from tensors to files.")
        for name, file in table.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file:
                raise ValueError(f"{chosen}: the file of {name}, {file!r}, is not in its folder.")
        return {name: path / file for name, file in table.items()}
    whole = path / "model.safetensors"  # a shard beside it is of a save that was interrupted
    files = sorted(path.glob("*.safetensors"))
    files = [f for f in files if f == whole or not _SHARD.fullmatch(f.name) or not whole.exists()]
    if any(file.name.startswith("model") for file in files):  # Mistral ships everything twice
        files = [file for file in files if not file.name.startswith("consolidated")]
    found: dict[str, pathlib.Path] = {}
    for file in files:
        for name in Shard(file).names():
            if name in found:
                raise ValueError(f"{found[name]} and {file} both hold {name}.")
            found[name] = file
    if not found:
        raise FileNotFoundError(f"{path} holds no safetensors files.")
    return found


def config_of(path: pathlib.Path) -> Mapping[str, Any]:
    """The config beside the files; after an interrupted save, the one that its index knows."""
    folder = path if path.is_dir() else path.parent
    names = ["config.json", "params.json"]
    if (folder / INDEX).is_file():
        metadata = read_json(folder / INDEX).get("metadata")
        pending = metadata.get("config") if isinstance(metadata, Mapping) else None
        if isinstance(pending, str) and pathlib.PurePath(pending).name == pending:
            names.insert(0, pending)
    for name in names:
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}
