"""What a state knows of the ids it has read: hashes that go on, go back, and are met by no other text."""

import pytest
import torch
from helpers import logits_of, random_tokens, tiny_config, tiny_model

from baka_hf.history_baka import MULTIPLIERS, PRIMES, hash_tokens


def polynomials(tokens: list[int]) -> list[int]:
    """The hash by its definition, in integers of any size."""
    values = [0, 0, 0]
    for token in tokens:
        steps = zip(values, MULTIPLIERS, PRIMES, strict=True)
        values = [(value * multiplier + token + 1) % prime for value, multiplier, prime in steps]
    return values


def test_the_hash_of_what_was_read() -> None:
    """In one call or many, with what is masked left out, in any dtype of ids; and cropped it is what it was before."""
    ids = torch.randint(2**30, (3, 70), generator=torch.Generator().manual_seed(0))
    real = torch.rand(3, 70) < 0.7
    found = hash_tokens(ids, real)
    assert found.tolist() == [polynomials(row[kept].tolist()) for row, kept in zip(ids, real, strict=True)]
    assert hash_tokens(ids[:, :1]).tolist() == [polynomials(row[:1].tolist()) for row in ids]
    in_pieces = None
    for piece, mask in zip(ids.split([1, 40, 1, 28], 1), real.split([1, 40, 1, 28], 1), strict=True):
        in_pieces = hash_tokens(piece, mask, in_pieces)
    assert in_pieces is not None and torch.equal(in_pieces, found)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(hash_tokens((ids % 256).to(dtype).to(torch.int64)), hash_tokens((ids % 256).to(dtype)))

    model = tiny_model(tiny_config())
    tokens, cache = random_tokens(model.config, 2, 17), model.new_cache(2)
    cache.activate_past_recording()
    for part in tokens.split(4, dim=1):
        logits_of(model, part, cache)
    for count in (1, 3, 9):
        cache.crop(-count)
        assert cache._history is not None
        assert cache._history.tolist() == [polynomials(row[: cache.get_seq_length()].tolist()) for row in tokens]


def is_primitive(root: int, prime: int) -> bool:
    """Whether all numbers from 1 to prime - 1 are powers of `root`."""
    rest, factors = prime - 1, set()
    for factor in range(2, int(prime**0.5) + 1):
        while rest % factor == 0:
            rest //= factor
            factors.add(factor)
    return all(pow(root, (prime - 1) // factor, prime) != 1 for factor in factors | {rest} - {1})


def test_powers_of_the_multipliers_do_not_come_back() -> None:
    """Which is what would make two places in a text alike: powers of a primitive root are all there are."""
    for root, prime in zip(MULTIPLIERS, PRIMES, strict=True):
        assert all(prime % factor for factor in range(2, int(prime**0.5) + 1)) and is_primitive(root, prime)


@pytest.mark.parametrize("pair", [(0, 1), (3, 4), (5, 17), (100, 31999), (0, 2**30)], ids=str)
def test_texts_with_a_pattern_have_hashes_of_their_own(pair: tuple[int, int]) -> None:
    """Thue-Morse texts, which are equal to their complements modulo 2^64, and other regular texts over two ids."""
    marks = torch.zeros(1, dtype=torch.int64)
    while len(marks) < 4096:
        marks = torch.cat([marks, 1 - marks])
    texts = {}
    for length in (2, 64, 1024, 4096):
        steps = torch.arange(length)
        rows = [marks[:length], 1 - marks[:length], steps % 2, (steps + 1) % 2, steps * 0, steps * 0 + 1]
        rows += [(steps == place).long() for place in range(0, length, 1 + length // 50)]
        rows += [(steps < place).long() for place in range(2, length, 1 + length // 50)]
        hashes = hash_tokens(torch.tensor(pair)[torch.stack(rows)])
        for column in hashes.unbind(1):  # each of the three alone tells them apart
            assert len(column.unique()) == len({tuple(row.tolist()) for row in rows})
        texts[length] = hashes
    short = torch.cartesian_prod(*[torch.tensor(pair)] * 14)
    assert len(hash_tokens(short).unique(dim=0)) == 2**14


def test_a_thue_morse_text_is_not_taken_for_its_complement() -> None:
    """A text never read is refused, where its hash modulo 2^64 was that of the history."""
    model = tiny_model(tiny_config(num_hidden_layers=1))
    marks = torch.tensor([[bin(number).count("1") % 2 for number in range(1024)]])
    cache = model.new_cache()
    logits_of(model, marks + 3, cache)
    with pytest.raises(ValueError, match="not what the state has read"):
        model.generate(torch.cat([4 - marks, marks[:, :2]], dim=1), cache=cache, max_new_tokens=1)
