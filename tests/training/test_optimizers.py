"""Optimizers by name against the original's cases, and every entry of the registry."""

from __future__ import annotations

import copy
import importlib
import math
import sys
import types

import pytest
import torch

from benchmarks.counting import count
from library.messages import UserError
from library.options.optimizer import OptimizerConfig
from library.options.registries import OPTIMIZERS
from library.training.metrics import rate_logs
from library.training.optimizers import is_schedule_free, load_optimizer_state, make_optimizer, set_training
from tests.conftest import GOLDEN, load_json

CASES = load_json(GOLDEN / "training_optimizers.json")["cases"]
# The original refuses these; here they have a meaning (training.md 6).
ACCEPTED_NOW = {"weight_decay=true": False, "nesterov=True": True}


def parameters(kind):
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    if kind == "plain":
        return weights
    if kind == "generator":
        return (weight for weight in weights)
    return [
        {"params": [weight], **({} if lr is None else {"lr": lr})} for weight, lr in zip(weights, kind, strict=True)
    ]


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A stand-in for the package that records how its classes are called."""
    calls = {}

    def make(name):
        def __init__(self, params, **kwargs):
            calls.update(kwargs)
            torch.optim.Optimizer.__init__(self, params, {"lr": 0.1})

        return type(name, (torch.optim.Optimizer,), {"__init__": __init__, "__module__": "bitsandbytes.optim"})

    package = types.ModuleType("bitsandbytes")
    package.optim = types.ModuleType("bitsandbytes.optim")
    for record in OPTIMIZERS:
        if record.package == "bitsandbytes":
            name = record.path.rpartition(".")[2]
            setattr(package.optim, name, make(name))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    return calls


def plain(value):
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden(index, request):
    case = CASES[index]
    options = {"learning_rate": 1e-3, **case["options"]}
    config = OptimizerConfig(**options)
    stub = request.getfixturevalue("bitsandbytes") if case.get("bitsandbytes_stub") else None
    unusual = set(options.get("optimizer_args") or ()) & set(ACCEPTED_NOW)
    if "error" in case and not any(ACCEPTED_NOW[text] for text in unusual):
        if unusual:
            # `true` is read as True; AdamW then takes a weight decay of 1
            assert make_optimizer(parameters(case["params"]), config).args_text == "weight_decay=True"
            return
        with pytest.raises(UserError) as error:
            make_optimizer(parameters(case["params"]), config)
        assert error.value.remedy
        return
    built = make_optimizer(parameters(case["params"]), config)
    if "error" in case:
        assert built.optimizer.defaults["nesterov"] is True
        assert built.args_text == "momentum=0.9"
        return
    assert built.name == case["name"]
    assert built.args_text == case["args"]
    assert list(built.notices) == case["notices"]
    assert [group.get("lr") for group in built.optimizer.param_groups] == case["group_lrs"]
    after = case["after"]
    assert built.effective_config.learning_rate == after["learning_rate"]
    assert built.effective_config.lr_scheduler == after["lr_scheduler"]
    assert built.ignores_group_rates == ("group_lrs_ignored" in case["notices"])
    if stub is not None:
        hidden = {"nesterov": True} if built.name.endswith("SGD8bit") else {}
        assert stub == {**hidden, **case["call_kwargs"]}
    else:
        check_defaults(built, case)


def check_defaults(built, case):
    ours = {key: plain(value) for key, value in built.optimizer.defaults.items()}
    for key, value in case["defaults"].items():
        if key == "fused":
            continue  # switched on here; see test_fused
        assert key in ours, key
        assert ours[key] == plain(value), key


def test_fused():
    fused = {name: make(name).defaults.get("fused") for name in ("AdamW", "Adam", "SGD", "SGDNesterov", "RAdam")}
    assert fused == {"AdamW": True, "Adam": True, "SGD": True, "SGDNesterov": True, "RAdam": None}
    assert make("AdamW", optimizer_args=["foreach=None"]).defaults["fused"] is None
    with torch.device("meta"):
        weights = [torch.nn.Parameter(torch.ones(2))]
    config = OptimizerConfig(learning_rate=1e-3)
    assert make_optimizer(weights, config).optimizer.defaults["fused"] is None


def test_fused_equals_the_loop():
    def train(*args):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3))
        config = OptimizerConfig(learning_rate=1e-2, optimizer_args=list(args))
        optimizer = make_optimizer([weight], config).optimizer
        for _ in range(5):
            (weight**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    torch.testing.assert_close(train(), train("fused=False"), rtol=1e-6, atol=1e-7)


def make(name, **options):
    config = OptimizerConfig(optimizer_type=name, learning_rate=0.5, **options)
    return make_optimizer(parameters("plain"), config).optimizer


@pytest.mark.parametrize("record", OPTIMIZERS, ids=lambda r: r.name)
def test_every_entry_can_be_made_and_steps(record, request):
    if record.package == "bitsandbytes":
        request.getfixturevalue("bitsandbytes")
    for name in (record.name, record.name.upper(), *record.aliases):
        weight = torch.nn.Parameter(torch.full((3, 2), 2.0))
        config = OptimizerConfig(optimizer_type=name, learning_rate=0.5)
        built = make_optimizer([{"params": [weight], "lr": 0.5}], config)
        assert record.path.rpartition(".")[2] == built.name.rpartition(".")[2]
        assert is_schedule_free(config) == record.schedule_free
        if record.package == "bitsandbytes":
            continue
        before = weight.detach().clone()
        for _ in range(8):  # RAdam only starts to move after five
            (weight**2).sum().backward()
            built.optimizer.step()
            built.optimizer.zero_grad()
        assert not torch.equal(weight, before)
        assert ("d" in built.optimizer.param_groups[0]) == record.adaptive


def test_schedule_free_weights_differ_between_training_and_evaluation():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(
        [weight], OptimizerConfig(optimizer_type="AdamWScheduleFree", learning_rate=0.1)
    ).optimizer
    for _ in range(3):
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    training = weight.detach().clone()
    set_training(optimizer, False)
    assert not torch.equal(weight, training)
    set_training(optimizer, True)
    torch.testing.assert_close(weight.detach(), training)


@pytest.mark.parametrize("record", [r for r in OPTIMIZERS if r.package], ids=lambda r: r.name)
def test_missing_package_is_named(record, monkeypatch):
    monkeypatch.setitem(sys.modules, record.path.rpartition(".")[0], None)
    with pytest.raises(UserError, match=f"pip install {record.package}"):
        make(record.name)


@pytest.mark.parametrize("record", [r for r in OPTIMIZERS if r.min_version], ids=lambda r: r.name)
def test_old_package_is_named(record, bitsandbytes, monkeypatch):
    monkeypatch.delattr(sys.modules["bitsandbytes.optim"], record.path.rpartition(".")[2])
    with pytest.raises(UserError, match=record.min_version):
        make(record.name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("adam", "Adam"), ("AdamW9bit", "AdamW8bit"), ("DAdaptAdm", "DAdaptAdam"), ("torch.optim.RAdm", "RAdam")],
)
def test_unknown_names_get_a_hint(name, hint):
    with pytest.raises(UserError, match=hint):
        make(name)


def test_unknown_argument_lists_what_is_taken():
    with pytest.raises(UserError, match=r"no_such.*weight_decay"):
        make("AdamW", optimizer_args=["no_such=1"])


def test_bad_values_are_one_line():
    with pytest.raises(UserError, match="beta parameter"):
        make("AdamW", optimizer_args=["betas=(2.0,0.9)"])
    with pytest.raises(UserError, match="nesterov"):
        make("SGDNesterov", optimizer_args=["nesterov=False"])


def test_value_with_an_equals_sign():
    """The original fails on a second `=`; here only the first one splits."""
    with pytest.raises(UserError, match="no such argument"):
        make("AdamW", optimizer_args=["text='a=b'"])


def test_class_by_path():
    optimizer = make("schedulefree.AdamWScheduleFree", optimizer_args=["r=1.0"])
    assert type(optimizer).__module__ == "schedulefree.adamw_schedulefree"
    assert is_schedule_free(OptimizerConfig(optimizer_type="schedulefree.AdamWScheduleFree"))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_fused_updates_can_be_masked_on_the_device(name):
    """A raised `found_inf` leaves weights and moments alone, without asking the host."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([weight], OptimizerConfig(optimizer_type=name, learning_rate=0.1)).optimizer
    weight.grad = torch.full((3,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(weight.detach(), torch.ones(3))


def test_a_state_of_another_program_keeps_updates_fused():
    """Such a state says `fused=None`, which would switch the mask of non-finite updates off."""

    def run(optimizer, weight, steps):
        for _ in range(steps):
            (weight**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach().clone()

    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    foreign = torch.optim.AdamW([weight], lr=0.1)
    run(foreign, weight, 3)
    state, middle = copy.deepcopy(foreign.state_dict()), weight.detach().clone()
    expected = run(foreign, weight, 3)

    weight = torch.nn.Parameter(middle)
    optimizer = make_optimizer([weight], OptimizerConfig(learning_rate=0.5)).optimizer
    load_optimizer_state(optimizer, state)
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(run(optimizer, weight, 3), expected)

    two = make_optimizer(parameters([0.1, 0.2]), OptimizerConfig(learning_rate=0.5)).optimizer
    with pytest.raises(ValueError, match="parameter groups"):
        load_optimizer_state(two, state)


PATHS = {record.path: record for record in OPTIMIZERS if record.package != "bitsandbytes"}


@pytest.mark.parametrize("record", PATHS.values(), ids=lambda r: r.name)
def test_three_steps_equal_the_class_called_directly(record):
    module, _, name = record.path.rpartition(".")
    library_class = getattr(importlib.import_module(module), name)

    def weights():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))]

    ours, theirs = weights(), weights()
    rate = 1.0 if record.adaptive else 1e-2
    arguments = {**record.defaults, **({"relative_step": True} if record.name == "AdaFactor" else {})}
    built = make_optimizer(ours, OptimizerConfig(optimizer_type=record.name, learning_rate=rate))
    direct = library_class(theirs, lr=None if record.name == "AdaFactor" else rate, **arguments)
    assert type(built.optimizer) is library_class
    set_training(direct, True)
    for step in range(3):
        for group, optimizer in ((ours, built.optimizer), (theirs, direct)):
            sum(((weight - step) ** 2).sum() for weight in group).backward()
            optimizer.step()
            optimizer.zero_grad()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("record", [r for r in OPTIMIZERS if r.adaptive], ids=lambda r: r.name)
def test_each_rate_has_a_step_size_of_its_own(record, caplog):
    """One instance for each group: each equals the library's class over that group alone."""

    def weights():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))]

    def train(parameters, optimizers, steps):
        for _ in range(steps):
            ((parameters[0] - 1) ** 2).sum().backward()
            ((parameters[1] * 5) ** 2).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def start(parameters):
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.5), strict=True)]
        return make_optimizer(groups, OptimizerConfig(optimizer_type=record.name, learning_rate=1.0))

    ours, alone = weights(), weights()
    built = start(ours)
    assert built.name == f"{type(built.optimizer.inner).__module__}.{type(built.optimizer.inner).__name__}"
    train(ours, [built.optimizer], 6)
    module, _, name = record.path.rpartition(".")
    library_class = getattr(importlib.import_module(module), name)
    train(alone, [library_class([p], lr=lr) for p, lr in zip(alone, (1.0, 0.5), strict=True)], 6)
    for one, other in zip(ours, alone, strict=True):
        torch.testing.assert_close(one, other)
    sizes = [group["d"] for group in built.optimizer.param_groups]
    assert sizes[0] != sizes[1]
    logged = rate_logs([1.0, 0.5], ["textencoder", "unet"], built.optimizer)
    assert logged["lr/d*lr/textencoder"] == pytest.approx(float(sizes[0]))
    assert logged["lr/d*lr/unet"] == pytest.approx(float(sizes[1]) * 0.5)

    state, middle = copy.deepcopy(built.optimizer.state_dict()), [p.detach().clone() for p in ours]
    train(ours, [built.optimizer], 3)
    resumed = [torch.nn.Parameter(p) for p in middle]
    again = start(resumed).optimizer
    load_optimizer_state(again, state)
    train(resumed, [again], 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, resumed, strict=True))


def test_a_class_by_its_path_has_the_same_facts():
    config = OptimizerConfig(optimizer_type="prodigyopt.Prodigy", learning_rate=1.0)
    built = make_optimizer(parameters([1.0, 0.5]), config)
    assert len(built.optimizer.pieces) == 2
    config = OptimizerConfig(optimizer_type="torch.optim.AdamW", learning_rate=1e-3, fused_backward_pass=True)
    assert make_optimizer(parameters("plain"), config).clips
    config = OptimizerConfig(optimizer_type="torch.optim.SGD", learning_rate=1e-3)
    assert make_optimizer(parameters("plain"), config).args_text == ""


def test_adaptive_optimizers_with_one_rate_stay_one():
    optimizer = make_optimizer(
        parameters([1.0, 1.0]), OptimizerConfig(optimizer_type="Prodigy", learning_rate=1.0)
    ).optimizer
    assert type(optimizer).__name__ == "Prodigy"


@pytest.mark.parametrize("record", PATHS.values(), ids=lambda r: r.name)
def test_memory_of_the_moments_is_what_the_record_says(record):
    weight = torch.nn.Parameter(torch.randn(64, 64))
    config = OptimizerConfig(optimizer_type=record.name, learning_rate=1.0 if record.adaptive else 1e-2)
    optimizer = make_optimizer([weight], config).optimizer
    for _ in range(2):
        (weight**2).sum().backward()
        optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert sum(t.numel() * t.element_size() for t in tensors) / weight.numel() == pytest.approx(
        record.state_bytes, abs=0.2
    )


def test_adafactor_asks_the_host_nothing():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = make_optimizer([weight], OptimizerConfig(optimizer_type="AdaFactor", learning_rate=0.0)).optimizer
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert count(optimizer.step).host_reads == 0
