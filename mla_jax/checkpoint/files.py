"""Safetensors shards of one checkpoint, memory-mapped, read a part of a tensor at a time.

A plain tensor is a view of the file; one with scales is multiplied by them as it is read
(`checkpoint.stored`), also where they lie in another shard. The `safetensors` library judges
whether a file is whole; its header says where the bytes are.
"""

import concurrent.futures
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from mla_jax import families
from mla_jax.checkpoint import scheme, stored
from mla_jax.checkpoint.names import AttentionTensors, attention_prefixes
from mla_jax.checkpoint.shards import Shard, config_of, index_of
from mla_jax.checkpoint.stored import Stored
from mla_jax.families import language_model
from mla_jax.families import resolve as resolve

_ADAPTER = re.compile(r"(^|\.)(lora_|dora_|modules_to_save\.)|^base_model\.model\.")


class Checkpoint:
    """The tensors of a checkpoint by name.

    Args:
        path: a folder with safetensors files (with or without an index) and usually config.json; a
            single .safetensors file; or a repo id (see `resolve`).

    Attributes:
        config: the config.json or params.json beside the files, {} where there is none.

    Raises:
        FileNotFoundError: no such folder, or no safetensors in it.
        ValueError: an index or a config that cannot be read; the message names the file.

    >>> import tempfile
    >>> from mla_jax.checkpoint import save_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(folder, {"model.norm.weight": np.ones(4, np.float32)})
    ...     with Checkpoint(folder) as files:
    ...         files.read("model.norm.weight", slice(2))
    array([1., 1.], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = resolve(path)
        self._files = index_of(self.path)
        self._shards: dict[pathlib.Path, Shard] = {}
        self._ahead: set[str] = set()
        self._by_layers: dict[str, dict[tuple[int, int], str]] = {}
        self._checked = False
        self._reader = concurrent.futures.ThreadPoolExecutor(1)
        self.config: Mapping[str, Any] = config_of(self.path)

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

    def where(self, name: str) -> str:
        """A tensor and its file: for errors."""
        return f"{name} in {self._files[name]}" if name in self._files else name

    def raw(self, name: str) -> np.ndarray:
        """A tensor as its file holds it: a read-only view."""
        return self._shard(name).view(name)

    def stored(self, name: str) -> Stored:
        """A weight in its stored form: values, scales and what they mean, nothing computed.

        Args:
            name: such as "model.layers.0.mlp.up_proj.weight", also of a packed one.

        Raises:
            KeyError: no such tensor.
            FileNotFoundError: the index names a file that is not there.
            ValueError: a corrupt file, no scales where the numbers need some, scales that do not
                fit, or a scheme that is not read; the message names key and file.
        """
        return stored.stored(name, self, self.forms)

    def read(self, name: str, index: Any = ..., dtype=None) -> np.ndarray:
        """The numbers of a tensor at an index, and only those, multiplied by their scales.

        Args:
            name: its full name.
            index: integers and slices, as numpy's; all by default.
            dtype: to cast to; None keeps the file's (float32 where scales apply).

        Returns:
            a read-only view of the file where nothing had to be computed, else an array.

        Raises:
            KeyError, FileNotFoundError, ValueError: as `stored`.
        """
        return self.stored(name).read(index, dtype)

    def tensor(self, name: str, dtype=None) -> np.ndarray:
        """All of a tensor: `read` without an index."""
        return self.read(name, ..., dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor's numbers."""
        return self.stored(name).shape

    @functools.cached_property
    def forms(self) -> tuple[scheme.Form, ...] | None:
        """The stored forms that the config announces: see `scheme.forms`."""
        return scheme.forms(self.config, str(self.path))

    def attention(self, layer: int, nth: int = 0) -> AttentionTensors:
        """The attention tensors of one layer under Hugging Face's names, read when asked for.

        Args:
            layer: its index. Blocks for multi-token prediction are not layers.
            nth: which of the layer's attentions (LongCat has two).

        Raises:
            ValueError: no such layer; the message says which layers have latent attention. Or an
                adapter beside the weights.
        """
        prefixes = {key: prefix for key, prefix in self._prefixes().items() if self._is_layer(key)}
        if (layer, nth) not in prefixes:
            have = sorted({key[0] for key in prefixes})
            second = f", attention {nth}" if nth else ""
            raise ValueError(
                f"{self.path} has no latent attention in layer {layer}{second}: layers with it are "
                f"{have}."
            )
        self.check_beside()
        self._check_behind()
        for family in families.FAMILIES.values():
            for name, remedy in family.learned.items():
                if name in self and np.any(np.asarray(self.raw(name), np.float32)):
                    raise ValueError(f"{self.where(name)} {remedy}.")
        return AttentionTensors(self, prefixes[layer, nth])

    def layers(self) -> list[int]:
        """Indices of the layers with latent attention, without multi-token-prediction blocks."""
        return sorted({key[0] for key in self._prefixes() if self._is_layer(key)})

    def root(self, layers: str = "layers") -> str:
        """What stands before "layers." in names of the language model.

        Raises:
            ValueError: no latent attention, or several models that have it.
        """
        prefixes = self._prefixes(layers)
        if not prefixes:
            raise ValueError(f"{self.path} has no layer with latent attention.")
        (layer, _), prefix = next(iter(prefixes.items()))
        return prefix[: prefix.index(f"{layers}.{layer}.")]

    def check_beside(self) -> None:
        """Refuses what changes the weights and is not in the index: adapters, and files unknown.

        Raises:
            ValueError: there is such a thing; the message names it.
        """
        if self._checked:
            return
        for name in self:
            if _ADAPTER.search(name):
                raise ValueError(
                    f"{self.where(name)} is an adapter's: merge it into the weights first."
                )
        if self.path.is_dir():
            self._check_folder()
        self._checked = True

    def _check_folder(self) -> None:
        """Files of the folder that the index does not know."""
        if (self.path / "adapter_config.json").exists():
            raise ValueError(
                f"{self.path} holds an adapter (adapter_config.json) beside the weights: merge it "
                "into them first."
            )
        known = set(self._files.values())
        for file in sorted(self.path.glob("*.safetensors")):
            if file in known or file.name.startswith(("model", "consolidated")):
                continue  # what a save left, or Mistral's second copy
            for name in Shard(file).names():
                if name not in self:
                    raise ValueError(f"{name} in {file}: the index does not know this file.")

    def _check_behind(self) -> None:
        """Refuses layers behind the last and the blocks for drafting that the config announces.

        Where it announces none such a block has eh_proj, if more than its attention is here.
        """
        count = _layer_count(self.config)
        drafts = language_model(self.config).get("num_nextn_predict_layers")
        for (layer, _), prefix in self._prefixes().items():
            if count is None or layer < count + (drafts if isinstance(drafts, int) else 0):
                continue
            inside = [name for name in self if name.startswith(f"{self.root()}layers.{layer}.")]
            others = [name for name in inside if not name.startswith(prefix)]
            known = drafts is None and any(name.endswith(".eh_proj.weight") for name in inside)
            if others and not known:
                raise ValueError(
                    f"{self.where(others[0])}: its config says num_hidden_layers={count} and "
                    f"num_nextn_predict_layers={drafts}, and a block for drafting has eh_proj."
                )

    def _prefixes(self, layers: str = "layers") -> dict[tuple[int, int], str]:
        if layers not in self._by_layers:
            self._by_layers[layers] = attention_prefixes(self, layers)
        return self._by_layers[layers]

    def _is_layer(self, key: tuple[int, int]) -> bool:
        """Whether a key is of a layer: those behind the last are for multi-token prediction."""
        count = _layer_count(self.config)
        return count is None or key[0] < count

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

    def _shard(self, name: str) -> "Shard":
        path = self.file_of(name)
        if path not in self._shards:
            try:
                self._shards[path] = Shard(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}, which should hold {name}, is missing.") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return self._shards[path]


def _layer_count(config: Mapping[str, Any]) -> int | None:
    model = language_model(config)
    for key in ("num_layers", "num_hidden_layers"):  # LongCat's second one counts attentions
        if isinstance(model.get(key), int):
            return model[key]
    return None
