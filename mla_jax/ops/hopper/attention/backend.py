"""The attention kernels as a backend of `dispatch`: what a call may see comes as `Seen`.

Letters: B batch, T query tokens, S slots.
"""

from mla_jax import target
from mla_jax.ops.hopper import attention
from mla_jax.ops.hopper.attention import Plan
from mla_jax.ops.hopper.attention import why_not as why_not


def plan(seen, call) -> Plan:
    """Which blocks meet: made within every call, for all its heads. No layer shares it yet."""
    more = {"window": seen.window, "segment_ids": seen.segments}
    return attention.plan_for(seen.limits, call.slots, call.key_dims, call.value_dim, **more)


def expanded_attention(queries, store, seen, call):
    """The expanded form: see `ops.expanded_attention`."""
    device = target.current()
    q_nope, q_rope = queries
    return attention.expanded_attention(
        q_nope,
        q_rope,
        store.k_nope,
        store.k_rope,
        store.value,
        scale=call.scale,
        plan=plan(seen, call) if seen.plan is None else seen.plan,
        segment_ids=seen.segments,
        interpret=device.interpret if device.interprets == "gpu" else None,
    )
