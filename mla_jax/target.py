"""The device that a computation is compiled for, real or abstract.

No other module of the library asks jax for it. The command line does, to say where it runs.

Under `jax.set_mesh`, and inside `jax.shard_map`, jax knows an abstract device: its kind and number
of cores, but not what it can do. What it can do then follows from a real device of that kind, or
from the kind's name.
"""

import dataclasses
import re
from typing import Any

import jax

try:  # jax has no public way to ask whether an interpret mode is on
    from jax._src.config import pallas_tpu_interpret_mode_context_manager as _interpret_mode
except ImportError:
    _interpret_mode = None

# NVIDIA compute capability by device kind, where no such device is there to ask; the first match.
_CAPABILITIES = (
    (r"\bGB?[23]00|\bB[123]00", 10.0),
    (r"\bG?H[128]00|\bGH200|\bH20\b", 9.0),
    (r"\bL4\b|\bL40|RTX (40|PRO 4|6000 Ada)", 8.9),
    (r"\bA(10G?|16|2|30|40|6000)\b", 8.6),
    (r"\bA(100|800)", 8.0),
    (r"\bT4\b", 7.5),
    (r"\bV100", 7.0),
)

PARTITIONED = (
    "XLA's partitioner cannot split a kernel, and would gather its operands on every device. Make "
    "the mesh with Explicit axes, as jax.make_mesh does by default, and place arrays on it by "
    "mla_jax.sharding.Rules; or call this within jax.shard_map."
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels and choices need to know of a device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: the name that its maker gave it, e.g. "NVIDIA H200" or "TPU v6 lite".
        capability: NVIDIA compute capability, e.g. 9.0; None for other devices.
        cores: multiprocessors of a GPU, or TensorCores of a TPU device; None where not known.
        interpret: parameters of the Pallas interpret mode that is on (`pltpu.InterpretParams`,
            `plgpu.InterpretGPUParams`), so that kernels of another platform run on this one; None
            where kernels run natively.
        auto: axes of the mesh in use over which XLA's partitioner may split arrays (Auto axes).

    >>> Target("gpu", "NVIDIA H200", 9.0, 132)
    Target(platform='gpu', kind='NVIDIA H200', capability=9.0, cores=132, interpret=None, auto=())
    """

    platform: str
    kind: str
    capability: float | None = None
    cores: int | None = None
    interpret: Any = dataclasses.field(default=None, compare=False)
    auto: tuple[str, ...] = ()

    @property
    def partitioned(self) -> str | None:
        """Why no kernel runs under the mesh in use, or None.

        >>> Target("tpu", "TPU v5p", auto=("x",)).partitioned.partition(":")[0]
        'the axes x of the mesh are Auto'
        """
        if not self.auto:
            return None
        return f"the axes {', '.join(self.auto)} of the mesh are Auto: {PARTITIONED}"

    @property
    def interprets(self) -> str | None:
        """The platform whose kernels an interpret mode runs here, "gpu" or "tpu", or None."""
        if self.interpret is None:
            return None
        return "gpu" if "GPU" in type(self.interpret).__name__ else "tpu"

    def __str__(self) -> str:
        return f"{self.kind} ({self.platform})"


def current() -> Target:
    """The target of what is being traced or run now.

    That is the device of the mesh in use, if there is one, else `jax_default_device`, else the
    first device of the default backend.

    >>> current().platform in ("cpu", "gpu", "tpu")
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = tuple(
        name for name, kind in kinds if kind == jax.sharding.AxisType.Auto and mesh.shape[name] > 1
    )
    device = getattr(mesh, "abstract_device", None)
    if getattr(device, "platform", None) is None:
        device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return dataclasses.replace(of(device), auto=auto)


def of(device: Any) -> Target:
    """The target that a `jax.Device`, an abstract device or a `Target` stands for.

    >>> of(jax.devices("cpu")[0]).kind
    'cpu'
    """
    if isinstance(device, Target):
        return device
    platform, kind = device.platform, device.device_kind
    mode = None if _interpret_mode is None else _interpret_mode.value
    if platform == "tpu":
        return Target(platform, kind, cores=getattr(device, "num_cores", None), interpret=mode)
    if platform != "gpu":
        return Target(platform, kind, interpret=mode)
    cores = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    reported = getattr(device, "compute_capability", None) or _real_capability(kind)
    try:
        capability = _by_kind(kind) if reported is None else float(reported)
    except ValueError:  # AMD's devices report a name
        capability = None
    return Target(platform, kind, capability, cores, mode)


def _real_capability(kind: str) -> str | None:
    """Compute capability of a real device of this kind, where this process has one."""
    if jax.default_backend() != "gpu":
        return None
    alike = (device for device in jax.local_devices() if device.device_kind == kind)
    return getattr(next(alike, None), "compute_capability", None)


def _by_kind(kind: str) -> float | None:
    return next((value for name, value in _CAPABILITIES if re.search(name, kind)), None)
