"""A training step as one CUDA graph; on a CPU a plain call."""

import threading

import pytest
import torch
from kinora.kernels import dispatch
from kinora.train.capture import CapturedStep
from torch import nn


def test_a_step_on_a_cpu_is_a_plain_call() -> None:
    step = CapturedStep(lambda a, b: (a + b,), torch.device("cpu"))
    assert torch.equal(step(torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))
    assert torch.equal(step(torch.ones(2), torch.zeros(2))[0], torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_like_the_plain_one() -> None:
    """The plain step sees the first batch `warmup` times more, as the recording does."""
    warmup, device = 2, torch.device("cuda")
    batches = torch.randn(20, 8, 4, device=device)

    def losses(captured: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: torch.Tensor) -> tuple[torch.Tensor]:
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return (loss.detach(),)

        if captured:
            run = CapturedStep(step, device, warmup)
            return [run(x)[0].item() for x in batches]
        for _ in range(warmup):
            step(batches[0])
        return [step(x)[0].item() for x in batches]

    assert losses(captured=True) == pytest.approx(losses(captured=False), rel=1e-4)


def test_a_choice_of_ops_is_of_one_thread() -> None:
    seen = []
    with dispatch.using(True):
        other = threading.Thread(target=lambda: seen.append(dispatch.tracing()))
        other.start()
        other.join()
        assert dispatch.tracing()
    assert seen == [False] and not dispatch.tracing()
