"""Muon: what it does to a matrix, that it learns, and how the parameters of a model are shared out."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinora.train.muon import Muon, MuonAdamW, orthogonalised, split_parameters
from torch import nn


@given(st.integers(1, 8), st.integers(0, 40), st.integers(1, 3))
def test_singular_values_come_near_one(rows: int, more: int, count: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + more)
    basis, _ = torch.linalg.qr(torch.randn(count, rows + more, rows, generator=generator))
    sizes = torch.linspace(1.0, 0.2, rows)  # singular values of comparable size
    values = torch.linalg.svdvals(orthogonalised((basis * sizes).mT))
    assert values.min() > 0.5 and values.max() < 1.5


def test_a_step_is_as_long_as_adamws_and_goes_downhill() -> None:
    weight = nn.Parameter(torch.zeros(6, 2, 5))
    gradient = torch.randn(6, 2, 5)
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)
    assert (weight.detach() * gradient).sum() < 0


def test_tall_and_wide_matrices_move_alike() -> None:
    gradient = torch.randn(3, 7)
    wide, tall = nn.Parameter(torch.zeros(3, 7)), nn.Parameter(torch.zeros(7, 3))
    wide.grad, tall.grad = gradient.clone(), gradient.mT.clone()
    Muon([wide, tall], lr=1.0).step()
    torch.testing.assert_close(wide.detach(), tall.detach().mT)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_a_model_learns_and_resumes() -> None:
    def model_and_optimizer() -> tuple[nn.Module, MuonAdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        return model, MuonAdamW(*split_parameters(model), betas=(0.9, 0.99), weight_decay=0.0)

    x = torch.randn(64, 4)
    y = x[:, :1] * x[:, 1:2]

    def train(model: nn.Module, optimizer: MuonAdamW, steps: int) -> float:
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    model, optimizer = model_and_optimizer()
    optimizer.set_learning_rate(0.02)
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 200) < 0.3 * first
    again, resumed = model_and_optimizer()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.set_learning_rate(0.02)
    assert train(again, resumed, 5) == train(model, optimizer, 5)


def test_parameters_are_shared_out() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(2, 3), "conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(4)})
    matrices, others = split_parameters(model, apart=("embed",))
    assert [tuple(p.shape) for p in matrices] == [(4, 3, 3, 3)]
    assert len(others) == 5
    assert len(split_parameters(model)[0]) == 2
