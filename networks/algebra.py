"""Algebra of low-rank updates: pure functions on tensors, computed in float32 whatever the dtype of the inputs.

A weight is (out, in) or (out, in, kh, kw). Its update is `up @ down` with `up` (out, r[, 1, 1]) and `down`
(r, in[, kh, kw]); as matrices (out, r) and (r, in * kh * kw).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLAMP_QUANTILE = 0.99
# Below this smaller side a full decomposition takes milliseconds and nothing is gained by another.
SMALL_SIDE = 256
# A randomised or factored decomposition pays where the rank, with what it draws on top, is below this share.
RANK_SHARE = 0.25
OVERSAMPLING = 16
POWER_STEPS = 4
# Largest singular value from which a module counts as without effect.
NO_EFFECT = 1e-6


def matrix(weight: Tensor) -> Tensor:
    """(a, b, ...) -> (a, b * ...) in float32."""
    return weight.detach().flatten(1).float()


def delta(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * up @ down` in float32, in the shape of the weight: (out, *down.shape[1:])."""
    return (matrix(up) @ matrix(down)).view(up.shape[0], *down.shape[1:]) * scale


# Norms and errors


def product_norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of `up @ down` without the product: |U D|^2 = sum(U^T U * D D^T)."""
    a, b = matrix(up).double(), matrix(down).double()
    return math.sqrt(max(0.0, ((a.mT @ a) * (b @ b.mT)).sum().item()))


class Error:
    """Distance of results from exact values over many tensors, relative to a size, as Frobenius norms."""

    def __init__(self) -> None:
        self._distance = self._size = 0.0

    def add(self, distance: float, size: float) -> None:
        """One tensor: its distance from the exact value, and the size that counts as 100 %."""
        self._distance += distance**2
        self._size += size**2

    @property
    def relative(self) -> float:
        """Distance of all tensors together, relative to their size; 0 where nothing has a size."""
        return math.sqrt(self._distance / self._size) if self._size else 0.0


# Decompositions


@dataclass(frozen=True)
class Decomposition:
    """U (out, m), S (m,) in falling order, Vh (m, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def split(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best update of a rank: up (out, rank) carries the singular values, down (rank, in)."""
        return self.U[:, :rank] * self.S[:rank], self.Vh[:rank]


def decompose(m: Tensor, rank: int | None = None) -> Decomposition:
    """Singular values and vectors of a matrix (out, in): all of them, or about the largest `rank`.

    A rank small against the matrix takes a randomised decomposition, see `randomised`.
    """
    m = m.float()
    if rank is not None and _is_small(rank + OVERSAMPLING, m.shape):
        return randomised(m, rank)
    return Decomposition(*torch.linalg.svd(m, full_matrices=False))


def randomised(m: Tensor, rank: int, steps: int = POWER_STEPS) -> Decomposition:
    """The largest `rank` singular values and vectors of a matrix by subspace iteration.

    Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1. The draws have a
    fixed seed of their own, so that the same input gives the same result.
    """
    columns = min(rank + OVERSAMPLING, *m.shape)
    draws = torch.randn(m.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(m @ draws.to(m.device)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(m.mT @ basis).Q
        basis = torch.linalg.qr(m @ basis).Q
    small = Decomposition(*torch.linalg.svd(basis.mT @ m, full_matrices=False))
    return Decomposition((basis @ small.U)[:, :rank], small.S[:rank], small.Vh[:rank])


def decompose_product(up: Tensor, down: Tensor, rank: int | None = None) -> Decomposition:
    """All singular values of `up @ down` that are not zero, exact; (out, r) and (r, in).

    Where r is small against the product, it comes from the factors' QR decompositions and never exists as a whole.

    Args:
        rank: number of singular vectors that are needed; more than r give the full decomposition.
    """
    up, down = matrix(up), matrix(down)
    inner = up.shape[1]
    if not _is_small(inner, (up.shape[0], down.shape[1])) or (rank is not None and rank > inner):
        return decompose(up @ down)
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return Decomposition(left.Q @ u, s, vh @ right.Q.mT)


def _is_small(rank: int, shape: Sequence[int]) -> bool:
    side = min(shape)
    return side > SMALL_SIDE and rank <= RANK_SHARE * side


def clamp(up: Tensor, down: Tensor, quantile: float = CLAMP_QUANTILE) -> tuple[Tensor, Tensor]:
    """Both factors cut to +-q, the quantile over the (signed) values of both."""
    if quantile >= 1:
        return up, down
    limit = quantile_of(torch.cat([up.flatten(), down.flatten()]), quantile)
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


def quantile_of(values: Tensor, quantile: float) -> float:
    """Quantile with linear interpolation, of any number of values (torch.quantile takes 2^24)."""
    position = quantile * (values.numel() - 1)
    low = math.floor(position)
    below = values.kthvalue(low + 1).values.item()
    above = values.kthvalue(min(low + 2, values.numel())).values.item()
    return below + (above - below) * (position - low)


# Ranks by singular values


def index_sv_ratio(S: Tensor, target: float) -> int:
    """Number of singular values above the largest divided by `target`, within 1 and n - 1."""
    return _clamped(int((S[0] / target < S).sum()), S)


def index_sv_cumulative(S: Tensor, target: float) -> int:
    """Where the running sum reaches a share of the whole, plus one, within 1 and n - 1."""
    share = torch.cumsum(S, 0) / S.sum()
    return _clamped(int(torch.searchsorted(share, target)) + 1, S)


def index_sv_fro(S: Tensor, target: float) -> int:
    """Where the running Frobenius norm reaches a share of the whole, plus one, within 1 and n - 1."""
    share = torch.cumsum(S.square(), 0) / S.square().sum()
    return _clamped(int(torch.searchsorted(share, target**2)) + 1, S)


def _clamped(index: int, S: Tensor) -> int:
    return max(1, min(index, len(S) - 1))


RANK_RULES = {"sv_ratio": index_sv_ratio, "sv_fro": index_sv_fro, "sv_cumulative": index_sv_cumulative}


def rank_resize(
    S: Tensor, rank: int, dynamic_method: str | None, dynamic_param: float | None, scale: float = 1
) -> dict[str, float]:
    """The new rank of a module, and what it keeps.

    Args:
        S: singular values in falling order.
        rank: the new rank; with a method the largest one.
        dynamic_method: a name of `RANK_RULES`, or None.
        scale: alpha / rank of the module, which the new alpha keeps.

    Returns:
        new_rank, new_alpha, sum_retained and fro_retained (shares; NaN for a module of zeros), max_ratio (largest
        to smallest kept singular value).
    """
    new_rank = rank if dynamic_method is None else RANK_RULES[dynamic_method](S, float(dynamic_param or 0)) + 1
    new_rank = 1 if S[0] <= NO_EFFECT else min(new_rank, rank, len(S))
    kept = S[:new_rank]
    return {
        "new_rank": new_rank,
        "new_alpha": float(scale * new_rank),
        "sum_retained": (kept.abs().sum() / S.abs().sum()).item(),
        "fro_retained": (kept.square().sum().sqrt() / S.square().sum().sqrt()).item(),
        "max_ratio": (S[0] / kept[-1]).item(),
    }


def padded(S: Tensor, length: int) -> Tensor:
    """Singular values with the zeros that a product of low rank has beyond them."""
    return torch.cat([S, S.new_zeros(max(0, length - len(S)))])


# Networks merged with each other


def merge_factor(ratio: float, alpha: float, base_alpha: float) -> float:
    """Factor of `down`; that of `up` is its absolute value, so that a network alone works with `ratio` squared."""
    return math.sqrt(alpha / base_alpha) * ratio


def add_up(total: Tensor | None, value: Tensor, *, concat: bool, dim: int) -> Tensor:
    """Running merge of one tensor: the sum, or the ranks side by side along `dim`.

    Raises:
        ValueError: shapes that cannot be added or set side by side.
    """
    if total is None:
        return value
    if concat:
        own, other = list(total.shape), list(value.shape)
        own[dim] = other[dim] = 0
        if own != other:
            raise ValueError(f"{tuple(total.shape)} and {tuple(value.shape)}")
        return torch.cat([total, value], dim)
    if total.shape != value.shape:
        raise ValueError(f"{tuple(total.shape)} and {tuple(value.shape)}")
    return total + value


def shuffled(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks in a random order, by torch's global generator; the product stays."""
    order = torch.randperm(down.shape[0])
    return up[:, order], down[order]


def stacked(terms: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """One pair of matrices for a sum of updates: (up, down, factor) ... -> (out, sum of r), (sum of r, in)."""
    ups = [matrix(up) * factor for up, _, factor in terms]
    return torch.cat(ups, 1), torch.cat([matrix(down) for _, down, _ in terms], 0)


# Splitting a network of many ranks


def first_ranks(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ranks of every module: rows of `lora_down`, columns of `lora_up`; the rest as it is."""
    result = {}
    for key, tensor in tensors.items():
        if "lora_down" in key:
            tensor = tensor[:rank].contiguous()
        elif "lora_up" in key:
            tensor = tensor[:, :rank].contiguous()
        result[key] = tensor
    return result
