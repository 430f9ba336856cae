"""What the replays of recorded runs on tiny models share: the recorded data, the weights by rule, the comparisons."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.data.plan import EpochPlan, PlannedBatch
from library.models.dimensions import TextDimensions
from library.models.text_encoders import empty_text_encoder, exchanged_key, restore_buffers, text_config
from library.models.unet_config import SdxlUNetConfig, UNetConfig
from library.models.unet_sd import from_config
from library.models.unet_sdxl import from_config as sdxl_from_config
from library.train_util import MinimalDataset
from library.training.draws import Draws, Place

UNET = UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=64)
# The recorded SDXL runs have the frequencies of 0.7.0.
SDXL_UNET = SdxlUNetConfig(
    block_out_channels=(32, 64, 128),
    transformer_layers_per_block=1,
    attention_head_dim=(1, 1, 2),
    cross_attention_dim=128,
    projection_class_embeddings_input_dim=64 + 1536,
    freq_shift=1.0,
)
SDXL_TEXTS = (
    (TextDimensions(64, 12, 128), "CLIPTextModel"),
    (TextDimensions(64, 12, 128, activation="gelu", projection=64), "CLIPTextModelWithProjection"),
)


def fill_by_rule(module: nn.Module, name_of: Any = str) -> None:
    """Every parameter from a generator seeded with its name."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            name = name_of(key)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values + (parameter.dim() == 1 and name.endswith("weight")))


def tiny_encoder(dimensions: TextDimensions = SDXL_TEXTS[0][0], class_name: str = "CLIPTextModel") -> nn.Module:
    encoder = empty_text_encoder(text_config(dimensions, class_name)).to_empty(device="cpu")
    restore_buffers(encoder, "cpu")
    fill_by_rule(encoder, exchanged_key)
    return encoder


def tiny_models(sdxl: bool) -> tuple[list[nn.Module], Any, nn.Module]:
    """(text encoders, VAE, U-Net)."""
    from diffusers import AutoencoderKL

    unet = sdxl_from_config(SDXL_UNET) if sdxl else from_config(UNET)
    fill_by_rule(unet)
    encoders = [tiny_encoder(*facts) for facts in SDXL_TEXTS] if sdxl else [tiny_encoder()]
    return encoders, AutoencoderKL(block_out_channels=(32,)), unet


class Recorded:
    """A recorded run: what goes in, and what came out."""

    def __init__(self, folder: Path, name: str) -> None:
        self.data = json.loads((folder / f"training_replay_{name}.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / f"training_replay_{name}.safetensors")
        self.steps: list[dict[str, Any]] = self.data["micro_steps"]
        ends = [index for index, entry in enumerate(self.data["logs"]) if "loss/epoch" in entry.get("log", {})]
        self.epoch = ends[0]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def micro_of(self, place: Place) -> int:
        return (place.epoch - 1) * self.epoch + place.micro

    def batch(self, micro: int) -> dict[str, Any]:
        names = ("latents", "input_ids", "input_ids2", "loss_weights")
        names += ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
        values = {name: self.tensors.get(f"{micro}.{name}") for name in names}
        return {**values, "images": None, "captions": self.steps[micro]["captions"]}

    def argv(self, folder: Path) -> list[str]:
        """The recorded command line, with a data set that gives the recorded batches."""
        argv = [argument for argument in self.data["argv"] if argument != "--cache_latents"]
        given = {"--output_dir": str(folder / "out")}
        for flag in ("--output_dir", "--logging_dir", "--train_data_dir", "--reg_data_dir", "--in_json"):
            if flag in argv:
                place = argv.index(flag)
                argv[place : place + 2] = [flag, given[flag]] if flag in given else []
        return [*argv, "--dataset_class", "recorded_run.Batches"]

    def dataset_class(self) -> type:
        """A data set that gives the recorded batches, with its text encoded where the run cached it."""
        recorded = self

        class Batches(MinimalDataset):
            encoded: dict[str, list[torch.Tensor]] | None = None

            def __len__(self) -> int:
                return recorded.epoch

            def __getitem__(self, index: int) -> dict[str, Any]:
                batch = recorded.batch((self.current_epoch - 1) * recorded.epoch + index)
                if self.encoded is None:
                    return batch
                rows = zip(*(self.encoded[caption] for caption in batch["captions"]), strict=True)
                names = ("text_encoder_outputs1_list", "text_encoder_outputs2_list", "text_encoder_pool2_list")
                return batch | {name: torch.stack(row) for name, row in zip(names, rows, strict=True)}

            def is_text_encoder_output_cacheable(self) -> bool:
                return True

            def cache_text_encoder_outputs(
                self, tokenizers: Any, encoders: Any, device: Any, dtype: Any, *_: Any
            ) -> None:
                from library.models.family import family

                self.encoded = {}
                for caption, ids in recorded.data["caption_ids"].items():
                    with torch.no_grad():
                        rows = [torch.tensor(row)[None, None] for row in ids]
                        text = family("sdxl").encode_text(encoders, rows, tokenizers=tokenizers, dtype=dtype)
                    self.encoded[caption] = [text.hidden[0][0], text.hidden[1][0], text.pooled[0]]

        return Batches


class RecordedDraws(Draws):
    def __init__(self, recorded: Recorded) -> None:
        super().__init__(0, torch.device("cpu"))
        self.recorded = recorded

    def noise(self, place: Place, latents: torch.Tensor, config: Any) -> torch.Tensor:
        return self.recorded[f"{self.recorded.micro_of(place)}.noise"]

    def timesteps(self, place: Place, count: int, config: Any) -> torch.Tensor:
        return torch.tensor(self.recorded.steps[self.recorded.micro_of(place)]["timesteps"])


class Watch:
    """Gives a run the recorded order of batches and keeps what it logs and the gradient norms."""

    def __init__(self, run: Any, recorded: Recorded) -> None:
        batches = tuple(PlannedBatch(0, (0, 0), (index,), (0,)) for index in range(recorded.epoch))
        run.feed.plan = lambda epoch: EpochPlan(epoch=epoch, seed=0, batches=(batches,))
        self.logs: list[tuple[dict[str, Any], int]] = []
        self.norms: list[float] = []
        run.log.log_to = lambda values, step: self.logs.append((values, step))
        watch = run.guard.watch
        run.guard.watch = lambda losses, norm, **rest: (self.norms.append(norm.item()), watch(losses, norm, **rest))[1]

    def compare(self, recorded: Recorded, *, epoch_losses: bool = True) -> None:
        norms = [step["grad_norm"] for step in recorded.steps if "grad_norm" in step]
        assert self.norms == pytest.approx(norms, rel=1e-4)
        entries = [entry for entry in recorded.data["logs"] if "log" in entry]
        assert [step for _, step in self.logs] == [entry["step"] for entry in entries]
        for (values, _), entry in zip(self.logs, entries, strict=True):
            compare_values(values, entry["log"], epoch_losses)


def compare_values(ours: dict[str, Any], recorded: dict[str, Any], epoch_losses: bool) -> None:
    """Every recorded value; the count of scaled keys may differ by a few that lie at the limit."""
    assert recorded.keys() <= ours.keys()
    for key, wanted in recorded.items():
        if key == "loss/epoch" and not epoch_losses:
            continue
        tolerance = {"abs": 25} if key.endswith("keys_scaled") else {"rel": 1e-5, "abs": 1e-9}
        assert ours[key] == pytest.approx(wanted, **tolerance), key


def compare_weights(ours: dict[str, torch.Tensor], recorded: dict[str, list[float]]) -> None:
    """Sum and L2 norm of every recorded parameter."""
    assert recorded.keys() <= ours.keys()
    for name, (total, norm) in recorded.items():
        values = ours[name].detach().double()
        assert values.norm().item() == pytest.approx(norm, rel=1e-4), name
        assert values.sum().item() == pytest.approx(total, rel=1e-4, abs=1e-4), name
