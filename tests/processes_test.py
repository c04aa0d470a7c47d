"""Two processes with two devices each: what they read, write and save is as of one process."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
from common import drawn
from flax import nnx
from numpy_decoder import NumpyDecoder

from mla_jax.checkpoint import Checkpoint, load_decoder, save_decoder, shards, stored
from mla_jax.generation import generate
from mla_jax.models import Decoder
from mla_jax.sharding import Rules

PROMPTS = [[1, 2, 3], [5, 6]]
PLACE = Rules(B="hosts", N="hosts", F="hosts", W="hosts", E=("hosts", "chips"))


def worker(address, index, folder):
    """Loads, writes a text and saves; prints what it read and what it holds."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, index)
    read, ahead = [], {}
    plain, early = stored.Stored.read, shards.Shard.read_ahead

    def reading(self, given=..., dtype=None):
        found = plain(self, given, dtype)
        read.append(found.size * self.values.itemsize)
        return found

    def reading_ahead(self, name):
        ahead[name] = self.view(name).nbytes
        return early(self, name)

    stored.Stored.read, shards.Shard.read_ahead = reading, reading_ahead
    with jax.set_mesh(jax.make_mesh((2, 2), ("hosts", "chips"))):
        model = load_decoder(folder / "one", dtype=np.float32, sharding=PLACE)
        held = 0
        for leaf in jax.tree.leaves(nnx.state(model)):
            parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
            held += sum(parts.values())
        result = generate(model, PROMPTS, max_new_tokens=5, sharding=PLACE)
        save_decoder(model, folder / "two")
    found = {"read": sum(read), "ahead": sum(ahead.values()), "held": held}
    print(json.dumps(found | {"tokens": result.tokens, "lengths": result.cache.max_length}))


def test_two_processes_are_one(tmp_path):
    from mesh_test import CONFIG  # here, as the workers have no use for what that file imports

    plain = {"num_nextn_predict_layers": 0, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}
    model = drawn(lambda: Decoder(CONFIG.replace(**plain), rngs=nnx.Rngs(0)))
    save_decoder(model, tmp_path / "one")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env |= {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, f"localhost:{port}", str(index), str(tmp_path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    exact = NumpyDecoder(model)
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        found = json.loads(out.splitlines()[-1])
        for prompt, tokens in zip(PROMPTS, found["tokens"], strict=True):
            logits = exact.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == tokens
            assert len(tokens) == 5
        assert found["held"] < 0.7 * whole  # else this test says nothing
        assert found["read"] <= 1.05 * found["held"]
        assert found["ahead"] <= found["held"]
    with Checkpoint(tmp_path / "one") as one, Checkpoint(tmp_path / "two") as two:
        assert set(one) == set(two)
        for name in one:
            np.testing.assert_array_equal(one.raw(name), two.raw(name), err_msg=name)


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
