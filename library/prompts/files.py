"""Prompt files of the picture scripts: one prompt line a line."""

from __future__ import annotations

from pathlib import Path

from library.messages import UserError


def read_prompt_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank, kept as they are; a byte order mark does not count.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read ({error.strerror})", "check --from_file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 ({error.reason})", "save it as UTF-8") from error
    return [line for line in text.splitlines() if line.strip()]
