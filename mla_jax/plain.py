"""The types of what may be given in place of a jax array."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

Ready = Array | np.ndarray
"""An array of jax or numpy, whose shape and dtype an annotation says: `Int[Ready, "B T"]`."""

Plain = np.ndarray | Sequence[Any]
"""An array of numpy, or a list with lists in it, of which jax makes an array."""

Whole = int | np.integer
"""A whole number of Python or numpy."""

Number = float | np.integer | np.floating
"""A number of Python or numpy; as in any annotation, float takes int in."""
