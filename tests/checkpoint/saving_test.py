"""Saved folders: bit for bit, whole after any interruption, also over what is being read."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, slow
from flax import nnx
from safetensors import safe_open

from mla_jax import MLAConfig, checkpoint
from mla_jax.models import Decoder, DecoderConfig, decoder_presets

DECODERS = pathlib.Path(__file__).parents[1] / "testdata" / "decoders"
FOLDERS = sorted(DECODERS.iterdir())
BFLOAT16 = "deepseek_v3", "minicpm3"  # with a router, whose parameters stay float32, and without
SMALL = DecoderConfig(
    attention=PLAIN.replace(num_hidden_layers=2), vocab_size=31, intermediate_size=20,
    moe_intermediate_size=9, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, scoring_func="sigmoid", norm_topk_prob=True,
    num_nextn_predict_layers=1, eos_token_ids=(3, 7),
)  # fmt: skip


def assert_same(one, two):
    states = [nnx.to_flat_state(nnx.state(model)) for model in (one, two)]
    assert [path for path, _ in states[0]] == [path for path, _ in states[1]]
    for (path, a), (_, b) in zip(*states, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def random_weights(model, seed=0):
    """Noise in every parameter: what a constructor makes has zeros and ones in it."""
    random = np.random.default_rng(seed)
    for _, parameter in nnx.to_flat_state(nnx.state(model)):
        noise = random.standard_normal(parameter.shape).astype(parameter.dtype)
        parameter.set_value(jax.device_put(noise))
    return model


def make(config, seed=0, **options):
    return random_weights(drawn(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)), seed)


@pytest.mark.parametrize(
    ("folder", "dtype"),
    [(folder, jnp.float32) for folder in FOLDERS]
    + [
        (folder, jnp.bfloat16) if folder.name in BFLOAT16 else slow(folder, jnp.bfloat16)
        for folder in FOLDERS
    ],
    ids=lambda value: getattr(value, "name", None) or np.dtype(value).name,
)
def test_a_families_model_comes_back_bit_for_bit(folder, dtype, tmp_path):
    model = checkpoint.load_decoder(folder, dtype=dtype)
    checkpoint.save_decoder(model, tmp_path, max_shard_bytes=9000)
    again = checkpoint.load_decoder(tmp_path, dtype=dtype)
    assert_same(model, again)
    assert again.config == model.config.replace(num_nextn_predict_layers=0)
    assert again.config.model_type == model.config.model_type
    source, saved = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    for key in saved.keys() & source.keys() - {"num_nextn_predict_layers"}:
        assert saved[key] == source[key], key
    if dtype != jnp.float32:
        return
    with checkpoint.Checkpoint(folder) as files, checkpoint.Checkpoint(tmp_path) as copies:
        assert set(files) == set(copies)
        for name in files:  # the very tensors of the family's own code
            np.testing.assert_array_equal(files.raw(name), copies.raw(name), err_msg=name)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(False, jnp.bfloat16), slow(False, jnp.float32), (True, jnp.float32),
     slow(True, jnp.bfloat16)],
    ids=["copies-bf16", "copies-f32", "its own embedding and head-f32",
         "its own embedding and head-bf16"],
)  # fmt: skip
def test_a_block_for_drafting_comes_back(own, dtype, tmp_path):
    model = make(SMALL, mtp=True, param_dtype=dtype)
    if own:
        embed = lambda: nnx.Embed(31, 24, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
        head = lambda: nnx.Linear(24, 31, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
        model.predictor.embed, model.predictor.head = drawn(embed, 5), drawn(head, 6)
    checkpoint.save_decoder(model, tmp_path)
    again = checkpoint.load_decoder(tmp_path, dtype=dtype, mtp=True)
    assert_same(model, again)
    assert again.config == SMALL
    assert (again.predictor.embed is None, again.predictor.head is None) == (not own, not own)
    without = checkpoint.load_decoder(tmp_path, dtype=dtype)
    assert without.predictor is None
    with checkpoint.Checkpoint(tmp_path) as files:  # as DeepSeek-V3's files have it
        assert "model.layers.2.embed_tokens.weight" in files
        assert "model.layers.2.shared_head.head.weight" in files


CONFIGS = {
    "the demo's: dense, tied": DecoderConfig(
        attention=MLAConfig.from_preset("tiny").replace(num_hidden_layers=2),
        tie_word_embeddings=True),
    "softmax": SMALL.replace(scoring_func="softmax", norm_topk_prob=False, n_group=3,
                             topk_group=2, num_nextn_predict_layers=0),
    "every factor": SMALL.replace(embed_scale=12.0, residual_scale=0.7, logit_scale=0.5,
                                  num_nextn_predict_layers=0),
    "biases, scaled latents, YaRN": DecoderConfig(attention=MICRO.replace(num_hidden_layers=2)),
    "frequencies given": DecoderConfig(attention=PLAIN.replace(
        rope_inv_freq=(0.5, 0.1), softmax_scale=0.3, latent_norm_eps=1e-5)),
    "one expert everywhere": SMALL.replace(first_k_dense_replace=0, n_shared_experts=0,
                                           num_nextn_predict_layers=0),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_any_decoder_comes_back(name, tmp_path):
    model = make(CONFIGS[name], dtype=jnp.float32)
    checkpoint.save_decoder(model, tmp_path)
    again = checkpoint.load_decoder(tmp_path, dtype=jnp.float32)
    assert again.config == CONFIGS[name]
    assert_same(model, again)
    assert nnx.graphdef(model) == nnx.graphdef(again)  # one program serves both


@pytest.mark.parametrize("preset", decoder_presets())
def test_a_presets_config_json_says_all_of_it(preset):
    from mla_jax import families

    config = DecoderConfig.from_preset(preset)
    written = json.loads(json.dumps(families.config_json(config, "bfloat16")))
    assert DecoderConfig.from_hf(written) == config


def test_files_are_safetensors_own(tmp_path):
    """The library reads them, names and dtypes are its own, and the index names every tensor."""
    model = make(SMALL, param_dtype=jnp.bfloat16)
    checkpoint.save_decoder(model, tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    seen, total = {}, 0
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(str(file), "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in list(opened.keys()):
                seen[name] = file.name
                total += opened.get_tensor(name).nbytes
    assert seen == index["weight_map"]
    assert total == index["metadata"]["total_size"]
    assert [file.name for file in tmp_path.glob("*.partial")] == []


def test_over_another_model_and_beside_other_files(tmp_path):
    checkpoint.save_decoder(make(SMALL), tmp_path, max_shard_bytes=3000)
    (tmp_path / "tokenizer.json").write_text("{}")
    other = make(CONFIGS["the demo's: dense, tied"], seed=1)
    for _ in range(2):
        checkpoint.save_decoder(other, tmp_path, max_shard_bytes=200_000)
        assert_same(checkpoint.load_decoder(tmp_path, dtype=jnp.float32), other)
    names = {file.name for file in tmp_path.iterdir()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert names == {"config.json", "tokenizer.json", "model.safetensors.index.json",
                     *index["weight_map"].values()}  # fmt: skip


@pytest.mark.parametrize("indexed", [True, False], ids=["shards", "one file"])
def test_over_what_is_being_read(indexed, tmp_path):
    """Mapped views keep their numbers, and are what the new files hold."""
    source = next(folder for folder in FOLDERS if folder.name == "deepseek_v3")
    if indexed:
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    else:
        with checkpoint.Checkpoint(source) as files:
            from safetensors.numpy import save_file

            save_file({name: files.raw(name).copy() for name in files},
                      str(tmp_path / "model.safetensors"))  # fmt: skip
    with checkpoint.Checkpoint(tmp_path) as files, checkpoint.Checkpoint(source) as own:
        views = {name: files.raw(name) for name in files}
        checkpoint.save_tensors(tmp_path, views, shard_bytes=20_000)
        for name, view in views.items():
            np.testing.assert_array_equal(view, own.raw(name))
    with checkpoint.Checkpoint(tmp_path) as files, checkpoint.Checkpoint(source) as own:
        assert set(files) == set(own)
        for name in files:
            np.testing.assert_array_equal(files.raw(name), own.raw(name))


_KILLED = """
import itertools, os, pathlib, resource, shutil, sys
import numpy as np
from mla_jax import checkpoint
from mla_jax.checkpoint import saving

folder, how = pathlib.Path(sys.argv[1]), None
BEFORE = {"one file": 1, "no index": 2, "fewer shards": 2, "more shards": 5}

def tensors(generation, count):
    return [saving.Tensor(f"t{i}.weight", np.dtype(np.float32), (50,),
                          lambda i=i: np.full(50, 10.0 * generation + i, np.float32))
            for i in range(count)]

def save(generation, count):
    saving.write(folder, tensors(generation, count), shard_bytes=500,
                 config={"generation": generation, "count": count})

def prepare():
    shutil.rmtree(folder, ignore_errors=True)
    save(1, 2 * BEFORE[how])
    if how == "one file":  # as many folders of the hub are, without an index
        (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
        (folder / "model.safetensors.index.json").unlink()
    if how == "no index":
        (folder / "model.safetensors.index.json").unlink()

def state():
    with checkpoint.Checkpoint(folder) as files:
        values = {name: set(files.raw(name).tolist()) for name in files}
        config = dict(files.config)
    generation, count = config["generation"], config["count"]
    assert values == {f"t{i}.weight": {10.0 * generation + i} for i in range(count)}, (
        config, values)
    return generation

def die_at(n):
    steps = itertools.count(1)
    def counted(real, module, name):
        def call(*args, **kwargs):
            if next(steps) == n:
                os._exit(9)
            return real(*args, **kwargs)
        setattr(module, name, call)
    for name in ("replace", "fsync", "open", "unlink"):
        counted(getattr(os, name), os, name)
    for name in ("unlink", "open", "mkdir"):
        counted(getattr(pathlib.Path, name), pathlib.Path, name)

for how in sys.argv[2:]:
    seen = []
    for n in itertools.count(1):
        prepare()
        child = os.fork()
        if child == 0:
            die_at(n)
            save(2, 6)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(state())
        save(3, 4)  # a later save finds its way, and leaves nothing behind
        assert state() == 3
        left = {f.name for f in folder.iterdir()}
        assert left == {"config.json", "model.safetensors.index.json",
                        *{f.name for f in folder.glob("model*-of-00002.safetensors")}}, left
        assert len(left) == 4, left
        if code == 0:
            break
    assert seen == sorted(seen) and set(seen) == {1, 2}, seen
    print("killed at", len(seen) - 1, "steps:", "".join(map(str, seen)))
"""


@pytest.mark.parametrize(
    "ways",
    [["one file", "fewer shards"], slow(["no index", "more shards"])],
    ids=" and ".join,
)
def test_killed_at_any_step_it_is_the_old_model_or_the_new(ways, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "model"), *ways], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    steps = [int(line.split()[2]) for line in found.stdout.splitlines()]
    assert len(steps) == len(ways)
    assert min(steps) > 15, found.stdout


_FULL = """
import pathlib, resource, signal, sys
import numpy as np
from mla_jax import checkpoint
folder = pathlib.Path(sys.argv[1])
old = {f"old{i}.weight": np.full(300, i, np.float32) for i in range(4)}
checkpoint.save_tensors(folder, old, shard_bytes=2000)
before = sorted(f.name for f in folder.iterdir())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
new = {f"new{i}.weight": np.full(1000 * (i + 1), i, np.float32) for i in range(3)}
for limit in (0, 50, 5000, 11_900):  # shards have 4, 8 and 12 thousand bytes and a header
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save_tensors(folder, new, shard_bytes=4500)
    except OSError as error:
        print(limit, error.errno)
    else:
        raise SystemExit("it fitted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
    assert sorted(f.name for f in folder.iterdir()) == before
    with checkpoint.Checkpoint(folder) as files:
        assert {n: files.raw(n).tolist() for n in files} == {n: v.tolist() for n, v in old.items()}
"""


def test_a_full_disk_leaves_the_old_model(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "model")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 4


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tensors to write"):
        checkpoint.save_tensors(tmp_path, {})
    with pytest.raises(ValueError, match="a is complex64"):
        checkpoint.save_tensors(tmp_path, {"a": np.zeros(2, np.complex64)})
    model = make(CONFIGS["softmax"].replace(model_type="minicpm3"))
    with pytest.raises(
        ValueError, match=r"model_type='minicpm3' cannot say moe_intermediate_size=9"
    ):
        checkpoint.save_decoder(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_sharded_parameters_are_saved_whole(tmp_path):
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])
    experts = jax.NamedSharding(mesh, jax.P("ep"))
    whole = jax.NamedSharding(mesh, jax.P())
    model = make(SMALL)
    checkpoint.save_decoder(model, tmp_path / "a")
    place = lambda path, shape: experts if len(shape) == 3 and "mlp" in path else whole  # noqa: E731
    placed = checkpoint.load_decoder(tmp_path / "a", dtype=jnp.float32, sharding=place)
    checkpoint.save_decoder(placed, tmp_path / "b")
    assert_same(checkpoint.load_decoder(tmp_path / "b", dtype=jnp.float32), model)
