"""Golden cases of the flow samplers: wan `sched_*`, liveavatar `schedule*`."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....runtime import samplers
from ....runtime.samplers import Schedule
from ..case import Case
from ..registry import handles

FLOW_MATCH_OPTIONS = ("sigma_min", "extra_one_step", "denoising_strength", "inverse_timesteps", "reverse_sigmas")


def build_schedule(table: str, options: dict[str, Any], steps: int, shift: float | None, mu: float | None) -> Schedule:
    """The schedule of a table name as the goldens spell it; `options` are the table's entries in the .json."""
    if table.startswith("flowmatch"):
        assert shift is not None
        chosen = {key: options[key] for key in FLOW_MATCH_OPTIONS if key in options}
        return samplers.flow_match_schedule(steps, shift, **chosen)
    if mu is not None:
        return samplers.unipc_dynamic_schedule(steps, mu)
    own_grid = table == "dpm" and options.get("grid") == "own"
    builders: dict[str, Callable[[int, float], Schedule]] = {
        "unipc": samplers.unipc_schedule,
        "dpm": samplers.unipc_schedule if own_grid else samplers.wan_dpm_schedule,
        "diffusers_euler": samplers.euler_schedule,
        "skyreels_avatar": samplers.skyreels_avatar_schedule,
    }
    assert shift is not None
    return builders[table](steps, shift)


def stored_sigmas(table: str, schedule: Schedule) -> Tensor:
    """The golden's form of a sigma table: FlowMatchScheduler does not store its final level."""
    return schedule.sigmas[:-1] if table.startswith("flowmatch") else schedule.sigmas


@handles("wan", "sched_tables", "sched_dynamic")
def tables(case: Case) -> dict[str, Tensor]:
    results = {}
    for name in case.names("out."):
        match = re.fullmatch(r"out\.(\w+)_(sigmas|timesteps|weights)(?:\.n(\d+)_(s|mu)(.+))?", name)
        if match is None:
            raise ValueError(f"unknown table name {name}")
        table, kind, steps, parameter, value = match.groups()
        options = case.json["tables"][table]
        shift = float(value) if parameter == "s" else options.get("shift")
        mu = float(value) if parameter == "mu" else None
        schedule = build_schedule(table, options, int(steps or options["steps"]), shift, mu)
        if kind == "sigmas":
            results[name] = stored_sigmas(table, schedule)
        elif kind == "weights":
            results[name] = samplers.timestep_weights(schedule)
        else:
            zero = schedule.timesteps.new_zeros(int(options.get("appended_zero", False)))
            results[name] = torch.cat((schedule.timesteps, zero))
    return results


@handles("wan", "sched_traj_*")
def trajectory(case: Case) -> dict[str, Tensor]:
    j = case.json
    table = j["sigma_table"]
    # the flow-match trajectories use the table of omni: sigma_min 0 with the extra step
    options = {"sigma_min": 0.0, "extra_one_step": True}
    schedule = build_schedule(table, options | j, j["steps"], j.get("shift"), j.get("mu"))
    x, outputs = case["in.x"], case["in.model_outputs"]
    step = _stepper(j, schedule)
    samples = []
    for i, output in enumerate(outputs):
        x = step(output, i, x)
        samples.append(x)
    return {"out.x": torch.stack(samples), "mid.sigmas": stored_sigmas(table, schedule)}


def _stepper(j: dict[str, Any], schedule: Schedule) -> Callable[[Tensor, int, Tensor], Tensor]:
    if j["sample_solver"] == "euler":
        sigmas = schedule.sigmas
        return lambda v, i, x: samplers.euler_step(x, v, sigmas[i], sigmas[i + 1])
    solvers: dict[str, tuple[Any, Any]] = {
        "unipc": (samplers.UniPC, samplers.UniPCConfig),
        "dpm++": (samplers.DPMSolver, samplers.DPMConfig),
    }
    solver, config = solvers[j["sample_solver"]]
    names = config.__dataclass_fields__
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in j.items() if k in names}
    return solver(schedule, config(**options)).step


@handles("wan", "sched_euler_batched")
def euler_batched(case: Case) -> dict[str, Tensor]:
    j = case.json
    common = {key: j[key] for key in FLOW_MATCH_OPTIONS if key in j}
    results = {}
    schedules = {}
    for table, options in j["tables"].items():
        schedules[table] = build_schedule("flowmatch", common | options, j["steps"], j["shift"], None)
        results[f"out.{table}_sigmas"] = schedules[table].sigmas[:-1]
        results[f"out.{table}_timesteps"] = schedules[table].timesteps
    for name, call in j["outputs"].items():
        if "model_output" not in call:
            continue
        schedule = schedules[call["table"]]
        index = schedule.nearest(torch.tensor(call["t"]))
        x, v = case[call["x"]], case[call["model_output"]]
        results[name] = samplers.batched_euler_step(schedule, x, v, index, to_final=call["to_final"], shared_end=True)
    return results


@handles("wan", "sched_noising")
def noising(case: Case) -> dict[str, Tensor]:
    j = case.json
    schedules = {
        name: build_schedule(
            "flowmatch" if "sigma_min" in table else "unipc", table, table["steps"], table["shift"], None
        )
        for name, table in j["tables"].items()
    }
    single, batch, unipc = schedules["single"], schedules["batch"], schedules["unipc"]
    z, eps, zb, eb = case["in.z"], case["in.eps"], case["in.zb"], case["in.eb"]
    index = single.nearest(case["in.t"])
    levels = single.sigmas[index]
    results = {f"out.noised.{i}": samplers.add_noise(z, eps, level) for i, level in enumerate(levels)}
    results["out.weights"] = samplers.timestep_weights(single)[index]
    results["out.target"] = samplers.flow_target(z, eps)
    back = j["outputs"]["out.back"]
    position = int(back["t"].removeprefix("in.t[").removesuffix("]"))
    results["out.back"] = samplers.flow_from_x0(case[back["x"]], case[back["x_stable"]], levels[position])
    tb = case["in.tb"]
    results["out.noised_batch"] = samplers.add_noise(zb, eb, batch.sigmas[batch.nearest(tb)])
    picked = tb[j["outputs"]["out.step_batch"]["t_index_in_tb"]]
    results["out.step_batch"] = samplers.batched_euler_step(batch, zb, eb, batch.nearest(picked), shared_end=True)
    exact = [unipc.sigmas[unipc.index_of(t)] for t in case["in.t_unipc"].tolist()]
    results["out.noised_unipc"] = torch.cat([samplers.add_noise(z, eps, level) for level in exact])
    return results


def _sampling_tables(case: Case) -> dict[str, Tensor]:
    results = {}
    for steps in case.json["steps_listed"]:
        schedule = samplers.euler_schedule(steps, case.json["shift"])
        results[f"out.sigmas.{steps}"] = schedule.sigmas
        results[f"out.timesteps.{steps}"] = schedule.timesteps
    return results


@handles("liveavatar", "schedule")
def liveavatar_schedule(case: Case) -> dict[str, Any]:
    j = case.json
    results: dict[str, Any] = _sampling_tables(case)
    for steps, table in j["tables"].items():
        schedule = samplers.euler_schedule(int(steps), j["shift"])
        for kind in table:
            results[f"json.tables.{steps}.{kind}"] = getattr(schedule, kind).tolist()
    sigmas = samplers.euler_schedule(j["trajectory_steps"], j["shift"]).sigmas
    for dtype in ("f32", "bf16"):
        x = case[f"in.{dtype}.x"]
        for i in range(j["trajectory_steps"]):
            x = samplers.euler_step(x, case[f"in.{dtype}.{i}.v"], sigmas[i], sigmas[i + 1])
            results[f"out.{dtype}.{i}.x"] = x
    return results


def _training_schedule(options: dict[str, Any]) -> Schedule:
    return build_schedule("flowmatch", options, options["steps"], options["shift"], None)


@handles("liveavatar", "schedule_more")
def liveavatar_schedule_more(case: Case) -> dict[str, Tensor]:
    results = _sampling_tables(case)
    schedule = _training_schedule(case.json["train"])
    index = schedule.nearest(case["in.train.t"])
    x0, noise, sigma = case["in.train.x0"], case["in.train.noise"], schedule.sigmas[index]
    noisy = samplers.add_noise(x0, noise, sigma)
    return results | {
        "out.train.index": index,
        "out.train.weight": samplers.timestep_weights(schedule)[index],
        "out.train.noisy": noisy,
        "out.train.x0_from_flow": samplers.x0_from_flow(noisy, samplers.flow_target(x0, noise), sigma),
        "out.train.flow_from_x0": samplers.flow_from_x0(noisy, x0, sigma),
    }


@handles("liveavatar", "schedule_train")
def liveavatar_schedule_train(case: Case) -> dict[str, Tensor]:
    schedule = _training_schedule(case.json["args"])
    x0, noise = case["in.x0"], case["in.noise"]
    sigma = schedule.sigmas[schedule.nearest(case["in.t"])]
    noisy, target = samplers.add_noise(x0, noise, sigma), samplers.flow_target(x0, noise)
    return {
        "out.sigmas": schedule.sigmas[:-1],
        "out.timesteps": schedule.timesteps,
        "out.weights": samplers.timestep_weights(schedule),
        "out.noisy": noisy,
        "out.target": target,
        "out.x0_from_flow": samplers.x0_from_flow(noisy, target, sigma),
        "out.flow_from_x0": samplers.flow_from_x0(noisy, x0, sigma),
    }
