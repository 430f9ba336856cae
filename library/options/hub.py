"""Uploads to and states from a model hub."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Uploads to and states from a model hub."""

    huggingface_repo_id: str | None = option(None, "Hugging Face repository that gets every written file, as USER/NAME")
    huggingface_repo_type: str | None = option(None, "type of the repository: model, dataset or space")
    huggingface_path_in_repo: str | None = option(None, "folder in the repository")
    huggingface_token: str | None = option(
        None, "Hugging Face token; `huggingface-cli login` keeps it out of the command line"
    )
    huggingface_repo_visibility: str | None = option(None, "public for a public repository; private when left out")
    save_state_to_huggingface: bool = option(False, "send the states too; needs --huggingface_repo_id")
    resume_from_huggingface: bool = option(False, "read --resume as USER/REPO/PATH[:REVISION[:TYPE]] on Hugging Face")
    async_upload: bool = option(False, "send files in the background, except the last")
