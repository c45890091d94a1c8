"""Flow samplers: sigma tables, Euler, UniPC, DPM-Solver++, and the training side of the same schedules.

Ours, since the solvers of diffusers cannot take Wan's sigma tables. Solvers step by index; state is in the object.
"""

from .dpm import DPMConfig, DPMSolver
from .euler import batched_euler_step, euler_step
from .schedules import (
    Schedule,
    euler_schedule,
    flow_match_schedule,
    skyreels_avatar_schedule,
    unipc_dynamic_schedule,
    unipc_schedule,
    wan_dpm_schedule,
)
from .training import add_noise, flow_from_x0, flow_target, timestep_weights, x0_from_flow
from .unipc import UniPC, UniPCConfig

__all__ = [
    "DPMConfig",
    "DPMSolver",
    "Schedule",
    "UniPC",
    "UniPCConfig",
    "add_noise",
    "batched_euler_step",
    "euler_schedule",
    "euler_step",
    "flow_from_x0",
    "flow_match_schedule",
    "flow_target",
    "skyreels_avatar_schedule",
    "timestep_weights",
    "unipc_dynamic_schedule",
    "unipc_schedule",
    "wan_dpm_schedule",
    "x0_from_flow",
]
