"""Safetensors shards of one checkpoint, memory-mapped, read a tensor at a time.

A tensor that is not fp8 is a view of the file. An fp8 weight is multiplied by its scales, one for
128 x 128 numbers (the last block of an axis may be partial; the scales may lie in another shard).
The `safetensors` library judges whether a file is whole; its header says where the bytes are.
"""

import concurrent.futures
import contextlib
import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from mla_jax.checkpoint import names as naming
from mla_jax.families import language_model, read_json

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_BLOCK = (128, 128)
_READ = 2**23  # bytes read ahead at once


class Checkpoint:
    """The tensors of a checkpoint by name.

    Args:
        path: a folder with safetensors files (with or without an index) and usually config.json; a
            single .safetensors file; or, where `huggingface_hub` is installed, a repo id.

    Attributes:
        config: the config.json or params.json beside the files, {} where there is none.

    Raises:
        FileNotFoundError: no such folder, or no safetensors in it.
        ValueError: an index or a config that cannot be read; the message names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(folder, {"model.norm.weight": np.ones(4, np.float32)})
    ...     with Checkpoint(folder) as files:
    ...         files.tensor("model.norm.weight")
    array([1., 1., 1., 1.], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = _resolve(path)
        folder = self.path if self.path.is_dir() else self.path.parent
        self._files = _index(self.path)
        self._shards: dict[pathlib.Path, _Shard] = {}
        self._ahead: set[str] = set()
        self._reader = concurrent.futures.ThreadPoolExecutor(1)
        self.config: Mapping[str, Any] = {}
        for name in ("config.json", "params.json"):
            if not self.config and (folder / name).is_file():
                self.config = read_json(folder / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forgets the open files; views of them stay valid until they are dropped."""
        self._reader.shutdown(cancel_futures=True)
        self._shards.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def file_of(self, name: str) -> pathlib.Path:
        """The file that holds a tensor.

        Raises:
            KeyError: no such tensor; the message names it and the checkpoint.
        """
        if name not in self._files:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        return self._shard(name).entry(name)[1]

    def tensor(self, name: str, dtype=None) -> np.ndarray:
        """A tensor as numpy holds it, an fp8 weight multiplied by its scales.

        Args:
            name: its full name.
            dtype: to cast to; None keeps the file's (float32 for fp8 with scales).

        Returns:
            A read-only view of the file where nothing had to be computed, else an array.

        Raises:
            KeyError: no such tensor.
            FileNotFoundError: the index names a file that is not there.
            ValueError: a corrupt file, or scales that do not fit; the message names key and file.
        """
        value = self._shard(name).view(name)
        if value.dtype in _FP8:
            return self._dequantized(name, value, np.dtype(dtype or np.float32))
        return value if dtype is None or value.dtype == dtype else value.astype(dtype)

    def attention(self, layer: int, nth: int = 0) -> "AttentionTensors":
        """The attention tensors of one layer under Hugging Face's names, read when asked for.

        Args:
            layer: its index. Blocks for multi-token prediction are not layers.
            nth: which of the layer's attentions (LongCat has two).

        Raises:
            ValueError: no such layer; the message says which layers have latent attention.
        """
        prefixes = naming.attention_prefixes(self)
        count = _layer_count(self.config)
        if count is not None:
            prefixes = {key: prefix for key, prefix in prefixes.items() if key[0] < count}
        if (layer, nth) not in prefixes:
            have = sorted({key[0] for key in prefixes})
            second = f", attention {nth}" if nth else ""
            raise ValueError(
                f"{self.path} has no latent attention in layer {layer}{second}: layers with it are "
                f"{have}."
            )
        for name in ("lerope.alpha", "model.language_model.rotary_emb.alpha"):
            if name in self and np.any(np.asarray(self.tensor(name), np.float32)):
                raise ValueError(
                    f"{self.path}: {name} learns the rotary frequencies: multiply "
                    "rope.inverse_frequencies by its exp, give MLAConfig.rope_inv_freq the result "
                    "and read the tensors by Checkpoint.tensor."
                )
        return AttentionTensors(self, prefixes[layer, nth])

    def layers(self) -> list[int]:
        """Indices of the layers with latent attention, without multi-token-prediction blocks."""
        count = _layer_count(self.config)
        found = {layer for layer, _ in naming.attention_prefixes(self)}
        return sorted(layer for layer in found if count is None or layer < count)

    def prefetch(self, names: Iterable[str]) -> None:
        """Reads tensors ahead in the background, each once, into the system's cache of the files.

        What is there does not count as this process' memory, and pages of a memory map are then
        found rather than waited for one by one.
        """
        for name in names:
            if name not in self._ahead:
                self._ahead.add(name)
                # Also the file is opened there: a broken one is an error where it is needed.
                self._reader.submit(lambda name: self._shard(name).read_ahead(name), name)

    def release(self) -> None:
        """Lets the operating system take back the memory of what was read, views included."""
        for shard in list(self._shards.values()):  # others may open files meanwhile
            shard.release()

    def _shard(self, name: str) -> "_Shard":
        path = self.file_of(name)
        if path not in self._shards:
            try:
                self._shards[path] = _Shard(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}, which should hold {name}, is missing.") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return self._shards[path]

    def _scale_name(self, name: str) -> str:
        stem = name.removesuffix("weight")
        for suffix in naming.SCALES:
            if stem + suffix in self and stem != name:
                return stem + suffix
        raise ValueError(
            f"{name} in {self.file_of(name)} is fp8 and has no scale: looked for "
            f"{stem}{{{', '.join(naming.SCALES)}}} in all files of {self.path}."
        )

    def _dequantized(self, name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        scale_name = self._scale_name(name)
        scale = self._shard(scale_name).view(scale_name)
        if scale.dtype == np.uint8:  # a power of two by its biased exponent
            scale = scale.view(ml_dtypes.float8_e8m0fnu)
        scale = scale.astype(np.float32)
        if scale.size == 1:
            scale, block = scale.reshape(1, 1), (*value.shape, 1, 1)[:2]
        else:
            block = self._block_shape()
        grid = tuple(-(-size // step) for size, step in zip(value.shape, block, strict=False))
        if value.ndim != 2 or scale.shape != grid:
            raise ValueError(
                f"{scale_name} in {self.file_of(scale_name)} has shape {scale.shape}: {name} of "
                f"shape {value.shape} in blocks of {block} needs {grid}."
            )
        out = np.empty(value.shape, dtype)
        columns = np.repeat(scale, block[1], axis=1)[:, : value.shape[1]]
        for row, factors in enumerate(columns):  # a block of rows at a time: little memory
            rows = slice(row * block[0], (row + 1) * block[0])
            out[rows] = value[rows].astype(np.float32) * factors
        return out

    def _block_shape(self) -> tuple[int, int]:
        config = self.config.get("quantization_config")
        block = config.get("weight_block_size") if isinstance(config, Mapping) else None
        if block is None:
            return _BLOCK
        sizes = range(1, 2**20)
        if not isinstance(block, list) or len(block) != 2 or any(b not in sizes for b in block):
            raise ValueError(
                f"{self.path}: weight_block_size={block!r} must be two positive whole numbers."
            )
        return block[0], block[1]


class AttentionTensors(Mapping[str, np.ndarray]):
    """One layer's attention tensors of a `Checkpoint`, under names relative to "self_attn.".

    Scales of fp8 weights belong to their weights and are not listed; buffers are left out.
    """

    def __init__(self, files: Checkpoint, prefix: str):
        self.files, self.prefix = files, prefix
        self._names: dict[str, str] = {}
        inside = [name for name in files if name.startswith(prefix)]
        for full in inside:
            name = full.removeprefix(prefix)
            if naming.IGNORED.search(name) or is_scale(full, files):
                continue
            known = self._names.setdefault(naming.canonical(name), full)
            if known != full:
                raise ValueError(f"{files.path}: {known} and {full} are the same tensor.")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.files.tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def full_name(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        return self._names[name]

    def where(self, name: str) -> str:
        """What a tensor is called in which file: for errors."""
        full = self._names[name]
        return f"{full} in {self.files.file_of(full)}"

    def prefetch(self) -> None:
        """Reads these tensors and the next layer's ahead: see `Checkpoint.prefetch`."""
        self.files.prefetch(self._names.values())
        head, layer, tail = re.split(r"(?<=layers\.)(\d+)", self.prefix, maxsplit=1)
        following = f"{head}{int(layer) + 1}{tail}"
        self.files.prefetch([name for name in self.files if name.startswith(following)])

    def release(self) -> None:
        """See `Checkpoint.release`."""
        self.files.release()


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, shard_bytes: float = 5e9
) -> None:
    """Writes safetensors files of at most `shard_bytes` (or one tensor) and their index.

    Raises:
        ValueError: no tensors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(folder, {"model.norm.weight": np.ones(4, np.float32)})
    ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
    ['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if not shards[0]:
        raise ValueError(f"there are no tensors to write to {folder}.")
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: np.ascontiguousarray(tensors[name]) for name in shard}
        save_file(content, str(folder / file), metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in content.values())
    text = json.dumps(index, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class _Shard:
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

    def entry(self, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        """dtype, shape and place of a tensor."""
        entry = self._header.get(name)
        if entry is None:
            raise ValueError(f"the index says that {self.path} holds {name}: it does not.")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{name} in {self.path} is {entry['dtype']}: known are {', '.join(_DTYPES)}."
            )
        dtype = np.dtype(_DTYPES[entry["dtype"]])
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


def is_scale(name: str, files: Checkpoint) -> bool:
    """Whether a tensor is the scale of another, which is in the checkpoint too."""
    for suffix in naming.SCALES:
        if name.endswith("." + suffix):
            return name.removesuffix(suffix) + "weight" in files
    return False


def _resolve(path: str | os.PathLike) -> pathlib.Path:
    local = pathlib.Path(path)
    if local.exists():
        return local
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        try:
            from huggingface_hub import snapshot_download  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise FileNotFoundError(
                f"{path} is neither a file nor a folder; to fetch a repository of that name from "
                "the Hugging Face hub, install huggingface_hub."
            ) from error
        patterns = ["*.safetensors", "*.json"]
        try:
            return pathlib.Path(snapshot_download(str(path), allow_patterns=patterns))
        except (OSError, ValueError) as error:  # of many lines, such as the network's
            first = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"{path} is neither a file nor a folder, nor could it be fetched: {first}"
            ) from error
    raise FileNotFoundError(f"{path} is neither a file nor a folder.")


def _index(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor names to files."""
    if path.is_file():
        return dict.fromkeys(_Shard(path)._header.keys() - {"__metadata__"}, path)
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
    files = sorted(path.glob("*.safetensors"))
    if any(file.name.startswith("model") for file in files):  # Mistral ships everything twice
        files = [file for file in files if not file.name.startswith("consolidated")]
    found: dict[str, pathlib.Path] = {}
    for file in files:
        for name in _Shard(file)._header.keys() - {"__metadata__"}:
            if name in found:
                raise ValueError(f"{found[name]} and {file} both hold {name}.")
            found[name] = file
    if not found:
        raise FileNotFoundError(f"{path} holds no safetensors files.")
    return found


def _layer_count(config: Mapping[str, Any]) -> int | None:
    model = language_model(config)
    for key in ("num_hidden_layers", "num_layers"):
        if isinstance(model.get(key), int):
            return model[key]
    return None
