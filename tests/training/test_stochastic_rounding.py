"""bfloat16 weights: on average nothing of an update is lost, whatever the optimizer, and a resume is exact."""

from __future__ import annotations

import copy

import pytest
import torch

from library.options.optimizer import OptimizerConfig
from library.options.registries import OPTIMIZERS
from library.training import optimizers
from library.training.optimizers import load_optimizer_state, make_optimizer, set_training
from library.training.stochastic_rounding import StochasticRounding, round_to_bfloat16

INSTALLED = [record for record in OPTIMIZERS if record.package != "bitsandbytes"]


def test_rounding_is_unbiased() -> None:
    value = 1 + 0.3 / 128  # 0.3 of the way between two neighbours
    rounded = round_to_bfloat16(torch.full((20_000,), value), torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert abs((rounded.mean() - 1).item() * 128 - 0.3) < 0.02
    negative = round_to_bfloat16(torch.full((20_000,), -value), torch.Generator().manual_seed(0)).float()
    assert torch.equal(negative, -rounded)


def test_what_bfloat16_can_hold_stays() -> None:
    values = torch.randn(1000).bfloat16()
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    assert torch.equal(round_to_bfloat16(values.float()), values)
    assert round_to_bfloat16(torch.tensor([float("nan")])).isnan().all()


def half_weights(count: int = 1, size: int = 64) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, 32).bfloat16()) for _ in range(count)]


def train(optimizer, weights, steps: int, rounding: StochasticRounding, start: int = 0) -> None:
    for step in range(start, start + steps):
        rounding.update_number = lambda step=step: step
        sum(((weight.float() - 3) ** 2).mean() for weight in weights).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("record", INSTALLED, ids=lambda r: r.name)
def test_every_optimizer(record) -> None:
    """Formats stay; the weights move with the mean that float32 weights have; moments are float32."""
    weights, rounding = half_weights(2), StochasticRounding(1)
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    rate = 1.0 if record.adaptive else 1e-3
    config = OptimizerConfig(optimizer_type=record.name, learning_rate=rate)
    optimizer = make_optimizer(weights, config, rounding=rounding).optimizer
    plain = make_optimizer(exact, config).optimizer
    before = [weight.detach().float().clone() for weight in weights]
    train(optimizer, weights, 8, rounding)
    train(plain, exact, 8, rounding)
    assert all(weight.dtype == torch.bfloat16 and weight.grad is None for weight in weights)
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert moments
    assert all(moment.dtype == torch.float32 for moment in moments)
    moved = (torch.cat(list(exact)) - torch.cat(before)).mean()
    ours = (torch.cat([w.detach().float() for w in weights]) - torch.cat(before)).mean()
    spread = 0.03 * len(weights) ** -0.5 * 64**-0.5 * 8**0.5  # of the mean of random roundings
    assert abs(ours - moved) < abs(moved) * 0.1 + spread


def test_tiny_updates_are_not_lost() -> None:
    """An update of a hundredth of the distance to the next number: rounded to nearest, nothing would ever move."""
    weight, rounding = torch.nn.Parameter(torch.ones(4096).bfloat16()), StochasticRounding(1)
    config = OptimizerConfig(optimizer_type="SGD", learning_rate=1 / 128 / 100)
    for rounded in (None, rounding):
        weight.data = torch.ones(4096).bfloat16()
        optimizer = make_optimizer([weight], config, rounding=rounded).optimizer
        for step in range(50):
            rounding.update_number = lambda step=step: step
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        mean = weight.detach().float().mean().item()
        assert mean == 1.0 if rounded is None else abs((mean - 1) * 128 - 0.5) < 0.05


@pytest.mark.parametrize("record", INSTALLED, ids=lambda r: r.name)
def test_resume_is_exact(record) -> None:
    config = OptimizerConfig(optimizer_type=record.name, learning_rate=1.0 if record.adaptive else 1e-3)

    def start():
        weights, rounding = half_weights(2), StochasticRounding(1)
        return weights, rounding, make_optimizer(weights, config, rounding=rounding).optimizer

    weights, rounding, optimizer = start()
    train(optimizer, weights, 3, rounding)
    state, middle = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
    train(optimizer, weights, 3, rounding, start=3)
    resumed, rounding, optimizer = start()
    for weight, values in zip(resumed, middle, strict=True):
        weight.data.copy_(values)
    load_optimizer_state(optimizer, state)
    train(optimizer, resumed, 3, rounding, start=3)
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def test_float32_copies_exist_for_some_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "ROUNDED_AT_ONCE", 3000)
    weights, rounding = half_weights(4, size=64), StochasticRounding(1)  # 2048 numbers each
    optimizer = make_optimizer(weights, OptimizerConfig(learning_rate=1e-3), rounding=rounding).optimizer
    assert len(optimizer.pieces) == 4
    assert len(optimizer.param_groups) == 1
    seen = []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        seen.append([weight.dtype == torch.float32 for weight in weights])
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(optimizer, weights, 1, rounding)
    assert seen == [[i == j for j in range(4)] for i in range(4)]


def test_the_schedule_reaches_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "ROUNDED_AT_ONCE", 10)
    weights = [torch.nn.Parameter(torch.ones(8).bfloat16()) for _ in range(3)]
    rounding = StochasticRounding(1)
    config = OptimizerConfig(optimizer_type="SGD", learning_rate=0.5)
    optimizer = make_optimizer(weights, config, rounding=rounding).optimizer
    optimizer.param_groups[0]["lr"] = 0.25
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(torch.equal(weight.detach(), torch.full((8,), 0.75).bfloat16()) for weight in weights)


def test_an_error_in_the_update_leaves_the_weights() -> None:
    weights, rounding = half_weights(), StochasticRounding(1)
    before = weights[0].detach().clone()
    optimizer = make_optimizer(weights, OptimizerConfig(learning_rate=1e-3), rounding=rounding).optimizer
    weights[0].grad = torch.ones_like(weights[0])

    def fail() -> None:
        raise RuntimeError("out of memory")

    optimizer.inner.step = fail
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert weights[0].dtype == torch.bfloat16
    assert torch.equal(weights[0].detach(), before)


def test_schedule_free_evaluation_changes_nothing_in_the_run() -> None:
    weights, rounding = half_weights(), StochasticRounding(1)
    config = OptimizerConfig(optimizer_type="AdamWScheduleFree", learning_rate=0.05)
    optimizer = make_optimizer(weights, config, rounding=rounding).optimizer
    train(optimizer, weights, 3, rounding)
    training = weights[0].detach().clone()
    set_training(optimizer, False)
    assert weights[0].dtype == torch.bfloat16
    assert not torch.equal(weights[0].detach(), training)
    set_training(optimizer, True)
    assert torch.equal(weights[0].detach(), training)
    assert optimizer.param_groups[0]["train_mode"]
