"""What a backend of the experts is asked about."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call of `routed_experts`: what a backend needs to know of it.

    Attributes:
        tokens: M; a symbolic dimension under `jax.export` is allowed.
        pairs: M K, pairs of a token and an expert.
        experts: E.
        widths: D and F, of the model and inside an expert.
        dtype: of the computation.
        partial: whether some pairs are of no expert here, marked by the number E, and are dropped.
        stored: dtype and blocks of weights as a checkpoint stores them; None where they are plain.

    >>> Call(tokens=8, pairs=48, experts=64, widths=(2048, 1408), dtype="bfloat16").static
    True
    """

    tokens: int
    pairs: int
    experts: int
    widths: tuple[int, int]
    dtype: str
    partial: bool = False
    stored: tuple[str, tuple[int | None, int | None]] | None = None

    @property
    def static(self) -> bool:
        """Whether the number of tokens is known while tracing."""
        return isinstance(self.tokens, int)
