"""Algebra of low-rank updates: cheap decompositions against the full one, quantiles, errors, ranks side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from networks import algebra


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, power: float) -> Tensor:
    """A matrix whose singular values fall like 1 / i^power."""
    side = min(rows, columns)
    u, v = torch.linalg.qr(random(rows, side)).Q, torch.linalg.qr(random(columns, side, seed=1)).Q
    return u * torch.arange(1, side + 1).pow(-power) @ v.mT


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("rows", "columns"), [(512, 384), (320, 1024)])
def test_randomised_decomposition_is_as_good_as_the_full_one(power: float, rows: int, columns: int) -> None:
    m, rank = decaying(rows, columns, power), 8
    best = algebra.Decomposition(*torch.linalg.svd(m, full_matrices=False))
    found = algebra.decompose(m, rank)
    assert len(found.S) == rank, "the cheap way was not taken"
    errors = []
    for parts in (best, found):
        up, down = parts.split(rank)
        errors.append((up @ down - m).norm().item())
    assert errors[1] <= errors[0] * 1.01
    torch.testing.assert_close(found.S, best.S[:rank], rtol=0.02, atol=0)
    again = algebra.decompose(m, rank)
    assert torch.equal(again.U, found.U)


def test_a_large_rank_takes_the_full_decomposition() -> None:
    m = random(300, 260)
    up, down = algebra.decompose(m, 200).split(260)
    torch.testing.assert_close(up @ down, m, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(512, 16, 384), (24, 16, 32)])
def test_decomposition_of_a_product(shape: tuple[int, int, int]) -> None:
    """From the factors where that is cheaper, from the product elsewhere: the same values."""
    rows, inner, columns = shape
    up, down = random(rows, inner), random(inner, columns, seed=1)
    parts = algebra.decompose_product(up, down, 4)
    full = torch.linalg.svdvals(up @ down)
    torch.testing.assert_close(parts.S[:inner], full[:inner], rtol=1e-4, atol=1e-4)
    new_up, new_down = parts.split(inner)
    torch.testing.assert_close(new_up @ new_down, up @ down, atol=1e-3, rtol=1e-4)


def test_more_ranks_than_the_product_has() -> None:
    up, down = random(300, 4), random(4, 300, seed=1)
    new_up, new_down = algebra.decompose_product(up, down, 8).split(8)
    assert new_up.shape == (300, 8)
    torch.testing.assert_close(new_up @ new_down, up @ down, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("quantile", [0.0, 0.31, 0.99, 1.0])
def test_quantile(quantile: float) -> None:
    values = random(1001)
    assert algebra.quantile_of(values, quantile) == pytest.approx(torch.quantile(values, quantile).item(), abs=1e-6)


def test_quantile_of_more_values_than_torch_takes() -> None:
    values = torch.arange(2**24 + 5, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        torch.quantile(values, 0.5)
    assert algebra.quantile_of(values, 0.5) == pytest.approx(2**23 + 2)


def test_clamp() -> None:
    up, down = random(20, 4), random(4, 30, seed=1)
    a, b = algebra.clamp(up, down, 0.9)
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.9).item()
    assert max(a.abs().max(), b.abs().max()).item() == pytest.approx(limit)
    assert algebra.clamp(up, down, 1.0)[0] is up


def test_norm_and_error_without_the_product() -> None:
    up, down = random(20, 4, 1, 1), random(4, 5, 3, 3, seed=1)
    weight = algebra.delta(up, down)
    assert weight.shape == (20, 5, 3, 3)
    assert algebra.product_norm(up, down) == pytest.approx(weight.norm().item(), rel=1e-6)
    error = algebra.Error()
    assert error.relative == 0
    error.add(3.0, 10.0)
    error.add(4.0, 0.0)
    assert error.relative == pytest.approx(0.5)


def test_ranks_side_by_side_and_in_another_order() -> None:
    terms = [(random(6, 2), random(2, 5, seed=1), 0.5), (random(6, 3, seed=2), random(3, 5, seed=3), -1.0)]
    up, down = algebra.stacked(terms)
    expected = sum(factor * u @ d for u, d, factor in terms)
    torch.testing.assert_close(up @ down, expected)
    shuffled_up, shuffled_down = algebra.shuffled(up, down)
    torch.testing.assert_close(shuffled_up @ shuffled_down, expected)
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(3, 5\)"):
        algebra.add_up(terms[0][1], terms[1][1], concat=False, dim=0)
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\)"):
        algebra.add_up(torch.zeros(2, 5), torch.zeros(2, 4), concat=True, dim=0)


def test_a_module_of_zeros_keeps_one_rank() -> None:
    facts = algebra.rank_resize(torch.zeros(5), 4, "sv_fro", 0.9, 0.5)
    assert (facts["new_rank"], facts["new_alpha"]) == (1, 0.5)
    assert facts["fro_retained"] != facts["fro_retained"]


def test_first_ranks() -> None:
    state = {"a.lora_down.weight": random(4, 5), "a.lora_up.weight": random(6, 4), "a.alpha": torch.tensor(2.0)}
    cut = algebra.first_ranks(state, 3)
    assert torch.equal(cut["a.lora_down.weight"], state["a.lora_down.weight"][:3])
    assert torch.equal(cut["a.lora_up.weight"], state["a.lora_up.weight"][:, :3])
    assert cut["a.alpha"] == 2
