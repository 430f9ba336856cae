"""Writes `docs/options.md`: `python -m library.options.docs > docs/options.md`."""

from __future__ import annotations

from library.messages import write
from library.options.additions import LATER, OWN
from library.options.declare import Option
from library.options.registries import LOSSES, NETWORKS, OPTIMIZERS, SAMPLERS, SCHEDULES
from library.options.schema import json_type
from library.options.scripts import CONCERNS, SCRIPTS

_HEAD = """# Options

Written by `python -m library.options.docs > docs/options.md`; change the texts in `library/options/`.

Every option can stand in a TOML file given with `--config_file` (training scripts), under the same name without
`--`; the command line wins. Marks: **+** is not in sd-scripts 0.7.0 but in a later release, **++** is only here."""


def page() -> str:
    """The whole page."""
    parts = [_HEAD, _scripts(), *(_concern(name) for name in CONCERNS), *_registries()]
    return "\n\n".join(parts)


def _scripts() -> str:
    lines = ["| script | groups of options | must be given |", "|---|---|---|"]
    for name, script in SCRIPTS.items():
        groups = ", ".join(f"[{c.replace('_', ' ')}](#{c.replace('_', '-')})" for c in script.concerns)
        flags = {option.dest: option.flag for option in script.options()}
        required = ", ".join(f"`{flags[r]}`" for r in script.required)
        lines.append(f"| `{name}` | {groups} | {required} |")
    return "\n".join(lines)


def _concern(concern: str) -> str:
    users = [script for script in SCRIPTS.values() if concern in script.concerns]
    options: dict[str, Option] = {}
    for script in users:
        for option in dict(script.groups())[concern]:
            options.setdefault(option.dest, option)
    lines = [
        f"## {concern.replace('_', ' ')}",
        "",
        (CONCERNS[concern].__doc__ or "").split("\n")[0],
        "",
        "| option | value | default | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(option) for option in options.values())])


def _row(option: Option) -> str:
    mark = " **++**" if option.dest in OWN else " **+**" if option.dest in LATER else ""
    default = "" if option.default in (None, "", False) else f"`{option.default}`"
    return f"| `{option.flag}`{mark} | {_value(option)} | {default} | {_escape(option.help)} |"


def _value(option: Option) -> str:
    if option.is_flag:
        return "flag"
    if option.choices:
        return ", ".join(f"`{c}`" for c in option.choices if c is not None)
    kind = json_type(option)
    name = kind.get("items", kind)["type"]
    text = "number of steps or share" if isinstance(name, list) else name
    return f"several: {text}" if option.nargs else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _registries() -> list[str]:
    return [
        _table(
            "Optimizers (`--optimizer_type`)",
            ("name", "package", ""),
            [(", ".join((r.name, *r.aliases)), r.package or "", r.note) for r in OPTIMIZERS],
        ),
        _table(
            "Schedules (`--lr_scheduler`)",
            ("name", "factor of the rate after the warm-up", ""),
            [(r.name, r.formula, r.note) for r in SCHEDULES],
        ),
        _table(
            "Samplers (`--sampler`, `--sample_sampler`)",
            ("name", "U-Net calls for N steps", ""),
            [(", ".join((r.name, *r.aliases)), r.calls, r.note) for r in SAMPLERS],
        ),
        _table("Losses (`--loss_type`)", ("name", "loss of one value"), [(r.name, r.formula) for r in LOSSES]),
        _table(
            "Network modules (`--network_module`)",
            ("name", "package", "arguments", ""),
            [(r.name, r.package or "", ", ".join(r.arguments), r.note) for r in NETWORKS],
        ),
    ]


def _table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([f"`{row[0]}`", *map(_escape, row[1:])]) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    write(page())
