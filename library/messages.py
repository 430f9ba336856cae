"""What the program says: one logger, errors that a user can act on, warnings said once. No torch here.

Only the first process speaks; `set_quiet(True)` silences the others (called by `library.runtime.processes`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

log = logging.getLogger("toolkit")
_said: set[str] = set()

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input: printed as one line that names the thing and the remedy, exit code 1, no traceback."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}: {remedy}" if remedy else problem)


class Interrupted(Exception):
    """The user stopped the run (Ctrl-C, SIGTERM); work was saved, the message says how to go on."""


def set_up(level: str = "INFO", file: str | None = None) -> None:
    """Send messages to standard error (plain lines) and, when given, to a file."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    logging.basicConfig(level=level, format="%(message)s", handlers=handlers, force=True)


def set_quiet(quiet: bool) -> None:
    """Silence this process (every process but the first)."""
    log.disabled = quiet


def warn_once(text: str) -> None:
    """Say a warning the first time it comes up, not again."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


def run(main: Callable[[], None]) -> None:
    """Run a script's main function with the exit codes and error lines of this house."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
