import contextlib
import gc
import importlib.util
import os
import pathlib
import shutil

# The GPU kernels' interpreter runs every warpgroup in a thread of XLA's pool: more than small
# machines have.
os.environ.setdefault("NPROC", "16")
# On a GPU many processes share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The tests compile many small programs and run each once or twice: compiling is what they wait for.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + os.environ.get("XLA_FLAGS", "")  # what the user has set comes last and wins
)
# Threads of numpy's spin while they wait for the next product, and products are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs that are compiled once serve all processes and tests, and the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    kept = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
    if sum(file.stat().st_size for file in kept.glob("*")) > 1e9:  # of code that has changed since
        shutil.rmtree(kept)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import annotations
import jax
import numpy as np
import pytest

if importlib.util.find_spec("typeguard"):  # else tests/annotations_test.py says that it skips
    annotations.install("mla_jax")  # before any test imports it

collect_ignore_glob = ["testdata/*"]  # scripts that need torch made what is there

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nobody reads the lines of Python that programs name: to write them takes 5 % of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Tracing makes many objects: to look through them at the usual rate takes a tenth of the time.
gc.set_threshold(50_000, 10, 10)

_raises = pytest.raises


@contextlib.contextmanager
def _raises_unchecked(expected, **options):
    """`pytest.raises` of what the package itself says to wrong input, before any checker does."""
    with annotations.unchecked(), _raises(expected, **options) as info:
        yield info


pytest.raises = _raises_unchecked

_MAPS = pathlib.Path("/proc/self/maps")  # where there is none, nothing is limited so


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Lets compiled programs go before Linux runs out of memory maps, of which each takes several.

    A process may have 65,530; XLA crashes without a word where it gets no more.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _checked_where_it_is_true(request):
    """Annotations are compared where no mark says otherwise."""
    left_out = request.node.get_closest_marker("unchecked")
    with annotations.unchecked() if left_out else contextlib.nullcontext():
        yield


class _Doctests:
    """They show errors, too, and lie where this file's fixtures are not seen."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        doctest = isinstance(item, pytest.DoctestItem)
        with annotations.unchecked() if doctest else contextlib.nullcontext():
            return (yield)


def pytest_configure(config):
    config.pluginmanager.register(_Doctests())


def pytest_collection_finish():
    """What was imported stays: nobody needs to look through it for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def traced_anew(request):
    """The module's TRACED: none finds a program traced before nor leaves a broken one behind."""
    programs = request.module.TRACED
    for program in programs:
        program.clear_cache()
    yield
    for program in programs:
        program.clear_cache()


@pytest.fixture
def few_merged_at_once(request, monkeypatch):
    """All loads of a merge are unrolled, and interpreting each is compiled for half a second.

    Slow tests and those on a GPU have as many as the package.
    """
    from mla_jax.ops.hopper import merge

    if not any(map(request.node.get_closest_marker, ("slow", "accelerator"))):
        monkeypatch.setattr(merge, "_AT_ONCE", ((1, 2, 2), (1, 1, 2), (1, 1, 2), (2, 1, 2)))
        few = (4, 16), ((1, 2, 2), (4, 1, 2), (4, 1, 2))
        monkeypatch.setattr(merge, "_OF_FEW_ROWS", few)


@pytest.fixture
def card():
    """The Hopper GPU that native tests run on; without one they are skipped."""
    from hopper_common import SPEC

    from mla_jax import target
    from mla_jax.ops import hopper

    device = target.current()
    reason = hopper.why_not(SPEC, device)
    if reason is not None:
        pytest.skip(reason)
    return device
