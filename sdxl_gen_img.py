"""Draw pictures with an SDXL model; docs/gen_img.md."""

from __future__ import annotations

import argparse

from library.messages import run
from library.options.parser import build_parser, parse, resolve
from library.porch import porch

SCRIPT = "sdxl_gen_img.py"


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script."""
    return build_parser(SCRIPT)


def main(args: argparse.Namespace | None = None) -> None:
    """Read the options (or take them from a caller) and draw."""
    args = parse(SCRIPT) if args is None else args
    options = resolve(args, SCRIPT)
    from library.generation.command import run as draw

    draw(options, args, family_name="sdxl")


# Names that others import from this script.
NAMES: dict[str, str] = {
    "handle_dynamic_prompt_variants": "library.generation.porch_adapters:handle_dynamic_prompt_variants",
    "replace_unet_modules": "library.runtime.porch_adapters:replace_unet_modules",
    "replace_vae_modules": "library.generation.porch_adapters:replace_vae_modules",
}
__getattr__, __dir__ = porch(__name__, NAMES)


if __name__ == "__main__":
    run(main)
