"""Prompt files of sample pictures: `.txt` with one prompt line a line, `.toml` and `.json` with tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.messages import UserError, log
from library.prompts.line_options import SAMPLE_ITEMS, parse_line

DEFAULT_STEPS = 30
DEFAULT_SCALE = 7.5
SMALLEST_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One sample picture as the prompt file asks for it.

    Attributes:
        width, height: pixels before rounding, or None for the family's default.
        seed: None for a fresh one each time.
        sampler: name, or None for `--sample_sampler`.
        control_image: path of a ControlNet's picture.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int = DEFAULT_STEPS
    scale: float = DEFAULT_SCALE
    seed: int | None = None
    sampler: str | None = None
    control_image: str | None = None

    def size(self, default: int, multiple: int) -> tuple[int, int]:
        """(width, height) that is drawn: rounded down to the multiple, at least 64."""
        sides = (self.width or default, self.height or default)
        width, height = (max(SMALLEST_SIDE, side - side % multiple) for side in sides)
        return width, height


# Key of a table -> field, and the types that it may have.
_KEYS: dict[str, tuple[str, tuple[type, ...]]] = {
    "prompt": ("prompt", (str,)),
    "negative_prompt": ("negative_prompt", (str,)),
    "sample_steps": ("steps", (int,)),
    "width": ("width", (int,)),
    "height": ("height", (int,)),
    "scale": ("scale", (int, float)),
    "seed": ("seed", (int,)),
    "sample_sampler": ("sampler", (str,)),
    "controlnet_image": ("control_image", (str,)),
}


def read_prompts(path: str | Path) -> list[SamplePrompt]:
    """Read a prompt file; its ending (any case) decides how.

    `.txt`: a prompt line a line; blank lines and lines that begin with `#` do not count. `.toml`: a table `prompt`
    with common keys and a list `prompt.subset` whose keys win. `.json`: a list of tables or prompt lines.

    Raises:
        UserError: not there, of another ending, or with contents that make no prompt.
    """
    path = Path(path)
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt file {path} has an unknown ending", f"use one of {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} not found", "check --sample_prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 ({error.reason})", "save it as UTF-8") from error
    return reader(text, path)


def sample_prompt(line: str) -> SamplePrompt:
    """A prompt line such as `a cat --n blurry --w 512 --d 7` as a sample prompt."""
    parsed = parse_line(line, SAMPLE_ITEMS)
    for item, reason in parsed.not_understood:
        log.warning(f'sample prompt: "--{item}" is left out ({reason}): {line}')
    values = dict(parsed.values)
    if values.pop("guidance_scale", None) is not None:
        log.warning(f"sample prompt: --g has no effect on this kind of model, --l sets the scale: {line}")
    return SamplePrompt(prompt=parsed.prompt, **values)


def _read_text(text: str, path: Path) -> list[SamplePrompt]:
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    return [sample_prompt(line) for line in lines if line]


def _read_toml(text: str, path: Path) -> list[SamplePrompt]:
    import toml

    try:
        table = toml.loads(text).get("prompt")
    except toml.TomlDecodeError as error:
        raise UserError(f"prompt file {path}: {error}", "check its TOML") from error
    if not isinstance(table, dict):
        raise UserError(f"prompt file {path} has no table [prompt]", "put keys under [prompt] or [[prompt.subset]]")
    common = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"prompt file {path}: subset is no list of tables", "write [[prompt.subset]]")
    return [_from_table({**common, **subset}, path) for subset in subsets]


def _read_json(text: str, path: Path) -> list[SamplePrompt]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompt file {path}: {error}", "check its JSON") from error
    if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
        raise UserError(f"prompt file {path} is no list of prompts", "write a list of texts and objects")
    return [sample_prompt(e) if isinstance(e, str) else _from_table(e, path) for e in entries]


def _from_table(table: Mapping[str, Any], path: Path) -> SamplePrompt:
    if not isinstance(table.get("prompt"), str):
        raise UserError(f"prompt file {path}: an entry has no prompt text", 'give each entry a key "prompt"')
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        raise UserError(f"prompt file {path}: unknown key {unknown[0]!r}", f"known are {', '.join(_KEYS)}")
    values = {}
    for key, value in table.items():
        name, types = _KEYS[key]
        if value is None:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            raise UserError(f"prompt file {path}: {key} = {value!r}", f"give it a value of type {types[-1].__name__}")
        values[name] = value
    prompt = SamplePrompt(**values)
    return dataclasses.replace(prompt, steps=max(1, min(1000, prompt.steps)))
