"""No option is parsed and ignored: each is read somewhere, refused, or known to do nothing."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from library.generation.checks import NOT_SUPPORTED_YET
from library.options.effects import NEEDS
from library.options.parser import build_parser
from library.options.scripts import SCRIPTS, find_script

ROOT = Path(__file__).parent.parent.parent
TRAIN = ["--pretrained_model_name_or_path", "m", "--network_module", "n", "--output_dir", "o", "--train_data_dir", "d"]
MODEL_TRAIN = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--train_data_dir", "d"]

# Read by the parser itself.
OF_THE_PARSER = {"config_file", "output_config", "strict", "dump_schema"}
# Does nothing by design, and `effects.py` says so when it is given.
NOTHING_TO_DO = {
    *("highvram", "ddp_gradient_as_bucket_view", "ddp_static_graph", "disable_mmap_load_safetensors"),
    *("zero3_init_flag", "zero3_save_16bit_model"),
}
# Tunes a feature that is still to come.
TUNING = {
    "gen_img_diffusers.py": (r"highres_fix_\w+|control_net_\w+|vgg16_\w+|ds_\w+|gradual_latent_\w+",),
    "sdxl_gen_img.py": (r"highres_fix_\w+|control_net_\w+|ds_\w+|gradual_latent_\w+",),
    "sdxl_minimal_inference.py": (),
    # SD 2.x projections have one form inside, so there is nothing to choose; the help says so
    "tools/convert_diffusers20_original_sd.py": (r"unet_use_linear_projection",),
}


@cache
def names_read() -> tuple[set[str], list[re.Pattern]]:
    """Attribute names, texts, and patterns of composed texts in the code that works with options."""
    names, patterns = set(), []
    for path in [p for room in ("library", "networks", "tools") for p in (ROOT / room).rglob("*.py")]:
        if "options" in path.parts or re.search(r"classic|porch|metadata", path.name):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [re.escape(v.value) if isinstance(v, ast.Constant) else r"\w+" for v in node.values]
                if re.fullmatch(r"[a-z_]+(\\w\+)?[a-z_]*", "".join(parts)) and len("".join(parts)) > 9:
                    patterns.append(re.compile("".join(parts)))
    return names, patterns


def is_read(dest: str) -> bool:
    names, patterns = names_read()
    return dest in names or any(p.fullmatch(dest) for p in patterns)


def refused(script: str) -> set[str]:
    entry = find_script(script)
    own = {option.dest for option in entry.options()} if "image" in entry.concerns else set()
    return set(NOT_SUPPORTED_YET) & own


# Read where the metadata are made only, which is their purpose.
METADATA_ONLY = {"training_comment"}


# Takes what every training script takes, and hands it to the rules of the one that is named.
OF_OTHERS = {"tools/inspect_dataset.py"}


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - OF_OTHERS))
def test_every_option_is_read_or_refused(script: str) -> None:
    ignored = [
        option.dest
        for option in find_script(script).options()
        if not is_read(option.dest)
        and option.dest not in OF_THE_PARSER | NOTHING_TO_DO | METADATA_ONLY | refused(script)
        and not any(re.fullmatch(pattern, option.dest) for pattern in TUNING.get(script, ()))
        and not option.dest.startswith("metadata_")
    ]
    assert not ignored


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_refused_options_exist(script: str) -> None:
    assert refused(script) <= {action.dest for action in build_parser(script)._actions}
    assert {name for need in NEEDS for name in need.names} >= NOTHING_TO_DO
