"""Every family and target under every way of computing: the losses of four steps stay what they were.

A change on purpose writes them anew: python -m tests.training.test_matrix
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.training.runs import SCRIPTS, losses, options_of, train

GOLDEN = Path(__file__).parent / "losses.json"

WAYS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("--mixed_precision", "bf16"),
    "full_bf16": ("--mixed_precision", "bf16", "--full_bf16"),
    "gradient_checkpointing": ("--gradient_checkpointing",),
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "cached": ("--cache_latents",),
}
# Computed in bfloat16, whose products differ between processors.
COARSE = {"bf16", "full_bf16"}


def run(script: str, way: str, model: Path, folder: Path) -> list[float]:
    train(script, options_of(script, model, folder, *WAYS[way]))
    return losses(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_losses(script: str, way: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(f"tiny_{SCRIPTS[script][0]}")
    found = run(script, way, model, tmp_path)
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[script][way]
    assert found == pytest.approx(expected, rel=1e-2 if way in COARSE else 5e-4)


def test_ways_that_change_nothing() -> None:
    """Recomputing activations gives the same losses as keeping them."""
    for script, ways in json.loads(GOLDEN.read_text(encoding="utf-8")).items():
        assert set(ways) == set(WAYS), script
        assert ways["gradient_checkpointing"] == pytest.approx(ways["fp32"], rel=1e-5), script


def write() -> None:
    from tests.conftest import unpack_model

    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for script, (family, _) in SCRIPTS.items():
            model = unpack_model(family, Path(temporary))
            found[script] = {way: run(script, way, model, Path(temporary) / f"{script}-{way}") for way in WAYS}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.exit()
