"""Models from one layout to another: checkpoint file or diffusers folder, either way, in any number format."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from library.messages import UserError, log
from library.models.checkpoint import Checkpoint, is_safetensors_name, open_checkpoint
from library.models.dimensions import KIND_NAMES, Kind, kind_of
from library.models.family import LoadedModel, family
from library.models.folders import open_part, read_json, resolve_folder
from library.models.loading import (
    MODEL_FOLDER_FILES,
    Told,
    name_the_file,
    refuse_no_model_folder,
    told_by_file,
    told_by_folder,
)
from library.models.merging import PRECISIONS
from library.models.modelspec import build_metadata
from library.models.saving import HASH_KEY, SPEC_KEY
from library.models.sd_loading import folder_kind
from library.options.model_tools import ModelConvertConfig
from library.runtime.files import atomic_write

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True)
class Source:
    """What a conversion starts from, seen without reading a tensor.

    Attributes:
        path: file or local folder.
        is_file: a checkpoint in Stability layout.
        kind: `sd1`, `sd2` or `sdxl`.
        told: what it says about its prediction.
        dtype: the number format of all its floating tensors; None when they differ.
        metadata: of a safetensors file.
    """

    path: Path
    is_file: bool
    kind: Kind
    told: Told
    dtype: torch.dtype | None
    metadata: dict[str, str]

    @property
    def is_v(self) -> bool:
        """Whether it predicts velocity; SD 2.x that does not say so is taken for the published 768 pixel model."""
        if self.told.prediction_type is None:
            return self.kind == "sd2"
        return self.told.prediction_type == "v_prediction"


def convert_model(options: ModelConvertConfig) -> None:
    """`convert_diffusers20_original_sd.py`.

    Raises:
        UserError: contradicting options, a source that is not there or of another family, a target that is the source.
    """
    texts = parse_metadata(options.metadata)
    if texts and not is_safetensors_name(options.model_to_save):
        raise UserError(f"--metadata has no place in {options.model_to_save}", "save to a .safetensors file")
    source_path = find_source(options.model_to_load)
    if Path(options.model_to_save).exists() and Path(options.model_to_save).resolve() == source_path.resolve():
        raise UserError(f"{options.model_to_save} is the source itself", "give another name to save to")
    with chosen_variant(source_path, options.variant) as path:
        source = describe_source(path)
        refuse_other_kind(source, options)
        model = load_source(source, save_dtype(options) or source.dtype or torch.float32)
        _save(model, source, options, texts)


# What the options say


def is_file_name(name: str) -> bool:
    """Whether a target is a checkpoint file: it ends in one of their suffixes. Other names are folders."""
    return Path(name).suffix.lower() in FILE_SUFFIXES


def save_dtype(options: ModelConvertConfig) -> torch.dtype | None:
    """The number format asked for: fp16 wins over bf16, bf16 over float; None keeps the source's."""
    for name in ("fp16", "bf16", "float"):
        if getattr(options, name) or options.save_precision_as == name:
            return PRECISIONS[name]
    return None


def parse_metadata(text: str | None) -> dict[str, str]:
    """`--metadata`: a JSON object or the text of a Python dictionary; nothing in it is run.

    Raises:
        UserError: it is neither.
    """
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise UserError(f"--metadata {text} is no table of texts", 'give a JSON object like {"author": "me"}')
    return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in content.items()}


def refuse_other_kind(source: Source, options: ModelConvertConfig) -> None:
    """Stop where `--v1` or `--v2` contradict the tensors; with neither, or both for a folder, these decide.

    Raises:
        UserError: they do.
    """
    if options.v1 and options.v2:
        if source.is_file:
            raise UserError("--v1 and --v2 are given", "leave one out, or both: the model is seen from its tensors")
        return
    said = "--v1" if options.v1 else "--v2" if options.v2 else None
    fits = {"--v1": "sd1", "--v2": "sd2"}
    if said and fits[said] != source.kind:
        raise UserError(
            f"{source.path} is a model of {KIND_NAMES[source.kind]}, but {said} is given", f"leave out {said}"
        )


# The source


def find_source(name: str) -> Path:
    """The file or folder to read; what looks like no file is a folder or a Hugging Face name.

    Raises:
        UserError: it is neither here nor on the hub.
    """
    path = Path(name)
    if path.is_file():
        return path
    if is_file_name(name) and not path.is_dir():
        raise UserError(f"model file {name} does not exist", "check the path")
    return resolve_folder(name, parts=(*PARTS, "scheduler", "tokenizer", "tokenizer_2"), what="model")


@contextlib.contextmanager
def chosen_variant(folder: Path, variant: str | None) -> Iterator[Path]:
    """A folder in which each part has the weights of one variant alone; without a variant the folder itself.

    Raises:
        UserError: a part has no such weights, or the source is a file.
    """
    if not variant:
        yield folder
        return
    if folder.is_file():
        raise UserError(f"--variant {variant} is for diffusers folders, {folder} is a file", "leave it out")
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    others = [folder / name for name in (*MODEL_FOLDER_FILES, "tokenizer_2")]
    chosen = [folder.glob("*.json"), *(other.glob("*") for other in others)]
    for part in parts:
        weights = list(part.glob(f"*.{variant}.*"))
        if not weights:
            raise UserError(f"{part} has no weights of --variant {variant}", "leave out --variant")
        chosen += [weights, part.glob("config.json")]
    with tempfile.TemporaryDirectory() as name:
        for file in (file for files in chosen for file in files):
            _link(file, Path(name) / file.relative_to(folder))
        yield Path(name)


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(file.resolve())
    except OSError:  # Windows allows links to few users
        shutil.copy(file, target)


def describe_source(path: Path) -> Source:
    """See a model's family, number format and prediction type.

    Raises:
        UserError: no supported model.
    """
    if path.is_file():
        checkpoint = open_checkpoint(path)
        try:
            kind = kind_of({key: info.shape for key, info in checkpoint.tensors.items()})
        except UserError as error:
            raise name_the_file(path, error) from error
        return Source(path, True, kind, told_by_file(checkpoint), common_dtype(checkpoint), checkpoint.metadata)
    refuse_no_model_folder(path)
    kind = folder_kind(path, open_part(path / "unet")[0], open_part(path / "text_encoder")[0])
    opened = [open_part(path / part)[1] for part in PARTS if (path / part).is_dir()]
    return Source(path, False, kind, told_by_folder(path), common_dtype(*opened), {})


def common_dtype(*files: Checkpoint) -> torch.dtype | None:
    """The number format of all floating tensors (marks without values aside), None when they differ."""
    infos = (info for file in files for info in file.tensors.values())
    formats = {info.dtype for info in infos if info.dtype.is_floating_point and info.size}
    return formats.pop() if len(formats) == 1 else None


def load_source(source: Source, dtype: torch.dtype) -> LoadedModel:
    """The model in the number format in which it will be written."""
    what = f"{KIND_NAMES[source.kind]}, {'v-prediction' if source.is_v else 'epsilon'}"
    log.info("%s: %s", source.path, what)
    if source.told.prediction_type is None and source.kind == "sd2":
        log.info("it does not say how it predicts; v-prediction is written, as in the published 768 pixel model")
    return family("sdxl" if source.kind == "sdxl" else "sd").load(
        source.path, v2=source.kind == "sd2", v_parameterization=source.is_v, dtype=dtype
    )


# The target


def _save(model: LoadedModel, source: Source, options: ModelConvertConfig, texts: dict[str, str]) -> None:
    target = Path(options.model_to_save)
    owner, dtype = family("sdxl" if source.kind == "sdxl" else "sd"), save_dtype(options)
    if is_file_name(options.model_to_save):
        safetensors = is_safetensors_name(target)
        owner.save(
            model,
            target,
            stability_layout=True,
            safetensors=safetensors,
            dtype=dtype,
            metadata=file_metadata(source, target.stem) | texts if safetensors else None,
            epoch=options.epoch,
            step=options.global_step,
        )
    else:
        reference = reference_folder(options.reference_model)
        if reference is not None:
            model.extras["folder"] = str(reference)
        owner.save(model, target, stability_layout=False, safetensors=options.use_safetensors, dtype=dtype)
        if reference is not None or not source.is_file:
            copy_scheduler(reference or source.path, target)
    log.info("%s is written as %s", target, str(next(model.unet.parameters()).dtype).removeprefix("torch."))


def file_metadata(source: Source, title: str) -> dict[str, str]:
    """A file's own ModelSpec texts, or new ones by what was seen of it."""
    if SPEC_KEY in source.metadata:
        return {key: value for key, value in source.metadata.items() if key != HASH_KEY}
    is_v2, is_sdxl = source.kind == "sd2", source.kind == "sdxl"
    return source.metadata | build_metadata(None, is_v2, source.is_v, is_sdxl, False, False, time.time(), title=title)


def reference_folder(name: str | None) -> Path | None:
    """The folder that gives tokenizer and scheduler.

    Raises:
        UserError: it is not there, or gives neither.
    """
    if not name:
        return None
    folder = resolve_folder(name, parts=("tokenizer", "tokenizer_2", "scheduler"), what="reference model")
    if not any((folder / part).is_dir() for part in MODEL_FOLDER_FILES):
        raise UserError(f"--reference_model {name} has neither tokenizer nor scheduler", "give a diffusers folder")
    return folder


def copy_scheduler(folder: Path, target: Path) -> None:
    """Give a new folder the scheduler of another one, if that has any."""
    if not (folder / SCHEDULER_FILE).is_file():
        return
    config, index = read_json(folder / SCHEDULER_FILE), read_json(target / "model_index.json")
    index["scheduler"] = ["diffusers", config.get("_class_name", index["scheduler"][1])]
    for path, content in ((target / SCHEDULER_FILE, config), (target / "model_index.json", index)):
        with atomic_write(path, "w") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
