"""diffusers folders: finding them (on disk or on the hub), their configs, their weight files."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from library.messages import UserError
from library.models.checkpoint import Checkpoint, JoinedCheckpoint, open_checkpoint

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".bf16", ".ema", ".non_ema")
_SUFFIXES = (".safetensors", ".bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "give a complete model folder") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON", "copy or download the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read as JSON", "copy or download the folder again")
    return content


def resolve_folder(source: str | Path, *, parts: Sequence[str], what: str) -> Path:
    """A local model folder: `source` itself, or the hub repository of that name in the local cache.

    Args:
        source: folder or hub id.
        parts: subfolders that are needed.
        what: for messages.

    Raises:
        UserError: neither a path nor a repository that can be had.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = source.as_posix() if isinstance(source, Path) else source
    looks_like_hub_id = (
        text.count("/") == 1 and not path.is_absolute() and not text.startswith(".") and "\\" not in text
    )
    if not looks_like_hub_id or path.suffix in (".safetensors", ".ckpt", ".pt"):
        raise UserError(f"{what} {source} does not exist", "check the path")
    return _download(text, parts, what)


def _download(repository: str, parts: Sequence[str], what: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            files = set(HfApi().list_repo_files(repository))
        except Exception as unreachable:  # no network: what an earlier download left in the cache is good enough
            try:
                return Path(snapshot_download(repository, local_files_only=True))
            except Exception:
                raise unreachable from None
        wanted = {name for name in files if name.endswith(".json") and name.count("/") <= 1}
        for prefix in ("", *(f"{part}/" for part in parts)):
            chosen = choose_weights({n.removeprefix(prefix) for n in files if n.startswith(prefix)})
            shards = chosen and chosen.endswith(".json") and {n for n in files if n.startswith(prefix) and "-of-" in n}
            if chosen and (prefix or "config.json" in files):
                wanted |= shards or {prefix + chosen}
        return Path(snapshot_download(repository, allow_patterns=sorted(wanted)))
    except Exception as error:  # the hub library's errors differ between versions
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{what} {repository} is neither on this disk nor to be had from the hub ({reason})", "check the name"
        ) from error


def choose_weights(names: Container[str]) -> str | None:
    """The best weight file of a part among these: safetensors before pickles, full precision before variants."""
    for suffix in _SUFFIXES:
        for variant in _VARIANTS:
            for stem in _STEMS:
                for name in (f"{stem}{variant}{suffix}", f"{stem}{suffix}.index{variant}.json"):
                    if name in names:
                        return name
    return None


def open_part(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Config and weights of one part (`unet`, `vae`, `text_encoder`).

    Raises:
        UserError: the folder, its config.json or its weights are missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"the model folder {folder.parent} has no subfolder {folder.name}", "give a complete model folder"
        )
    config = read_json(folder / "config.json")
    name = choose_weights({file.name for file in folder.iterdir()})
    if name is None:
        raise UserError(f"{folder} has no weight file", "give a complete model folder")
    path = folder / name
    if path.suffix != ".json":
        return config, open_checkpoint(path)
    names = sorted(set(read_json(path).get("weight_map", {}).values()))
    return config, JoinedCheckpoint(path, [open_checkpoint(folder / name) for name in names])
