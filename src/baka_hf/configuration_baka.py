"""The configuration of BakaLLM: every variant of the architecture is a choice of these fields."""

from difflib import get_close_matches
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .memory_baka import MEMORY_UPDATES
from .part_files_baka import described, save_parts
from .parts_baka import REGISTERED, check_parts

AUTO_MAP = {
    "AutoConfig": "configuration_baka.BakaConfig",
    "AutoModel": "modeling_baka.BakaModel",
    "AutoModelForCausalLM": "modeling_baka.BakaForCausalLM",
    # transformers scores typed decisions by a language model's next-token logits, and `transformers serve` (5.24) finds
    # a checkpoint's own code by this entry alone.
    "AutoModelForDecision": "modeling_baka.BakaForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_baka.BakaForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_baka.BakaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_baka.BakaForTokenClassification",
}
MEMORY_WRITES = ("carry", "tokens")
MEMORY_SOLIDIFIERS = ("none", "glu", "gelephant", "mlp", "layer")
ASSOCIATIVE_WRITES = ("memory", "tokens")
ASSOCIATIVE_GATES = ("sigmoid", "hard_sigmoid")
PAUSE_PLACEMENTS = ("fixed", "random")
NORM_TYPES = ("layernorm", "rmsnorm")
# The kinds of RoPE whose angles do not depend on a text's length, and what each is told beside `rope_theta`.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Fields that say more of a part, by the one that gives its size.
DETAILS: dict[str, tuple[str, ...]] = {
    "num_memory_tokens": ("memory_update", "memory_solidifier", "separate_solidifiers"),
    "associative_dim": (
        "associative_write",
        "associative_gate",
        "associative_write_cost",
        "associative_layer_interval",
    ),
}
ADDED = "If other code added it before the checkpoint was saved, that has to be done before loading too."

# What models were before anybody could choose. A `config.json` that lacks a field means this, for a version wrote it
# that did not have it yet, and the diary's rungs are made of it. Unlike the defaults below it never changes: it grows
# with each new field. None: derived.
ORIGINALLY: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "elephant",
    "norm_type": "layernorm",
    "layer_norm_eps": 1e-5,
    "parallel_residual": True,
    "qk_norm": False,
    "value_residual": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "residual_initializer_range": None,
    "rope_parameters": None,
    "chunk_size": 512,
    "num_memory_tokens": 16,
    "memory_write": "carry",
    "memory_update": "replace",
    "memory_solidifier": "none",
    "separate_solidifiers": False,
    "memory_norm": False,
    "associative_dim": 0,
    "associative_write": "memory",
    "associative_gate": "sigmoid",
    "associative_write_cost": 0.0,
    "associative_layer_interval": 1,
    "num_pause_tokens": 8,
    "pause_placement": "fixed",
    "use_xl_cache": True,
    "bptt_chunks": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# The diary's ladder: what each rung says. A part that it does not name has a size, which may be any but 0.
RUNGS: dict[str, dict[str, Any]] = {
    "pristine": dict(hidden_act="silu", use_xl_cache=False, num_pause_tokens=0, num_memory_tokens=0),
    "elephant": dict(hidden_act="elephant", use_xl_cache=False, num_pause_tokens=0, num_memory_tokens=0),
    "xl": dict(hidden_act="elephant", use_xl_cache=True, num_pause_tokens=0, num_memory_tokens=0),
    "pause": dict(hidden_act="elephant", use_xl_cache=True, num_memory_tokens=0),
    "tokens": dict(hidden_act="elephant", use_xl_cache=True, memory_write="tokens"),
    "carry": dict(hidden_act="elephant", use_xl_cache=True, memory_write="carry"),
}


class BakaConfig(PreTrainedConfig):
    r"""
    Configuration of a BakaLLM, a decoder-only language model that reads text in chunks and carries memory tokens
    (Recurrent Memory Transformer, arXiv 2207.06881) and the previous chunk's keys and values (Transformer-XL,
    arXiv 1901.02860) from chunk to chunk.

    With n = `chunk_size`, R = `num_memory_tokens` and P = `num_pause_tokens`, one chunk is a stream of
    S = R + n + P + R positions: read memory, the text with its pauses, write memory.

    Args:
        vocab_size (`int`, defaults to 32000): Number of token ids.
        hidden_size (`int`, defaults to 768): Width D of the residual stream.
        intermediate_size (`int`, defaults to 3072): Width of the gated feed-forward layers.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 12): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key and value heads (grouped-query attention). It divides
            `num_attention_heads`, which is the default.
        head_dim (`int`, *optional*): Width of a head, even (RoPE turns pairs). Defaults to
            `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): Gate of the feed-forward layers: any name in
            `transformers.activations.ACT2FN`, or the diary's `"elephant"`, 1 / (1 + |x|^8) (arXiv 2310.01365).
        norm_type (`str`, defaults to `"layernorm"`): Norm of the blocks, the memory, the solidifiers and the output:
            `"layernorm"`, with weight and bias, or `"rmsnorm"` (arXiv 1910.07467), with a weight alone.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every norm.
        parallel_residual (`bool`, defaults to `True`): Attention and MLP read one norm, side by side. `False`: the MLP
            reads what attention has added to, by a norm of its own, as in Llama.
        qk_norm (`bool`, defaults to `True`): RMSNorm of each head's queries and keys before RoPE, as in Qwen3.
        value_residual (`bool`, defaults to `True`): Each block but the first attends to a mean of its own values and
            the first block's, with a learned share of these, 1/2 at first (arXiv 2410.17897).
        attention_bias (`bool`, defaults to `False`): Biases of attention's four projections.
        mlp_bias (`bool`, defaults to `False`): Biases of the feed-forward layers.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        residual_initializer_range (`float`, *optional*, defaults to 0.0): That of the weights whose products a block
            adds to the residual stream, `o_proj` and `down_proj`; 0: each block is the identity at first. `None`:
            `initializer_range`.
        rope_parameters (`dict`, *optional*): `{"rope_type": "default", "rope_theta": 10000.0}`, or of type `"linear"`
            or `"llama3"` with what transformers has for these. Positions are re-based every chunk and stay below 2S,
            so the types whose angles depend on a length are refused.
        chunk_size (`int`, defaults to 512): Tokens of text in a chunk.
        num_memory_tokens (`int`, defaults to 16): Memory vectors; 0 for none.
        memory_write (`str`, defaults to `"carry"`): What stands at the write positions of a chunk: `"carry"`, the
            memory of the chunks before it, or `"tokens"`, the learned vectors again (an ablation).
        memory_update (`str`, defaults to `"replace"`): What becomes of a memory when a chunk has written: a name in
            `memory_baka.MEMORY_UPDATES`, where code can add others. `"replace"`: what was written; its norm has no
            bound without `memory_norm`. `"gate"`: a gated mean of what it was and what was written, normed; it is
            bounded, and kept in float32 in models of any dtype.
        memory_solidifier (`str`, defaults to `"none"`): What a memory passes through on its way into the next
            chunk: `"none"`, `"glu"`, `"gelephant"`, `"mlp"` or `"layer"`.
        separate_solidifiers (`bool`, defaults to `False`): One solidifier for reading and one for writing.
        memory_norm (`bool`, defaults to `True`): A norm of what is written to memory. `memory_update="gate"` needs it.
        associative_dim (`int`, defaults to 0): Width of the keys of an associative memory, a matrix that blocks keep;
            0 for none.
        associative_write (`str`, defaults to `"memory"`): What writes to it when a chunk is full: `"memory"`, the
            blocks' outputs at the write positions of the memory vectors (ARMT, arXiv 2407.04841), or `"tokens"`, every
            token of the text, in each of `num_attention_heads` heads (the gated delta rule, arXiv 2412.06464).
        associative_gate (`str`, defaults to `"sigmoid"`): What makes the strength of a write of a product: `"sigmoid"`,
            or `"hard_sigmoid"`, which can be exactly 0.
        associative_write_cost (`float`, defaults to 0.0): In training a language model's loss grows by so much times
            the mean strength of writes, `write_strength` of its output.
        associative_layer_interval (`int`, defaults to 1): Every so many blocks one has an associative memory: of 1, 2,
            3, … counted from 1, those that it divides.
        num_pause_tokens (`int`, defaults to 0): Pauses in a chunk (arXiv 2310.02226), at most `chunk_size`.
        pause_placement (`str`, defaults to `"fixed"`): `"fixed"`, before every (n // P)-th token, or `"random"`
            while training, unless dropout is switched off.
        use_xl_cache (`bool`, defaults to `True`): Attend to the previous chunk's keys and values.
        bptt_chunks (`int`, *optional*): Gradients reach exactly this many chunks before the one a loss stands in, and
            none from before the call; each chunk is then read up to `bptt_chunks` + 1 times. `None` for all chunks.
        tie_word_embeddings (`bool`, defaults to `False`): One matrix for `embed_tokens` and `lm_head`.
        use_cache (`bool`, defaults to `True`): Return the recurrent state when not training.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special token ids.

    `config.json` holds every field, and one that it lacks is read as it was before there was a choice.

    Raises:
        ValueError: a field has a value outside what is allowed; the message names the field and the value. Or the name
            of a field is spelt almost like one of these; other names are kept, as with every config.
    """

    model_type = "baka"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - a class attribute of every HF config
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in below
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    norm_type: str = "layernorm"
    layer_norm_eps: float = 1e-5
    parallel_residual: bool = True
    qk_norm: bool = True
    value_residual: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    residual_initializer_range: float | None = 0.0
    rope_parameters: dict = None  # type: ignore[assignment]
    chunk_size: int = 512
    num_memory_tokens: int = 16
    memory_write: str = "carry"
    memory_update: str = "replace"
    memory_solidifier: str = "none"
    separate_solidifiers: bool = False
    memory_norm: bool = True
    associative_dim: int = 0
    associative_write: str = "memory"
    associative_gate: str = "sigmoid"
    associative_write_cost: float = 0.0
    associative_layer_interval: int = 1
    num_pause_tokens: int = 0
    pause_placement: str = "fixed"
    use_xl_cache: bool = True
    bptt_chunks: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Every Auto class must find its model in a checkpoint, whichever of them was saved.
        own = {"AutoConfig": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}
        kwargs.setdefault("auto_map", AUTO_MAP | own)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and _is_int(self.hidden_size, 1) and _is_int(self.num_attention_heads, 1):
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size` must be a multiple of `num_attention_heads` ({self.num_attention_heads}) when "
                    f"`head_dim` is not given, got {self.hidden_size}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Before transformers fills in what the type lacks:
        self._validate_rope(kwargs.get("rope_scaling") or self.rope_parameters)
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # transformers completes it in place
        super().__post_init__(**kwargs)
        self.validate_architecture()
        # Each process norms and mixes its own heads. What a plan names in vain is a warning.
        whole = ["q_norm", "k_norm"] * self.qk_norm + ["value_residual"] * self.value_residual
        names = [f"layers.*.self_attn.{name}" for name in whole]
        self.base_model_tp_plan = self.base_model_tp_plan | dict.fromkeys(names, "replicated_with_grad_allreduce")

    @classmethod
    def rung(cls, name: str, /, **fields: Any) -> "BakaConfig":
        """A rung of the diary's ladder, the same whatever the defaults have become.

        Args:
            name: "pristine", no memory, no pauses, no XL cache, a gate of silu; "elephant", the same with its gate;
                "xl" adds the XL cache, "pause" the pauses, "tokens" memory that is written anew, and "carry" is the
                formula of the Recurrent Memory Transformer.
            fields: sizes, and whatever a rung does not speak of.

        Raises:
            ValueError: there is no such rung, or a field would make another one of it: one of those that `RUNGS` gives
                it has another value, or a part that it has is given a size of 0.
        """
        if name not in RUNGS:
            raise ValueError(f"`rung` must be one of {', '.join(RUNGS)}, got {name!r}.")
        rung = RUNGS[name]
        for field, value in fields.items():
            if value != rung.get(field, value):
                raise ValueError(f"`{field}` must be {rung[field]!r} on the rung {name!r}, got {value!r}.")
            if value == 0 and field in ("num_memory_tokens", "num_pause_tokens") and field not in rung:
                raise ValueError(f"`{field}` must be at least 1 on the rung {name!r}, got {value!r}.")
        return cls(**ORIGINALLY | rung | fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As every config's; raises a `ValueError` for a config of another architecture or class."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"expected a checkpoint of model_type {cls.model_type!r}, got {model_type!r}: its weights are those of "
                "another architecture, and none are converted on loading. Load it with the class of its own "
                f"(AutoModelForCausalLM), or begin with new weights: a model made from a {cls.__name__}."
            )
        auto_map = config_dict.get("auto_map") or {}
        found = auto_map.get("AutoConfig", cls.__name__).rpartition(".")[2]
        if cls.__name__ == "BakaConfig" != found:
            raise ValueError(
                f"expected a checkpoint of BakaConfig, got one of {found}, which has code of its own. Load it with its "
                "own classes, or with trust_remote_code=True in a process that has not imported baka_hf. Both get "
                f"along in one process if {found} has a `model_type` of its own."
            )
        for name in kwargs:
            cls._refuse_misspelt(name)
        return super().from_dict(ORIGINALLY | config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_diff_dict(self) -> dict[str, Any]:
        """What a file holds: all that differs from transformers' defaults, every field of the architecture, and where
        others' parts are."""
        fields = {name: value for name, value in self.to_dict().items() if name in ORIGINALLY}
        return described(super().to_diff_dict() | fields, self, AUTO_MAP)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As of every config, with the code of others' parts that it names.

        Raises:
            ValueError: a file of that code cannot stand in a checkpoint, see `part_files_baka`.
        """
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        save_parts(self, save_directory, AUTO_MAP)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            self._refuse_misspelt(name)
        super().__setattr__(name, value)

    @classmethod
    def _refuse_misspelt(cls, name: str) -> None:
        """Raise a `ValueError` for a name that is almost a field's.

        Ids of special tokens differ by a letter and are everybody's to name. No other name that transformers gives
        comes as close to one of ours, but for those that mean the same in another architecture (`layer_norm_epsilon`).
        """
        if name.startswith("_") or name.endswith("_token_id") or hasattr(cls, name):
            return
        fields = [field for field in ORIGINALLY if not field.endswith("_token_id")]
        for field in get_close_matches(name, fields, n=1, cutoff=0.85):
            raise ValueError(f"there is no field `{name}` in {cls.__name__}. Did you mean `{field}`?")

    # transformers' own ask for `max_position_embeddings`, and there is no longest text. What types need, we check.

    def standardize_rope_params(self) -> None:
        self.rope_parameters.setdefault("rope_type", self.rope_parameters.get("type", "default"))

    def _validate_llama3_rope_parameters(self, rope_parameters: dict, ignore_keys: set | None = None) -> None:
        pass

    @property
    def stream_length(self) -> int:
        """S = R + n + P + R, the positions of one chunk's stream."""
        return 2 * self.num_memory_tokens + self.chunk_size + self.num_pause_tokens

    @property
    def num_associative_heads(self) -> int:
        """Of an associative memory that tokens write; 0 of all others."""
        return self.num_attention_heads if self.associative_dim and self.associative_writers == "tokens" else 0

    @property
    def associative_writers(self) -> str:
        """Who writes to an associative memory, "memory" or "tokens"; a registered one says so itself."""
        part = REGISTERED["associative_write"].get(self.associative_write)
        return getattr(part, "written_by", self.associative_write)

    @property
    def rope(self) -> tuple[str, float, dict[str, float]]:
        """The type of RoPE, its theta, and the numbers that `ROPE_TYPES` names for the type."""
        found = self.rope_parameters
        rope_type = found.get("rope_type", found.get("type", "default"))
        return rope_type, float(found["rope_theta"]), {name: float(found[name]) for name in ROPE_TYPES[rope_type]}

    @property
    def uses_random_pauses(self) -> bool:
        """Whether a chunk's pauses may stand elsewhere than at their fixed positions."""
        return self.pause_placement == "random" and self.num_pause_tokens > 1

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for the first field whose value is not allowed."""
        check_parts(self)
        for name, least in (
            ("vocab_size", 1),
            ("hidden_size", 1),
            ("intermediate_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("num_key_value_heads", 1),
            ("head_dim", 2),
            ("chunk_size", 1),
            ("num_memory_tokens", 0),
            ("associative_dim", 0),
            ("associative_layer_interval", 1),
            ("num_pause_tokens", 0),
        ):
            check_integers(least, **{name: getattr(self, name)})
        if self.bptt_chunks is not None and not _is_int(self.bptt_chunks, 1):
            raise ValueError(f"`bptt_chunks` must be None or an integer of at least 1, got {self.bptt_chunks!r}.")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        value = self.associative_write_cost
        if not _is_number(value) or value < 0:
            raise ValueError(f"`associative_write_cost` must be a number of at least 0, got {value!r}.")
        value = self.residual_initializer_range
        if value is not None and (not _is_number(value) or value < 0):
            raise ValueError(f"`residual_initializer_range` must be None or a number of at least 0, got {value!r}.")
        for name, originally in ORIGINALLY.items():
            if isinstance(originally, bool) and not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        for name, allowed in (
            ("norm_type", NORM_TYPES),
            ("memory_write", MEMORY_WRITES),
            ("memory_update", MEMORY_UPDATES),
            ("memory_solidifier", MEMORY_SOLIDIFIERS),
            ("associative_write", ASSOCIATIVE_WRITES),
            ("associative_gate", ASSOCIATIVE_GATES),
            ("pause_placement", PAUSE_PLACEMENTS),
        ):
            names = tuple(dict.fromkeys([*allowed, *REGISTERED.get(name, ())]))
            if getattr(self, name) not in names:
                raise ValueError(f"`{name}` must be one of {', '.join(names)}, got {getattr(self, name)!r}. {ADDED}")
        names = ("elephant", *REGISTERED["hidden_act"])
        if not isinstance(self.hidden_act, str) or (self.hidden_act not in names and self.hidden_act not in ACT2FN):
            raise ValueError(
                f"`hidden_act` must be {' or '.join(map(repr, names))} or a name in transformers' ACT2FN "
                f"({', '.join(ACT2FN)}), got {self.hidden_act!r}. {ADDED}"
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, because RoPE turns pairs of features, got {self.head_dim}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}."
            )
        if self.num_pause_tokens > self.chunk_size:
            raise ValueError(
                f"`num_pause_tokens` must be at most `chunk_size` ({self.chunk_size}), got {self.num_pause_tokens}."
            )
        if self.separate_solidifiers and self.memory_solidifier == "none":
            raise ValueError("`separate_solidifiers` must be False when `memory_solidifier` is 'none', got True.")
        if MEMORY_UPDATES[self.memory_update].needs_norm and not self.memory_norm:
            raise ValueError(f"`memory_norm` must be True when `memory_update` is {self.memory_update!r}, got False.")
        if self.associative_dim and self.associative_writers == "memory" and not self.num_memory_tokens:
            raise ValueError(
                "`associative_write` must be 'tokens' when `num_memory_tokens` is 0, got "
                f"{self.associative_write!r}: there are no memory vectors to write with."
            )
        if self.associative_layer_interval > self.num_hidden_layers:
            raise ValueError(
                f"`associative_layer_interval` must be at most `num_hidden_layers` ({self.num_hidden_layers}), got "
                f"{self.associative_layer_interval}."
            )
        # Unless it is the default: who asks for no memory need not know all that is done with one.
        for size, names in DETAILS.items():
            for name in () if getattr(self, size) else names:
                value, nothing = getattr(self, name), ORIGINALLY[name]
                if value not in (nothing, getattr(type(self), name)):
                    raise ValueError(f"`{name}` must be {nothing!r} when `{size}` is 0, got {value!r}.")

        self._validate_rope(self.rope_parameters)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if name == "eos_token_id" and isinstance(value, list | tuple) else [value]:
                if token is not None and not (_is_int(token, 0) and token < self.vocab_size):
                    raise ValueError(f"`{name}` must be None or a token id below {self.vocab_size}, got {value!r}.")

    def _validate_rope(self, rope_parameters: Any) -> None:
        if rope_parameters is None:
            return
        if not isinstance(rope_parameters, dict):
            raise ValueError(f"`rope_parameters` must be a dict, got {rope_parameters!r}.")
        rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
        if rope_type not in tuple(ROPE_TYPES):
            raise ValueError(
                f"`rope_parameters` must have a rope_type of {', '.join(ROPE_TYPES)}, got {rope_type!r}: positions are "
                "re-based every chunk and never grow, so there is no length for angles to depend on."
            )
        names = ("rope_theta", *ROPE_TYPES[rope_type])
        if unknown := rope_parameters.keys() - {"rope_type", "type", *names}:
            raise ValueError(
                f"`rope_parameters` of type {rope_type} may hold {', '.join(names)}, got {sorted(unknown)}."
            )
        for name in names:
            value: Any = rope_parameters.get(name, 1.0 if name == "rope_theta" else None)
            if not _is_number(value) or value <= 0:
                raise ValueError(
                    f"`rope_parameters` of type {rope_type} must have a positive number {name}, got {value!r}."
                )
        if rope_type == "llama3" and rope_parameters["low_freq_factor"] >= rope_parameters["high_freq_factor"]:
            raise ValueError(
                f"`rope_parameters` must have a low_freq_factor below high_freq_factor, got {rope_parameters!r}."
            )


def check_integers(least: int = 1, /, **values: object) -> None:
    """Raise a `ValueError` if one of the values that are named is no integer of at least `least`."""
    for name, value in values.items():
        if not _is_int(value, least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


BakaConfig.register_for_auto_class()

__all__ = ["BakaConfig"]
