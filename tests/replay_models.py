"""Replays a recorded training of a whole model: as `replay_training.py`, with sums over all weights at the end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from library.training.recipes.model import DreamBoothRecipe, FineTuneRecipe, SdxlModelRecipe
from tests.replay_training import (
    FINAL_CLOSE,
    FINAL_SHARE,
    Comparison,
    RecordedDraws,
    Watcher,
    compare_metadata,
    feed_recorded_batches,
    remember_pictures,
    working_folder,
)

RECIPES = {"train_db.py": DreamBoothRecipe, "fine_tune.py": FineTuneRecipe, "sdxl_train.py": SdxlModelRecipe}


class ModelComparison(Comparison):
    """With the wider limit of predictions (tests/reference/README.md, section 5), and one for sums over a tensor."""

    limits: ClassVar[dict[str, float]] = {**Comparison.limits, "prediction": 5e-4, "sums": 2e-3}


class ModelWatcher(Watcher):
    """Text comes as one object."""

    def encode_text(self, own: Any, batch: Any) -> Any:
        text = own(batch)
        super().encode_text(lambda _: text.hidden[0] if text.pooled is None else (*text.hidden, text.pooled), batch)
        return text


def replay_model_case(folder: Path, case: dict[str, Any], model: Path, scratch: Path) -> Comparison:
    """Run one recorded case; see `replay_training.replay_case`."""
    from library.options.parser import parse
    from library.training import assemble, loop

    result = ModelComparison(case["case"])
    trace = load_file(folder / "trace.safetensors")
    options = [o for o in case["options"] if o not in ("--tokenizer_cache_dir", "tokenizers")]
    with working_folder(scratch, model):
        places: dict[tuple[int, int], int] = {}
        draws, recipe = RecordedDraws(trace, places), RECIPES[case["script"]]()
        remember_pictures(recipe, draws)
        run = assemble.build_run(recipe, parse(case["script"], options), draws=draws)
        feed_recorded_batches(run, case, places)
        ModelWatcher(trace, result).attach(run)
        loop.train(run)
        compare_model(case, folder, Path(case["initial"]["file"]), Path("out") / f"{case['case']}.safetensors", result)
    return result


def compare_model(case: dict[str, Any], folder: Path, start: Path, written: Path, result: Comparison) -> None:
    """The chosen tensors one by one, sums over every tensor that changed, and that nothing else changed."""
    ours, initial, final = load_file(written), load_file(start), load_file(folder / "final.safetensors")
    if len(ours) != case["final_file_keys"]:
        result.faults.append(f"{len(ours)} tensors, recorded {case['final_file_keys']}")
    result.faults += [f"{key} is missing" for key in final if key not in ours]
    differences = [(ours[key].float() - tensor.float()).abs() for key, tensor in final.items() if key in ours]
    total = sum(difference.numel() for difference in differences)
    close = sum(int((difference <= FINAL_CLOSE).sum()) for difference in differences)
    result.errors["final"] = 1 - close / total
    if close < FINAL_SHARE * total:
        result.faults.append(f"only {close / total:.2%} of the final weights are within {FINAL_CLOSE}")
    stats = json.loads(gzip.decompress((folder / "final_stats.json.gz").read_bytes()))["tensors"]
    for key in set(stats) - set(case["noise_floor"]["ill_conditioned_final_tensors"]):
        recorded, sums = stats[key], sums_of(ours[key], initial[key])
        result.errors["sums"] = max(result.errors.get("sums", 0.0), distance(sums, recorded, ours[key].numel()))
    for key in case.get("unchanged", ()):
        if not torch.equal(ours[key].float(), initial[key].float()):
            result.faults.append(f"{key} has changed")
    compare_metadata(case, written, result)


def sums_of(ours: torch.Tensor, initial: torch.Tensor) -> list[float]:
    """Of the change: norm, largest value, mean, sum of difference_i sin(i); then the norm of the tensor."""
    change = (ours.double() - initial.double()).flatten()
    waves = torch.sin(torch.arange(1, change.numel() + 1, dtype=torch.float64))
    sums = change.norm(), change.abs().max(), change.mean(), (change * waves).sum(), ours.double().norm()
    return [value.item() for value in sums]


def distance(ours: list[float], recorded: list[float], count: int) -> float:
    """Largest difference of the sums, each against the size that it has for a change of the recorded norm.

    0 for tensors that hardly move, as their gradients are rounding noise: no weight by more than the limit of one.
    """
    norm = recorded[0]
    if max(recorded[1], ours[1]) < FINAL_CLOSE:
        return 0.0
    scales = norm, norm, norm / count**0.5, norm * (count / 2) ** 0.5 / count**0.5, recorded[4]
    return max(abs(a - b) / scale for a, b, scale in zip(ours, recorded, scales, strict=True))
