"""Files to and states from Hugging Face repositories."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.messages import UserError, log

if TYPE_CHECKING:
    from library.options.hub import HubConfig


class Uploads:
    """Sends what a run writes to the repository of `--huggingface_repo_id`; without one, every call does nothing.

    A failure is told and the run goes on.

    Args:
        config: repository, folder in it, token, background uploads.
    """

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._running: dict[str, threading.Thread] = {}

    @property
    def wanted(self) -> bool:
        """Whether models are sent."""
        return bool(self.config.huggingface_repo_id)  # front ends write an empty text

    @property
    def states_wanted(self) -> bool:
        """Whether state folders are sent."""
        return self.wanted and self.config.save_state_to_huggingface

    def send(self, path: str | Path, *, last: bool = False, name: str | None = None) -> None:
        """Send a file or folder, under its own name unless another is given.

        With `--async_upload` that happens in the background, except for the last file.
        """
        if self.wanted:
            self._send(Path(path), self.config.async_upload and not last, name)

    def send_state(self, folder: str | Path) -> None:
        """Send a state folder, with `--save_state_to_huggingface`."""
        if self.states_wanted:
            self._send(Path(folder), self.config.async_upload)

    def is_busy(self, path: str | Path) -> bool:
        """Whether this path is being sent and must stay where it is."""
        thread = self._running.get(str(path))
        return thread is not None and thread.is_alive()

    def wait(self) -> None:
        """Wait for everything that is being sent."""
        for thread in self._running.values():
            thread.join()
        self._running.clear()

    def _send(self, path: Path, background: bool, name: str | None = None) -> None:
        config = self.config
        folder = (config.huggingface_path_in_repo or "").rstrip("/")
        destination = "/".join(part for part in (folder, name or path.name) if part)
        _make_repository(config)
        if not background:
            _upload(config, path, destination)
            return
        thread = threading.Thread(target=_upload, args=(config, path, destination), name=f"upload {path.name}")
        self._running[str(path)] = thread
        thread.start()


def exists_repo(repo_id: str, repo_type: str | None, revision: str | None = "main", token: str | None = None) -> bool:
    """Whether the repository can be seen at this revision."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).repo_info(repo_id=repo_id, revision=revision, repo_type=repo_type)
    except Exception:  # not there, not allowed and not reachable look different in every release of the client
        return False
    return True


def list_dir(
    repo_id: str,
    subfolder: str,
    repo_type: str | None,
    revision: str | None = "main",
    token: str | None = None,
) -> list[Any]:
    """The repository's files in a folder, as the hub client describes them (`.rfilename`)."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).repo_info(repo_id=repo_id, revision=revision, repo_type=repo_type)
    prefix = subfolder.rstrip("/") + "/" if subfolder else ""
    return [file for file in info.siblings or () if file.rfilename.startswith(prefix)]


def parse_state_address(text: str) -> tuple[str, str, str | None, str | None]:
    """`USER/REPO/PATH[:REVISION[:TYPE]]` -> (repository, path, revision, type).

    Raises:
        UserError: no user, repository or path in it.
    """
    address, *rest = text.split(":")
    parts = address.strip("/").split("/", 2)
    if len(parts) < 3 or not all(parts) or len(rest) > 2:
        raise UserError(f"--resume {text!r} is no place on the hub", "write USER/REPO/PATH[:REVISION[:TYPE]]")
    revision = rest[0] if rest else None
    repo_type = rest[1] if len(rest) == 2 else "model" if rest else None
    return "/".join(parts[:2]), parts[2], revision, repo_type


def download_state(text: str, token: str | None = None) -> Path:
    """Fetch a state folder for `--resume_from_huggingface`.

    Args:
        text: `--resume` as `parse_state_address` reads it.

    Returns:
        The folder on this machine.

    Raises:
        UserError: repository or folder cannot be found or read.
    """
    from huggingface_hub import hf_hub_download

    repo_id, path, revision, repo_type = parse_state_address(text)
    try:
        names = [file.rfilename for file in list_dir(repo_id, path, repo_type, revision, token)]
        local = [
            Path(hf_hub_download(repo_id=repo_id, filename=name, revision=revision, repo_type=repo_type, token=token))
            for name in names
        ]
    except Exception as error:  # the client's errors share no base class over its releases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the state {text} cannot be fetched ({reason})", "check --resume, --huggingface_token and the network"
        ) from error
    if not local:
        raise UserError(f"there is no folder {path} in {repo_id}", "check --resume")
    inside = len(Path(names[0]).parts) - len(Path(path).parts)
    return local[0].parents[inside - 1]


def _make_repository(config: HubConfig) -> None:
    """Create the repository if it cannot be seen."""
    from huggingface_hub import HfApi

    repo_id, repo_type = config.huggingface_repo_id or "", config.huggingface_repo_type
    if exists_repo(repo_id, repo_type, token=config.huggingface_token):
        return
    try:
        private = config.huggingface_repo_visibility != "public"
        HfApi(token=config.huggingface_token).create_repo(repo_id=repo_id, repo_type=repo_type, private=private)
    except Exception as error:
        log.warning("the repository %s cannot be made: %s", repo_id, error)


def _upload(config: HubConfig, path: Path, destination: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=config.huggingface_token)
    where = {"repo_id": config.huggingface_repo_id, "repo_type": config.huggingface_repo_type}
    try:
        if path.is_dir():
            api.upload_folder(**where, folder_path=str(path), path_in_repo=destination)
        else:
            api.upload_file(**where, path_or_fileobj=str(path), path_in_repo=destination)
    except Exception as error:
        log.warning("%s was not sent to %s: %s", path, config.huggingface_repo_id, error)
