"""Associations: what is stored under keys, in matrices, and how it is read.

Two ways to write, both once a chunk, so that within a chunk what is read stands still: a few vectors at once, as ARMT's
(arXiv 2407.04841), or every token in turn by the delta rule (arXiv 2412.06464), which is computed in parallel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_baka import BakaConfig
from .functions_baka import at_least_float32, initialise
from .memory_baka import Held
from .parts_baka import Part, register

NUM_SHIFTS = 3  # ν of DPFP-ν: a key of d numbers has 2νd features
EPSILON = 1e-5
MAX_PIECE = 64  # tokens whose writes are solved for at once
BLOCK = 8  # rows of a triangular matrix whose inverse is a product
FEW = 2  # queries that compiled sums serve better than a product of matrices: norm, cast and sum are one pass


def hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """min(1, max(0, 1/2 + x/6)), whose gradient PyTorch's own has in float32 alone."""
    return (x / 6 + 0.5).clamp(0, 1)


# What makes the strength of a write, 0 to 1, of a product. A hard one is 0 below -3: then nothing is written at all.
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": hard_sigmoid}


def associative_layers(config: Any) -> list[int]:
    """The numbers of the blocks that have an associative memory, of a `BakaConfig` or what a state knows of one."""
    every = config.associative_layer_interval
    return list(range(every - 1, config.num_hidden_layers, every)) if config.associative_dim else []


def associations_held(config: Any) -> dict[str, Held]:
    """What a state has of them for each row, stacked over the blocks that have one, by name; zero where nothing was
    stored. Arguments as for `associative_layers`."""
    width, heads, count = config.associative_dim, config.num_associative_heads, len(associative_layers(config))
    if not width:
        return {}
    if heads:
        return {"associations": Held((count, heads, width, config.head_dim), in_float32=True)}
    features = 2 * NUM_SHIFTS * width
    return {
        "associations": Held((count, features, config.hidden_size), in_float32=True),
        "normalizers": Held((count, features), in_float32=True),
    }


class BakaMemoryAssociation(nn.Module):
    """Written by a block's outputs at the write positions, and read by every position before the block (ARMT)."""

    written_by = "memory"

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.associative_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.associative_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.beta_proj = nn.Linear(config.hidden_size, 1)
        self.gate = GATES[config.associative_gate]
        initialise(config.hidden_size**-0.5, self.q_proj, self.k_proj)
        initialise(0.0, self.v_proj, self.beta_proj)

    def read(self, query: torch.Tensor, held: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What is stored under `query`, a product of `q_proj` [B, Q, d]: [B, Q, D]."""
        association, normalizer = held
        return recall(association, normalizer, dpfp(query))

    def project(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys [B, R, d], values [B, R, D] and what strengths are made of [B, R, 1]."""
        return self.k_proj(inputs), self.v_proj(inputs), self.beta_proj(inputs)

    def write(self, held: tuple[torch.Tensor, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held after a chunk whose write positions gave `inputs` [B, R, D]."""
        association, normalizer = held
        keys, values, strengths = self.project(inputs)
        with torch.autocast(association.device.type, enabled=False):
            keys, values, strengths = (x.to(association) for x in (keys, values, strengths))
            return store(association, normalizer, dpfp(keys), values, self.gate(strengths[..., 0]))


class BakaTokenAssociation(nn.Module):
    """Written by every token's input to a block, and read by every position beside attention.

    Under the key of the token before it, so that what followed a context is stored under that. The first token of a
    chunk writes nothing.
    """

    written_by = "tokens"

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.num_heads = config.num_associative_heads
        keys, values = self.num_heads * config.associative_dim, self.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, values, bias=False)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)
        self.beta_proj = nn.Linear(config.hidden_size, self.num_heads)
        self.gamma_proj = nn.Linear(config.hidden_size, self.num_heads)
        self.gate = GATES[config.associative_gate]
        initialise(config.hidden_size**-0.5, self.q_proj, self.k_proj, self.v_proj)
        initialise(0.0, self.o_proj, self.beta_proj, self.gamma_proj)
        # From a head that keeps 0.88 of its state over a chunk to one that keeps 0.99 of it over 1,600.
        self.gamma_proj.initial_bias = (2.0, 12.0)  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Queries begin as keys do: a token finds what followed it before, and what followed others like it.

        Where another's class has them made in another way, they stay as they are.
        """
        query, key = ((type(x), getattr(x, "initial_std", None), x.extra_repr()) for x in (self.q_proj, self.k_proj))
        if query == key and type(self.q_proj) is nn.Linear:
            init.copy_(self.q_proj.weight, self.k_proj.weight)

    def read(self, query: torch.Tensor, held: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What is stored under `query`, a product of `q_proj` [B, Q, H · d]: [B, Q, D]."""
        return self.o_proj(self.look_up(query, held))

    def look_up(self, query: torch.Tensor, held: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What `o_proj` takes, [B, Q, H · head_dim], arguments as in `read`."""
        (state,), dtype = held, query.dtype
        query = self.of_heads(query)
        query = F.normalize(query.to(at_least_float32(dtype)), dim=-1).to(dtype)
        if query.shape[2] <= FEW:
            found = (query[..., None].to(state) * state[:, :, None]).sum(-2).to(dtype)
        else:
            found = query @ state.to(dtype)
        return found.transpose(1, 2).flatten(2)

    def project(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys [B, n, H · d], values [B, n, H · head_dim], and what strengths and decay are made of [B, n, H]."""
        return self.k_proj(inputs), self.v_proj(inputs), self.beta_proj(inputs), self.gamma_proj(inputs)

    def write(self, held: tuple[torch.Tensor, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is held after a chunk whose text had the normed inputs `inputs` [B, n, D]."""
        (state,) = held
        products = self.project(inputs)
        with torch.autocast(state.device.type, enabled=False):
            keys, values, strengths, decay = (self.of_heads(x.to(state)) for x in products)
            keys = F.pad(F.normalize(keys[:, :, :-1], dim=-1), (0, 0, 1, 0))
            strengths, decay = self.gate(strengths[..., 0]), decay[..., 0].mean(-1).sigmoid()
            return (delta_rule(state, keys, values, strengths, decay),)

    def of_heads(self, products: torch.Tensor) -> torch.Tensor:
        """[B, T, H · ·] as [B, H, T, ·]."""
        return products.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def write_strength(association: Any, inputs: torch.Tensor) -> torch.Tensor:
    """[B], in float32 at least: the mean strength with which `inputs`, what `write` of one of the above takes, are
    written."""
    products = association.project(inputs)[2]
    return association.gate(products.to(at_least_float32(products.dtype))).mean((1, 2))


# A few vectors at once


def dpfp(x: torch.Tensor) -> torch.Tensor:
    """DPFP-3 (arXiv 2102.11174) of x [..., d]: 6d features, none below 0, scaled to length 1.

    With r = relu([x, -x]), they are r_i r_(i - j) for j = 1, 2, 3, indices modulo 2d. Unscaled they grow with the
    square of x, without bound, and a query that meets nothing of z would multiply what it finds by as much.
    """
    rectified = torch.cat([x, -x], dim=-1).to(at_least_float32(x.dtype)).relu()
    shifts = range(1, NUM_SHIFTS + 1)
    features = torch.cat([rectified * rectified.roll(shift, dims=-1) for shift in shifts], dim=-1)
    return F.normalize(features, dim=-1).to(x.dtype)


def recall(association: torch.Tensor, normalizer: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Aᵀφ / (z·φ + ε) of the features φ [B, Q, F] of queries: [B, Q, D], zero where nothing is stored.

    Args:
        association: A, [B, F, D].
        normalizer: z, [B, F].
        features: φ; in their dtype the products are, and the quotient in float32 at least.
    """
    wide = features.to(at_least_float32(features.dtype))
    total = torch.einsum("bqf,bf->bq", wide, normalizer.to(wide))[..., None] + EPSILON
    # Divided last: by ε alone, where nothing is stored, features would be more than float16 can say.
    return ((features @ association.to(features.dtype)).to(wide) / total).to(features.dtype)


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

    Where β is exactly 0 so is γ: what is not written leaves no trace.

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
        newness = (1 - known).clamp(0, 1) * (strengths > 0)
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
    right = torch.cat([strengths * values, scaled], dim=-1)
    maps = keys.mT @ UnitLowerSolve.apply((scaled @ keys.mT).tril(-1), right)
    while maps.shape[-3] > 1:
        if maps.shape[-3] % 2:
            maps = F.pad(maps, (0, 0, 0, 0, 0, 1))
        first, second = maps[..., ::2, :, :], maps[..., 1::2, :, :]
        maps = first + second - second[..., width:] @ first
    added, removed = maps[..., 0, :, :].split([width, maps.shape[-1] - width], dim=-1)
    state = decay[..., None, None] * state
    return state - removed @ state + added


class UnitLowerSolve(torch.autograd.Function):
    """x with (I + L) x = b, for strictly lower triangular L [..., m, m] and b [..., m, ·], m = 8, 16, 32, …

    By products of matrices alone, which any device is fast at, as it is not at substitution row by row.
    """

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        inverse = invert_unit_lower(lower)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad_solution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse, solution = ctx.saved_tensors
        grad_right = inverse.mT @ grad_solution
        return -grad_right @ solution.mT, grad_right


def invert_unit_lower(lower: torch.Tensor) -> torch.Tensor:
    """(I + L)⁻¹, for L as in `UnitLowerSolve`.

    A block D of 8 x 8 on the diagonal is nilpotent, D⁸ = 0, so its inverse is (I - D)(I + D²)(I + D⁴). Then two
    neighbours T₁, T₂ and what lies below them, L₂₁, become one of twice the size: T₂₁ = -T₂ L₂₁ T₁.
    """

    def blocks(size: int, offset: int) -> torch.Tensor:
        """Those of size x size on a diagonal of blocks, [..., N, size, size]."""
        tiled = lower.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        return tiled.diagonal(offset, -4, -2).movedim(-1, -3)

    diagonal = blocks(BLOCK, 0)
    squared = diagonal @ diagonal
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device)
    inverse = (identity - diagonal) @ (identity + squared)
    inverse = inverse + inverse @ (squared @ squared)
    while inverse.shape[-3] > 1:
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        below = -second @ blocks(inverse.shape[-1], -1)[..., ::2, :, :] @ first
        halves = torch.cat([first, torch.zeros_like(first)], dim=-1), torch.cat([below, second], dim=-1)
        inverse = torch.cat(halves, dim=-2)
    return inverse[..., 0, :, :]


ASSOCIATIONS: dict[str, type[nn.Module]] = {"memory": BakaMemoryAssociation, "tokens": BakaTokenAssociation}


def register_association(name: str) -> Callable[[Part], Part]:
    """A decorator for a class that `associative_write="name"` then stands for, a subclass of `BakaMemoryAssociation` or
    of `BakaTokenAssociation`: of that it has what is held, who writes and when it is read.

    Raises:
        ValueError: the class is neither, or the name is another's.
    """
    return register("associative_write", name, ASSOCIATIONS, (BakaMemoryAssociation, BakaTokenAssociation))
