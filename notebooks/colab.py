"""Runs the notebooks' set-up cell, and then the notebooks, in what Colab's runtimes have installed.

    python notebooks/colab.py --dry      # asks pip what the cell would install, for every runtime
    python notebooks/colab.py            # installs for real, without an accelerator; all notebooks
    python notebooks/colab.py 01 05      # ... and these notebooks

The set-up cell is taken from the notebooks as it is, but for the repository's address, in whose
place it installs a wheel of this checkout. A dry run needs no more than names and versions, which
pip reads from folders NAME-VERSION.dist-info. The full run makes a virtual environment with Python
3.13 and the versions below, and starts its kernel for every notebook; it needs the dependency group
`notebooks`.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent
ADDRESS = "git+https://github.com/mla-jax/mla_jax"
KEPT = "numpy", "scipy", "ipykernel", "tornado"

# What matters here of the package lists that Colab publishes (github.com/googlecolab/backend-info,
# 19 August 2026): what mla_jax needs, and what runs the notebooks.
EVERYWHERE = [
    "absl-py==1.4.0", "certifi==2026.7.22", "charset-normalizer==3.4.9", "etils==1.14.0",
    "flax==0.11.2", "humanize==4.16.0", "idna==3.18", "ipykernel==6.17.1", "ipython==7.34.0",
    "jax==0.7.2", "jaxlib==0.7.2", "jupyter_client==7.4.9", "matplotlib==3.10.0",
    "ml_dtypes==0.6.0", "msgpack==1.2.1", "numpy==2.1.3", "opt_einsum==3.4.0", "optax==0.2.8",
    "orbax-checkpoint==0.12.4", "pandas==2.2.3", "PyYAML==6.0.3", "requests==2.32.4",
    "safetensors==0.8.0", "scipy==1.16.3", "simplejson==4.1.1", "tensorstore==0.1.85",
    "tokenizers==0.22.2", "tornado==6.5.7", "tqdm==4.67.3", "treescope==0.1.10",
    "typing_extensions==4.16.0", "urllib3==2.5.0",
]  # fmt: skip
NO_TPU = [*EVERYWHERE, "protobuf==5.29.6", "rich==13.9.4", "toolz==0.12.1"]
RUNTIMES = {
    "cpu": NO_TPU,
    "cuda12": [
        *NO_TPU,
        "jax-cuda12-plugin==0.7.2", "jax-cuda12-pjrt==0.7.2", "nvidia-cublas-cu12==12.8.4.1",
        "nvidia-cuda-cupti-cu12==12.8.90", "nvidia-cuda-nvcc-cu12==12.8.93",
        "nvidia-cuda-nvrtc-cu12==12.8.93", "nvidia-cuda-runtime-cu12==12.8.90",
        "nvidia-cudnn-cu12==9.19.0.56", "nvidia-cufft-cu12==11.3.3.83",
        "nvidia-cusolver-cu12==11.7.3.90", "nvidia-cusparse-cu12==12.5.8.93",
        "nvidia-nccl-cu12==2.28.9", "nvidia-nvjitlink-cu12==12.8.93",
        "nvidia-nvshmem-cu12==3.4.5",
    ],
    "tpu": [
        *EVERYWHERE, "chex==0.1.90", "libtpu==0.0.21.1", "protobuf==7.35.1", "rich==15.0.0",
        "toolz==1.1.0",
    ],
}  # fmt: skip
ACCELERATORS = {"cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}  # what must move with jax


def set_up_cell(wheel: pathlib.Path) -> str:
    """The notebooks' first code cell, which installs this wheel instead of the repository."""
    text = min(FOLDER.glob("0*.md")).read_text()
    cell = text.split("```{code-cell} ipython3\n", 1)[1].split("```", 1)[0]
    if ADDRESS not in cell:
        raise SystemExit(f"the set-up cell does not install {ADDRESS}")
    return cell.replace(ADDRESS, wheel.as_uri())


def colab_python() -> str | None:
    """The path of a Python of Colab's version, where there is one."""
    if sys.version_info[:2] == (3, 13):
        return sys.executable
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    found = sorted(map(str, pyenv.glob("versions/3.13*/bin/python")))
    return found[-1] if found else shutil.which("python3.13")


def environment(scratch: pathlib.Path, python: str) -> tuple[str, pathlib.Path]:
    """The Python of a new virtual environment that has pip alone, and a wheel of this checkout."""
    subprocess.run([python, "-m", "venv", scratch / "venv"], check=True)
    own = str(scratch / "venv" / "bin" / "python")
    build = [own, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", scratch, ROOT]
    subprocess.run(build, check=True)
    return own, next(scratch.glob("mla_jax-*.whl"))


def dry(own: str, cell: str, runtime: str, scratch: pathlib.Path) -> dict[str, str]:
    """What the cell would install on such a runtime, by name.

    Raises:
        SystemExit: pip finds no versions that go together, or moves what must stay.
    """
    site = scratch / runtime
    held = dict(package.lower().replace("_", "-").split("==") for package in RUNTIMES[runtime])
    for name, version in held.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    report = scratch / f"{runtime}.json"
    env = os.environ | {"PYTHONPATH": str(site), "PIP_DRY_RUN": "1", "PIP_REPORT": str(report)}
    command = [own, "-c", cell]  # in a folder from which no mla_jax can be imported
    subprocess.run(command, check=True, cwd=scratch, env=env, stdout=subprocess.DEVNULL)
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    new = {item["name"].lower().replace("_", "-"): item["version"] for item in items}
    moved = [name for name in KEPT if name in new]
    late = [name for name in ("jax", "jaxlib", "flax", ACCELERATORS.get(runtime, "jax"))
            if name not in new]  # fmt: skip
    if moved or late:
        raise SystemExit(f"{runtime}: {moved} would move and must not; {late} must and would not.")
    changes = [f"{name} {held.get(name, '-')} -> {version}" for name, version in new.items()]
    print(f"{runtime}: {', '.join(changes)}", flush=True)
    return new


def full(scratch: pathlib.Path, python: str, chosen: list[str]) -> None:
    """Installs Colab's versions, and executes the notebooks on them, the set-up cell first."""
    import jupytext
    import nbclient

    own, wheel = environment(scratch, python)
    subprocess.run([own, "-m", "pip", "install", "-q", *RUNTIMES["cpu"]], check=True)
    kernel = scratch / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [own, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    os.environ["JUPYTER_PATH"] = str(scratch / "jupyter")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a notice that says nothing of ours
    os.environ.pop("PYTHONPATH", None)  # the checkout must be found because it was installed
    for path in sorted(FOLDER.glob("0*.md")):
        if chosen and path.stem[:2] not in chosen:
            continue
        started = time.monotonic()
        notebook = jupytext.read(path)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        cells[0].source = set_up_cell(wheel)
        where = {"metadata": {"path": str(scratch)}}
        client = nbclient.NotebookClient(
            notebook, kernel_name="colab", timeout=1800, resources=where
        )
        client.execute()
        said = "".join(output.get("text", "") for output in cells[0].outputs).strip()
        print(f"{path.stem}: {time.monotonic() - started:.0f} s. {said}", flush=True)
    freeze = [own, "-m", "pip", "freeze"]
    print(subprocess.run(freeze, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="numbers, such as 01; all by default")
    parser.add_argument("--dry", action="store_true", help="resolve only, for every runtime")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        python = colab_python()
        if not options.dry:
            if python is None:
                parser.error("Colab has Python 3.13: none was found in PATH or in pyenv.")
            return full(scratch, python, options.notebooks)
        if python is None:
            python = sys.executable
            print(f"No Python 3.13 was found: pip resolves for {python}.", file=sys.stderr)
        own, wheel = environment(scratch, python)
        for runtime in RUNTIMES:
            dry(own, set_up_cell(wheel), runtime, scratch)


if __name__ == "__main__":
    main()
