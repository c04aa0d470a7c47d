"""Peak rates and memory of accelerators, from their data sheets."""

import dataclasses
import functools
import math
import tomllib

from mla_jax.check import check_choice
from mla_jax.config import configs_dir


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator's rates: dense bf16 operations, memory bandwidth, bytes of memory.

    Make one from measured rates to replace a data sheet's.

    Raises:
        ValueError: a number that is not positive.

    >>> Device("measured", 9e14, 3e12, 80 * 10**9).ridge
    300.0
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: int

    def __post_init__(self):
        for key in ("flops_per_second", "bytes_per_second", "memory_bytes"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{key}={value!r}: {key} must be a positive number.")

    @property
    def ridge(self) -> float:
        """Operations per byte above which work is bound by arithmetic."""
        return self.flops_per_second / self.bytes_per_second


@functools.cache
def devices() -> dict[str, Device]:
    """The devices of configs/devices.toml by name. The file cites the data sheets.

    >>> list(devices())[:3]
    ['h200', 'h100', 'a100']
    """
    tables = tomllib.loads((configs_dir() / "devices.toml").read_text(encoding="utf-8"))
    return {name: Device(name, **table) for name, table in tables.items()}


def device(name: str) -> Device:
    """One of `devices()`.

    Raises:
        ValueError: no device of that name.

    >>> device("h100").memory_bytes, round(device("h100").ridge, 1)
    (80000000000, 295.2)
    """
    check_choice("device", name, tuple(devices()))
    return devices()[name]
