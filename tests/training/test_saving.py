"""File names, when files are due, and which older ones go, against the original's."""

from __future__ import annotations

import pytest

from library.messages import UserError
from library.options.saving import SavingConfig
from library.training import saving
from library.training.saving import SavedFiles
from tests.conftest import GOLDEN, load_json

DATA = load_json(GOLDEN / "training_names.json")


@pytest.mark.parametrize("index", range(len(DATA["names"])))
def test_names(index):
    case = DATA["names"][index]
    make = {"epoch": saving.epoch_name, "step": saving.step_name, "last": saving.last_name}[case["kind"]]
    number = [case["no"]] if "no" in case else []
    assert make(case["output_name"], *number, case["ext"]) == case["name"]


def test_formats():
    assert {name: getattr(saving, name) for name in DATA["formats"]} == DATA["formats"]


def test_extensions():
    assert saving.network_extension(SavingConfig(save_model_as="ckpt")) == ".ckpt"
    assert saving.network_extension(SavingConfig(save_model_as=None)) == ".safetensors"
    assert [saving.model_extension(flag) for flag in (True, False)] == [".safetensors", ".ckpt"]


def write(path):
    """A file, or a folder where the name has no ending."""
    if path.suffix:
        path.write_text("x")
    else:
        path.mkdir(exist_ok=True)
        (path / "inside").write_text("x")


@pytest.mark.parametrize("index", range(len(DATA["retention"])))
def test_retention(index, tmp_path):
    case = DATA["retention"][index]
    unit = "epoch" if "epoch_to_remove" in case else "step"
    config = SavingConfig(**{name: case[name] for name in case if name.startswith("save_")})
    oldest = {"epoch": saving.oldest_epoch_to_go, "step": saving.oldest_step_to_go}[unit]
    table = {int(number): removed for number, removed in case[f"{unit}_to_remove"].items()}
    if case.get("save_last_n_steps") == 0:
        # the recorded rule removes the file just written
        with pytest.raises(UserError, match="save_last_n_steps 0"):
            oldest(config, 100)
        return
    files = SavedFiles()
    for number, removed in table.items():
        assert oldest(config, number) == removed
        path = tmp_path / f"{number}.safetensors"
        write(path)
        files.add(path, unit, number)
        files.remove_until(unit, oldest(config, number))
        kept = {int(file.stem) for file in tmp_path.iterdir()}
        # one number goes at each save, so nothing at or below it is left
        assert kept == {n for n in table if n <= number and (removed is None or n > removed)}


@pytest.mark.parametrize("index", range(len(DATA["simulations"])))
def test_simulated_runs_of_the_model_scripts(index, tmp_path):
    """What lies in the output folder after every save."""
    case = DATA["simulations"][index]
    options = dict(case["options"])
    config = SavingConfig(**options)
    ext = saving.model_extension(case["use_safetensors"]) if case["stability_layout"] else ""
    files, name, epochs = SavedFiles(), config.output_name, case["epochs"]
    for event in case["events"]:
        unit, _, number = event["after"].partition(" ")
        if unit == "end":
            if saving.state_due_at_end(config):
                write(tmp_path / saving.last_state_name(name))
            write(tmp_path / saving.last_name(name, ext))
        else:
            save_one(config, files, tmp_path, unit, int(number), epochs, ext)
        # The epoch that a model file tells at the end is 3 of 4 in the recorded run; the writer's tests cover it.
        assert sorted(file.name for file in tmp_path.iterdir()) == event["dir"], event["after"]


def save_one(config, files, folder, unit, number, epochs, ext):
    name = config.output_name
    if unit == "epoch":
        due = saving.due_after_epoch(config, number, epochs)
        names = saving.epoch_name(name, number, ext), saving.epoch_state_name(name, number)
        oldest = saving.oldest_epoch_to_go
    else:
        due = saving.due_after_step(config, number)
        names = saving.step_name(name, number, ext), saving.step_state_name(name, number)
        oldest = saving.oldest_step_to_go
    if not due:
        return
    for state in (False, True) if config.save_state else (False,):
        path = folder / names[state]
        write(path)
        files.add(path, unit, number, state=state)
        files.remove_until(unit, oldest(config, number, state=state), state=state)


def test_recorded_network_run(tmp_path):
    """Names, states and removals of a run of train_network in their order."""
    run = DATA["network_run"]
    options = dict(zip(run["options"], run["options"][1:], strict=False))
    names = ("save_every_n_steps", "save_last_n_steps", "save_every_n_epochs", "save_last_n_epochs")
    numbers = {name: int(options[f"--{name}"]) for name in (*names, "save_last_n_epochs_state")}
    config = SavingConfig(output_name="n", save_state=True, **numbers)
    ext, files = saving.network_extension(config), SavedFiles()
    events = [event for event in run["events"] if event[0] in ("save", "state", "remove")]
    ours = []

    def save(kind, number, name, state_name, oldest, order):
        for what in order:
            state = what == "state"
            path = tmp_path / (state_name if state else name)
            if what == "remove":
                gone = files.remove_until(kind, oldest(config, number))
                ours.extend(["remove", str(p).rpartition("/")[2]] for p in gone)
                continue
            write(path)
            files.add(path, kind, number, state=state)
            ours.append([what, path.name])
            if state:
                gone = files.remove_until(kind, oldest(config, number, state=True), state=True)
                ours.extend(["remove", str(p).rpartition("/")[2]] for p in gone)

    for step in range(1, 9):
        if saving.due_after_step(config, step):
            states = saving.step_name("n", step, ext), saving.step_state_name("n", step)
            save("step", step, *states, saving.oldest_step_to_go, ("save", "state", "remove"))
        epoch = step // 2
        if step % 2 == 0 and saving.due_after_epoch(config, epoch, 4):
            states = saving.epoch_name("n", epoch, ext), saving.epoch_state_name("n", epoch)
            save("epoch", epoch, *states, saving.oldest_epoch_to_go, ("save", "remove", "state"))
    for what, name in (("state", saving.last_state_name("n")), ("save", saving.last_name("n", ext))):
        write(tmp_path / name)
        ours.append([what, name])
    assert ours == [event[:2] for event in events]
    final = next(event[1] for event in run["events"] if event[0] == "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == final


def test_everything_older_than_the_window_goes(tmp_path):
    """The original removes one number at a time, so files of other settings stay for ever."""
    files = SavedFiles()
    for epoch in (1, 2, 3, 4):
        path = tmp_path / saving.epoch_name("m", epoch, ".safetensors")
        write(path)
        files.add(path, "epoch", epoch)
    write(tmp_path / "m-000000.safetensors")  # not of this run
    config = SavingConfig(save_every_n_epochs=1, save_last_n_epochs=2)
    files = SavedFiles.from_data(files.to_data())
    files.remove_until("epoch", saving.oldest_epoch_to_go(config, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-000000.safetensors", "m-000004.safetensors"]


def test_files_in_use_go_at_the_next_call(tmp_path):
    files = SavedFiles()
    for epoch in (1, 2):
        write(tmp_path / f"{epoch}.ckpt")
        files.add(tmp_path / f"{epoch}.ckpt", "epoch", epoch)
    busy = {str(tmp_path / "1.ckpt")}
    assert files.remove_until("epoch", 2, busy=busy.__contains__) == [str(tmp_path / "2.ckpt")]
    assert files.remove_until("epoch", 2) == [str(tmp_path / "1.ckpt")]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_gone_already_is_forgotten(tmp_path):
    files = SavedFiles()
    files.add(tmp_path / "gone.ckpt", "step", 1)
    files.remove_until("step", 1)
    assert files.files == []


def test_a_file_written_again_counts_once(tmp_path):
    files = SavedFiles()
    files.add("a.ckpt", "step", 1)
    files.add("a.ckpt", "step", 2)
    assert [file.number for file in files.files] == [2]


@pytest.mark.parametrize(("ratio", "epochs", "every"), [(3, 10, 3), (20, 10, 1), (None, 10, 7), (0, 10, 7)])
def test_epoch_ratio(ratio, epochs, every):
    config = SavingConfig(save_every_n_epochs=7, save_n_epoch_ratio=ratio)
    assert saving.with_epoch_ratio(config, epochs).save_every_n_epochs == every
