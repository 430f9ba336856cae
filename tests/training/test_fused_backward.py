"""Updates inside the backward pass equal updates after it, with gradients that never exist together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.messages import UserError
from library.options.optimizer import OptimizerConfig
from library.options.registries import OPTIMIZERS
from library.training.optimizers import load_optimizer_state, make_optimizer
from library.training.schedules import make_lr_schedule
from library.training.stochastic_rounding import StochasticRounding

FUSED = [record for record in OPTIMIZERS if record.fused_backward]
BY_RUNS = [r for r in OPTIMIZERS if r.package != "bitsandbytes" and r.independent]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    return (net(batch(step).to(next(net.parameters()).dtype)).float() - 1).square().mean()


def run(net: nn.Module, optimizer, schedule=None, steps: int = 3, start: int = 0, clip: float = 0.0) -> None:
    for step in range(start, start + steps):
        loss_of(net, step).backward()
        for parameter in net.parameters() if clip else ():
            nn.utils.clip_grad_norm_([parameter], clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def config(name: str, **options) -> OptimizerConfig:
    return OptimizerConfig(optimizer_type=name, learning_rate=1e-2, **{"max_grad_norm": 0.0, **options})


def groups(net: nn.Module) -> list[dict]:
    return [{"params": list(net[0].parameters())}, {"params": [*net[2].parameters(), *net[4].parameters()], "lr": 3e-3}]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("record", FUSED, ids=lambda r: r.name)
def test_each_parameter_alone(record, clip: float) -> None:
    plain, fused = small_net(), small_net()
    built = make_optimizer(groups(plain), config(record.name))
    own = make_optimizer(groups(fused), config(record.name, fused_backward_pass=True, max_grad_norm=clip))
    assert own.clips
    assert own.name == built.name
    assert own.sources == (0, 1)
    assert len(own.optimizer.pieces) == 6
    assert [g["lr"] for g in own.optimizer.param_groups] == [g["lr"] for g in built.optimizer.param_groups]
    run(plain, built.optimizer, clip=clip)
    run(fused, own.optimizer)
    assert_same(plain, fused)
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_gradients_do_not_exist_together() -> None:
    net = small_net()
    make_optimizer(net.parameters(), config("AdamW", fused_backward_pass=True))
    most = []
    for parameter in net.parameters():
        parameter.register_hook(lambda _: most.append(sum(p.grad is not None for p in net.parameters())))
    loss_of(net, 0).backward()
    assert len(most) == 6
    assert max(most) <= 1


@pytest.mark.parametrize("record", BY_RUNS, ids=lambda r: r.name)
def test_runs_of_parameters(record) -> None:
    plain, fused = small_net(), small_net()
    built = make_optimizer(groups(plain), config(record.name))
    own = make_optimizer(groups(fused), config(record.name), fused_groups=3)
    # ceil(6 / 3) = 2 tensors a run, and a new one at each change of rate
    assert [len(group["params"]) for group in own.optimizer.param_groups] == [2, 2, 2]
    assert own.sources == (0, 1, 1)
    run(plain, built.optimizer)
    run(fused, own.optimizer)
    assert_same(plain, fused)


def test_adaptive_optimizers_run_in_runs_too() -> None:
    net = small_net()
    built = make_optimizer(
        net.parameters(), OptimizerConfig(optimizer_type="Prodigy", learning_rate=1.0), fused_groups=2
    )
    before = copy.deepcopy(net)
    run(net, built.optimizer, steps=8)
    assert not torch.equal(next(net.parameters()), next(before.parameters()))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("record", FUSED, ids=lambda r: r.name)
def test_schedule_and_resume(record, half: bool) -> None:
    def start():
        net, rounding = small_net(), StochasticRounding(1) if half else None
        net.to(torch.bfloat16 if half else torch.float32)
        options = config(record.name, fused_backward_pass=True, lr_scheduler="cosine", max_grad_norm=1.0)
        built = make_optimizer(groups(net), options, rounding=rounding)
        schedule = make_lr_schedule(built.optimizer, built.effective_config, 6)
        if rounding is not None:
            rounding.update_number = lambda: schedule.last_epoch
        return net, built.optimizer, schedule

    net, optimizer, schedule = start()
    run(net, optimizer, schedule)
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    run(net, optimizer, schedule, start=3)
    again, optimizer, schedule = start()
    again.load_state_dict(states[0])
    load_optimizer_state(optimizer, states[1])
    schedule.load_state_dict(states[2])
    run(again, optimizer, schedule, start=3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("record", FUSED, ids=lambda r: r.name)
def test_a_state_fits_with_and_without_the_option(record) -> None:
    plain, fused = small_net(), small_net()
    own = make_optimizer(groups(fused), config(record.name, fused_backward_pass=True)).optimizer
    run(fused, own)
    built = make_optimizer(groups(plain), config(record.name)).optimizer
    load_optimizer_state(built, copy.deepcopy(own.state_dict()))
    plain.load_state_dict(fused.state_dict())
    run(plain, built, start=3)
    run(fused, own, start=3)
    assert_same(plain, fused)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("record", FUSED, ids=lambda r: r.name)
def test_a_bad_gradient_changes_neither_weights_nor_moments(record, warm: bool) -> None:
    net = small_net()
    optimizer = make_optimizer(net.parameters(), config(record.name, fused_backward_pass=True)).optimizer
    if warm:
        run(net, optimizer)
        assert optimizer.finish_backward().item() == 0
    before = copy.deepcopy(net.state_dict())
    moments = [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in net.parameters()]
    (loss_of(net, 0) * float("nan")).backward()
    assert optimizer.finish_backward().item() == 1
    optimizer.take_back_counts()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for parameter, kept in zip(net.parameters(), moments, strict=True):
        for key, value in optimizer.state[parameter].items():
            value = value if torch.is_tensor(value) else torch.tensor(float(value))
            expected = torch.as_tensor(kept.get(key, torch.zeros_like(value)), dtype=value.dtype)
            assert torch.equal(value, expected), key
    run(net, optimizer, start=4)
    assert optimizer.finish_backward().item() == 0
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_the_norm_of_all_gradients_is_known() -> None:
    net, plain = small_net(), small_net()
    optimizer = make_optimizer(
        net.parameters(), config("AdamW", fused_backward_pass=True, max_grad_norm=0.01)
    ).optimizer
    loss_of(net, 0).backward()
    optimizer.finish_backward()
    loss_of(plain, 0).backward()
    torch.testing.assert_close(optimizer.last_norm, nn.utils.clip_grad_norm_(plain.parameters(), 1.0))


def test_parameters_without_a_gradient_hold_nothing_up() -> None:
    net = small_net()
    optimizer = make_optimizer(net.parameters(), config("AdamW"), fused_groups=1).optimizer
    unused = net[4].bias
    before = unused.detach().clone()
    (net[:4](batch(0)).square().mean() + net[4].weight.square().mean()).backward()
    assert next(net.parameters()).grad is not None
    optimizer.finish_backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(unused.detach(), before)
    run(net, optimizer)
    assert not torch.equal(unused.detach(), before)


@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree", "torch.optim.RAdam"])
def test_others_are_refused_with_the_names_of_those_that_can(name: str) -> None:
    with pytest.raises(UserError, match=r"AdamW.*AdaFactor.*--fused_optimizer_groups"):
        make_optimizer(small_net().parameters(), config(name, fused_backward_pass=True))
