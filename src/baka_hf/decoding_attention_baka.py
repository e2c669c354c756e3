"""Attention of a step of many rows, by a kernel that does not read what a row's mask hides.

PyTorch's kernels read all keys and values, whatever a mask says of them. Rows that are at different places of their
chunks, some in their first one, see less than half of their slots; and to read these is most of a step of many rows.
"""

import torch

try:  # where PyTorch has CUDA, it has Triton
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# From so many rows on it is faster, if they see no more than such a share of what PyTorch's kernel would read.
FEWEST_ROWS = 128
LARGEST_SHARE = 3 / 4

KEYS_TOGETHER = 64  # that are read or skipped
DEVICES = ("cuda",)


def can_attend_seen(dtype: torch.dtype, device: torch.device, num_rows: int) -> bool:
    """Whether the kernel, which computes in float32, is there for these rows, and so many of them that it pays."""
    return triton is not None and device.type in DEVICES and dtype != torch.float64 and num_rows >= FEWEST_ROWS


def attend_seen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention [B, H, Q, head_dim] of a step's queries, one or two in a row, which see something each.

    Args:
        query: [B, H, Q, head_dim], each head_dim in one piece of memory, as those of `key` and `value`.
        key, value: [B, H_kv, K, head_dim], lying alike in memory.
        mask: [B, 1, Q, K], contiguous, 0 where a query sees a key and -inf elsewhere.
        scale: what scores are multiplied by.
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(query):
        _attend_seen[batch_size * num_heads, num_queries](
            *(query, key, value, mask, output, scale, key.shape[2], head_dim),
            *(*query.stride()[:3], *key.stride()[:3]),
            num_heads=num_heads,
            group=num_heads // key.shape[1],
            width=triton.next_power_of_2(head_dim),
            block=KEYS_TOGETHER,
            num_warps=1,
        )
    return output


if triton is not None:

    @triton.jit
    def _attend_seen(  # type: ignore[no-untyped-def]  # Triton takes an annotation for a type of its own
        queries,
        keys,
        values,
        masks,
        outputs,
        scale,
        num_keys,
        head_dim,
        query_row,
        query_head,
        query_step,
        key_row,
        key_head,
        key_step,
        num_heads: tl.constexpr,
        group: tl.constexpr,
        width: tl.constexpr,
        block: tl.constexpr,
    ):
        """A query of a row and head: blocks of keys one after another, with the softmax of all so far."""
        row, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
        position = tl.program_id(1)
        queries += row * query_row + head * query_head + position * query_step
        keys += row * key_row + (head // group) * key_head
        values += row * key_row + (head // group) * key_head
        masks += (row * tl.num_programs(1) + position) * num_keys
        outputs += ((row * num_heads + head) * tl.num_programs(1) + position) * head_dim

        places = tl.arange(0, width)
        is_there = places < head_dim
        query = tl.load(queries + places, mask=is_there, other=0.0).to(tl.float32) * scale
        largest, total = float("-inf"), 0.0
        result = tl.zeros([width], tl.float32)
        for start in range(0, num_keys, block):
            slots = start + tl.arange(0, block)
            hides = tl.load(masks + slots, mask=slots < num_keys, other=float("-inf")).to(tl.float32)
            sees = hides == 0.0
            if tl.max(sees.to(tl.int32)) > 0:
                where = slots[:, None] * key_step + places[None, :]
                is_read = sees[:, None] & is_there[None, :]
                key = tl.load(keys + where, mask=is_read, other=0.0).to(tl.float32)
                value = tl.load(values + where, mask=is_read, other=0.0).to(tl.float32)
                scores = tl.where(sees, tl.sum(key * query[None, :], 1), float("-inf"))
                new_largest = tl.maximum(largest, tl.max(scores))
                weights, before = tl.exp(scores - new_largest), tl.exp(largest - new_largest)
                total = total * before + tl.sum(weights)
                result = result * before + tl.sum(weights[:, None] * value, 0)
                largest = new_largest
        tl.store(outputs + places, (result / total).to(outputs.dtype.element_ty), mask=is_there)


__all__ = ["attend_seen", "can_attend_seen"]
