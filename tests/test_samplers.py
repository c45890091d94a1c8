"""Flow samplers: agreement with diffusers where the tables agree, published integer tables, state and error rules."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.runtime import samplers
from kinora.runtime.samplers import DPMConfig, DPMSolver, Schedule, UniPC, UniPCConfig

SHIFTS = (2, 3, 4, 5, 7, 8, 10, 11, 12)


@pytest.mark.parametrize(
    ("schedule", "timesteps"),
    [
        (samplers.unipc_schedule(4, 3), [999, 899, 749, 499]),
        (samplers.unipc_schedule(4, 5), [999, 937, 833, 624]),
        (samplers.unipc_schedule(10, 5), [999, 978, 952, 920, 882, 833, 768, 681, 555, 356]),
        (samplers.wan_dpm_schedule(4, 5), [1000, 937, 833, 625]),
        (samplers.wan_dpm_schedule(10, 5), [1000, 978, 952, 921, 882, 833, 769, 681, 555, 357]),
    ],
)
def test_published_integer_tables(schedule: Schedule, timesteps: list[int]) -> None:
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.timesteps.tolist() == timesteps


def test_liveavatar_table() -> None:
    schedule = samplers.euler_schedule(4, 3)
    assert schedule.timesteps.tolist() == [1000.0, 857.6923217773438, 602.1505737304688, 8.928571701049805]
    assert schedule.sigmas.tolist() == [1.0, 0.857692301273346, 0.602150559425354, 0.008928571827709675, 0.0]


@pytest.mark.parametrize("shift", [1, 3, 5, 8])
def test_euler_table_is_that_of_diffusers(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    for steps in (*range(1, 60), 75, 99):
        peer.set_timesteps(steps)
        mine = samplers.euler_schedule(steps, shift)
        assert torch.equal(mine.timesteps, peer.timesteps), steps
        assert torch.equal(mine.sigmas, peer.sigmas), steps


@pytest.mark.parametrize("shift", SHIFTS)
def test_own_table_is_that_of_diffusers_dpm(shift: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    for steps in range(1, 101, 3):
        peer.set_timesteps(steps)
        mine = samplers.unipc_schedule(steps, shift)
        assert torch.equal(mine.timesteps, peer.timesteps), steps
        assert (mine.sigmas - peer.sigmas).abs().max() < 1.2e-7


def _trajectories(peer, solver, x, outputs):
    theirs = ours = x
    for i, output in enumerate(outputs):
        theirs = peer.step(output, peer.timesteps[i], theirs, return_dict=False)[0]
        ours = solver.step(output, i, ours)
        yield theirs, ours


@pytest.mark.parametrize(("order", "steps"), [(1, 6), (2, 4), (2, 12), (3, 9)])
def test_unipc_is_that_of_diffusers(order: int, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
        solver_order=order,
        disable_corrector=[1],
    )
    # newer versions changed their own grid but take one; older ones have Wan's and take none
    grid = {"sigmas": samplers.unipc_schedule(steps, 1).sigmas[:-1].double().numpy()}
    peer.set_timesteps(steps, **(grid if "sigmas" in inspect.signature(peer.set_timesteps).parameters else {}))
    solver = UniPC(samplers.unipc_schedule(steps, 5), UniPCConfig(solver_order=order, disable_corrector=(1,)))
    noise = torch.Generator().manual_seed(order)
    outputs = torch.randn(steps, 2, 3, 4, generator=noise)
    for theirs, ours in _trajectories(peer, solver, torch.randn(2, 3, 4, generator=noise), outputs):
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "steps"), [(1, 5), (2, 6), (2, 16), (3, 8), (3, 17)])
def test_dpm_is_that_of_diffusers(order: int, steps: int, solver_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=order,
        solver_type=solver_type,
        algorithm_type="dpmsolver++",
    )
    peer.set_timesteps(steps)
    solver = DPMSolver(samplers.unipc_schedule(steps, 3), DPMConfig(solver_order=order, solver_type=solver_type))
    noise = torch.Generator().manual_seed(order)
    outputs = torch.randn(steps, 2, 3, 4, generator=noise)
    for theirs, ours in _trajectories(peer, solver, torch.randn(2, 3, 4, generator=noise), outputs):
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=5e-6)


def _straight_solvers(schedule: Schedule):
    if schedule.sigmas[0] < 1:
        yield UniPC(schedule).step
    yield DPMSolver(schedule).step
    sigmas = schedule.sigmas
    yield lambda v, i, x: samplers.euler_step(x, v, sigmas[i], sigmas[i + 1])


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 30), shift=st.floats(0.5, 12), begin=st.integers(0, 29), wan_grid=st.booleans())
def test_solvers_are_exact_on_a_straight_flow(steps: int, shift: float, begin: int, wan_grid: bool) -> None:
    """With the velocity of a straight path every solver lands on x0, from any first index."""
    schedule = (samplers.wan_dpm_schedule if wan_grid else samplers.unipc_schedule)(steps, shift)
    begin %= steps
    noise = torch.Generator().manual_seed(steps)
    x0, eps = torch.randn(2, 8, generator=noise), torch.randn(2, 8, generator=noise)
    velocity = samplers.flow_target(x0, eps)
    for step in _straight_solvers(schedule):
        x = samplers.add_noise(x0, eps, schedule.sigmas[begin])
        for i in range(begin, steps):
            x = step(velocity, i, x)
        torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-4)


def test_dpm_second_step_from_sigma_one_is_first_order() -> None:
    schedule = samplers.wan_dpm_schedule(8, 5)
    outputs, x = torch.randn(2, 5), torch.randn(5)
    second = DPMSolver(schedule)
    first = DPMSolver(schedule, DPMConfig(solver_order=1))
    a = b = x
    for i in range(2):
        a, b = second.step(outputs[i], i, a), first.step(outputs[i], i, b)
    assert torch.equal(a, b)


def test_half_precision_keeps_dtype() -> None:
    schedule = samplers.unipc_schedule(5, 5)
    x, v = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    for step in _straight_solvers(schedule):
        assert step(v, 0, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"solver_type": "bh1"},
        {"lower_order_final": False},
        {"predict_x0": False},
        {"final_sigmas_type": "sigma_min"},
        {"solver_order": 0},
        {"solver_type": "bh3"},
        {"thresholding": True, "sample_max_value": 0.5},
    ],
)
def test_unipc_rejects(options: dict) -> None:
    with pytest.raises(ValueError, match="UniPC"):
        UniPCConfig(**options)


def test_unipc_bh1_stops_before_the_last_step() -> None:
    solver = UniPC(samplers.unipc_schedule(3, 5), UniPCConfig(solver_type="bh1", stop_before_last=True))
    x = torch.randn(4)
    for i in range(2):
        x = solver.step(torch.randn(4), i, x)
        assert x.isfinite().all()
    with pytest.raises(ValueError, match="last step"):
        solver.step(torch.randn(4), 2, x)


@pytest.mark.parametrize("options", [{"solver_order": 4}, {"solver_type": "bh2"}])
def test_dpm_rejects(options: dict) -> None:
    with pytest.raises(ValueError, match="DPM"):
        DPMConfig(**options)


@pytest.mark.parametrize("solver", [UniPC, DPMSolver])
def test_solvers_want_consecutive_steps_of_a_falling_table(solver: type) -> None:
    x = torch.zeros(2)
    stepper = solver(samplers.unipc_schedule(4, 3))
    stepper.step(x, 1, x)
    for wrong in (1, 3, 0):
        with pytest.raises(ValueError, match="consecutive"):
            stepper.step(x, wrong, x)
    with pytest.raises(ValueError, match="outside"):
        solver(samplers.unipc_schedule(4, 3)).step(x, 4, x)
    with pytest.raises(ValueError, match="exactly 0"):
        solver(samplers.flow_match_schedule(4, 3, reverse_sigmas=True))


def test_unipc_does_not_start_at_sigma_one() -> None:
    with pytest.raises(ValueError, match="unipc_schedule"):
        UniPC(samplers.wan_dpm_schedule(4, 3))


def test_schedule_errors() -> None:
    for builder in (samplers.unipc_schedule, samplers.wan_dpm_schedule, samplers.euler_schedule):
        with pytest.raises(ValueError, match="at least one step"):
            builder(0, 3)
        with pytest.raises(ValueError, match="shift"):
            builder(4, 0)
    with pytest.raises(ValueError, match="mu"):
        samplers.unipc_dynamic_schedule(4, math.nan)
    with pytest.raises(ValueError, match="n \\+ 1 sigmas"):
        Schedule(torch.zeros(4), torch.zeros(4))


def test_lookups() -> None:
    schedule = samplers.flow_match_schedule(8, 3, sigma_min=0.0, extra_one_step=True)
    middle = (schedule.timesteps[3] + schedule.timesteps[4]) / 2
    low, high = torch.tensor(-5.0), torch.tensor(2000.0)
    exact_tie = Schedule(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1000.0, 500.0]))
    assert exact_tie.nearest(torch.tensor([[750.0]])).tolist() == [[0]]
    assert schedule.nearest(torch.stack([low, high, middle + 1e-3])).tolist() == [7, 0, 3]
    doubled = Schedule(torch.tensor([0.9, 0.8, 0.7, 0.0]), torch.tensor([900, 800, 800]))
    assert doubled.index_of(800) == 2 and doubled.index_of(900) == 0
    with pytest.raises(ValueError, match="not in the table"):
        doubled.index_of(850)


@given(steps=st.integers(1, 200), shift=st.floats(1, 12))
@settings(max_examples=25, deadline=None)
def test_tables_fall_from_one_to_zero(steps: int, shift: float) -> None:
    for builder in (samplers.unipc_schedule, samplers.wan_dpm_schedule, samplers.euler_schedule):
        schedule = builder(steps, shift)
        assert len(schedule) == steps
        assert (schedule.sigmas.diff() < 0).all() and schedule.sigmas[-1] == 0 and schedule.sigmas[0] <= 1 + 1e-6
        assert ((schedule.timesteps - 1000 * schedule.sigmas[:-1]).abs() <= 1).all()


def test_dynamic_shift_equals_plain_shift() -> None:
    dynamic, plain = samplers.unipc_dynamic_schedule(20, 1.15), samplers.unipc_schedule(20, math.exp(1.15))
    torch.testing.assert_close(dynamic.sigmas, plain.sigmas, rtol=0, atol=1e-7)


def test_batched_step_ends_each_sample_on_its_own_unless_shared() -> None:
    schedule = samplers.flow_match_schedule(5, 3, sigma_min=0.0, extra_one_step=True)
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    index = torch.tensor([1, 4])
    own = samplers.batched_euler_step(schedule, x, v, index)
    for b, i in enumerate(index.tolist()):
        assert torch.equal(own[b], samplers.euler_step(x[b], v[b], schedule.sigmas[i], schedule.sigmas[i + 1]))
    shared = samplers.batched_euler_step(schedule, x, v, index, shared_end=True)
    assert torch.equal(shared[1], own[1]) and not torch.equal(shared[0], own[0])
    assert torch.equal(shared, samplers.batched_euler_step(schedule, x, v, index, to_final=True))
    with pytest.raises(ValueError, match="one step a sample"):
        samplers.batched_euler_step(schedule, x, v, torch.tensor(1))


def test_training_round_trip() -> None:
    schedule = samplers.flow_match_schedule(1000, 5, sigma_min=0.0, extra_one_step=True)
    weights = samplers.timestep_weights(schedule)
    assert weights[0] == 0 and int(weights.argmax()) == 833
    assert float(weights.max()) == pytest.approx(2.0764, abs=1e-4)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    x0, noise = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    sigma = schedule.sigmas[torch.tensor([0, 200, 700, 999])]
    noisy, flow = samplers.add_noise(x0, noise, sigma), samplers.flow_target(x0, noise)
    torch.testing.assert_close(samplers.x0_from_flow(noisy, flow, sigma), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(samplers.flow_from_x0(noisy, x0, sigma), flow, rtol=0, atol=1e-4)
