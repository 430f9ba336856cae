"""The options themselves, in a file."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFileConfig:
    """The options themselves, in a file."""

    config_file: str | None = option(None, "")
    output_config: bool = option(False, "")
