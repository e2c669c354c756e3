"""Associations: what is stored under keys, in matrices, and how it is read.

Two ways to write, both once a chunk, so that within a chunk what is read stands still: a few vectors at once, as ARMT's
(arXiv 2407.04841), or every token in turn by the delta rule (arXiv 2412.06464), which is computed in parallel.
"""

import torch
from torch.nn import functional as F

from .functions_baka import at_least_float32

NUM_SHIFTS = 3  # ν of DPFP-ν: a key of d numbers has 2νd features
EPSILON = 1e-5
MAX_PIECE = 64  # tokens whose writes are solved for at once
BLOCK = 8  # rows of a triangular matrix whose inverse is a product


# A few vectors at once


def dpfp(x: torch.Tensor) -> torch.Tensor:
    """DPFP-3 (arXiv 2102.11174) of x [..., d]: 6d features, none below 0.

    With r = relu([x, -x]), they are r_i r_(i - j) for j = 1, 2, 3, indices modulo 2d.
    """
    rectified = torch.cat([x, -x], dim=-1).relu()
    return torch.cat([rectified * rectified.roll(shift, dims=-1) for shift in range(1, NUM_SHIFTS + 1)], dim=-1)


def recall(association: torch.Tensor, normalizer: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Aᵀφ / (z·φ + ε) of the features φ [B, Q, F] of queries: [B, Q, D], zero where nothing is stored.

    Args:
        association: A, [B, F, D].
        normalizer: z, [B, F].
        features: φ; in their dtype the products are, and the quotient in float32 at least.
    """
    wide = features.to(at_least_float32(features.dtype))
    shares = wide / (torch.einsum("bqf,bf->bq", wide, normalizer.to(wide))[..., None] + EPSILON)
    return shares.to(features.dtype) @ association.to(features.dtype)


def store(
    association: torch.Tensor,
    normalizer: torch.Tensor,
    features: torch.Tensor,
    values: torch.Tensor,
    strengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ARMT's update: the next A and z, after R vectors have been written at once.

        A ← A + Σ β_i k_i (v_i - v̄_i)ᵀ      v̄_i = Aᵀk_i / (z·k_i + ε), what was there
        z ← z + Σ γ_i k_i                     γ_i = clip(1 - z·k_i / (|k_i|² + ε), 0, 1), how new a key is; no gradient

    Args:
        association: A, [B, F, D].
        normalizer: z, [B, F].
        features: the keys k, [B, R, F], and all else in the dtype of A.
        values: v, [B, R, D].
        strengths: β, [B, R].
    """
    change = strengths[..., None] * (values - recall(association, normalizer, features))
    with torch.no_grad():
        known = torch.einsum("brf,bf->br", features, normalizer) / (features.square().sum(-1) + EPSILON)
        newness = (1 - known).clamp(0, 1)
    return association + features.mT @ change, normalizer + (newness[..., None] * features).sum(1)


# Every token in turn


def delta_rule(
    state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, strengths: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """The next state [..., d, v]: S ← γS, then for each token in order S ← S + β k ᵀ(v - k S), k a row.

    The writes are an affine map of the state, S ← S - P S + N, and so is one after another. So pieces of a chunk become
    maps in parallel, and maps one map, two and two: Y = [N | P] of two in turn is Y₁ + Y₂ - P₂ Y₁, and the map that
    changes nothing is 0.

    Args:
        state: S, [..., d, v].
        keys: k, [..., n, d], and all else in the dtype of S.
        values: v, [..., n, v].
        strengths: β, [..., n].
        decay: γ, [...].
    """
    length, width = values.shape[-2:]
    piece = min(MAX_PIECE, BLOCK * 2 ** ((length - 1) // BLOCK).bit_length())  # a power of two
    rest = -length % piece
    keys, values, strengths = F.pad(keys, (0, 0, 0, rest)), F.pad(values, (0, 0, 0, rest)), F.pad(strengths, (0, rest))
    keys, values, strengths = (x.unflatten(-2, (-1, piece)) for x in (keys, values, strengths[..., None]))
    scaled = strengths * keys
    maps = keys.mT @ solve_unit_lower((scaled @ keys.mT).tril(-1), torch.cat([strengths * values, scaled], dim=-1))
    while maps.shape[-3] > 1:
        if maps.shape[-3] % 2:
            maps = F.pad(maps, (0, 0, 0, 0, 0, 1))
        first, second = maps[..., ::2, :, :], maps[..., 1::2, :, :]
        maps = first + second - second[..., width:] @ first
    added, removed = maps[..., 0, :, :].split([width, maps.shape[-1] - width], dim=-1)
    state = decay[..., None, None] * state
    return state - removed @ state + added


def solve_unit_lower(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x with (I + `lower`) x = `right` [..., m, ·], for a strictly lower triangular matrix [..., m, m], m = 8, 16, …

    By products of matrices alone, which any device is fast at, as it is not at substitution row by row. The inverse
    goes without gradients: after one step of refinement, x + T (b - x - L x) with T and x constant, there is that of
    the solution itself.
    """
    with torch.no_grad():
        inverse = invert_unit_lower(lower)
        solution = inverse @ right
    return solution + inverse @ (right - solution - lower @ solution)


def invert_unit_lower(lower: torch.Tensor) -> torch.Tensor:
    """(I + `lower`)⁻¹, arguments as in `solve_unit_lower`.

    A block of 8 x 8 on the diagonal is nilpotent, D⁸ = 0, so its inverse is (I - D)(I + D²)(I + D⁴). Then two
    neighbours T₁, T₂ and what lies below them, L₂₁, become one of twice the size: T₂₁ = -T₂ L₂₁ T₁.
    """
    index = torch.arange(lower.shape[-1], device=lower.device)
    blocks = lambda size: index[:, None] // size == index // size  # noqa: E731
    diagonal = lower * blocks(BLOCK)
    squared = diagonal @ diagonal
    identity = torch.eye(len(index), dtype=lower.dtype, device=lower.device)
    inverse = (identity - diagonal) @ (identity + squared)
    inverse = inverse + inverse @ (squared @ squared)
    size = BLOCK
    while size < len(index):
        below = lower * (blocks(2 * size) & ~blocks(size))
        inverse = inverse - inverse @ below @ inverse
        size *= 2
    return inverse
