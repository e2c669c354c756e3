"""BakaLLM read literally: one row, one chunk after another, every slot, float64, no cache and no cleverness.

    stream_i = read_i ‖ text_i with pauses ‖ write_i        S = R + n + P + R slots, pause p before text p·(n // P)
    read_0   = write_0 = m_0                                R learned vectors
    read_i   = f_read(m_i)                                  f: the solidifier
    write_i  = f_write(m_i), or m_0                         memory_write "carry", or "tokens"
    m_i+1    = last block's output at chunk i's write slots, with memory_norm its LN; memory_update "gate":
               g ⊙ m_i + (1 - g) ⊙ that, g = σ(W that + b)
    y        = x + attention(LN x) + mlp(LN x)              in every block; without parallel_residual
               h + mlp(LN' h) of h = x + attention(LN x)    LN: LayerNorm or RMSNorm, everywhere
    RoPE       previous stream at slots 0 … S-1, own stream at S … 2S-1; `allowed` says which slots see which

Nothing is shared with the package but the names of the config's fields and of the parameters. Everything is made of
differentiable torch operations, so the naive gradients are those of the formulas too.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
KeysValues = tuple[Tensor, Tensor]
Association = Sequence[Tensor]  # A [F, D] and z [F], or of each head S [d, head_dim]


@dataclass
class Reading:
    """What one row says: T text tokens, R memory tokens, a stream of S slots, L blocks."""

    logits: Tensor  # [T, V]
    hidden: list[Tensor]  # L + 1 of [T, D]: embeddings, blocks 1 … L-1, the last block after the final norm
    attentions: list[Tensor]  # L of [H, T, 2S]: over the previous stream's slots, then the own stream's
    memories: list[Tensor]  # m_0, m_1, … of [R, D], one more per full chunk
    streams: list[list[Tensor]]  # L of, for each chunk, the attention of all its positions, [H, positions, 2S]
    strengths: list[Tensor]  # for each full chunk and block with associations, of its writes: [n, heads] or [R, 1]


def elephant(x: Tensor) -> Tensor:
    return 1 / (1 + x.abs() ** 8)


SOLIDIFIERS: dict[str, Callable[..., Tensor]] = {}  # those of a test
ACTIVATIONS = {"elephant": elephant, "silu": F.silu, "gelu": F.gelu}


def allowed(query: int, key: int, num_memory: int, num_slots: int) -> bool:
    """Whether slot `query` of its stream sees slot `key` of 0 … 2S-1: the previous stream's slots, then its own."""
    if key < num_slots:
        return True
    key -= num_slots
    both_read = query < num_memory and key < num_memory
    query_writes = query >= num_slots - num_memory
    return key <= query or both_read or query_writes


@cache
def allowed_mask(length: int, has_previous: bool, num_memory: int, num_slots: int) -> Tensor:
    """[length, S + length] or [length, length]: `allowed` for the first `length` slots of a stream."""
    keys = [*range(num_slots if has_previous else 0), *range(num_slots, num_slots + length)]
    return torch.tensor([[allowed(q, k, num_memory, num_slots) for k in keys] for q in range(length)])


def rms_norm(config: Any, weights: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt() * weights[f"{name}.weight"]


def norm(config: Any, weights: Weights, name: str, x: Tensor) -> Tensor:
    if config.norm_type == "rmsnorm":
        return rms_norm(config, weights, name, x)
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)


def linear(weights: Weights, name: str, x: Tensor, bias: bool) -> Tensor:
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if bias else product


def mlp(config: Any, weights: Weights, name: str, x: Tensor) -> Tensor:
    up, gate = (linear(weights, f"{name}.{proj}_proj", x, config.mlp_bias) for proj in ("up", "gate"))
    return linear(weights, f"{name}.down_proj", up * ACTIVATIONS[config.hidden_act](gate), config.mlp_bias)


def frequency(rope: Mapping[str, Any], exponent: float) -> float:
    """The angle of one slot, for a pair of features: theta^-exponent, scaled as `rope` says."""
    plain = rope["rope_theta"] ** -exponent
    if rope["rope_type"] == "linear":
        return plain / rope["factor"]
    if rope["rope_type"] == "llama3":  # by the wavelength, as the authors of Llama 3.1 have written it
        wavelength, context = 2 * math.pi / plain, rope["original_max_position_embeddings"]
        if wavelength < context / rope["high_freq_factor"]:
            return plain
        if wavelength > context / rope["low_freq_factor"]:
            return plain / rope["factor"]
        smooth = context / wavelength - rope["low_freq_factor"]
        smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
        return (1 - smooth) * plain / rope["factor"] + smooth * plain
    return plain


def rotate(config: Any, x: Tensor, first_slot: int) -> Tensor:
    """RoPE (arXiv 2104.09864, rotate-half) of x [N, heads, head_dim] at slots first_slot, first_slot + 1, …"""
    length, _, head_dim = x.shape
    slots = torch.arange(first_slot, first_slot + length, dtype=x.dtype)
    frequencies = [frequency(config.rope_parameters, pair / head_dim) for pair in range(0, head_dim, 2)]
    angles = torch.outer(slots, torch.tensor(frequencies, dtype=x.dtype)).repeat(1, 2)[:, None]
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def attention(
    config: Any,
    weights: Weights,
    name: str,
    x: Tensor,
    previous: KeysValues | None,
    first_slot: int,
    mask: Tensor,
    first_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, KeysValues]:
    """Attention of x [N, D], at slots from `first_slot` on, to itself and to the previous stream at slots 0 … S-1.
    With the first block's values its own are mixed (arXiv 2410.17897).

    Returns the output [N, D], the weights [H, N, keys], and the own keys (never rotated) and values.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    query, own_key, own_value = (
        linear(weights, f"{name}.{proj}_proj", x, config.attention_bias).unflatten(-1, (count, head_dim))
        for proj, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    if config.qk_norm:
        query = rms_norm(config, weights, f"{name}.q_norm", query)
        own_key = rms_norm(config, weights, f"{name}.k_norm", own_key)
    if first_value is not None:
        share = 0.5 + weights[f"{name}.value_residual.weight"]
        own_value = (1 - share) * own_value + share * first_value
    key, value = rotate(config, own_key, first_slot), own_value
    if previous is not None:
        key = torch.cat([rotate(config, previous[0], 0), key])
        value = torch.cat([previous[1], value])
    key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", rotate(config, query, first_slot), key) / head_dim**0.5
    attended = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    output = torch.einsum("hqk,khd->qhd", attended, value).flatten(1)
    output = linear(weights, f"{name}.o_proj", output, config.attention_bias)
    return output, attended, (own_key, own_value)


def features(weights: Weights, name: str, x: Tensor) -> Tensor:
    """DPFP-3 (arXiv 2102.11174) of W x, of length 1: r_i r_(i - j) for j = 1, 2, 3, where r = relu of W x and -W x"""
    x = weights[f"{name}.weight"] @ x
    r = [max(number, 0 * number) for number in [*x, *-x]]
    products = torch.stack([r[i] * r[i - j] for j in (1, 2, 3) for i in range(len(r))])
    return products / products.norm() if products.any() else products


def recall(weights: Weights, name: str, x: Tensor, association: Association) -> Tensor:
    """Aᵀφ / (z·φ + 1e-5) of one position x [D]"""
    A, z = association
    phi = features(weights, f"{name}.q_proj", x)
    return A.T @ phi / (z @ phi + 1e-5)


def strength(config: Any, x: Tensor) -> Tensor:
    """β of a product: 1 / (1 + exp(-x)), or 1/2 + x/6 where that is from 0 to 1"""
    return (x / 6 + 0.5).clamp(0, 1) if config.associative_gate == "hard_sigmoid" else 1 / (1 + (-x).exp())


def store(config: Any, weights: Weights, name: str, written: Tensor, association: Association) -> Association:
    """A and z after a chunk whose write positions gave `written` [R, D] (ARMT, arXiv 2407.04841)"""
    A, z = after = association
    for o in written:
        k = features(weights, f"{name}.k_proj", o)
        there = A.T @ k / (z @ k + 1e-5)
        beta = strength(config, linear(weights, f"{name}.beta_proj", o, True))
        gamma = (1 - z @ k / (k @ k + 1e-5)).clamp(0, 1).detach() * (beta > 0)
        change = beta * (weights[f"{name}.v_proj.weight"] @ o - there)
        after = after[0] + torch.outer(k, change), after[1] + gamma * k
    return after


def heads_of(weights: Weights, name: str, x: Tensor, heads: int) -> list[Tensor]:
    return list((weights[f"{name}.weight"] @ x).chunk(heads))


def recall_in_heads(weights: Weights, name: str, x: Tensor, states: Association) -> Tensor:
    """W_o concat(q S) of one position x [D], whose queries have length 1"""
    queries = heads_of(weights, f"{name}.q_proj", x, len(states))
    recalled = [query / query.norm() @ state for query, state in zip(queries, states, strict=True)]
    return weights[f"{name}.o_proj.weight"] @ torch.cat(recalled)


def store_in_heads(config: Any, weights: Weights, name: str, text: Tensor, states: Association) -> Association:
    """The states after a chunk with the normed inputs `text` [n, D]: the gated delta rule (arXiv 2412.06464), each
    token under the key of the one before it"""
    gammas = linear(weights, f"{name}.gamma_proj", text.mean(0), True).sigmoid()
    states = [gamma * state for gamma, state in zip(gammas, states, strict=True)]
    for before, token in pairwise(text):
        keys = heads_of(weights, f"{name}.k_proj", before, len(states))
        values = heads_of(weights, f"{name}.v_proj", token, len(states))
        betas = strength(config, linear(weights, f"{name}.beta_proj", token, True))
        for head, (key, value, beta) in enumerate(zip(keys, values, betas, strict=True)):
            key = key / key.norm()
            states[head] = states[head] + beta * torch.outer(key, value - key @ states[head])
    return states


def block(
    config: Any,
    weights: Weights,
    name: str,
    x: Tensor,
    previous: KeysValues | None,
    first_slot: int,
    mask: Tensor,
    association: Association | None = None,
    first_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, KeysValues]:
    """y = x + attention(LN x) + mlp(LN x), or h + mlp(LN' h) of h = x + attention(LN x); associations are read by x
    before all that, or by LN x beside attention"""
    by_tokens = config.associative_write == "tokens"
    if association is not None and not by_tokens:
        x = x + torch.stack([recall(weights, f"{name}.association", position, association) for position in x])
    normed = norm(config, weights, f"{name}.input_layernorm", x)
    of_own = normed, previous, first_slot, mask, first_value
    out, attended, keys_values = attention(config, weights, f"{name}.self_attn", *of_own)
    if association is not None and by_tokens:
        out = out + torch.stack(
            [recall_in_heads(weights, f"{name}.association", position, association) for position in normed]
        )
    if not config.parallel_residual:
        x, out = x + out, 0
        normed = norm(config, weights, f"{name}.post_attention_layernorm", x)
    return x + out + mlp(config, weights, f"{name}.mlp", normed), attended, keys_values


def solidify(config: Any, weights: Weights, role: str, x: Tensor) -> Tensor:
    """f_read or f_write of the memory x [R, D]"""
    name = f"model.{role}_solidifier" if config.separate_solidifiers else "model.solidifier"
    match config.memory_solidifier:
        case "none":
            return x
        case "glu" | "gelephant" as kind:
            gate = x @ weights[f"{name}.gate_proj.weight"].T
            gate = gate.sigmoid() if kind == "glu" else elephant(gate)
            return x + (x @ weights[f"{name}.proj.weight"].T) * gate
        case "mlp":
            return x + mlp(config, weights, f"{name}.mlp", norm(config, weights, f"{name}.norm", x))
        case "layer":
            everything = torch.ones(len(x), len(x), dtype=torch.bool)
            return block(config, weights, name, x, None, 0, everything)[0]
    return SOLIDIFIERS[config.memory_solidifier](config, weights, name, x)


def gated(weights: Weights, memory: Tensor, written: Tensor) -> Tensor:
    gate = written @ weights["model.memory_update.gate_proj.weight"].T + weights["model.memory_update.gate_bias"]
    return torch.sigmoid(gate) * memory + torch.sigmoid(-gate) * written


def read(
    config: Any,
    weights: Weights,
    tokens: Sequence[int] | None = None,
    *,
    embeds: Tensor | None = None,
    memory: Tensor | None = None,
    detach_at: Collection[int] = (),
    update: Callable[[Tensor, Tensor], Tensor] = lambda memory, written: written,
) -> Reading:
    """Read one document from its first token: `tokens`, or their embeddings `embeds` [T, D].

    `memory` [R, D] seeds the stream with another stream's memory; the state entering a chunk in `detach_at`
    (memory and previous keys and values) is cut from the graph. `update` makes the next memory of the one that a chunk
    has read and of what it has written.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    text = embedding[torch.tensor(tokens)] if embeds is None else embeds.double()
    n, num_layers = config.chunk_size, config.num_hidden_layers
    num_memory, num_pauses = config.num_memory_tokens, config.num_pause_tokens
    num_slots = num_memory + n + num_pauses + num_memory
    pause_before = {p * (n // num_pauses) for p in range(num_pauses)}

    m_0 = weights["model.memory_tokens.weight"] if num_memory else text.new_zeros(0, config.hidden_size)
    m = m_0 if memory is None else memory.double()
    previous: list[KeysValues | None] = [None] * num_layers
    associations: list[Association | None] = [None] * num_layers
    for layer in range(num_layers):
        if config.associative_dim and (layer + 1) % config.associative_layer_interval == 0:
            shapes: list[tuple[int, ...]] = [
                (6 * config.associative_dim, config.hidden_size),
                (6 * config.associative_dim,),
            ]
            if config.associative_write == "tokens":
                shapes = [(config.associative_dim, config.head_dim)] * config.num_attention_heads
            associations[layer] = [text.new_zeros(shape) for shape in shapes]
    memories = [m]
    hidden: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
    attentions: list[list[Tensor]] = [[] for _ in range(num_layers)]
    streams: list[list[Tensor]] = [[] for _ in range(num_layers)]
    strengths: list[Tensor] = []

    for i, chunk in enumerate(text.split(n)):
        if i in detach_at:
            m = m.detach()
            previous = [kv and (kv[0].detach(), kv[1].detach()) for kv in previous]
            associations = [held and [tensor.detach() for tensor in held] for held in associations]

        learned = i == 0 and memory is None  # chunk 0 reads and writes m_0 itself; solidifiers are for what was written
        stream = list(m if learned else solidify(config, weights, "read", m))
        text_slots = []
        for t, token in enumerate(chunk):
            if t in pause_before:
                stream.append(weights["model.pause_token.weight"][0])
            text_slots.append(len(stream))
            stream.append(token)
        full = len(chunk) == n
        if full:
            carried = config.memory_write == "carry" and not learned
            stream.extend(solidify(config, weights, "write", m) if carried else m_0)

        x = torch.stack(stream)
        mask = allowed_mask(len(stream), previous[0] is not None, num_memory, num_slots)
        own: list[KeysValues | None] = []
        for layer in range(num_layers):
            hidden[layer].append(x[text_slots])
            name = f"model.layers.{layer}"
            before, held = x, associations[layer]
            first = own[0][1] if config.value_residual and layer else None
            x, attended, keys_values = block(config, weights, name, x, previous[layer], num_slots, mask, held, first)
            if full and held is not None:
                name = f"{name}.association"
                if config.associative_write == "tokens":
                    writers = norm(config, weights, f"model.layers.{layer}.input_layernorm", before[text_slots])
                    associations[layer] = store_in_heads(config, weights, name, writers, held)
                else:
                    writers = x[len(x) - num_memory :]
                    associations[layer] = store(config, weights, name, writers, held)
                products = [linear(weights, f"{name}.beta_proj", writer, True) for writer in writers]
                strengths.append(strength(config, torch.stack(products)))
            own.append(keys_values)
            unseen = num_slots if previous[layer] is None else 0, num_slots - len(stream)
            streams[layer].append(F.pad(attended, unseen))
            attentions[layer].append(streams[layer][-1][:, text_slots])
        hidden[num_layers].append(norm(config, weights, "model.norm", x[text_slots]))

        if full:
            written = x[len(x) - num_memory :]
            if config.memory_norm:
                written = norm(config, weights, "model.memory_norm", written)
            m = gated(weights, m, written) if config.memory_update == "gate" else update(m, written)
            memories.append(m)
            if config.use_xl_cache:
                previous = own

    final = torch.cat(hidden[-1])
    return Reading(
        logits=final @ weights.get("lm_head.weight", embedding).T,
        hidden=[torch.cat(states) for states in hidden],
        attentions=[torch.cat(attended, dim=1) for attended in attentions],
        memories=memories,
        streams=streams,
        strengths=strengths,
    )
