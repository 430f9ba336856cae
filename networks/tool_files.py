"""Network files as the tools see them: opened by their header, read module by module, described by their metadata."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.messages import UserError, log
from library.models.checkpoint import Checkpoint, open_checkpoint
from library.models.modelspec import build_merged_from, build_metadata
from networks import names
from networks.files import kind_of, refuse_foreign_methods

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (down, up) in the last two parts of a key: LoRA files of this kind, of peft, of older diffusers.
PAIRS = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("down", "up"))
SDXL = "a network for SDXL"
OFT = "an OFT network"
PEFT = "a diffusers or peft LoRA"
SD_KINDS = ("a network for SD 1.x", "a network for SD 2.x", "a network for SD 1.x or 2.x")


def dtype_of(precision: str | None) -> torch.dtype | None:
    """`float`, `fp16`, `bf16` -> dtype; None stays."""
    return None if precision is None else PRECISIONS[precision]


@dataclass(frozen=True)
class Pair:
    """Keys of one low-rank module in its file."""

    up: str
    down: str
    alpha: str


@dataclass(frozen=True)
class Module:
    """One low-rank module: up (out, r[, 1, 1]), down (r, in[, kh, kw])."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_conv(self) -> bool:
        """A convolution other than 1x1."""
        return self.down.dim() == 4 and tuple(self.down.shape[2:]) != (1, 1)


def find_pairs(keys: Iterable[str]) -> dict[str, Pair]:
    """Module name -> its keys, in the order in which the `down` keys appear."""
    known = dict.fromkeys(keys)
    pairs = {}
    for key in known:
        parts = key.split(".")
        for i in range(max(1, len(parts) - 2), len(parts)):
            up = next((u for d, u in PAIRS if parts[i] == d), None)
            up_key = ".".join([*parts[:i], up or "", *parts[i + 1 :]])
            if up is not None and up_key in known:
                name = ".".join(parts[:i])
                pairs[name] = Pair(up_key, key, f"{name}.alpha")
    return pairs


class NetworkFile:
    """An opened network file.

    Attributes:
        path, metadata: of the file.
        kind: what its keys say it is, e.g. `a network for SDXL`.
        pairs: module -> keys of its tensors, in the order of the file.
        alphas, ranks: module -> number; a missing alpha is the rank.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path, self.metadata = checkpoint.path, checkpoint.metadata
        self.stubs = {key: torch.empty(info.shape, device="meta") for key, info in checkpoint.tensors.items()}
        self.kind = kind_of(self.stubs)
        self.pairs = find_pairs(checkpoint.tensors)
        self.ranks = {name: checkpoint.tensors[pair.down].shape[0] for name, pair in self.pairs.items()}
        alphas = checkpoint.read([pair.alpha for pair in self.pairs.values() if pair.alpha in checkpoint.tensors])
        self.alphas = {
            name: float(alphas[pair.alpha]) if pair.alpha in alphas else float(self.ranks[name])
            for name, pair in self.pairs.items()
        }
        self._own_names: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The modules under the names that `module` takes."""
        return list(self._own_names) or list(self.pairs)

    def module(self, name: str, device: str | torch.device = "cpu") -> Module | None:
        """The tensors of a module, None where the file has no such module."""
        pair = self.pairs.get(self._own_names.get(name, name))
        if pair is None:
            return None
        tensors = self.checkpoint.read([pair.up, pair.down], device=device)
        return Module(tensors[pair.up], tensors[pair.down], self.alphas[self._own_names.get(name, name)])

    def use_usual_names(self) -> None:
        """Take the modules under the style of names that networks of their family normally have."""
        if self.kind == SDXL:
            self._rename(names.rename_unet(self.stubs, "stability", "sdxl"))
        elif self.kind in SD_KINDS[:2]:
            self._rename(names.rename_unet(self.stubs, "diffusers", "sd"))

    def under_names_of(self, model_names: Iterable[str]) -> list[str]:
        """The file's modules under the names that a model's layers have; `module` takes these from now on."""
        self._rename(names.convert_if_needed(self.stubs, model_names))
        return self.names

    def _rename(self, renamed: Mapping[str, Tensor]) -> None:
        heads = {a.partition(".")[0]: b.partition(".")[0] for a, b in zip(self.stubs, renamed, strict=True)}
        self._own_names = {heads.get(name, name): name for name in self.pairs}


def open_network(path: str | Path, methods: Sequence[str] = ()) -> NetworkFile:
    """Open a file of low-rank modules.

    Args:
        methods: kinds of files without such modules that are taken as well.

    Raises:
        UserError: not there, broken, or of another kind or method (named from its keys).
    """
    file = NetworkFile(open_checkpoint(path))
    if file.kind in methods:
        return file
    refuse_foreign_methods(file.stubs, str(path))
    if file.kind == PEFT:
        raise UserError(f"{path} is {PEFT}", "convert it with convert_lora.py first")
    if file.kind not in (SDXL, *SD_KINDS) and not file.pairs:
        raise UserError(f"{path} is {file.kind}", "give a LoRA file")
    if not file.pairs:
        raise UserError(f"{path} holds no lora_up and lora_down tensors", "give a LoRA file")
    return file


def open_networks(paths: Sequence[str], methods: Sequence[str] = ()) -> list[NetworkFile]:
    """Open files that are to be merged.

    Raises:
        UserError: as `open_network`; or they are for different model families.
    """
    files = [open_network(path, methods) for path in paths]
    for file in files:
        file.use_usual_names()
    for file in files[1:]:
        if not _fit(files[0].kind, file.kind):
            raise UserError(
                f"{files[0].path} is {files[0].kind}, {file.path} is {file.kind}", "merge networks of one family"
            )
    return files


def _fit(a: str, b: str) -> bool:
    return a == b or (a in SD_KINDS and b in SD_KINDS and SD_KINDS[-1] in (a, b))


def refuse_kinds(files: Iterable[NetworkFile], kinds: Sequence[str], remedy: str) -> None:
    """Stop at a file of one of these kinds."""
    for file in files:
        if file.kind in kinds:
            raise UserError(f"{file.path} is {file.kind}", remedy)


def module_names(files: Iterable[NetworkFile]) -> list[str]:
    """Modules of all files, in the order of first appearance."""
    return list(dict.fromkeys(name for file in files for name in file.names))


def check_ratios(models: Sequence[str] | None, ratios: Sequence[float] | None) -> tuple[list[str], list[float]]:
    """`--models` and `--ratios` as lists of one length.

    Raises:
        UserError: they are not.
    """
    models, ratios = list(models or ()), list(ratios or ())
    if not models:
        raise UserError("--models is missing", "give the network files")
    if len(models) != len(ratios):
        raise UserError(f"{len(models)} --models but {len(ratios)} --ratios", "give one ratio for each model")
    return models, ratios


# Metadata


def base_facts(files: Iterable[NetworkFile]) -> tuple[bool | None, str | None]:
    """`ss_v2` and `ss_base_model_version` of the first files that have them."""
    v2 = base = None
    for file in files:
        if v2 is None and "ss_v2" in file.metadata:
            v2 = file.metadata["ss_v2"].lower() == "true"
        base = base or file.metadata.get("ss_base_model_version")
    return v2, base


def minimum_metadata(
    v2: bool | None, base_model: str | None, dim: Any, alpha: Any, network_args: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What other programs need to load a network."""
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(dim), "ss_network_alpha": str(alpha)}
    if v2 is not None:
        metadata["ss_v2"] = str(v2)
    if base_model is not None:
        metadata["ss_base_model_version"] = base_model
    if network_args is not None:
        metadata["ss_network_args"] = json.dumps(network_args)
    return metadata


def common(values: Iterable[Any]) -> Any:
    """The value that all have, or `Dynamic`."""
    different = set(values)
    return different.pop() if len(different) == 1 else "Dynamic"


def modelspec(
    save_to: str, sources: Sequence[str], *, v2: bool, v_parameterization: bool, sdxl: bool, network: bool = True
) -> dict[str, str]:
    """The `modelspec.*` texts of a merged or extracted file; its title is the file's name."""
    return build_metadata(
        None,
        v2,
        v_parameterization,
        sdxl,
        network,
        False,
        time.time(),
        title=Path(save_to).stem,
        is_stable_diffusion_ckpt=None if network else True,
        merged_from=build_merged_from(sources) if sources else None,
    )


def say_error(relative: float, against: str) -> None:
    """Tell the measured error of a result."""
    log.info("error: %.3g %% of %s", 100 * relative, against)


def first_few(things: Sequence[str], count: int = 3) -> str:
    """A list shortened for a message."""
    return ", ".join(things[:count]) + (", ..." if len(things) > count else "")


def iterate_state(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Module]]:
    """(name, module) of every low-rank module in a state dict."""
    for name, pair in find_pairs(state).items():
        up, down = state[pair.up], state[pair.down]
        alpha = float(state[pair.alpha]) if pair.alpha in state else float(down.shape[0])
        yield name, Module(up, down, alpha)
