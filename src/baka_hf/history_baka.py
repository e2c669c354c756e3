"""What a state knows of the ids it has read: the first of each text, and the hash of all.

The hash goes on token by token, within CUDA graphs too, and goes back.
"""

from functools import cache, lru_cache

import torch

from .functions_baka import put_on
from .state_files_baka import NUM_HASHES, OPENING

# What was read is known by its polynomials modulo the largest primes below 2^31, so that products fit into 64 bits, at
# primitive roots drawn at random. (Modulo 2^64 every odd number makes a Thue-Morse text equal to its complement.)
PRIMES = (2147483647, 2147483629, 2147483587)
MULTIPLIERS = (1240014341, 754875954, 1984295915)


def hash_tokens(
    input_ids: torch.Tensor, real: torch.Tensor | None = None, start: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, 3] int64, what stands for the tokens [B, L] of each row where `real` [B, L] is True.

    It goes on from `start` [B, 3], that of what was read before. Texts of one length and one hash are met by nobody by
    accident, whatever pattern they have; but who wants to can compute them.
    """
    batch_size, length = input_ids.shape
    primes = _numbers(PRIMES, input_ids.device)
    values = input_ids.long() + 1
    start = hash_of_nothing(batch_size, input_ids.device) if start is None else start
    if length == 1 and real is None:
        return (start * _numbers(MULTIPLIERS, input_ids.device) + values) % primes
    powers = _powers(length, input_ids.device)
    if real is None:
        return (start * powers[length] + (values[:, :, None] * powers[:length].flip(0) % primes).sum(1)) % primes
    after = real.flip(1).cumsum(1).flip(1) - real.long()
    terms = (values * real)[:, :, None] * powers[after] % primes
    return (start * powers[real.sum(1)] + terms.sum(1)) % primes


def hash_before(history: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The hash [B, 3] of what was read before the last tokens `input_ids` [B, L] of `history` [B, 3]."""
    primes, count = _numbers(PRIMES, input_ids.device), input_ids.shape[1]
    inverses = [pow(m, -count, prime) for m, prime in zip(MULTIPLIERS, PRIMES, strict=True)]
    rest = history - hash_tokens(input_ids)
    return rest % primes * torch.tensor(inverses, device=input_ids.device) % primes


def hash_of_nothing(batch_size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(batch_size, NUM_HASHES, dtype=torch.int64, device=device)


@lru_cache(maxsize=8)
def _powers(length: int, device: torch.device) -> torch.Tensor:
    """The multipliers' powers 0 … `length`, [length + 1, 3], in each step twice as many."""
    with torch.inference_mode(False):
        primes, factors = _numbers(PRIMES, device), _numbers(MULTIPLIERS, device)
        powers = torch.ones_like(primes)[None]
        while len(powers) <= length:
            powers = torch.cat([powers, powers * factors % primes])
            factors = factors * factors % primes
        return powers[: length + 1]


@cache
def _numbers(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Constants that stay where CUDA graphs have met them."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def opening_of_nothing(batch_size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(batch_size, OPENING, dtype=torch.int64, device=device)


def opening_with(
    opening: torch.Tensor, num_tokens: torch.Tensor, input_ids: torch.Tensor, real: torch.Tensor | None
) -> torch.Tensor:
    """The first ids [B, OPENING] of each text, which has `num_tokens` [B] after the ids [B, L] where `real` is True."""
    device = input_ids.device
    real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else put_on(device, real)
    # Counted from the end: a text may have begun within the call, and what was before it is left out.
    places = put_on(device, num_tokens)[:, None] - real.flip(1).cumsum(1).flip(1)
    places = torch.where(real & (places >= 0) & (places < OPENING), places, OPENING)
    opening = torch.nn.functional.pad(opening.to(device), (0, 1))  # one more, for what is left out
    return opening.scatter(1, places, input_ids.long())[:, :OPENING]
