"""Replays a recorded run of the picture script or of sample pictures: the recorded command line goes through the real
script, and every recorded quantity is compared (format: tests/reference/generation/README.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from library.generation import passes
from library.generation.command import open_engine, prompt_lines, size_condition
from library.generation.engine import Engine
from library.generation.request import ImageRequest
from library.generation.sampling import sample_name, sample_prompt
from library.generation.session import Session
from library.models.family import Family, TextCondition, family
from library.models.sdxl import size_vector
from library.models.unet_config import SIZE_EMBED_DIM
from library.options.parser import build_parser, resolve
from library.prompts.chunks import padded_ids

# tests/reference/generation/README.md: 1e-5 for a call that is fed with the recorded input, 1e-4 over a whole run
WHOLE_RUN = 1e-4
LIMITS = {"prediction": 1e-5, "start_latents": 1e-5, "timesteps": 1e-6, "vector": 1e-5}
# A run whose own text is off by roundings alone, where these grow beyond the limit of a run from the recorded text.
LIMITS["final_latents_from_own_text"] = 1e-3
# what the roundings of all layers together amount to, relative to the largest input
ROUNDING = 1e-6
# What stands between the recorded time stamp and the end of a sample's name: step, place, seed.
SAMPLE_STEP = 12


@dataclass
class Report:
    """Largest error per quantity, relative to the quantity's largest value, and everything that is simply different."""

    case: str
    errors: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def compare(self, quantity: str, ours: torch.Tensor, recorded: torch.Tensor) -> None:
        if ours.shape != recorded.shape:
            self.faults.append(f"{quantity}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            return
        ours, recorded = ours.detach().double().cpu(), recorded.double()
        error = (ours - recorded).abs().max() / recorded.abs().max().clamp(min=1e-12)
        self.errors[quantity] = max(self.errors.get(quantity, 0.0), error.item())

    @property
    def passed(self) -> bool:
        return not self.faults and all(error <= LIMITS.get(name, WHOLE_RUN) for name, error in self.errors.items())

    def line(self) -> str:
        errors = "  ".join(f"{name} {error:.1e}" for name, error in sorted(self.errors.items()))
        faults = "".join(f"\n     {fault}" for fault in self.faults)
        return f"{'ok  ' if self.passed else 'FAIL'} {self.case}: {errors}{faults}"


class WatchedFamily:
    """A family that keeps the inputs of every call of the U-Net."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.inputs: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def predict(self, unet: Any, latents: torch.Tensor, timesteps: torch.Tensor, *rest: Any, **more: Any) -> Any:
        self.inputs.append(latents)
        self.timesteps.append(timesteps[0].double())
        return self._own.predict(unet, latents, timesteps, *rest, **more)


class WatchedEngine(Engine):
    """The engine, comparing what passes through it."""

    trace: dict[str, torch.Tensor]
    report: Report
    given_text: TextCondition | None = None

    def latents(self, requests: Sequence[ImageRequest], on_step: Any = None, text: Any = None) -> torch.Tensor:
        trace, report = self.trace, self.report
        self.networks.prepare_batch(requests[0].network_multipliers)
        text = self.given_text or self.encode(requests)
        report.compare("context", torch.cat(text.hidden, dim=-1), trace["context"])
        if text.pooled is not None:
            sizes = size_vector(self._sizes(requests), text.pooled.device)
            report.compare("vector", torch.cat([text.pooled, sizes], dim=-1), trace["vector"])
        self._compare_tokens(requests)
        self._compare_predictions(requests)
        latents, errors = self._compare_run(requests, text)
        if errors["final_latents"] > WHOLE_RUN:
            report.errors["final_latents_from_own_text"] = errors["final_latents"]
            latents, errors = self._compare_run(requests, recorded_text(trace))
        report.errors |= {name: max(error, report.errors.get(name, 0.0)) for name, error in errors.items()}
        return latents

    def _compare_run(self, requests: Sequence[ImageRequest], text: TextCondition) -> tuple[Any, dict[str, float]]:
        trace, part = self.trace, Report("")
        own, self.family = self.family, WatchedFamily(self.family)
        steps: list[torch.Tensor] = []
        latents = super().latents(requests, lambda index, timestep, x: steps.append(x), text)
        part.compare("model_input", torch.stack(self.family.inputs)[:, : len(requests)], trace["model_input"])
        part.compare("timesteps", torch.stack(self.family.timesteps), trace["timesteps"])
        part.compare("latents", torch.stack(steps), trace["latents"])
        part.compare("final_latents", latents, trace["final_latents"])
        self.report.faults += part.faults
        self.family = own
        return latents, part.errors

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = super().decode(latents)
        if "decoded" in self.trace:
            self.report.compare("decoded", images, self.trace["decoded"])
        if "image" in self.trace:
            ours = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            self.report.compare("image", ours, self.trace["image"])
        return images

    def _compare_tokens(self, requests: Sequence[ImageRequest]) -> None:
        if "tokens.0" not in self.trace:
            return
        from library.generation.text import special_ids

        count = self.reader.chunk_count([text for r in requests for text in (r.prompt, r.negative_prompt)])
        for encoder, tokenizer in enumerate(self.reader.tokenizers):
            tokens = [self.reader.tokens(request.prompt)[encoder].ids for request in requests]
            rows = [padded_ids(ids, special_ids(tokenizer), count) for ids in tokens]
            if rows != self.trace[f"tokens.{encoder}"].tolist():
                self.report.faults.append(f"token ids of encoder {encoder} differ")

    @torch.no_grad()
    def _compare_predictions(self, requests: Sequence[ImageRequest]) -> None:
        """Each call of the U-Net alone, fed with its recorded input.

        A call that roundings of its input move as far is told apart: the original's own runs of one case with an
        applied and with a merged network differ there by 1.5e-4.
        """
        trace = self.trace
        text, sizes = recorded_text(trace), self._sizes(requests)
        parts = len(trace["context"]) // len(requests)
        largest = trace["model_output"].abs().max()

        def call(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            rows = torch.cat([x] * parts)
            return self.family.predict(self.model.unet, rows, timestep.expand(len(rows)), text, sizes)

        for x, timestep, output in zip(trace["model_input"], trace["timesteps"], trace["model_output"], strict=True):
            ours = call(x, timestep)
            error = float((ours - output).abs().max() / largest)
            quantity = "prediction"
            if error > LIMITS[quantity]:
                rounded = [x + ROUNDING * x.abs().max() * noise for noise in noises(x.shape)]
                moved = max((call(other, timestep) - ours).abs().max() for other in rounded)
                if moved / largest >= error:
                    quantity = "prediction_ill_conditioned"
            self.report.errors[quantity] = max(self.report.errors.get(quantity, 0.0), error)


def recorded_text(trace: dict[str, torch.Tensor]) -> TextCondition:
    """The recorded text states; the encoders' are already joined, and SDXL's vector begins with the pooled text."""
    pooled = trace["vector"][:, : -6 * SIZE_EMBED_DIM] if "vector" in trace else None
    return TextCondition([trace["context"]], pooled)


def noises(shape: torch.Size) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def watch(engine: Engine, trace: dict[str, torch.Tensor], report: Report) -> WatchedEngine:
    engine.__class__ = WatchedEngine
    assert isinstance(engine, WatchedEngine)
    engine.trace, engine.report = trace, report
    return engine


class watched_noise:
    """Compares the start latents inside the block.

    `sample`: they were recorded after the sampler's factor, and without the draws that the picture scripts drop
    between the start and the sampler's noise (samples here drop them as the scripts do).
    """

    def __init__(self, trace: dict[str, torch.Tensor], report: Report, *, sample: bool) -> None:
        self.trace, self.report, self.sample = trace, report, sample

    def __enter__(self) -> None:
        self.original = passes.start_noise

        def start_noise(*arguments: Any, sampler: str, steps: int) -> torch.Tensor:
            noise = self.original(*arguments, sampler=sampler, steps=0 if self.sample else steps)
            factor = passes.make_sampler(sampler).init_noise_sigma if self.sample else 1.0
            self.report.compare("start_latents", noise * factor, self.trace["start_latents"])
            return noise

        passes.start_noise = start_noise

    def __exit__(self, *_: object) -> None:
        passes.start_noise = self.original


def replay_case(folder: Path, model: Path, scratch: Path) -> Report:
    """Run one recorded case.

    Args:
        folder: with case.json and tensors.safetensors; the folder `data` is beside it.
        model: the unpacked model file.
        scratch: an empty folder to work in.
    """
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    trace = load_file(folder / "tensors.safetensors")
    report = Report(case["name"])
    is_sample = "argv" not in case
    with watched_noise(trace, report, sample=is_sample):
        if is_sample:
            draw_sample(case, trace, report, model)
        else:
            draw_command(case, trace, report, folder.parent / "data", model, scratch)
    return report


def draw_command(
    case: dict[str, Any], trace: dict[str, torch.Tensor], report: Report, data: Path, model: Path, scratch: Path
) -> None:
    argv = [argument.replace("DATA/", f"{data}/") for argument in case["argv"]]
    outdir = scratch / "pictures"
    script = case["script"]
    args = build_parser(script).parse_args([*argv, "--ckpt", str(model), "--outdir", str(outdir)])
    options = resolve(args, script)
    engine = watch(open_engine(family_of(case), options.image_model, options.image), trace, report)
    Session(options.image, engine, prompt_lines(options.image), sizes=size_condition(options)).run()
    compare_files(case, outdir, report)


def family_of(case: dict[str, Any]) -> Family:
    return family("sdxl" if case["family"] == "sdxl" else "sd")


def draw_sample(case: dict[str, Any], trace: dict[str, torch.Tensor], report: Report, model: Path) -> None:
    """A sample picture, from its recorded context: its text was read by other rules than ours."""
    own = family_of(case)
    loaded = own.load(model, v2=case["family"] == "sd21", v_parameterization=case["v_parameterization"])
    engine = Engine(own, loaded, sampler=case["sampler"], clip_skip=case["clip_skip"])
    watched = watch(engine, trace, report)
    watched.given_text = recorded_text(trace)
    prompt = sample_prompt(case["prompt_line"])
    width, height = prompt.size(own.default_size, own.size_multiple)
    request = ImageRequest(
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt or "",
        width=width,
        height=height,
        steps=prompt.steps,
        scale=prompt.scale,
        seed=prompt.seed or 0,
    )
    watched.generate([request])
    name = sample_name("name", None, SAMPLE_STEP, 0, prompt.seed)
    if without_stamp(name) != without_stamp(case["files"][0]):
        report.faults.append(f"file {name}, recorded {case['files'][0]}")


def compare_files(case: dict[str, Any], folder: Path, report: Report) -> None:
    """Names without their time stamps, and the recorded text chunks."""
    ours = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            ours[without_stamp(path.name)] = image.text
    recorded = {without_stamp(file["name"]): file["text"] for file in case["files"]}
    if ours.keys() != recorded.keys():
        report.faults.append(f"files {sorted(ours)}, recorded {sorted(recorded)}")
    for name in ours.keys() & recorded.keys():
        for key, value in recorded[name].items():
            if ours[name].get(key) != value:
                report.faults.append(f"{name}, {key}: {ours[name].get(key)!r}, recorded {value!r}")


def without_stamp(name: str) -> str:
    head, stamp, rest = name.split("_", 2)
    assert len(stamp) == 14
    return f"{head}_{rest}"
