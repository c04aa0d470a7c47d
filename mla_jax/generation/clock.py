"""Seconds of what `generate` does, with those in which it compiles counted apart."""

import time
from collections.abc import Callable
from typing import Any

import jax

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Clock:
    """Seconds between laps, compilation counted apart."""

    def __init__(self):
        self.compiling = 0.0
        self._start = time.perf_counter()

    def call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Calls a function; the seconds in which it traced and compiled are counted apart."""
        compiled = 0.0

        def hear(event: str, duration_secs: float, **_: Any) -> None:
            nonlocal compiled
            if event in _COMPILING:
                compiled += duration_secs

        started = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            return function(*arguments, **options)
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)
            # A trace within another is heard of twice.
            compiled = min(compiled, time.perf_counter() - started)
            self.compiling += compiled
            self._start += compiled

    def lap(self) -> float:
        """Seconds since the last lap, without those of compiling."""
        now = time.perf_counter()
        spent, self._start = now - self._start, now
        return spent
