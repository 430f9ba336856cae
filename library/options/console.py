"""What the console shows."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsoleConfig:
    """What the console shows."""

    console_log_level: str | None = option(
        None,
        "least important messages that are shown: DEBUG, INFO, WARNING, ERROR or CRITICAL; INFO when left out",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(None, "file that gets the messages too")
    console_log_simple: bool = option(False, "plain lines without progress bars")
    dump_schema: bool = option(False, "write a JSON schema of the options to standard output and exit")
