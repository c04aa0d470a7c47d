"""How fast a kind of device runs what the two forms of attention do, as far as that is known.

`configs/tuning` has the rates by device kind: timed on hardware, or of libtpu's static cycles.
"""

import functools
import tomllib
from typing import NamedTuple

from mla_jax.config import configs_dir


class Rates(NamedTuple):
    """Operations per second, in any one unit: only their ratios matter.

    Attributes:
        products: of plain matrix products, as the folds and the expansion of latents.
        absorbed: of scores and mixing over latents, many queries at once.
        expanded: of scores and mixing over keys and values of every head.
        source: what they come from, in words.
    """

    products: float = 1.0
    absorbed: float = 1.0
    expanded: float = 1.0
    source: str = "operations"


OPERATIONS = Rates()


@functools.cache
def rates_of(kind: str) -> Rates:
    """The rates of a device kind; where none are known all are alike, so that operations decide.

    >>> rates_of("cpu").source
    'operations'
    >>> rates_of("TPU v6 lite").source
    'static cycles, libtpu 0.0.52'
    """
    for path in sorted((configs_dir() / "tuning").glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        known = table if table.get("device_kind") == kind else table.get(kind, {})
        if "rates" in known:
            return Rates(**known["rates"])
    return OPERATIONS
