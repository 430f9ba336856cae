"""The run's own record: what stands in it, that nothing stands in it twice, and that it is strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from library.messages import UserError
from library.training.micro_losses import BANDS, band_names, fetch
from library.training.network_trainer import NetworkTrainer
from library.training.record import Record, plain, read_record
from library.training.run_history import History
from library.training.stopwatch import Stopwatch
from library.training.work import WorkCounter


def steps_of(folder: Path) -> list[dict]:
    return [line for line in read_record(folder / "x-metrics.jsonl") if line["kind"] == "step"]


def test_every_update_is_one_line(train) -> None:
    out = train("--gradient_accumulation_steps", "2", "--validation_split", "0", steps=3)
    lines = read_record(out / "x-metrics.jsonl")
    assert [line["kind"] for line in lines] == ["run", "step", "step", "step", "save", "end"]
    run, *steps = lines[:4]
    assert run["max_steps"] == 3 and run["options"]["learning_rate"] == 1e-3 and not run["resumed"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert set(step["rates"]) == {"textencoder", "unet"}
        assert step["norm"] > 0 and step["seconds"] > step["waited"] >= 0 and step["memory"] > 1e6
        samples = sum(count for _, count in step["bands"])
        losses = sum(total for total, _ in step["bands"])
        assert 1 <= samples <= 4
        # every micro-batch counts the same in the update's loss, also a smaller one
        assert step["loss"] > 0 and losses / samples == pytest.approx(step["loss"], rel=0.2)
    assert lines[-1]["problem"] is None and lines[-2]["path"] == "x.safetensors"


def test_a_resumed_run_goes_on_without_double_lines(train) -> None:
    options = ("--save_state", "--save_every_n_steps", "2")
    whole = train(*options, steps=5)
    state = whole / "x-step00000002-state"
    losses = [step["loss"] for step in steps_of(whole)]
    again = train(*options, "--resume", str(state), steps=5)
    assert again == whole
    lines = read_record(whole / "x-metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [step["loss"] for step in steps_of(whole)] == losses
    assert [line["from_step"] for line in lines if line["kind"] == "run"] == [0, 2]
    assert [line["path"] for line in lines if line["kind"] == "save"].count("x-step00000004.safetensors") == 1
    moved = train(*options, "--resume", str(state), output="elsewhere", steps=4)
    assert [step["step"] for step in steps_of(moved)] == [1, 2, 3, 4], "the earlier steps came along"


def test_a_new_run_begins_a_new_record(train) -> None:
    train(steps=2)
    assert [step["step"] for step in steps_of(train(steps=1))] == [1]


def test_a_failure_stands_in_record_and_page(train, tmp_path: Path) -> None:
    class Broken(NetworkTrainer):
        def post_process_loss(self, loss, *_):
            return loss * float("nan") if self.run.position.step == 1 else loss

    with pytest.raises(UserError, match="not a finite number"):
        train(trainer=Broken())
    lines = read_record(tmp_path / "out" / "x-metrics.jsonl")
    assert [line["kind"] for line in lines] == ["run", "step", "end"]
    assert "not a finite number" in lines[-1]["problem"]
    assert "not a finite number" in (tmp_path / "out" / "x-report.html").read_text(encoding="utf-8")


def test_secrets_stay_out(train) -> None:
    out = train("--huggingface_token", "hf_secret", steps=1)
    for path in (out / "x-metrics.jsonl", out / "x-report.html"):
        assert "hf_secret" not in path.read_text(encoding="utf-8")


def test_no_report(train) -> None:
    out = train("--no_report", steps=1)
    assert sorted(path.name for path in out.iterdir()) == ["x-metrics.jsonl", "x.safetensors"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x-metrics.jsonl"
    record = Record(path)
    record.start({"name": "x"})
    record.add({"kind": "step", "step": 1}, {"kind": "step", "step": 2})
    state = record.state()
    record.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    assert [line["kind"] for line in read_record(path)] == ["run", "step", "step"]

    def go_on() -> list:
        resumed = Record(path)
        resumed.go_on(state)
        resumed.start({"name": "x"})
        assert resumed.state() == state, "nothing is written before the first step"
        resumed.add({"kind": "step", "step": 3})
        resumed.close()
        return [line.get("step") for line in read_record(path)]

    assert go_on() == [None, 1, 2, None, 3]


def test_the_record_of_another_run_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x-metrics.jsonl"
    states = []
    for name in ("first", "second"):
        record = Record(path)
        record.start({"name": name})
        record.add({"kind": "step", "step": 1})
        states.append(record.state())
        record.close()
    resumed = Record(path)
    resumed.go_on(states[0])
    resumed.start({"name": "third"})
    resumed.add({"kind": "step", "step": 2})
    resumed.close()
    assert [line.get("name", line.get("step")) for line in read_record(path)] == ["third", 2]


def test_a_run_that_fails_before_its_first_step_leaves_the_earlier_record(tmp_path: Path) -> None:
    path, page = tmp_path / "x-metrics.jsonl", tmp_path / "x-report.html"
    path.write_text("earlier", encoding="utf-8")
    record = Record(path, page)
    record.start({"name": "x"})
    with pytest.raises(ValueError), record.open_until_the_end():
        raise ValueError
    assert path.read_text(encoding="utf-8") == "earlier" and not page.exists()


def test_a_full_disk_does_not_end_the_training(tmp_path: Path) -> None:
    record = Record(tmp_path / "none" / "x-metrics.jsonl")
    (tmp_path / "none").write_text("a file where the folder should be", encoding="utf-8")
    record.start({"name": "x"})
    record.add({"kind": "step", "step": 1})
    record.add({"kind": "step", "step": 2})
    record.close()


def test_strict_json() -> None:
    text = json.dumps(plain({"a": math.nan, "b": [math.inf, 1], "c": Path("x"), 1: (2,)}), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [None, 1], "c": "x", "1": [2]}


class OneProcess:
    count = 1

    @staticmethod
    def reduce_mean(value: torch.Tensor) -> torch.Tensor:
        return value


class TwoProcesses:
    """The other process has the same values plus one."""

    count = 2

    @staticmethod
    def reduce_mean(value: torch.Tensor) -> torch.Tensor:
        return value + 0.5


def entries() -> list:
    from library.training.logbook import Entry

    samples = (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 199, 999]))
    return [
        Entry(1, 0, 1, torch.tensor(2.5), [], samples=samples, norm=torch.tensor(7.0)),
        Entry(1, 1, 1, torch.tensor(0.5), [], updated=False),
    ]


def test_losses_by_band() -> None:
    first, second = fetch(entries(), OneProcess())  # type: ignore[arg-type]
    assert (first.loss, first.norm, second.loss, second.norm) == (2.5, 7.0, 0.5, None)
    assert first.bands == [(3.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (4.0, 1.0)]
    assert second.bands == [(0.0, 0.0)] * BANDS
    assert band_names() == ["0-199", "200-399", "400-599", "600-799", "800-999"]


def test_losses_by_band_over_processes() -> None:
    first, _ = fetch(entries(), TwoProcesses())  # type: ignore[arg-type]
    assert first.loss == 3.0
    assert first.bands[0] == (2 * 3.0 + 1, 2 * 2.0 + 1), "sums and counts of both"


def test_stopwatch() -> None:
    import time

    watch = Stopwatch()

    def slow() -> list:
        time.sleep(0.02)
        yield 1
        time.sleep(0.02)

    for _ in watch.waiting(slow()):
        time.sleep(0.01)
    seconds, waited = watch.read()
    assert 0.02 <= waited <= seconds - 0.01
    assert watch.read()[1] == 0


def test_work_of_a_matrix_product() -> None:
    counter = WorkCounter(wanted=True)
    weight = torch.randn(8, 16, requires_grad=True)
    for _ in range(2):
        with counter.counted(pictures=4):
            (torch.randn(4, 8) @ weight).sum().backward()
    assert counter.per_picture == 2 * (2 * 4 * 8 * 16) / 4, "forward and the weight's gradient, of the first time"
    unwanted = WorkCounter()
    with unwanted.counted(4):
        torch.randn(2, 2) @ torch.randn(2, 2)
    assert unwanted.per_picture is None


def test_share_of_the_peak() -> None:
    run = {"kind": "run", "pictures_per_update": 2, "peak_flops": 100.0, "processes": 1}
    step = {"kind": "step", "step": 1, "seconds": 4.0, "waited": 1.0, "flops": 50.0, "memory": None}
    history = History([run, step, {**step, "step": 2}])
    assert history.pictures_per_second == 0.5
    assert history.peak_share == 0.25
    assert history.waiting_share == 0.25
    assert history.memory is None
