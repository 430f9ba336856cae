"""Every draw is a function of its name and place alone."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from library.runtime.streams import python_stream, stream, stream_seed


def test_a_stream_repeats_whatever_was_drawn_before() -> None:
    first = torch.randn(4, generator=stream(7, "noise", 3, 1))
    torch.randn(100)
    torch.randn(100, generator=stream(7, "noise", 3, 1))
    assert torch.equal(first, torch.randn(4, generator=stream(7, "noise", 3, 1)))
    assert python_stream(7, "caption", 2, "a.png").random() == python_stream(7, "caption", 2, "a.png").random()


def test_a_stream_leaves_the_global_generators_alone() -> None:
    import random

    torch.manual_seed(0)
    random.seed(0)
    expected = torch.randn(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    torch.randn(5, generator=stream(1, "noise"))
    python_stream(1, "noise").random()
    assert torch.equal(torch.randn(3), expected[0])
    assert random.random() == expected[1]


def test_every_argument_makes_another_stream() -> None:
    places = list(itertools.product((0, 1, 2**40), ("noise", "timestep"), (0, 1, 11), (0, 1, "1a", "a.png")))
    assert len({stream_seed(*place) for place in places}) == len(places)
    # Neighbouring fields must not run into each other.
    assert stream_seed(1, "a", 11, 1) != stream_seed(1, "a", 1, 11)


def test_neighbouring_streams_are_not_correlated() -> None:
    draws = torch.stack([torch.randn(1000, generator=stream(0, "noise", step)) for step in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert correlation.abs().max() < 0.15
    assert abs(draws.mean().item()) < 0.03 and abs(draws.std().item() - 1) < 0.03


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from library.runtime.streams import stream_seed; print(stream_seed(42, 'caption', 3, 'bild ä.png'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stream_seed(42, "caption", 3, "bild ä.png")


@pytest.mark.parametrize("seed", [0, -1, 2**64, 2**31])
def test_any_seed_makes_a_seed_that_torch_takes(seed: int) -> None:
    assert 0 <= stream_seed(seed, "noise") < 2**63
    stream(seed, "noise")


def test_seeds_stay_as_recorded() -> None:
    """A change of this value would change every run; resumes of older states would no longer be exact."""
    assert stream_seed(42, "noise", 7, 3) == RECORDED


RECORDED = 1171692351070870317
