"""`kinora bench step`: one `forward_block` (one denoising step of one block) with a full rolling cache.

A variant is timed only if its flow is close to that of the eager model before quantisation. "kinora" runs a captured
block of one step, whose result is the latents after it and which encodes the block's audio as well.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..graphs.models.liveavatar import LiveAvatarConfig
from ..kernels.dispatch import using
from ..runtime.systems.liveavatar import LiveAvatarSystem
from .captured import captured_block
from .harness.run import Bench, Expected, Ready, Unavailable, Work
from .models import ModelChoice, weight_bytes
from .peers import diffusers_wan, quantize_by_torchao
from .state import BlockCase, Kept, StepCall, release
from .variants import compiled, running
from .work import META, count_flops, step_flops

VARIANTS = ("eager", "compiled", "fused", "kinora", "torchao", "diffusers")
TOLERANCE = {"float32": 1e-4, "bf16": 5e-2, "fp8": 1.5e-1}
"""Relative L2 error of a whole model of 40 layers against the eager one. Random weights amplify rounding more than
trained ones do; a wrong kernel gives errors near 1."""


@dataclass(frozen=True)
class Target:
    """What other libraries are measured on: sizes and inputs; `flow` of the eager model, None where it is not known."""

    name: str
    config: LiveAvatarConfig
    noises: tuple[Tensor, ...]
    prompt: Tensor
    work: Work
    flow: Tensor | None


def bench_step(bench: Bench, choice: ModelChoice, variants: Sequence[str]) -> None:
    """Measure one step of `choice` in each variant; other libraries' models last, when the memory of ours is free."""
    target = _bench_models(bench, choice, variants)
    release()
    if "torchao" in variants and target.flow is not None:
        expected = Expected(target.flow, TOLERANCE[choice.precision])
        note = "torchao's quantize_, blocks compiled"
        bench.measure(target.name, "torchao", partial(_torchao, choice), target.work, expected, note=note)
    if "diffusers" in variants:
        _bench_diffusers(bench, target.config, target.noises, target.prompt)


def _bench_models(bench: Bench, choice: ModelChoice, variants: Sequence[str]) -> Target:
    """Our own model in its variants."""
    system = _system(choice)
    case = BlockCase.of(system, choice.video_size(system))
    name = f"step/{choice.name}/{choice.precision}/{case.tokens} tokens"
    target = Target(name, system.dit.config, case.noises, case.prompt, Work(0, 0, choice.precision), None)
    if set(variants) <= {"diffusers"}:
        return target
    made = bench.attempt(name, "reference", partial(_prepare, case))
    if made is None:
        return target
    call, flow, latents = made
    choice.quantize(system.dit)
    flops = step_flops(system.dit.config, system.mode, case.grid)
    work = Work(flops, weight_bytes(system.dit) + call.cache_bytes(), choice.precision)
    plain = Kept(partial(StepCall.prepare, case), call)
    del made, call
    for variant in variants:
        if variant in ("torchao", "diffusers"):
            continue
        captured = variant == "kinora"
        expected = Expected(latents if captured else flow, TOLERANCE[choice.precision])
        way = partial(_captured, case, plain) if captured else partial(_model, variant, plain)
        bench.measure(name, variant, way, work, expected)
    return replace(target, work=work, flow=flow)


def _system(choice: ModelChoice) -> LiveAvatarSystem:
    """With one denoising step: one rolling cache."""
    system = choice.build()
    return replace(system, mode=replace(system.mode, steps=1))


@contextmanager
def _torchao(choice: ModelChoice) -> Iterator[Ready]:
    """The same model, built again, since torchao starts from the weights that ours has given up."""
    if choice.precision != "fp8":
        raise Unavailable("torchao is measured in FP8; pass --precision fp8")
    system = _system(choice)
    quantize_by_torchao(system.dit)
    call = StepCall.prepare(BlockCase.of(system, choice.video_size(system)))
    with running("compiled", dit=system.dit):
        calls = [partial(call, x) for x in call.case.noises]
        yield Ready(calls, calls[0])


def _bench_diffusers(bench: Bench, config: LiveAvatarConfig, noises: Sequence[Tensor], prompt: Tensor) -> None:
    """diffusers' transformer of the same size on the same latents, its blocks compiled; in the dtype of the noises."""
    tokens = noises[0].shape[2:].numel() // math.prod(config.patch)
    precision = "float32" if noises[0].dtype == torch.float32 else "bf16"
    name = f"step/diffusers Wan of the same size/{precision}/{tokens} tokens"
    work = bench.attempt(name, "diffusers", lambda: _diffusers_work(config, noises[0], prompt, precision))
    if work is None:
        return
    way = partial(_diffusers, config, noises, prompt)
    note = "blocks compiled; no rolling cache, no condition tokens, no audio"
    bench.measure(name, "diffusers", way, work, note=note)


def _diffusers_call(model: nn.Module, x: Tensor, prompt: Tensor) -> Tensor:
    return model(x, torch.full((1,), 1000, device=x.device), prompt[None], return_dict=False)[0]


def _diffusers_work(config: LiveAvatarConfig, x: Tensor, prompt: Tensor, precision: str) -> Work:
    model = diffusers_wan(config, x.dtype, META)
    flops = count_flops(lambda: _diffusers_call(model, x.to(META), prompt.to(META)))
    return Work(flops, weight_bytes(model), precision)


@contextmanager
def _diffusers(config: LiveAvatarConfig, noises: Sequence[Tensor], prompt: Tensor) -> Iterator[Ready]:
    model = diffusers_wan(config, noises[0].dtype, noises[0].device)
    with compiled(list(model.blocks)):  # type: ignore[arg-type]
        calls = [partial(_diffusers_call, model, x, prompt) for x in noises]
        yield Ready(calls, calls[0])


def _prepare(case: BlockCase) -> tuple[StepCall, Tensor, Tensor]:
    """(the step, the eager model's flow, its latents after the step), for the first noise of the case."""
    with torch.no_grad(), using(False):
        call = StepCall.prepare(case)
        return call, call(case.noises[0]), call.denoiser.denoise(case.noises[0], case.inputs(case.index))


@contextmanager
def _model(variant: str, plain: Kept[StepCall]) -> Iterator[Ready]:
    call = plain.get()
    with running(variant, dit=call.case.dit):
        calls = [partial(call, x) for x in call.case.noises]
        yield Ready(calls, calls[0])


@contextmanager
def _captured(case: BlockCase, plain: Kept[StepCall]) -> Iterator[Ready]:
    plain.free()
    denoiser = case.open(captured_block(case.dit, case.prompt, case.mode, case.grid))
    calls = [partial(denoiser.denoise, x, case.inputs(case.index)) for x in case.noises]
    yield Ready(calls, calls[0])
