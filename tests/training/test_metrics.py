"""Loss average and logged values against the original's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from library.training.metrics import LossRecorder, step_logs
from tests.conftest import GOLDEN, load_json

LOGS = load_json(GOLDEN / "training_logs.json")
RECORDER = load_json(GOLDEN / "training_later.json")["loss_recorder"]


def test_moving_average():
    recorder = LossRecorder()
    shown = []
    for epoch, step, loss in RECORDER["adds_epoch_step_loss"]:
        recorder.add(epoch=epoch, step=step, loss=loss)
        shown.append(recorder.moving_average)
    # The recorded one fills the places it skips with zeros; only real losses count here.
    assert shown == pytest.approx([*RECORDER["moving_average"][:-1], 13 / 4])


def test_a_run_that_starts_late_averages_what_it_saw():
    """The recorded one averages over the places before its start."""
    recorder = LossRecorder()
    assert recorder.moving_average == 0
    recorder.add(epoch=3, step=2, loss=4.0)
    assert recorder.moving_average == 4.0 != RECORDER["started_at_epoch_3_step_2"]


def test_recorder_resumes_exactly():
    losses = [0.1 * i**0.5 + 0.03 for i in range(20)]

    def feed(recorder, part):
        for i in part:
            recorder.add(epoch=i // 6, step=i % 6, loss=losses[i])
        return recorder

    whole = feed(LossRecorder(), range(20))
    resumed = LossRecorder()
    resumed.load_state(json.loads(json.dumps(feed(LossRecorder(), range(9)).state())))
    assert feed(resumed, range(9, 20)).moving_average == whole.moving_average


def optimizer_of(case):
    """Groups as the optimizer has them: only adaptive ones keep a step size `d`."""
    adaptive = case["optimizer_type"] != "AdamW"
    steps = case.get("d") or [(i + 1) / 2 for i in range(len(case["rates"]))]
    groups = [{"lr": lr, **({"d": d} if adaptive else {})} for lr, d in zip(case["rates"], steps, strict=True)]
    return SimpleNamespace(param_groups=groups)


def group_names(case):
    """What the groups of such a network are called."""
    count, unet_only, text_only = len(case["rates"]), case["unet_only"], case["text_encoder_only"]
    if count == 2 and not unet_only and not text_only:
        return ["textencoder", "unet"]
    first = ("unet" if count < 3 or text_only else "group0") if unet_only else "textencoder"
    return [first, *(f"group{i}" for i in range(1, count))]


@pytest.mark.parametrize("index", range(len(LOGS["network"])))
def test_network_logs(index):
    case = LOGS["network"][index]
    names = group_names(case)
    norms = dict(zip(("keys_scaled", "mean_norm", "maximum_norm"), case["max_norm"], strict=True))
    ours = step_logs(1.5, 1.25, case["rates"], names, optimizer=optimizer_of(case), **norms)
    expected = dict(case["logs"])
    if len(names) == 1 and names == ["textencoder"] and not case["text_encoder_only"]:
        # one group of a network without the other part: the original shows it under both labels
        del expected["lr/unet"]
    assert {key: ours[key] for key in expected} == expected
    # groups that the original does not show, and the step size of the first group by name
    extra = {f"lr/{name}" for name in names} | {"lr/d*lr"} | {f"lr/d*lr/{name}" for name in names}
    assert set(ours) - set(expected) <= extra


@pytest.mark.parametrize("index", range(len(LOGS["block"])))
def test_block_logs(index):
    case = LOGS["block"][index]
    names = [f"block{i}" for i, rate in enumerate(case["block_lrs"]) if rate]
    names += [f"text_encoder{i + 1}" for i in range(len(case["rates"]) - len(names))]
    ours = step_logs(1.5, 1.25, case["rates"], names, optimizer=optimizer_of(case))
    assert {key: ours[key] for key in case["logs"]} == case["logs"]
    assert set(ours) - set(case["logs"]) <= {"loss/current", "loss/average", "lr/d*lr"}


def test_groups_without_names_and_other_values():
    logs = step_logs(1.0, 2.0, [0.1, 0.2], None, mean_grad_norm=0.5, mean_norm=None, something=3)
    assert logs == {
        "loss/current": 1.0,
        "loss/average": 2.0,
        "lr/group0": 0.1,
        "lr/group1": 0.2,
        "norm/avg_grad_norm": 0.5,
        "something": 3,
    }
