"""The folder `configs/`, and the presets that lie in it."""

import importlib.resources
import pathlib

# Releases that share another's shapes.
ALIASES = {
    "kimi_k2": "kimi_k2_0711",
    "deepseek_r1": "deepseek_v3",
    "deepseek_v3_1": "deepseek_v3",
}


def configs_dir() -> pathlib.Path:
    """The folder `configs/`: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(str(importlib.resources.files("mla_jax")))
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "models").is_dir():
            return folder
    raise FileNotFoundError(f"no configs/ with presets in {package} or beside it.")


def presets() -> tuple[str, ...]:
    """Names that `MLAConfig.from_preset` knows.

    >>> "deepseek_v3" in presets()
    True
    """
    return tuple(sorted(path.stem for path in (configs_dir() / "models").glob("*.toml")))


def aliases(preset: str) -> tuple[str, ...]:
    """Other names of a preset: of releases that share its shapes.

    >>> aliases("deepseek_v3")
    ('deepseek_r1', 'deepseek_v3_1')
    """
    return tuple(sorted(name for name, file in ALIASES.items() if file == preset))
