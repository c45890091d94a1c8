"""Parity of the Wan DiT: units, whole forwards, precision flows stage by stage, gradients, key tables (wan.md, 2.3)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....graphs.models import wan_configs
from ....graphs.models.layers import rope_grid, rope_table, sinusoid
from ....graphs.models.wan import Context, Embedded, WanModel, attend, set_precision
from ....graphs.models.wan_configs import Precision, WanConfig
from ....kernels import ops
from ....runtime.samplers import add_noise, flow_match_schedule, flow_target, timestep_weights
from ..case import Case
from ..registry import handles


def build_model(config: Mapping[str, Any], weights: dict[str, Tensor]) -> WanModel:
    """The model of a case: sizes from its .json (`img_dim` marks image cross-attention), weights loaded strictly."""
    with torch.device("meta"):
        model = WanModel(WanConfig.from_published(config, image_dim=config.get("img_dim")))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)


def read_inputs(read_tensor: Callable[[str], Tensor], names: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments from an entry of `outputs`, which holds tensor names, lists of names, or numbers."""
    rename = {"clip_fea": "clip_features"}
    read: dict[str, Any] = {}
    for key, value in names.items():
        if isinstance(value, str):
            read[rename.get(key, key)] = read_tensor(value)
        elif isinstance(value, list):
            read[rename.get(key, key)] = [read_tensor(name) for name in value]
        elif key == "seq_len":
            read[key] = value
    return read


def named_outputs(case: Case, name: str, latents: list[Tensor]) -> dict[str, Tensor]:
    """A list of latents under the names of the golden: one tensor (a sample or a stack) or one per index."""
    if name not in case:
        return {f"{name}.{i}": latent for i, latent in enumerate(latents)}
    return {name: latents[0] if case.tensors[name].ndim == 4 else torch.stack(latents)}


@handles("wan", "dit_sinusoid")
def time_sinusoid(case: Case) -> Mapping[str, Tensor]:
    return {name: sinusoid(case[p["t"]], p["freq_dim"]) for name, p in case.json["outputs"].items()}


@handles("wan", "dit_norms")
def norms(case: Case) -> Mapping[str, Tensor]:
    weight, found = case.weights(prefix="rms.")["weight"], {}
    for name, p in case.json["outputs"].items():
        x, eps = case[p["x"]], case.json["eps"]
        found[name] = ops.rms_norm(x, weight, eps) if p["op"] == "rms" else ops.layer_norm(x, eps=eps)
    return found


@handles("wan", "dit_rope")
def rotary(case: Case) -> Mapping[str, Tensor]:
    """Tables, a padded batch of two grids, and the slices that sequence-parallel ranks rotate."""

    def table(sample: int) -> Tensor:
        axes = [torch.arange(int(n)) for n in case["in.grid_sizes"][sample]]
        return rope_grid(axes[0], axes[1], axes[2], case.json["head_dim"]).float()

    x, found = case["in.x"], {}
    rotated = [ops.apply_rope(sample[None], table(i)) for i, sample in enumerate(x)]
    found["out.y"] = torch.cat(rotated)
    found["out.y_sp_padded"] = rotated[0]
    pieces = case["in.x_sp"].chunk(case.json["sp_ranks"], 1)
    for rank, tokens in enumerate(pieces):
        start = rank * pieces[0].shape[1]
        found[f"out.y_sp_rank.{rank}"] = ops.apply_rope(tokens, table(0)[start : start + tokens.shape[1]])
    for name in case.names("mid.table"):
        first = case.json["outputs"][name]["first_position"]
        positions = torch.arange(first, first + case.tensors[name].shape[0])
        found[name] = rope_table(positions, positions, positions, case.json["outputs"][name]["head_dim"])
    return found


class Recorder:
    """Keeps the first input and the output of submodules of one block during a forward."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.found: dict[str, Tensor] = {}
        self.inputs: dict[str, tuple[Any, ...]] = {}
        for name, module in modules.items():
            module.register_forward_hook(lambda _, args, out, name=name: self._keep(name, args, out))

    def _keep(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        self.inputs.setdefault(name, args)
        self.found.setdefault(f"mid.{name}_out", out)
        if isinstance(args[0], Tensor):
            self.found.setdefault(f"mid.{name}_in", args[0])


@handles("wan", "dit_t2v_*", "dit_i2v_*")
def forward(case: Case) -> Mapping[str, Tensor]:
    """Every output of the .json; the recorded intermediates belong to the first."""
    config = case.sibling(case.json["config"]).json if "config" in case.json else case.json
    model = build_model(config, case.weights())
    found: dict[str, Tensor] = {}
    for index, (name, p) in enumerate(case.json["outputs"].items()):
        if not isinstance(p, dict):
            continue
        arguments = read_inputs(case.__getitem__, p)
        latents = model(**arguments)
        found |= named_outputs(case, name, latents)
        if index == 0 and case.names("mid."):
            mids = intermediates(model, arguments, case.json["mid_block"])
            found |= {key: mids[key] for key in case.names("mid.")}
    return found


def intermediates(model: WanModel, arguments: dict[str, Any], index: int) -> dict[str, Tensor]:
    """Values of one block and around it, by golden name."""
    block = model.blocks[index]
    parts = {name: block.get_submodule(name) for name in ("self_attn", "cross_attn", "ffn")}
    seen = Recorder({**parts, "block": block, "head": model.head})
    start = model.embed(**arguments)
    tokens = model.run_blocks(start.tokens, start.modulation, start.context, start.spans)
    model.head(tokens, start.time)
    context = start.context
    found = {
        **seen.found,
        "mid.e": start.time.squeeze(1),
        "mid.e0": start.modulation.flatten(2).squeeze(1),
        "mid.context": context.text,
        f"mid.block{index}_in": seen.found["mid.block_in"],
        f"mid.block{index}_out": seen.found["mid.block_out"],
    }
    if context.image is not None:
        found["mid.img_tokens"] = context.image
        found["mid.cross_attn_ctx"] = torch.cat((context.image, context.text), 1)
    return found


def flow_of(case: Case) -> Precision:
    """The precision flow that the keys `weights_dtype`, `autocast` and `rev` describe."""
    weights = getattr(torch, case.json["weights_dtype"])
    autocast = case.json["autocast"]
    products = weights if autocast in ("off", None, False) else getattr(torch, autocast)
    return Precision(weights, products, islands=case.json["rev"] == "2.2")


@handles("wan", "dit_bf16_*")
def precision_flow(case: Case) -> Mapping[str, Tensor]:
    """Each stage from the recorded inputs of that stage (`stages`), the whole model from the start."""
    model = build_model(case.json, case.weights())
    set_precision(model, flow_of(case))
    dtypes = {name: getattr(torch, dtype) for name, dtype in case.json["dtypes"].items()}

    def recorded(name: str) -> Tensor:
        return case[name].to(dtypes.get(name, case[name].dtype))

    arguments = read_inputs(recorded, case.json["outputs"]["out.y"])
    start = model.embed(**arguments)
    found = {"mid.x_tokens": start.tokens, "mid.context": start.context.text}
    rows = {"mid.e": start.time, "mid.e0": start.modulation.flatten(2)}  # [B, R, D], [B, R, 6 D]
    if (kept := case.json["kept_token_rows_of_e"]) is not None:
        found |= {name: v.expand(-1, start.tokens.shape[1], -1)[:, kept] for name, v in rows.items()}
    else:  # one time per sample: the golden's own values feed the stages
        found |= {name: v.squeeze(1) for name, v in rows.items()}
        modulation = recorded("mid.e0").unflatten(-1, (1, 6, -1))
        start = start._replace(time=recorded("mid.e").unsqueeze(1), modulation=modulation)
    start = start._replace(context=Context(recorded("mid.context")))
    for index, block in enumerate(model.blocks):
        start = start._replace(tokens=recorded(f"out.blocks.{index - 1}" if index else "mid.x_tokens"))
        if index == case.json["mid_block"]:
            found |= block_stages(block, start, recorded)
            found[f"out.blocks.{index}"] = found.pop("block")
        else:
            found[f"out.blocks.{index}"] = block(start.tokens, start.modulation, start.context, start.spans)
    last = recorded(f"out.blocks.{len(model.blocks) - 1}")
    found["out.head"] = model.head(last, start.time)
    found |= named_outputs(case, "out.y", model(**arguments))
    wrong = {n: v.dtype for n, v in found.items() if v.dtype != dtypes.get(n, v.dtype)}
    if wrong:
        raise TypeError(f"dtypes differ from the golden's: {wrong}")
    return found


def block_stages(block: nn.Module, start: Embedded, recorded: Any) -> dict[str, Tensor]:
    """The stages inside a block; while the block runs, its parts return what the golden recorded for them."""
    found: dict[str, Tensor] = {}
    attention, cross, ffn = (block.get_submodule(name) for name in ("self_attn", "cross_attn", "ffn"))
    hooks = []
    for name, part in (("self_attn", attention), ("cross_attn", cross), ("ffn", ffn)):

        def replace(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> Tensor:
            found[f"mid.{name}_in"] = args[0]
            return recorded(f"mid.{name}_out")

        hooks.append(part.register_forward_hook(replace))
    found["block"] = block(start.tokens, start.modulation, start.context, start.spans)
    for hook in hooks:
        hook.remove()
    q, k, v = attention.project(recorded("mid.self_attn_in"), start.spans)  # type: ignore[operator]
    found |= {"mid.q": q, "mid.k": k, "mid.v": v}
    found["mid.attn"] = attend(recorded("mid.q"), recorded("mid.k"), recorded("mid.v"), start.spans)
    found["mid.self_attn_out"] = attention.o(recorded("mid.attn").flatten(2))  # type: ignore[operator]
    found["mid.cross_attn_out"] = cross(recorded("mid.cross_attn_in"), start.context)
    found["mid.ffn_out"] = ffn(recorded("mid.ffn_in"))
    return found


@handles("wan", "dit_grad_*")
def gradients(case: Case) -> Mapping[str, Any]:
    """Flow-matching loss at one training time, and its gradients."""
    model = build_model(case.json, case.weights()).requires_grad_(True)
    clean, noise, t, index = case["in.x0"], case["in.eps"], case["in.t"], case.json["timestep_index"]
    schedule = flow_match_schedule(case.json["train_steps"], case.json["shift"], sigma_min=0.0, extra_one_step=True)
    noised = add_noise(clean, noise, schedule.sigmas[index]).requires_grad_(True)
    context = case["in.context.0"].requires_grad_(True)
    y = model([noised], t, [context], case.json["seq_len"])[0]
    loss = timestep_weights(schedule)[index] * (y.float() - flow_target(clean, noise)).square().mean()
    loss.backward()
    found = {"out.x_noised": noised, "out.y": y, "out.loss": loss[None]}
    found |= {"out.grad.x": noised.grad, "out.grad.context": context.grad}
    prefix = "out.grad.w."
    found |= {name: model.get_parameter(name.removeprefix(prefix)).grad for name in case.names(prefix)}
    return found


@handles("wan", "keys_wan21_t2v_*", "keys_wan21_i2v_*")
def key_table(case: Case) -> Mapping[str, Any]:
    """Keys and shapes of a published size, built on the meta device."""
    published = {"t2v_1_3B": "WAN21_T2V_1_3B", "t2v_14B": "WAN21_T2V_14B", "i2v_14B": "WAN21_I2V_14B"}
    config = getattr(wan_configs, published[case.name.removeprefix("keys_wan21_")])
    with torch.device("meta"):
        state = WanModel(config).state_dict()
    return {
        "json.keys": [[key, list(value.shape)] for key, value in state.items()],
        "json.n_keys": len(state),
        "json.n_params": sum(value.numel() for value in state.values()),
    }
