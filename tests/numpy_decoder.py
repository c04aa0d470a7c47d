"""Decoders of DeepSeek's shape, and their drafts, in float64: nothing cached, nothing batched."""

import types

import jax
import numpy as np
from flax import nnx

from mla_jax import rope


class NumpyDecoder:
    """The same model in float64, one token of one row at a time, from the papers' equations."""

    def __init__(self, model):
        self.config = model.config
        self.weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))

    @classmethod
    def attended(cls, layer, x):
        """What one attention layer by itself makes of one row [T D]."""
        exact = cls.__new__(cls)
        exact.config = types.SimpleNamespace(attention=layer.config)
        return exact.attention(
            jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer))), np.float64(x)
        )

    def logits(self, tokens):
        return self.head(self.hidden(tokens), self.weights)

    def hidden(self, tokens):
        """States of one row's tokens after the final norm."""
        w, c = self.weights, self.config
        x = w["embed"]["embedding"][np.asarray(tokens)] * c.embed_scale
        for layer in range(c.attention.num_hidden_layers):
            x = self.block(w["blocks"][layer], x)
        return self.norm(x, w["norm"], c.rms_norm_eps)

    def head(self, hidden, w):
        tied = self.config.tie_word_embeddings and "head" not in w
        head = self.weights["embed"]["embedding"].T if tied else w["head"]["kernel"]
        return hidden @ head * self.config.logit_scale

    def block(self, b, x):
        c = self.config
        if c.shortcut:
            return self.shortcut_block(b, x)
        x = x + c.residual_scale * self.attention(
            b["attention"], self.norm(x, b["attention_norm"], c.rms_norm_eps)
        )
        h = self.norm(x, b["mlp_norm"], c.rms_norm_eps)
        return x + c.residual_scale * (
            np.stack([self.experts(b["mlp"], row) for row in h])
            if "router" in b["mlp"] else self.mlp(b["mlp"], h)
        )  # fmt: skip

    def shortcut_block(self, b, x):
        """LongCat-Flash: what the experts make of the first MLP's input is added at the end."""
        eps, shortcut = self.config.rms_norm_eps, 0
        for i in range(2):
            h = self.norm(x, b["attention_norms"][i], eps)
            x = x + self.attention(b["attentions"][i], h)
            h = self.norm(x, b["mlp_norms"][i], eps)
            if i == 0:
                shortcut = np.stack([self.experts(b["mlp"], row) for row in h])
            x = x + self.mlp(b["mlps"][i], h)
        return x + shortcut

    def draft(self, hidden, following):
        """The predictor's states after the model's of positions 0.. and the tokens that follow."""
        p, c = self.weights["predictor"], self.config
        embed = p.get("embed", self.weights["embed"])["embedding"]
        e = self.norm(embed[np.asarray(following)] * c.embed_scale, p["enorm"], c.rms_norm_eps)
        h = self.norm(hidden, p["hnorm"], c.rms_norm_eps)
        x = self.block(p["block"], np.concatenate([e, h], -1) @ p["eh_proj"]["kernel"])
        return self.norm(x, p["norm"], c.rms_norm_eps)

    def draft_logits(self, state):
        return self.head(state, self.weights | self.weights["predictor"])

    def guesses(self, tokens, count):
        """The tokens that the predictor drafts after a text, each time from scratch."""
        tokens = [int(token) for token in tokens]
        hidden = self.hidden(tokens[:-1])
        for _ in range(count):
            state = self.draft(hidden, tokens[1:])[-1:]
            tokens.append(int(self.draft_logits(state)[0].argmax()))
            hidden = np.concatenate([hidden, state])
        return tokens[-count:]

    def norm(self, x, w, eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w["scale"]

    def mlp(self, w, x):
        gate = x @ w["gate_proj"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["up_proj"]["kernel"])) @ w["down_proj"][
            "kernel"
        ]

    def choose(self, w, x):
        """{expert: weight} of one token."""
        c = self.config
        scores = x @ w["kernel"]
        if c.scoring_func == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        else:
            scores = np.exp(scores) / np.exp(scores).sum()
        choice = scores + w.get("bias", 0)
        groups = choice.reshape(c.n_group, -1)
        best = 2 if c.scoring_func == "sigmoid" else 1
        worth = np.sort(groups, -1)[:, -best:].sum(-1)
        size = groups.shape[1]
        allowed = [
            e for g in np.argsort(-worth)[: c.topk_group] for e in range(g * size, g * size + size)
        ]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: c.num_experts_per_tok]
        total = scores[chosen].sum() if c.norm_topk_prob else 1
        return {e: scores[e] / total * c.routed_scaling_factor for e in chosen}

    def experts(self, w, x):
        out = np.zeros_like(x)
        for e, share in self.choose(w["router"], x).items():
            if e >= len(w["gate_proj"]):  # it returns its input
                out += share * x
                continue
            one = {k: {"kernel": w[k][e]} for k in ("gate_proj", "up_proj", "down_proj")}
            out += share * self.mlp(one, x)
        return out + (self.mlp(w["shared"], x) if self.config.n_shared_experts else 0)

    def linear(self, w, x):
        kernel = w["kernel"].reshape(x.shape[-1], -1)
        y = x @ kernel + w.get("bias", np.zeros(1)).reshape(-1)
        return y.reshape(*x.shape[:-1], *w["kernel"].shape[1:])

    def attention(self, w, x):
        c = self.config.attention
        if c.q_lora_rank is None:
            q, q_latent = self.linear(w["q_proj"], x), None
        else:
            q = self.norm(self.linear(w["q_a_proj"], x), w["q_a_norm"], c.latent_norm_eps)
            q_latent = q
            q = self.linear(w["q_b_proj"], q)
            q = q * (np.sqrt(c.hidden_size / c.q_lora_rank) if c.mla_scale_q_lora else 1)
        latent, k_rope = np.split(self.linear(w["kv_a_proj"], x), [c.kv_lora_rank], -1)
        latent = self.norm(latent, w["kv_a_norm"], c.latent_norm_eps)
        latent = latent * (np.sqrt(c.hidden_size / c.kv_lora_rank) if c.mla_scale_kv_lora else 1)
        kv = np.einsum("tr,rnk->tnk", latent, w["kv_b_proj"]["kernel"])
        k_nope, value = np.split(kv, [c.qk_nope_head_dim], -1)
        q_nope, q_rope = np.split(q, [c.qk_nope_head_dim], -1)
        turn = np.exp(1j * np.arange(len(x))[:, None] * rope.inverse_frequencies(c))
        turn = turn * rope.attention_factor(c)

        def rotate(y, turn, interleave=c.rope_interleave):
            pairs = y[..., 0::2] + 1j * y[..., 1::2]
            if not interleave:
                first, second = np.split(y, 2, -1)
                pairs = first + 1j * second
            return pairs * turn

        q_rope, k_rope = rotate(q_rope, turn[:, None]), rotate(k_rope, turn)
        if c.index_topk is not None and "indexer" in w:  # later layers may share the choice
            half = lambda y, turn: rotate(y, turn, c.indexer_rope_interleave)  # noqa: E731
            self.chosen = self.choose_tokens(w["indexer"], x, q_latent, half, turn)
        heads = np.zeros(value.shape)
        for t, n in np.ndindex(*heads.shape[:2]):
            seen = list(range(t + 1)) if c.index_topk is None else self.chosen[t]
            scores = k_nope[seen, n] @ q_nope[t, n]
            scores = c.scale * (scores + (k_rope[seen] * q_rope[t, n].conj()).real.sum(-1))
            p = np.exp(scores - scores.max())
            heads[t, n] = p / p.sum() @ value[seen, n]
        o = w["o_proj"]
        return heads.reshape(len(x), -1) @ o["kernel"].reshape(-1, len(x[0])) + o.get("bias", 0)

    def choose_tokens(self, w, x, q_latent, rotate, turn):
        """The tokens that each of a row's attends to: DeepSeek-V3.2's indexer, token by token."""
        c = self.config.attention
        key = self.linear(w["wk"], x)
        key = key - key.mean(-1, keepdims=True)
        key = key / np.sqrt((key**2).mean(-1, keepdims=True) + c.index_norm_eps)
        key = key * w["k_norm"]["scale"] + w["k_norm"]["bias"]
        query, weights = self.linear(w["wq_b"], q_latent), self.linear(w["weights_proj"], x)
        width = c.qk_rope_head_dim
        turned_key, turned = rotate(key[:, :width], turn), rotate(query[..., :width], turn[:, None])
        chosen = []
        for t in range(len(x)):
            scores = np.zeros(t + 1)
            for s, j in np.ndindex(t + 1, c.index_n_heads):
                product = (turned_key[s] * turned[t, j].conj()).real.sum()
                product += key[s, width:] @ query[t, j, width:]
                scores[s] += weights[t, j] * max(product * c.index_head_dim**-0.5, 0)
            scores *= c.index_n_heads**-0.5
            chosen.append(sorted(range(t + 1), key=lambda s: (-scores[s], s))[: c.index_topk])
        return chosen
