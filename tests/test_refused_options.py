"""Options that a script has and cannot do yet: the list here equals what the code refuses, and shrinks to nothing."""

from __future__ import annotations

import re

import pytest

from library import messages
from library.generation.checks import check_options
from library.messages import UserError
from library.options.declare import Option
from library.options.effects import without_effect
from library.options.parser import Resolved, parse, resolve
from library.options.scripts import SCRIPTS, find_script
from tests.options.test_every_option_counts import MODEL_TRAIN, OF_THE_PARSER, TRAIN, TUNING

REFUSED = {
    "gen_img_diffusers.py": {
        "image_path",
        "mask_path",
        "guide_image_path",
        "network_regional_mask_max_color_codes",
        "highres_fix_scale",
        "control_net_models",
        "clip_guidance_scale",
        "clip_image_guidance_scale",
        "vgg16_guidance_scale",
        "ds_depth_1",
        "gradual_latent_timesteps",
    },
    "sdxl_gen_img.py": {
        "image_path",
        "mask_path",
        "guide_image_path",
        "network_regional_mask_max_color_codes",
        "highres_fix_scale",
        "control_net_lllite_models",
        "clip_vision_strength",
        "ds_depth_1",
        "gradual_latent_timesteps",
    },
    "sdxl_minimal_inference.py": set(),
}
OPENED_AT_THE_DOOR = {"console_log_file"}
BASE = {"train_network.py": TRAIN, "sdxl_train_network.py": TRAIN, "gen_img_diffusers.py": ["--ckpt", "m"]}
BASE |= {"sdxl_gen_img.py": ["--ckpt", "m"], "sdxl_minimal_inference.py": ["--ckpt_path", "m"]}


BASE |= dict.fromkeys(("train_db.py", "fine_tune.py", "sdxl_train.py"), MODEL_TRAIN)
EMBEDDINGS = ("train_textual_inversion.py", "train_textual_inversion_XTI.py", "sdxl_train_textual_inversion.py")
BASE |= {script: [*MODEL_TRAIN, "--token_string", "w"] for script in EMBEDDINGS}
BASE["tools/inspect_dataset.py"] = ["--train_data_dir", "d"]


def given(option: Option) -> list[str]:
    """The option on a command line, with a value that is not its default."""
    if option.is_flag:
        return [option.flag]
    if not option.flag.startswith("-"):
        return ["m"]
    if option.choices:
        return [option.flag, str(next(c for c in option.choices if c not in (None, option.default)))]
    return [option.flag, "0.3" if option.value_type is float else "7"]


def base(script: str) -> list[str]:
    """What the script must have."""
    if script in BASE:
        return BASE[script]
    return [word for o in find_script(script).options() if o.dest in find_script(script).required for word in given(o)]


def checked(script: str, option: Option) -> Resolved:
    own = given(option) if option.flag.startswith("-") else []
    options = resolve(parse(script, [*base(script), *own]), script)
    if "image" in options:
        check_options(options.image, options.image_model, options.image_passes)
    return options


def driven(script: str) -> list[Option]:
    return [option for option in find_script(script).options() if option.dest not in OF_THE_PARSER | OPENED_AT_THE_DOOR]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_the_list_is_what_is_refused(script: str) -> None:
    refused, accepted = set(), 0
    for option in driven(script):
        try:
            checked(script, option)
            accepted += 1
        except UserError as error:
            if "not supported yet" in str(error):
                assert str(error).startswith(f"{option.flag}: "), error
                refused.add(option.dest)
    assert refused == REFUSED.get(script, set())
    assert accepted > (50 if REFUSED.get(script) else 1)


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_what_only_tunes_a_missing_feature_is_said_to_do_nothing(
    script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuning = [
        option
        for option in driven(script)
        if option.dest not in REFUSED.get(script, ())
        and any(re.fullmatch(p, option.dest) for p in TUNING.get(script, ()))
    ]
    assert len(tuning) > 5 or not REFUSED.get(script)
    silent = []
    messages.log.propagate = True
    for option in tuning:
        monkeypatch.setattr(messages, "_said", set())
        caplog.clear()
        with caplog.at_level("WARNING", logger=messages.log.name):
            options = checked(script, option)
        said = {name for name, _ in without_effect(options)} if "loop" in options else set()
        if option.dest not in said and option.flag not in caplog.text:
            silent.append(option.dest)
    assert silent == []
