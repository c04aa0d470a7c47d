"""Trains small models whose caches are equally large: MHA, GQA, MQA and MLA, three seeds each.

    python benchmarks/quality.py --json benchmarks/quality.json

All cache 80 numbers per token and layer, and all have as many parameters: what an attention
spares, its MLPs get. MHA's four heads then have keys and values of 10 channels, GQA's two groups
of 20, MQA's one of 40; MLA caches a latent of 64 and a rotary key of 16, which serve four heads of
32 + 16. The text is Python's standard library by bytes, its last windows held out. Learning rate
and schedule are those of `mla-jax demo`, tuned for none. Results depend a little on the machine.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

import mla_jax
from mla_jax import costs, training

WIDTH, HEADS, LAYERS = 128, 4, 2
STEPS, BATCH, LENGTH, HELD_OUT = 400, 8, 64, 128  # the last is in windows
MLA = mla_jax.MLAConfig(
    hidden_size=WIDTH, num_attention_heads=HEADS, q_lora_rank=64, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, num_hidden_layers=LAYERS,
)  # fmt: skip
GROUPS = {"MHA": (4, 10), "GQA": (2, 20), "MQA": (1, 40)}  # keys and values, channels of each
assert {2 * n * width for n, width in GROUPS.values()} == {costs.cache_numbers(MLA)} == {80}


class GroupedAttention(nnx.Module):
    """Causal attention of HEADS heads on fewer keys and values, with rotary positions."""

    def __init__(self, groups, channels, rngs):
        self.shape = MLA.replace(qk_nope_head_dim=0, qk_rope_head_dim=channels)
        options = {"use_bias": False, "rngs": rngs}
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, channels), **options)
        self.key = nnx.LinearGeneral(WIDTH, (groups, channels), **options)
        self.value = nnx.LinearGeneral(WIDTH, (groups, channels), **options)
        self.out = nnx.LinearGeneral((HEADS, channels), WIDTH, axis=(-2, -1), **options)

    def __call__(self, x):
        positions = jnp.arange(x.shape[1])
        query, key = (
            mla_jax.rope.apply_rope(made, positions, self.shape)
            for made in (self.query(x), self.key(x))
        )
        return self.out(jax.nn.dot_product_attention(query, key, self.value(x), is_causal=True))


class Transformer(nnx.Module):
    """Bytes to logits over bytes; `inner` is the width of the MLPs."""

    def __init__(self, kind, inner, rngs):
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(256, WIDTH, embedding_init=small, rngs=rngs)
        self.attentions, self.mlps, self.norms = nnx.List(), nnx.List(), nnx.List()
        for _ in range(LAYERS):
            if kind == "MLA":
                attention = mla_jax.MultiHeadLatentAttention(MLA, rngs=rngs)
            else:
                attention = GroupedAttention(*GROUPS[kind], rngs)
            self.attentions.append(attention)
            up, down = nnx.Linear(WIDTH, inner, rngs=rngs), nnx.Linear(inner, WIDTH, rngs=rngs)
            self.mlps.append(nnx.Sequential(up, nnx.gelu, down))
            self.norms += [nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)]
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in range(LAYERS):
            x = x + self.attentions[layer](self.norms[2 * layer](x))
            x = x + self.mlps[layer](self.norms[2 * layer + 1](x))
        return self.head(self.norm(x))


def parameters(model):
    """How many numbers train."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def inner_width(kind):
    """The MLP width that gives a model as many parameters as MLA's has with 4 WIDTH."""

    def size(kind):
        return parameters(nnx.eval_shape(lambda: Transformer(kind, 4 * WIDTH, nnx.Rngs(0))))

    sizes = {name: size(name) for name in ("MLA", kind)}
    return 4 * WIDTH + round((sizes["MLA"] - sizes[kind]) / (LAYERS * (2 * WIDTH + 1)))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="where the figures go, after every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    text = training.standard_library_text(megabytes=4)
    train_text = text[: -HELD_OUT * (LENGTH + 1)]
    found = {
        kind: {"parameters": 0, "mlp_width": inner_width(kind), "held_out": []}
        for kind in ("MHA", "GQA", "MQA", "MLA")
    }
    about = {"numbers_per_token_and_layer": 80, "steps": options.steps, "models": found}
    for seed in range(options.seeds):
        for kind, told in found.items():
            model = Transformer(kind, told["mlp_width"], nnx.Rngs(seed))
            told["parameters"] = parameters(model)
            run = training.train(
                model, train_text, steps=options.steps, batch=BATCH, length=LENGTH, seed=seed
            )
            for _ in run:
                pass
            loss = training.held_out_loss(model, text, length=LENGTH, batch=HELD_OUT)
            told["held_out"].append(round(loss, 3))
            print(f"{kind} seed {seed}: {told['parameters']:,} parameters, {loss:.3f}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
