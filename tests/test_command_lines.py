"""The frozen command lines: every option of the original, identical in name, type, default and choices."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest

from library.options.additions import EVERYWHERE, LATER, MORE_CHOICES, OTHER_FAMILIES, OWN, OWN_SCRIPTS, SEVERAL, WIDER
from library.options.parser import build_parser
from library.options.scripts import SCRIPTS

SPEC = Path(__file__).parent / "spec"
ORIGINAL = json.loads((SPEC / "options.json").read_text(encoding="utf-8"))
SUCCESSORS = json.loads((SPEC / "later_options.json").read_text(encoding="utf-8"))

# Scripts still to come; a script leaves this list when it is there.
TO_COME = {
    "finetune/make_captions.py",
    "finetune/make_captions_by_git.py",
    "finetune/tag_images_by_wd14_tagger.py",
    "sdxl_train_control_net_lllite.py",
    "sdxl_train_control_net_lllite_old.py",
    "tools/latent_upscaler.py",
    "train_controlnet.py",
}
PRESENT = sorted(set(ORIGINAL) - TO_COME)


def actions_of(script: str) -> dict[str, argparse.Action]:
    """dest -> action of the script's own `setup_parser`."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return {action.dest: action for action in module.setup_parser()._actions if action.dest != "help"}


def facts_of(action: argparse.Action) -> dict[str, object]:
    """An action in the form of the recorded command lines."""
    flag = isinstance(action, argparse._StoreTrueAction)
    return {
        "flags": list(action.option_strings),
        "action": type(action).__name__.strip("_").removesuffix("Action"),
        "type": None if flag else getattr(action.type, "__name__", action.type),
        "default": action.default,
        "choices": list(action.choices) if action.choices else None,
        "nargs": action.nargs,
        "required": action.required,
    }


def differences(recorded: list[dict], actions: dict[str, argparse.Action]) -> list[str]:
    """What differs from the recorded options, one line each."""
    lines = []
    for option in recorded:
        dest = option["dest"]
        if dest not in actions:
            lines.append(f"{dest}: missing")
            continue
        found = facts_of(actions[dest])
        for key, value in found.items():
            expected = option.get(key)
            if key == "type" and dest in WIDER:
                there, here = WIDER[dest]
                assert expected == there, f"{dest} is listed as wider than {there}, but was {expected}"
                expected = here
            if key == "nargs" and dest in SEVERAL:
                assert expected is None, f"{dest} is listed as one that took one value"
                expected = "*"
            if key == "choices" and dest in MORE_CHOICES:
                expected = [*expected, *MORE_CHOICES[dest]]
            if key == "type" and expected == "int_or_float":
                expected = "int_or_ratio"
            if expected != value or type(expected) is not type(value):
                lines.append(f"{dest}: {key} was {expected!r}, is {value!r}")
    return lines


def test_every_script_is_there_or_listed() -> None:
    assert len(ORIGINAL) == 40
    assert set(ORIGINAL) >= TO_COME, "a script to come that the original does not have"
    root = Path(__file__).parent.parent
    wrong = [s for s in ORIGINAL if (root / s).exists() == (s in TO_COME)]
    assert not wrong, f"there but listed as to come, or neither: {wrong}"
    assert set(SCRIPTS) <= set(ORIGINAL) | set(SUCCESSORS) | OWN_SCRIPTS
    assert all((root / script).is_file() for script in OWN_SCRIPTS)


@pytest.mark.parametrize("script", PRESENT)
def test_original_options(script: str) -> None:
    assert not differences(ORIGINAL[script], actions_of(script))


@pytest.mark.parametrize("script", PRESENT)
def test_options_of_successors(script: str) -> None:
    actions = actions_of(script)
    recorded = [o for o in SUCCESSORS.get(script, []) if o["dest"] in actions]
    assert not differences(recorded, actions)


@pytest.mark.parametrize("script", PRESENT)
def test_additions_are_listed(script: str) -> None:
    known = {option["dest"] for option in ORIGINAL[script]}
    added = set(actions_of(script)) - known
    listed = set(OWN) | LATER | (EVERYWHERE if "loop" in SCRIPTS[script].concerns else set())
    assert added <= listed, f"not listed in additions.py: {sorted(added - listed)}"
    later = {option["dest"] for option in SUCCESSORS.get(script, [])}
    assert not (added & LATER) - later - EVERYWHERE, "listed as a successor's, but the successor's script lacks it"
    missing = later - added - known - OTHER_FAMILIES
    assert not missing, f"options of successors that are missing here: {sorted(missing)}"


def test_no_addition_is_listed_in_vain() -> None:
    present = {action.dest for script in SCRIPTS for action in build_parser(script)._actions}
    assert not (set(OWN) | LATER) - present


@pytest.mark.parametrize("script", PRESENT)
def test_help_texts(script: str) -> None:
    for action in build_parser(script)._actions:
        assert action.help and len(action.help) > 10, f"{action.dest} has no help"
        assert not action.help.rstrip().endswith("."), f"{action.dest}: no full stop, like the others"
