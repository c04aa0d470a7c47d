"""An attention's tensors under Hugging Face's names of DeepSeek's, whatever a family calls them.

Everything inside is relative to "self_attn."; `canonical` maps any family's names to them, `rename`
maps back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mla_jax import families
from mla_jax.checkpoint import stored
from mla_jax.checkpoint.scheme import Form
from mla_jax.checkpoint.stored import Stored


def canonical(name: str) -> str:
    """Hugging Face's name of an attention tensor, relative to "self_attn.", from any family's."""
    table = {theirs: ours for style in families.styles().values() for ours, theirs in style.items()}
    if name in table:
        return table[name]
    module, dot, kind = name.rpartition(".")
    return table.get(module, module) + dot + kind


def rename(name: str, style: str) -> str:
    """The inverse of `canonical`, for one of `families.styles`.

    Raises:
        ValueError: no such style.
    """
    styles = families.styles()
    if style not in styles:
        raise ValueError(f"names={style!r}: it must be one of {', '.join(styles)}.")
    names = styles[style]
    if name in names:
        return names[name]
    module, dot, kind = name.rpartition(".")
    return names.get(module, module) + dot + kind


class AttentionTensors(Mapping[str, np.ndarray]):
    """One layer's attention tensors of a `Checkpoint`, under names relative to "self_attn.".

    Scales that are multiplied belong to their weights and are not listed; others are.
    """

    def __init__(self, files: Any, prefix: str):
        self.files, self.prefix = files, prefix
        self._names = by_canonical_name(
            [name.removeprefix(prefix) for name in files if name.startswith(prefix)],
            _Inside(files, prefix), files.forms,
        )  # fmt: skip

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored(name).read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def stored(self, name: str) -> Stored:
        """A tensor in its stored form: see `Checkpoint.stored`."""
        return self.files.stored(self.full_name(name))

    def full_name(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        return self.prefix + self._names[name]

    def where(self, name: str) -> str:
        """What a tensor is called in which file: for errors."""
        full = self.full_name(name)
        packed = full.removesuffix("weight") + "weight_packed"
        return self.files.where(packed if full not in self.files else full)

    def prefetch(self) -> None:
        """Reads these tensors and the next layer's ahead: see `Checkpoint.prefetch`."""
        head, layer, tail = re.split(r"(?<=layers\.)(\d+)", self.prefix, maxsplit=1)
        following = f"{head}{int(layer) + 1}{tail}"
        for start in (self.prefix, following):
            self.files.prefetch([name for name in self.files if name.startswith(start)])

    def release(self) -> None:
        """See `Checkpoint.release`."""
        self.files.release()


class _Inside:
    """The tensors behind a prefix, as a source."""

    def __init__(self, files: Any, prefix: str):
        self.files, self.prefix = files, prefix

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.files

    def raw(self, name: str) -> np.ndarray:
        return self.files.raw(self.prefix + name)

    def where(self, name: str) -> str:
        return self.files.where(self.prefix + name)


def by_canonical_name(
    names: Iterable[str], source: stored.Source, forms: tuple[Form, ...] | None
) -> dict[str, str]:
    """Hugging Face's names of an attention's tensors to the ones that they have.

    Scales that a weight is multiplied by are left out, as are buffers and scales of activations.

    Raises:
        ValueError: two names of the same tensor.
    """
    weights: dict[str, str] = {}
    used: set[str] = set()
    names = list(names)
    for name in names:
        logical = re.sub(r"(?<=\.)weight_packed$", "weight", name)
        if logical.endswith(".weight") and (logical == name or logical not in source):
            used |= set(stored.stored(logical, source, forms).names)
            weights[name] = logical
    found: dict[str, str] = {}
    for name in names:
        buffer = stored.BUFFER.search(name) or stored.beside(name, source) in used
        if buffer or (name in used and name not in weights):
            continue
        own = weights.get(name, name)
        known = found.setdefault(canonical(own), own)
        if known != own:
            raise ValueError(f"{known} and {own} are the same tensor: give one.")
    return found


def attention_prefixes(names: Iterable[str], layers: str = "layers") -> dict[tuple[int, int], str]:
    """(layer, which attention of it) to the prefix of its tensors, for every layer with latents.

    Multi-token-prediction blocks that live beside the layers ("mtp.") are left out; those that
    follow them under the next number are not: only the config knows how many layers there are.

    Args:
        names: of all tensors.
        layers: what the family calls its list of layers.

    Raises:
        ValueError: latents under several roots, so that it is open which are the model's.
    """
    pattern = re.compile(
        rf"(?P<root>(?:[^.]+\.)*?){re.escape(layers)}\.(?P<layer>\d+)\."
        r"(?:[^.]+\.)?(?:(?P<nth>\d)\.)?(?P<name>[^.]+\.weight)(?:_packed)?"
    )
    prefixes: dict[str, dict[tuple[int, int], str]] = {}
    latent = {
        f"{style.get('kv_a_proj_with_mqa', 'kv_a_proj_with_mqa')}.weight"
        for style in families.styles().values()
    }
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or match["name"] not in latent or "mtp" in match["root"].split("."):
            continue
        key = (int(match["layer"]), int(match["nth"] or 0))
        prefixes.setdefault(match["root"], {})[key] = name[: match.start("name")]
    if len(prefixes) > 1:
        raise ValueError(f"several models have latent attention here: {sorted(prefixes)}.")
    return next(iter(prefixes.values()), {})
