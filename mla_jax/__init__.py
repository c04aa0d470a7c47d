"""Multi-head Latent Attention for JAX and Flax.

To read the code, begin with `layers.attention`: the layer, its two forms and its data flow. What it
keeps of tokens is a `cache.Cache`; what a call appends to all layers' stores is a
`layers.step.Step`; its cores are in `ops`, which chooses a backend in `ops.dispatch`.
`models.decoder` makes a whole model of layers, `checkpoint` loads it by what `families` says, and
`generation` lets it write.

A module imports only from those of its own group or before it: check, config, target, sharding;
rates; plain; rope, costs; cache; ops; layers; models; families; checkpoint; generation; training,
explain, placing; cli. The exceptions are config and models, whose `from_hf` asks families how to
read a config.json.

Public names are imported when they are first used, so that what needs no JAX (configs, costs, the
command line's help) does not wait for it.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_jax import checkpoint as checkpoint
    from mla_jax import costs as costs
    from mla_jax import generation as generation
    from mla_jax import sharding as sharding
    from mla_jax.cache import Cache as Cache
    from mla_jax.config import MLAConfig as MLAConfig
    from mla_jax.config import RopeScaling as RopeScaling
    from mla_jax.config import presets as presets
    from mla_jax.explain import explain as explain
    from mla_jax.generation.bound import bind as bind
    from mla_jax.generation.sampling import sample as sample
    from mla_jax.generation.steps import decode_loop as decode_loop
    from mla_jax.generation.steps import decode_step as decode_step
    from mla_jax.generation.steps import prefill_step as prefill_step
    from mla_jax.layers.attention import MultiHeadLatentAttention as MultiHeadLatentAttention
    from mla_jax.layers.memory import Memory as Memory
    from mla_jax.layers.remat import remat_policy as remat_policy
    from mla_jax.layers.step import Step as Step
    from mla_jax.ops import expanded_attention as expanded_attention
    from mla_jax.ops import latent_attention as latent_attention
    from mla_jax.ops import merge_attention as merge_attention
    from mla_jax.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from mla_jax.ops.cross_entropy import mean_linear_cross_entropy as mean_linear_cross_entropy
    from mla_jax.placing import Placement as Placement
    from mla_jax.placing import placement as placement

__version__ = "0.1.0"

# The same names again, by the module that each comes from.
_HOMES = {
    "cache": ("Cache",),
    "config": ("MLAConfig", "RopeScaling", "presets"),
    "explain": ("explain",),
    "generation.bound": ("bind",),
    "generation.sampling": ("sample",),
    "generation.steps": ("decode_loop", "decode_step", "prefill_step"),
    "layers.attention": ("MultiHeadLatentAttention",),
    "layers.memory": ("Memory",),
    "layers.remat": ("remat_policy",),
    "layers.step": ("Step",),
    "ops": ("expanded_attention", "latent_attention", "merge_attention"),
    "ops.cross_entropy": ("linear_cross_entropy", "mean_linear_cross_entropy"),
    "placing": ("Placement", "placement"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*_HOME, "checkpoint", "costs", "generation", "sharding"]


class _Package(types.ModuleType):
    """A package one of whose names may be that of a module, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module binds it on its package: a function of the same name stays what it is.
        if name not in _HOME or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


if not TYPE_CHECKING:
    sys.modules[__name__].__class__ = _Package

    def __getattr__(name):
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
