"""Compiled programs are kept for the next run: JAX's persistent compilation cache, turned on."""

import os
import pathlib
import sys

import jax

_SECONDS = 0.2  # of compilation, from which on a program is worth its file


def keep_compiled() -> None:
    """Turns the persistent compilation cache on, unless the user has set JAX's own.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    A folder that cannot be written to is no error: programs are then compiled anew.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)


def cache_folder() -> pathlib.Path:
    """Where this program keeps what it can make again: `mla_jax` in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = pathlib.Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mla_jax"
