"""Uploads to and states from a model hub."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Uploads to and states from a model hub."""

    huggingface_repo_id: str | None = option(None, "")
    huggingface_repo_type: str | None = option(None, "")
    huggingface_path_in_repo: str | None = option(None, "")
    huggingface_token: str | None = option(None, "")
    huggingface_repo_visibility: str | None = option(None, "")
    save_state_to_huggingface: bool = option(False, "")
    resume_from_huggingface: bool = option(False, "")
    async_upload: bool = option(False, "")
