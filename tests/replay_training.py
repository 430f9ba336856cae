"""Replays a recorded training run: the recorded batches and draws go through the real loop, and every recorded
quantity is compared (format: tests/reference/README.md)."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.data.images import to_tensor
from library.data.plan import EpochPlan, PlannedBatch
from library.data.sample import picture_for_cache
from library.training.draws import Draws, Place
from library.training.network_trainer import NetworkTrainer
from library.training.recipes.embedding import EmbeddingRecipe
from library.training.recipes.network import NetworkRecipe
from library.training.sdxl_network_trainer import SdxlNetworkTrainer
from library.training.textual_inversion_trainer import SdxlTextualInversionTrainer, TextualInversionTrainer

REFERENCE = Path(__file__).parent / "reference"
# tests/reference/README.md, section 5
LIMITS = {"prediction": 1e-4, "loss": 2e-5, "grad_norm": 1e-4, "latents": 1e-4, "noisy_latents": 1e-4}
LIMITS |= {"text": 1e-4, "sizes": 1e-5}
FINAL_CLOSE, FINAL_SHARE = 2e-5, 0.998


@dataclass
class Comparison:
    """Largest relative error per quantity, and everything that is simply different."""

    case: str
    errors: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    limits: ClassVar[dict[str, float]] = LIMITS

    def compare(self, quantity: str, ours: torch.Tensor, recorded: torch.Tensor, what: str) -> None:
        if ours.shape != recorded.shape:
            self.faults.append(f"{what}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            return
        recorded = recorded.float()
        error = (ours.detach().float().cpu() - recorded).abs().max() / recorded.abs().max().clamp(min=1e-12)
        self.errors[quantity] = max(self.errors.get(quantity, 0.0), error.item())

    @property
    def passed(self) -> bool:
        return not self.faults and all(error <= self.limits.get(name, 1.0) for name, error in self.errors.items())

    def line(self) -> str:
        errors = "  ".join(f"{name} {error:.1e}" for name, error in sorted(self.errors.items()))
        return f"{'ok  ' if self.passed else 'FAIL'} {self.case}: {errors}" + "".join(
            f"\n     {f}" for f in self.faults
        )


class RecordedDraws(Draws):
    """Draws from a trace instead of from streams."""

    def __init__(self, trace: dict[str, torch.Tensor], steps: dict[tuple[int, int], int]) -> None:
        super().__init__(0, torch.device("cpu"))
        self.trace = trace
        self.steps = steps
        self.pictures: dict[str, torch.Tensor] = {}

    def _recorded(self, place: Place, key: str) -> torch.Tensor:
        return self.trace[f"step{self.steps[place.epoch, place.micro]}.{key}"]

    def posterior(self, place: Place, distribution: Any) -> torch.Tensor:
        return distribution.mean + distribution.std * self._recorded(place, "vae_noise")

    def cached_posterior(self, distribution: Any, images: torch.Tensor) -> torch.Tensor:
        names = [next(name for name, picture in self.pictures.items() if same(picture, image)) for image in images]
        noise = [self.trace[f"cache.vae_noise.{name}"].reshape(distribution.mean.shape[1:]) for name in names]
        return distribution.mean + distribution.std * torch.stack(noise)

    def noise(self, place: Place, latents: torch.Tensor, config: Any) -> torch.Tensor:
        return self._recorded(place, "noise")

    def timesteps(self, place: Place, count: int, config: Any) -> torch.Tensor:
        return self._recorded(place, "timesteps").long()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class Watcher:
    """Compares what passes through a run's target with a trace; `micro` is the micro-step under way."""

    def __init__(self, trace: dict[str, torch.Tensor], result: Comparison) -> None:
        self.trace = trace
        self.result = result
        self.micro = -1

    def compare(self, quantity: str, ours: torch.Tensor, name: str) -> None:
        key = f"step{self.micro}.{name}"
        self.result.compare(quantity, ours, self.trace[key], key)

    def attach(self, run: Any) -> None:
        """Stand between the loop and the run's target, latents and guard."""
        target = run.target
        for name in ("on_step_start", "encode_text", "predict", "post_process_loss"):
            setattr(target, name, partial(getattr(self, name), getattr(target, name)))
        run.latents = partial(self.latents, run.latents)
        run.guard.watch = partial(self.guard, run, run.guard.watch)

    def on_step_start(self, own: Any, batch: Any) -> None:
        self.micro += 1
        for name in ("input_ids", "input_ids2", "original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            recorded = self.trace.get(f"step{self.micro}.{name}")
            if recorded is not None and not torch.equal(batch[name], recorded):
                self.result.faults.append(f"step {self.micro}: {name} is {batch[name]}, recorded {recorded}")
        if f"step{self.micro}.size_embeddings" in self.trace:
            from library.models.sdxl import size_vector

            self.compare("sizes", size_vector(batch, torch.device("cpu")), "size_embeddings")
        own(batch)

    def latents(self, own: Any, batch: Any, place: Place) -> torch.Tensor:
        made = own(batch, place)
        self.compare("latents", made, "latents")
        return made

    def encode_text(self, own: Any, batch: Any) -> Any:
        text = own(batch)
        one = torch.is_tensor(text)
        names = ("text_hidden",) if one else ("text_hidden1", "text_hidden2", "text_pooled")
        for name, tensor in zip(names, [text] if one else text, strict=True):
            if f"step{self.micro}.{name}" in self.trace:
                self.compare("text", tensor, name)
        return text

    def predict(self, own: Any, noisy_latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.compare("noisy_latents", noisy_latents, "noisy_latents")
        prediction = own(noisy_latents, *rest)
        self.compare("prediction", prediction, "prediction")
        return prediction

    def post_process_loss(self, own: Any, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        losses = own(losses, timesteps)
        self.compare("loss", losses, "loss_per_sample_weighted")
        self.compare("loss", losses.mean().reshape(1), "loss")
        return losses

    def guard(self, run: Any, own: Any, losses: Any, norm: torch.Tensor | None, **rest: Any) -> bool:
        if norm is not None:  # with --max_grad_norm 0 nothing is clipped
            self.compare("grad_norm", norm.reshape(1), "grad_norm")
        rates = torch.tensor([group["lr"] for group in run.optimizer.param_groups], dtype=torch.float64)
        recorded = self.trace[f"step{self.micro}.lr"].double()
        if not torch.allclose(rates, recorded, rtol=1e-9):
            self.result.faults.append(f"step {self.micro}: rates {rates.tolist()}, recorded {recorded.tolist()}")
        return own(losses, norm, **rest)


def remember_pictures(recipe: Any, draws: RecordedDraws) -> None:
    """The pixels of each picture that a cache encodes, so that its recorded draw can be found."""
    check = recipe.check_group

    def check_group(args: Any, group: Any) -> None:
        check(args, group)
        dataset = group.datasets[0]
        for item in dataset.items:
            pixels = picture_for_cache(item, dataset.subsets[item.subset], dataset.settings)
            draws.pictures[item.path] = to_tensor(pixels)

    recipe.check_group = check_group


# Script -> (its recipe, the option that names a file to start from).
RECIPES: dict[str, tuple[Any, str]] = {
    "train_network.py": (lambda: NetworkRecipe(NetworkTrainer()), "--network_weights"),
    "sdxl_train_network.py": (lambda: NetworkRecipe(SdxlNetworkTrainer()), "--network_weights"),
    "train_textual_inversion.py": (lambda: EmbeddingRecipe(TextualInversionTrainer()), "--weights"),
    "sdxl_train_textual_inversion.py": (lambda: EmbeddingRecipe(SdxlTextualInversionTrainer()), "--weights"),
}


@contextmanager
def working_folder(folder: Path, model: Path):
    """A folder with the data and model under the names that recorded command lines use."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    shutil.copytree(REFERENCE / "data", folder / "data", dirs_exist_ok=True)
    if not (folder / "models" / model.name).exists():
        os.link(model, folder / "models" / model.name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def epochs_of(steps: list[dict[str, Any]], pictures: int) -> list[list[dict[str, Any]]]:
    """Recorded micro-steps, split where every picture was seen."""
    epochs: list[list[dict[str, Any]]] = [[]]
    seen = 0
    for step in steps:
        if seen >= pictures:
            epochs.append([])
            seen = 0
        epochs[-1].append(step)
        seen += len(step["image_files"])
    return epochs


def replay_case(folder: Path, model: Path, scratch: Path) -> Comparison:
    """Run one recorded case.

    Args:
        folder: with case.json, trace.safetensors, initial.safetensors, final.safetensors.
        model: the unpacked model file.
        scratch: an empty folder to work in.
    """
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    if case["script"] not in RECIPES:
        from tests.replay_models import replay_model_case

        return replay_model_case(folder, case, model, scratch)
    result = Comparison(case["case"])
    trace = load_file(folder / "trace.safetensors")
    final = load_file(folder / "final.safetensors")
    recorded = folder / "initial.safetensors"  # not there: everything starts at zero
    initial = load_file(recorded) if recorded.exists() else {}
    with working_folder(scratch, model):
        start = {k: initial.get(k, torch.zeros_like(v)).float() for k, v in final.items()}
        start |= {k: v for k, v in final.items() if k.endswith(".alpha")}
        save_file(start, "initial.safetensors")
        train(case, trace, result)
        compare_files(case, final, folder / "final.safetensors", Path("out") / f"{case['case']}.safetensors", result)
    return result


def train(case: dict[str, Any], trace: dict[str, torch.Tensor], result: Comparison) -> None:
    from library.options.parser import parse
    from library.training import assemble, loop

    make_recipe, start_option = RECIPES[case["script"]]
    options = [o for o in case["options"] if o not in ("--tokenizer_cache_dir", "tokenizers")]
    args = parse(case["script"], [*options, start_option, "initial.safetensors"])
    places: dict[tuple[int, int], int] = {}
    draws = RecordedDraws(trace, places)
    recipe = make_recipe()
    remember_pictures(recipe, draws)
    run = assemble.build_run(recipe, args, draws=draws)
    if hasattr(recipe, "trainer"):
        recipe.trainer.run = run
    feed_recorded_batches(run, case, places)
    watcher = Watcher(trace, result)
    inject_ranks(case, run, watcher)
    watcher.attach(run)
    loop.train(run)


def feed_recorded_batches(run: Any, case: dict[str, Any], places: dict[tuple[int, int], int]) -> None:
    """The recorded batches in the recorded order; `places` learns which place in the run each micro-step has."""
    dataset = run.feed.group.datasets[0]
    numbers = {item.path: index for index, item in enumerate(dataset.items)}
    plans: dict[int, EpochPlan] = {}
    micro = 0
    for number, epoch in enumerate(epochs_of(case["steps"], len(dataset.items)), 1):
        batches = []
        for position, step in enumerate(epoch):
            items = tuple(numbers[file] for file in step["image_files"])
            bucket = dataset.items[items[0]].bucket
            batches.append(PlannedBatch(0, bucket, items, (0,) * len(items)))
            places[number, position] = micro
            micro += 1
        plans[number] = EpochPlan(epoch=number, seed=0, batches=(tuple(batches),))
    run.feed.plan = plans.__getitem__


def inject_ranks(case: dict[str, Any], run: Any, watcher: Watcher) -> None:
    """The recorded draws of DyLoRA modules in place of their own."""
    for index, name in enumerate(case.get("dylora_modules", ())):
        module = run.target.network.get_submodule(name)
        module.draw = lambda index=index: int(watcher.trace[f"step{watcher.micro}.dylora_rank"][index])


def compare_files(
    case: dict[str, Any], final: dict[str, torch.Tensor], recorded: Path, written: Path, result: Comparison
) -> None:
    """Keys, shapes, dtypes, metadata keys and values, weights."""
    ours = load_file(written)
    for missing in sorted(set(final) ^ set(ours)):
        result.faults.append(f"key {missing} is {'missing' if missing in final else 'new'}")
    close = total = 0
    rate = float(case["options"][case["options"].index("--learning_rate") + 1])
    for key in set(final) & set(ours):
        if ours[key].shape != final[key].shape or ours[key].dtype != final[key].dtype:
            result.faults.append(f"{key}: {ours[key].dtype} {tuple(ours[key].shape)}")
            continue
        difference = (ours[key].float() - final[key].float()).abs()
        close += int((difference <= FINAL_CLOSE).sum())
        total += difference.numel()
        if difference.max() > rate * case["optimizer_steps"]:
            result.faults.append(f"{key}: differs by {difference.max():.1e}")
    result.errors["final"] = 1 - close / max(total, 1)
    if close < FINAL_SHARE * total:
        result.faults.append(f"only {close / total:.2%} of the final weights are within {FINAL_CLOSE}")
    compare_metadata(case, written, result)


def compare_metadata(case: dict[str, Any], written: Path, result: Comparison) -> None:
    with safe_open(written, "pt") as file:
        ours = file.metadata()
    recorded, volatile = case["final_metadata"], set(case["volatile_metadata"])
    for key in sorted(set(recorded) ^ set(ours)):
        if key in recorded or key not in NEW_METADATA:
            result.faults.append(f"metadata key {key} is {'missing' if key in recorded else 'new'}")
    for key in sorted(set(recorded) & set(ours) - volatile):
        if ours[key] != recorded[key]:
            result.faults.append(f"metadata {key}: {ours[key]!r}, recorded {recorded[key]!r}")


# keys of later releases, which 0.7.0 did not write
NEW_METADATA = {
    *("ss_debiased_estimation", "ss_fp8_base", "ss_fp8_base_unet", "ss_huber_c", "ss_huber_scale", "ss_huber_schedule"),
    *(
        "ss_ip_noise_gamma_random_strength",
        "ss_loss_type",
        "ss_max_validation_steps",
        "ss_noise_offset_random_strength",
    ),
    *(
        "ss_dataset_manifest_hash",
        "ss_num_validation_images",
        "ss_resize_interpolation",
        "ss_validate_every_n_epochs",
        "ss_validate_every_n_steps",
    ),
    *("ss_validation_seed", "ss_validation_split", "modelspec.hash_sha256"),
}
