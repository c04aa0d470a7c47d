"""What a `Family` of models says of itself: its config.json, its tensors' names, its decoder."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Models beside the language model that releases bring along under these names.
VISION = (
    "vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "mm_projector.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models: all that the package knows about it, in one place.

    Only `model_types` is needed: what is left out is as in DeepSeek-V3's code.

    Attributes:
        model_types: values of config.json's `model_type` that name it.
        defaults: values of the keys that a config.json may leave out: the defaults of the family's
            config class, and what its code does without asking. Besides Hugging Face's keys these
            may be fields of `MLAConfig` (output_gate, latent_norm_eps). A key that is there and
            null counts as given.
        renamed: keys of its config.json to the ones of DeepSeek's that mean the same.
        adjust: called with the config (renamed, with defaults), what to call it in an error, and
            the layer or None; returns the config with what no table can say.
        refusals: a key to a value that the layer cannot honour, and why.
        refused: why no model of this family can be computed; None where they can.
        styles: names of its attention tensors, by a name for `attention_tensors(names=...)`: from
            Hugging Face's names of DeepSeek's to its own.
        names: modules of a whole model, by DeepSeek's dotted names ("self_attn", "mlp.gate",
            "embed_tokens", "layers"), to its own.
        decoder: called with the config, the `MLAConfig` and what to call it in an error; returns
            the fields of `DecoderConfig`. None: `Decoder` has not its shape.
        no_decoder: what its decoder needs that `Decoder` has not; None names the families that fit.
        written: the inverse of `adjust` and `decoder`: called with a `DecoderConfig` and the
            config.json that says it in DeepSeek's keys; returns the family's.
        architecture: the class that its config.json names; serving engines go by it.
        saved_as: the model_type under which its language model is saved; None is its own.
        skipped: prefixes, behind the language model's own, of tensors that nothing reads, such as a
            block for drafting of another shape.
        beside: prefixes of tensors that are no part of the language model.
        learned: tensors that change the attention where they are not zero, and what to do then.

    >>> Family(model_types=("mine",), renamed={"heads": "num_attention_heads"}).model_types
    ('mine',)
    """

    model_types: tuple[str, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adjust: Callable[[dict[str, Any], str, int | None], dict[str, Any]] | None = None
    refusals: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    refused: str | None = None
    styles: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decoder: Callable[[Mapping[str, Any], Any, str], dict[str, Any]] | None = None
    no_decoder: str | None = None
    written: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    architecture: str | None = None
    saved_as: str | None = None
    skipped: tuple[str, ...] = ()
    beside: tuple[str, ...] = VISION
    learned: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensor_name(self, name: str) -> str:
        """What the family calls a tensor that has this name in DeepSeek's models.

        >>> Family(model_types=("mine",), names={"mlp": "feed_forward"}).tensor_name(
        ...     "layers.3.mlp.up_proj.weight")
        'layers.3.feed_forward.up_proj.weight'
        """
        if not self.names:
            return name
        parts, out = name.split("."), []
        while parts:
            for count in range(len(parts), 0, -1):  # the longest name that fits
                theirs = self.names.get(".".join(parts[:count]))
                if theirs is not None or count == 1:
                    out.append(parts[0] if theirs is None else theirs)
                    parts = parts[count:]
                    break
        return ".".join(out)
