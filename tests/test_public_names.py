"""The names that other programs import stand where they look for them, take the same arguments, have the same values.

`tests/spec/public_names.json`: module -> name -> what is known of it: `arguments` as in a def, `value` of a constant,
`has` (attributes of a class), `since` later (after sd-scripts 0.7.0) or through (a module that is reached through
another one).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import library.config_util
import library.train_util
from library import messages, replaceable

ROOT = Path(__file__).parent.parent
TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "spec" / "public_names.json").read_text(encoding="utf-8")
)

CONTROLNET = "ControlNet"
PASSES = "picture passes besides text to image"
DEEPSPEED = "more than one process"
# Names whose area is still to come.
LATER: dict[str, dict[str, str]] = {
    "library.model_util": {
        "convert_controlnet_state_dict_to_sd": CONTROLNET,
        "convert_controlnet_state_dict_to_diffusers": CONTROLNET,
    },
    "library.original_unet": {"InferUNet2DConditionModel": PASSES},
    "library.sdxl_original_unet": {"InferSdxlUNet2DConditionModel": PASSES},
    "library.utils": {"GradualLatent": PASSES, "EulerAncestralDiscreteSchedulerGL": PASSES},
    "library.deepspeed_utils": {
        "add_deepspeed_arguments": DEEPSPEED,
        "prepare_deepspeed_args": DEEPSPEED,
        "prepare_deepspeed_plugin": DEEPSPEED,
        "prepare_deepspeed_model": DEEPSPEED,
    },
    "library.lpw_stable_diffusion": {"preprocess_image": PASSES, "preprocess_mask": PASSES}
    | {"prepare_controlnet_image": CONTROLNET},
    "gen_img_diffusers": {"preprocess_image": PASSES, "preprocess_mask": PASSES},
    "sdxl_gen_img": {"preprocess_image": PASSES, "preprocess_mask": PASSES},
    "library.sdxl_lpw_stable_diffusion": {"preprocess_image": PASSES, "preprocess_mask": PASSES}
    | {"prepare_controlnet_image": CONTROLNET},
}
# Attributes of classes that are there already.
LATER_ATTRIBUTES = {
    ("library.lpw_stable_diffusion", "StableDiffusionLongPromptWeightingPipeline"): {"img2img", "inpaint"},
    ("library.sdxl_lpw_stable_diffusion", "SdxlStableDiffusionLongPromptWeightingPipeline"): {"img2img", "inpaint"},
    ("networks.lora", "LoRAInfModule"): {"set_region"},
}
# Whole modules whose names are not in the table yet.
LATER_MODULES = {
    "library.hypernetwork": PASSES,
    "networks.control_net_lllite": CONTROLNET,
    "tools.original_control_net": CONTROLNET,
}
CASES = [(m, n) for m, names in TABLE.items() for n in names if n not in LATER.get(m, {})]


def known(module: str, name: str) -> dict[str, Any]:
    return TABLE[module][name]


def has(module: str, name: str) -> bool:
    try:
        getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True


def test_the_table_is_whole() -> None:
    assert len(CASES) > 230
    assert all(entry["mark"] in "AB" for names in TABLE.values() for entry in names.values())


def test_later_names_are_in_the_table_and_not_there_yet() -> None:
    listed = [(m, n) for m, names in LATER.items() for n in names]
    assert [case for case in listed if case[1] not in TABLE[case[0]]] == []
    assert [case for case in listed if has(*case)] == []
    assert [m for m in LATER_MODULES if (ROOT / (m.replace(".", "/") + ".py")).exists()] == []


@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m}.{n}" for m, n in CASES])
def test_name(module: str, name: str) -> None:
    entry = known(module, name)
    found = getattr(importlib.import_module(module), name)
    if "value" in entry:
        assert found == entry["value"]
    assert {one for one in entry.get("has", ()) if not hasattr(found, one)} == LATER_ATTRIBUTES.get(
        (module, name), set()
    )
    if "arguments" in entry and not takes_the_rest(found):
        assert problems_of(inspect.signature(found), entry["arguments"]) == []


def takes_the_rest(found: Any) -> bool:
    """Whether the arguments of a base class come as *args; then `test_subset_in_order` calls it."""
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in inspect.signature(found).parameters.values())


def problems_of(signature: inspect.Signature, text: str) -> list[str]:
    """How a signature differs from the text of a def's arguments.

    What comes after the known arguments must be optional, and an argument may have a default where it had none.
    """
    wanted = ast.parse(f"def f({text}): pass").body[0].args  # type: ignore[attr-defined]
    names = [argument.arg for argument in wanted.args]
    defaults = dict(zip(names[len(names) - len(wanted.defaults) :], wanted.defaults, strict=True))
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    problems = []
    if [p.name for p in positional[: len(names)]] != names:
        problems.append(f"arguments {[p.name for p in positional]} instead of {names}")
    for name, default in defaults.items():
        have = getattr(signature.parameters.get(name), "default", inspect.Parameter.empty)
        want = default.id if isinstance(default, ast.Name) else ast.literal_eval(default)
        if (have.__name__ if isinstance(have, type) else have) != want:
            problems.append(f"default of {name} is {have!r} instead of {want!r}")
    problems += [f"{p.name} is required" for p in positional[len(names) :] if p.default is p.empty]
    for argument in wanted.kwonlyargs:
        parameter = signature.parameters.get(argument.arg)
        if parameter is None or parameter.kind is not parameter.KEYWORD_ONLY:
            problems.append(f"no keyword argument {argument.arg}")
    if wanted.kwarg and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        problems.append("takes no further keywords")
    return problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a, b=2", ""),
        ("a", ""),
        ("b, a", "instead of"),
        ("a, b=3", "default of b"),
        ("a, b=2, c=3", "instead of"),
        ("a, b=2, **k", "further keywords"),
    ],
)
def test_a_difference_would_be_found(text: str, problem: str) -> None:
    def function(a, b=2):
        pass

    found = problems_of(inspect.signature(function), text)
    assert bool(found) == bool(problem)
    assert problem in " ".join(found)


def test_subset_in_order(tmp_path: Path) -> None:
    """The classes whose signature ends in `*common` take the same arguments in the same order."""
    for name in ("DreamBoothSubset", "FineTuningSubset", "ControlNetSubset"):
        names = [argument.strip() for argument in known("library.train_util", name)["arguments"].split(",")]
        values = [f"{argument}-value" for argument in names]
        if "caption_extension" in names:
            values[names.index("caption_extension")] = ".caption-extension"
        made = getattr(library.train_util, name)(*values)
        assert [getattr(made, argument) for argument in names] == values


def test_picture_suffixes_and_transform() -> None:
    import numpy as np

    suffixes = library.train_util.IMAGE_EXTENSIONS
    assert {".png", ".PNG", ".jpg", ".jpeg", ".webp", ".WEBP", ".bmp"} <= set(suffixes)
    tensor = library.train_util.IMAGE_TRANSFORMS(np.array([[[0, 255, 127]]], dtype=np.uint8))
    assert tuple(tensor.shape) == (3, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1, 1, 127 / 127.5 - 1])


def test_parameter_classes_are_dataclasses() -> None:
    for name in TABLE["library.config_util"]:
        if name.endswith(("Params", "Blueprint")):
            assert dataclasses.is_dataclass(getattr(library.config_util, name)), name


def test_forms_of_import() -> None:
    """Every form works in a fresh interpreter with the repository's root on the path, also from another folder."""
    code = """
import library.train_util, library.config_util as config_util, train_network
from library import train_util, model_util
from library.train_util import DatasetGroup, load_tokenizer
from networks import lora
assert library.train_util is train_util and train_network.train_util is train_util
assert config_util.DatasetGroup is DatasetGroup is library.train_util.DatasetGroup
assert train_network.config_util is config_util and train_network.model_util is model_util
assert train_util.load_tokenizer is load_tokenizer and lora.create_network
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(sys.executable).parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_same_object(monkeypatch: pytest.MonkeyPatch) -> None:
    import train_network
    from library.training import network_trainer
    from library.training.hooks import Hooks

    trainer = train_network.NetworkTrainer
    assert trainer is network_trainer.NetworkTrainer

    class Mine(trainer):
        pass

    assert issubclass(Mine, network_trainer.NetworkTrainer)
    assert not Hooks(Mine()).overridden("sample_images")
    monkeypatch.setattr(trainer, "sample_images", lambda self, *arguments: None)
    assert Hooks(Mine()).overridden("sample_images")
    assert Hooks(network_trainer.NetworkTrainer()).overridden("sample_images")


@pytest.mark.parametrize("module", [m for m in TABLE if m not in ("networks.lora",)])
def test_unknown_name(module: str) -> None:
    if module in LATER and set(TABLE[module]) <= set(LATER[module]):
        pytest.skip("the whole module comes later")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module(module).no_such_name


def test_other_assignments_are_kept_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "_said", set())
    messages.log.propagate = True
    with caplog.at_level("WARNING", logger=messages.log.name):
        monkeypatch.setattr(library.train_util, "get_optimizer", mine := object())
        monkeypatch.setattr(library.train_util, "get_optimizer", mine)
        assert library.train_util.get_optimizer is mine
        monkeypatch.setattr("library.utils.setup_logging", mine)
    assert [r.message for r in caplog.records] == [
        "library.train_util.get_optimizer was assigned from outside; this program does not call it from there"
    ]
    monkeypatch.undo()
    assert library.train_util.get_optimizer is not mine


REPLACEABLE = [(m, n) for m, names in replaceable.REPLACEABLE.items() for n in names]


@pytest.mark.parametrize(("module", "name"), REPLACEABLE)
def test_assignments_last_until_they_are_undone(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    porch = importlib.import_module(f"library.{module}")
    own = getattr(porch, name)
    with monkeypatch.context() as patch:
        patch.setattr(porch, name, mine := lambda *a, **k: None)
        assert replaceable.replacement(module, name) is mine
        assert getattr(porch, name) is mine
    assert replaceable.replacement(module, name) is None
    setattr(porch, name, mine)
    assert replaceable.replacement(module, name) is mine
    setattr(porch, name, own)
    assert replaceable.replacement(module, name) is None
    delattr(porch, name)
    assert getattr(porch, name) is own
