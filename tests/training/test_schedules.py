"""Learning-rate schedules against the original's numbers, counted in updates."""

from __future__ import annotations

import pytest
import torch

from library.messages import UserError
from library.options.optimizer import OptimizerConfig
from library.options.registries import SCHEDULES
from library.training.optimizers import make_optimizer
from library.training.schedules import FACTORS, make_lr_schedule
from tests.conftest import GOLDEN, load_json

OLD = load_json(GOLDEN / "training_lr.json")["cases"]
LATER = load_json(GOLDEN / "training_later.json")["lr"]
CASES = [*OLD, *LATER]


def rates(options, updates, group_lrs=None, **kwargs):
    """What the schedule shows before and after each update."""
    config = OptimizerConfig(**{"learning_rate": 1e-3, **options})
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in group_lrs or (1,)]
    groups = weights
    if group_lrs:
        groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, group_lrs, strict=True)]
    built = make_optimizer(groups, config)
    schedule = make_lr_schedule(built.optimizer, built.effective_config, 20, **kwargs)
    shown = [schedule.get_last_lr()]
    for _ in range(updates):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        built.optimizer.step()
        for _ in range(kwargs.get("steps_per_update", 1)):
            schedule.step()
        shown.append(schedule.get_last_lr())
    return shown if group_lrs else [values[0] for values in shown]


def shows_the_defect(case):
    """With two processes the original counts warm-up in scheduler steps, two of which are one update."""
    return case["num_processes"] > 1 and isinstance(warmup := case["options"].get("lr_warmup_steps", 0), int) and warmup


@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden(index):
    case = CASES[index]
    options = case["options"]
    if options.get("lr_scheduler") == "adafactor" and options.get("optimizer_args") == ["relative_step=False"]:
        # the original cannot read a rate from plain `adafactor`; here it is the learning rate
        assert rates(options, 0) == [1e-3]
        return
    if "error" in case:
        with pytest.raises(UserError) as error:
            rates(options, 1)
        assert error.value.remedy
        return
    expected = case["lr"]
    if shows_the_defect(case):
        same = [c for c in CASES if c["options"] == options and c["num_processes"] == 1 and "lr" in c]
        expected = same[0]["lr"] if same else rates(options, len(expected) - 1)
    shown = rates(options, len(expected) - 1, case.get("group_lrs"))
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(expected), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("index", [i for i, c in enumerate(CASES) if c["num_processes"] > 1 and "lr" in c])
def test_loops_that_step_several_times_per_update_see_the_same_rates(index):
    options = CASES[index]["options"]
    assert rates(options, 20, steps_per_update=2) == pytest.approx(rates(options, 20), rel=1e-9)


def test_warmup_lasts_its_updates():
    shown = rates({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}, 5)
    assert shown == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_registry_and_functions_name_the_same_schedules():
    assert {record.name for record in SCHEDULES} == {*FACTORS, "adafactor"}


@pytest.mark.parametrize("record", [r for r in SCHEDULES if r.name != "adafactor"], ids=lambda r: r.name)
def test_every_entry_resumes_in_the_middle(record):
    options = {
        "lr_scheduler": record.name,
        "lr_warmup_steps": 3 if "lr_warmup_steps" in record.takes else 0,
        "lr_decay_steps": 6,
        "lr_scheduler_min_lr_ratio": 0.1,
        "lr_scheduler_args": ["step_rules='1:5,0.1'"] if "step_rules" in record.arguments else None,
    }
    config = OptimizerConfig(learning_rate=1e-3, **options)
    weight = torch.nn.Parameter(torch.ones(1))

    def start():
        optimizer = make_optimizer([weight], config).optimizer
        return optimizer, make_lr_schedule(optimizer, config, 20)

    def run(optimizer, schedule, updates):
        shown = []
        for _ in range(updates):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            schedule.step()
            shown.append((schedule.get_last_lr(), optimizer.param_groups[0]["lr"]))
        return shown

    whole = run(*start(), 20)
    optimizer, schedule = start()
    first = run(optimizer, schedule, 9)
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = start()
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert first + run(optimizer, schedule, 11) == whole
    assert all(0 <= rate <= 1e-3 for _, rate in whole)


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_shapes_are_those_of_transformers(decay_type, warmup_type):
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    theirs = optimization.get_wsd_schedule(
        optimizer, 4, 6, num_training_steps=20, warmup_type=warmup_type, decay_type=decay_type, min_lr_ratio=0.2
    )
    expected = [theirs.get_last_lr()[0]]
    for _ in range(22):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    shown = rates(
        {
            "lr_scheduler": "warmup_stable_decay",
            "lr_warmup_steps": 4,
            "lr_decay_steps": 6,
            "lr_scheduler_min_lr_ratio": 0.2,
            "lr_scheduler_args": [f"decay_type='{decay_type}'", f"warmup_type='{warmup_type}'"],
        },
        22,
    )
    assert shown == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler": "Cosine"}, "cosine"),
        ({"lr_scheduler_type": "StepLr"}, "StepLR"),
        ({"lr_scheduler_type": "no.such.Schedule"}, "no"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "metric"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["power=2"]}, "power"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1;2'"]}, "step_rules"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ["decay_type='steep'"]}, "1-sqrt"),
        ({"lr_scheduler": "adafactor:fast", "optimizer_type": "AdaFactor"}, "fast"),
    ],
)
def test_bad_input_names_the_thing(options, words):
    config = OptimizerConfig(learning_rate=1e-3, **options)
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(2, 2))], config).optimizer
    with pytest.raises(UserError, match=words):
        make_lr_schedule(optimizer, config, 20)
