"""The moving average of the weights: its formula, what is written and drawn, what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.counting import count
from library.messages import UserError
from library.training.ema import MovingAverage, marked_name


def walk(average: MovingAverage, parameter: torch.nn.Parameter, values: list[float]) -> list[float]:
    seen = []
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        average.note_update()
        average.settle()
        seen.append(float(average.averages[0].mean()))
    return seen


def test_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], decay=0.5, start=2)
    seen = walk(average, parameter, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected, now = [], 0.0
    for number, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1):
        decay = 0.0 if number <= 2 else min(0.5, (1 + number - 2) / (10 + number - 2))
        now = decay * now + (1 - decay) * value
        expected.append(now)
    assert seen == pytest.approx(expected)


def test_bfloat16_weights_have_a_float32_average() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = MovingAverage([parameter], decay=0.9999)
    average.updates = 10**6
    walk(average, parameter, [2.0] * 3)
    assert average.averages[0].dtype == torch.float32
    assert float(average.averages[0][0]) == pytest.approx(2 - 0.9999**3, abs=1e-6)
    with average.in_place():
        assert parameter.dtype == torch.bfloat16 and float(parameter.detach()[0]) == 1.0
    assert float(parameter.detach()[0]) == 2.0


def test_in_place_and_back_bit_for_bit() -> None:
    parameters = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(2, 2))]
    average = MovingAverage(parameters, decay=0.9)
    with torch.no_grad():
        parameters[0].add_(1)
    raw = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError), average.in_place():
        assert not torch.equal(parameters[0], raw[0])
        raise RuntimeError
    assert all(torch.equal(p, r) for p, r in zip(parameters, raw, strict=True))


def test_an_update_that_was_not_made_does_not_count() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = MovingAverage([parameter], decay=0.9)
    average.note_update()
    average.forget_update()
    average.settle()
    assert average.updates == 0


def test_updates_cost_one_operation_and_no_host_read() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(50)]
    average = MovingAverage(parameters, decay=0.9)
    average.note_update()
    counter = count(average.settle)
    assert counter.ops == {"aten::_foreach_lerp_": 1}
    assert counter.host_reads == 0


def test_no_average() -> None:
    average = MovingAverage((), decay=0.0)
    average.note_update()
    average.settle()
    assert not average


@pytest.mark.parametrize("extension", [".safetensors", ""])
def test_names(extension: str) -> None:
    assert marked_name("x-000002" + extension, extension) == "x-000002-ema" + extension


def test_files_pictures_and_retention(train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 3\nblue --w 64 --h 64 --s 2", encoding="utf-8")
    options = ("--ema_decay", "0.5", "--save_every_n_steps", "1", "--save_last_n_steps", "1")
    samples = ("--sample_every_n_steps", "4", "--sample_prompts", str(prompts), "--sample_at_first")
    out = train(*options, *samples)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    kept = [f"x-step0000000{n}{mark}.safetensors" for n in (3, 4) for mark in ("", "-ema")]
    assert files == sorted([*kept, "x.safetensors", "x-ema.safetensors"])
    raw, average = load_file(out / "x.safetensors"), load_file(out / "x-ema.safetensors")
    assert set(raw) == set(average)
    assert any(not torch.equal(raw[key], average[key]) for key in raw if "lora_up" in key)

    plain = train(output="plain")
    assert all(torch.equal(raw[key], t) for key, t in load_file(plain / "x.safetensors").items())
    drawn = {path.name.split("_2")[0] for path in (out / "sample").glob("*.png")}
    assert drawn == {"x", "x-ema"} and len(list((out / "sample").glob("*.png"))) == 8


def test_average_follows_the_formula_in_a_run(train) -> None:
    """The file after each step is the average of the files of the weights."""
    out = train("--ema_decay", "0.3", "--save_every_n_steps", "1", "--save_precision", "float", steps=3)
    start = train("--learning_rate", "1e-30", output="start", steps=1)
    name = next(key for key in load_file(out / "x.safetensors") if "unet" in key and "lora_up" in key)
    now = load_file(start / "x.safetensors")[name]
    for number in (1, 2, 3):
        decay = min(0.3, (1 + number) / (10 + number))
        now = now + (load_file(out / f"x-step0000000{number}.safetensors")[name] - now) * (1 - decay)
        torch.testing.assert_close(load_file(out / f"x-step0000000{number}-ema.safetensors")[name], now)


def test_state_of_a_run_without_average(train, caplog: pytest.LogCaptureFixture) -> None:
    from library.messages import log

    log.propagate = True
    state = str(train("--save_state", output="a", steps=2) / "x-state")
    with caplog.at_level("WARNING", logger=log.name):
        out = train("--ema_decay", "0.5", "--resume", state, "--save_state", output="b", steps=3)
        train("--resume", str(out / "x-state"), output="c", steps=4)
    assert "holds no moving average of the weights: it begins now" in caplog.text
    assert "without --ema_decay it ends here" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ema_decay", "1.5"), "--ema_decay 1.5 is not in 0 to 1"),
        (("--ema_decay", "0.9", "--ema_start", "-1"), "--ema_start -1 is below 0"),
        (("--ema_decay", "0.9", "--optimizer_type", "AdamWScheduleFree"), "it averages the weights itself"),
        (("--validate_every_n_steps", "0"), "--validate_every_n_steps 0 is below 1"),
    ],
)
def test_refusals(train, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(*options)


def test_average_on_the_cpu_equals_the_other(train) -> None:
    a = load_file(train("--ema_decay", "0.5", output="a", steps=2) / "x-ema.safetensors")
    b = load_file(train("--ema_decay", "0.5", "--ema_device", "cpu", output="b", steps=2) / "x-ema.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_room_and_memory_for_it_are_counted(command, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.options.parser import parse
    from library.training import assemble
    from library.training.disk_need import disk_need
    from library.training.network_trainer import NetworkTrainer

    needs = []
    monkeypatch.setattr(assemble, "show_settings", lambda options, run, *_: needs.append(disk_need(run, options)))
    for options in ((), ("--ema_decay", "0.9")):
        NetworkTrainer().train(parse("train_network.py", command(*options, "--save_state", "--dry_run")))
    plain, averaged = needs
    assert averaged.files == 2 * plain.files
    assert averaged.state > plain.state and averaged.state - plain.state <= 1.1 * plain.file
