"""Golden cases of LiveAvatar's training: block mask, loss and gradients, LoRA (liveavatar.md, 6 and 9)."""

import torch

from ....checkpoints_tools.lora import merge_lora
from ....graphs.models.liveavatar_block import block_mask
from ....runtime.samplers import add_noise
from ....train.flow_matching import (
    flow_matching_loss,
    frame_losses,
    noise_level,
    share_within_blocks,
    training_schedule,
)
from ....train.lora import add_lora, lora_state_dict
from ..case import Case
from ..registry import handles
from .liveavatar_dit import load_model
from .liveavatar_units import Values


@handles("liveavatar", "model_train")
@torch.no_grad()
def model_train(case: Case) -> Values:
    dit = load_model(case)
    x = case["in.x"][None]
    per_frame = x.shape[-2] * x.shape[-1] // 4
    condition = case.tensors["mid.attn_mask"].shape[0] - x.shape[2] * per_frame
    flow = dit.forward_train(
        x,
        case["in.t"],
        case["in.context"],
        case["in.audio_input"],
        case["in.ref_latents"],
        case["in.motion_latents"],
        cond_states=case["in.cond_states"],
        add_last_motion=case.json["add_last_motion_argument"],
        ref_shift=case.json["cond_shift"],
    )
    frames = dit.config.num_frames_per_block
    mask = block_mask(x.shape[2] // frames, frames * per_frame, condition)
    return {"out.flow": flow[0], "mid.attn_mask": mask.to(torch.uint8)}


@handles("liveavatar", "lora_merge")
def lora_merge(case: Case) -> Values:
    weights = {name: value.clone() for name, value in case.weights().items()}
    lora = {name.removeprefix("in."): case[name] for name in case.names("in.")}
    merge_lora(weights, lora, case.json["alpha"], case.json["targets"].split(","))
    return {f"out.{name}": value for name, value in weights.items() if f"out.{name}" in case}


@handles("liveavatar", "train_loss")
def train_loss(case: Case) -> Values:
    info, lora = case.json, case.json["lora"]
    dit = load_model(case)
    add_lora(dit, lora["rank"], lora["alpha"], lora["targets"])
    state = dit.state_dict()
    for name in lora_state_dict(dit):
        state[name].copy_(case[f"in.{name}"])
    schedule = training_schedule(**info["scheduler"])
    t = share_within_blocks(case["in.t_raw"], info["num_frame_per_block"])
    sigma, weight = noise_level(schedule, t)
    x0, noise = case["in.x0"][None], case["in.noise"][None]
    noisy = add_noise(x0, noise, sigma[:, None, :, None, None])
    flow = dit.forward_train(
        noisy,
        t,
        case["in.context"],
        case["in.audio_input"],
        case["in.ref_latents"],
        case["in.motion_latents"],
        cond_states=case["in.cond_states"],
        add_last_motion=info["add_last_motion_argument"],
        ref_shift=info["cond_shift"],
    )
    loss = flow_matching_loss(flow, x0, noise, weight)
    loss.backward()
    gradients = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
    listed = info["parameters_without_gradient"]
    without = {name for name, p in dit.named_parameters() if p.grad is None}
    in_order = [name for name in listed if name in without] + sorted(without.difference(listed))
    recorded = {name: gradients[name.removeprefix("out.grad.")] for name in case.names("out.grad.")}
    return recorded | {
        "mid.t_block": t,
        "mid.noisy": noisy[0],
        "mid.weight": weight[0],
        "mid.sigma": sigma[0],
        "mid.flow": flow[0],
        "mid.loss_per_frame": frame_losses(flow, x0, noise)[0],
        "out.loss": loss[None],
        "out.grad_norms": torch.stack([gradients[name].norm() for name in info["grad_norm_names"]]),
        "json.parameters_without_gradient": in_order,
    }
