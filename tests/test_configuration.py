"""BakaConfig: what it holds, what it refuses, and that it survives being written to a file."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import CONFIGS, LLAMA3, tiny_config
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from baka_hf import BakaConfig, BakaModel
from baka_hf.configuration_baka import ORIGINALLY
from baka_hf.memory_baka import MEMORY_UPDATES, BakaMemoryUpdate

# The contract of the public interface, field by field.
DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    hidden_act="silu",
    norm_type="layernorm",
    layer_norm_eps=1e-5,
    parallel_residual=True,
    qk_norm=True,
    value_residual=True,
    attention_bias=False,
    mlp_bias=False,
    initializer_range=0.02,
    residual_initializer_range=0.0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    chunk_size=512,
    num_memory_tokens=16,
    memory_write="carry",
    memory_update="replace",
    memory_solidifier="none",
    separate_solidifiers=False,
    memory_norm=True,
    associative_dim=0,
    associative_write="memory",
    associative_gate="sigmoid",
    associative_write_cost=0.0,
    associative_layer_interval=1,
    num_pause_tokens=0,
    pause_placement="fixed",
    use_xl_cache=True,
    bptt_chunks=None,
    tie_word_embeddings=False,
    use_cache=True,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)

# What evidence has changed of the diary's, which files without a word of it mean.
DIARY = DEFAULTS | dict(hidden_act="elephant", qk_norm=False, value_residual=False, residual_initializer_range=None)
DIARY |= dict(memory_norm=False, num_pause_tokens=8)

# Every field away from its default.
UNUSUAL = dict(
    vocab_size=7,
    hidden_size=24,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    hidden_act="gelu",
    norm_type="rmsnorm",
    layer_norm_eps=1e-3,
    parallel_residual=False,
    qk_norm=False,
    value_residual=False,
    attention_bias=True,
    mlp_bias=True,
    initializer_range=0.1,
    residual_initializer_range=0.03,
    rope_parameters=LLAMA3,
    chunk_size=9,
    num_memory_tokens=1,
    memory_write="tokens",
    memory_update="other",
    memory_solidifier="mlp",
    separate_solidifiers=True,
    memory_norm=False,
    associative_dim=5,
    associative_write="tokens",
    associative_gate="hard_sigmoid",
    associative_write_cost=0.1,
    associative_layer_interval=2,
    num_pause_tokens=3,
    pause_placement="random",
    use_xl_cache=False,
    bptt_chunks=2,
    tie_word_embeddings=True,
    use_cache=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=[2, 3],
)


def architecture(config: BakaConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEFAULTS}


@pytest.mark.smoke
def test_defaults() -> None:
    """A config without arguments is the one of the contract, and there is no field beside those."""
    assert architecture(BakaConfig()) == DEFAULTS
    own = {field.name for field in fields(BakaConfig)} - {field.name for field in fields(BakaConfig.__base__)}
    assert own == set(DEFAULTS)


@pytest.mark.smoke
@pytest.mark.parametrize("values", [DEFAULTS, UNUSUAL], ids=["default", "unusual"])
def test_round_trip_through_json(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field comes back from a file, a dict and a JSON string as it was, through AutoConfig too."""
    monkeypatch.setitem(MEMORY_UPDATES, "other", BakaMemoryUpdate)
    config = BakaConfig(**values)
    assert architecture(config) == values
    config.save_pretrained(tmp_path)
    for read in (
        BakaConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        BakaConfig.from_dict(config.to_dict()),
        BakaConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert type(read) is BakaConfig
        assert architecture(read) == values
        unlike = {name for name, value in read.to_dict().items() if config.to_dict()[name] != value}
        assert unlike <= {"_name_or_path", "transformers_version"}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_every_variant_survives_the_difference_to_the_defaults(overrides: dict[str, Any], tmp_path: Path) -> None:
    """`save_pretrained` writes what differs from transformers' defaults: nothing a variant needs is lost by that."""
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    assert architecture(BakaConfig.from_pretrained(tmp_path)) == architecture(config)


# Defaults that change


class Later(BakaConfig):
    """A later version, with other defaults and a field more."""

    hidden_size: int = 24
    num_attention_heads: int = 2
    hidden_act: str = "gelu"
    num_memory_tokens: int = 3
    memory_solidifier: str = "mlp"
    num_pause_tokens: int = 0
    use_xl_cache: bool = False
    tie_word_embeddings: bool = True


@pytest.mark.smoke
def test_a_file_holds_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at its default, and also if transformers had a field of that name and with that default for all configs."""
    plain = PreTrainedConfig.to_dict
    shared = dict(num_memory_tokens=16, tie_word_embeddings=False, bptt_chunks=None)
    patched = lambda self: plain(self) | (shared if type(self) is PreTrainedConfig else {})  # noqa: E731
    monkeypatch.setattr(PreTrainedConfig, "to_dict", patched)
    BakaConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in DEFAULTS} == DEFAULTS
    assert json.loads(BakaConfig().to_json_string()).items() >= DEFAULTS.items()


@pytest.mark.smoke
def test_a_file_means_what_it_meant_when_it_was_written(tmp_path: Path) -> None:
    """A field that it lacks is read as it was by default then, by all that read configs."""
    assert Later().hidden_act == "gelu" and Later().memory_solidifier == "mlp"  # new models are as they are now
    config = BakaConfig()
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert architecture(Later.from_pretrained(tmp_path)) == DEFAULTS
    for absent in DEFAULTS:
        read = Later.from_dict({name: value for name, value in written.items() if name != absent})
        assert architecture(read) == DEFAULTS | {absent: DIARY[absent]}
    file.write_text(json.dumps({"model_type": "baka", "vocab_size": 7}))
    for read in (Later.from_pretrained(tmp_path), Later.from_json_file(file)):
        assert architecture(read) == DIARY | dict(vocab_size=7)
    assert Later.from_pretrained(tmp_path, num_memory_tokens=1).num_memory_tokens == 1
    assert BakaConfig.from_dict({"rope_theta": 50.0}).rope_parameters["rope_theta"] == 50.0


def test_every_field_has_a_first_value() -> None:
    """Who adds a field says what models were before it."""
    assert set(ORIGINALLY) == set(DEFAULTS)


# The diary's ladder

RUNGS: dict[str, dict[str, Any]] = {
    "pristine": dict(num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False, hidden_act="silu"),
    "elephant": dict(num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False),
    "xl": dict(num_memory_tokens=0, num_pause_tokens=0),
    "pause": dict(num_memory_tokens=0),
    "tokens": dict(memory_write="tokens"),
    "carry": dict(),
}


@pytest.mark.smoke
@pytest.mark.parametrize("rung", RUNGS)
def test_rungs(rung: str) -> None:
    """The same whatever the defaults have become, and sizes are anybody's choice."""
    for cls in (BakaConfig, Later):
        assert architecture(cls.rung(rung)) == DIARY | RUNGS[rung]
        sizes = dict(vocab_size=19, hidden_size=12, num_attention_heads=2, num_hidden_layers=1, chunk_size=5)
        sizes |= {} if "num_pause_tokens" in RUNGS[rung] else dict(num_pause_tokens=2)
        sizes |= {} if "num_memory_tokens" in RUNGS[rung] else dict(num_memory_tokens=3)
        derived = dict(num_key_value_heads=2, head_dim=6)
        assert architecture(cls.rung(rung, **sizes)) == DIARY | RUNGS[rung] | sizes | derived
    assert BakaConfig.rung(rung, **RUNGS[rung]).to_dict() == BakaConfig.rung(rung).to_dict()
    BakaModel(BakaConfig.rung(rung, **sizes))


def test_there_is_no_such_rung() -> None:
    with pytest.raises(ValueError, match="must be one of pristine, elephant, xl, pause, tokens, carry, got 'rmt'"):
        BakaConfig.rung("rmt")


@pytest.mark.parametrize(
    ("rung", "field", "value"),
    [
        ("pristine", "hidden_act", "elephant"),
        ("pristine", "num_memory_tokens", 4),
        ("elephant", "num_pause_tokens", 4),
        ("elephant", "use_xl_cache", True),
        ("xl", "use_xl_cache", False),
        ("pause", "num_pause_tokens", 0),
        ("tokens", "memory_write", "carry"),
        ("carry", "memory_write", "tokens"),
        ("carry", "num_memory_tokens", 0),
    ],
)
def test_a_rung_stays_what_it_is(rung: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be .* on the rung '{rung}', got {value!r}"):
        BakaConfig.rung(rung, **{field: value})


def test_what_no_rung_speaks_of_is_added_to_it() -> None:
    config = BakaConfig.rung("carry", memory_norm=True, memory_solidifier="mlp")
    assert architecture(config) == DIARY | dict(memory_norm=True, memory_solidifier="mlp")


def test_auto_config_for_model() -> None:
    """The model type is registered as "baka"."""
    config = AutoConfig.for_model("baka", chunk_size=3, num_pause_tokens=1)
    assert type(config) is BakaConfig and config.chunk_size == 3


def test_auto_map_names_every_auto_class(tmp_path: Path) -> None:
    """A saved config says where each Auto class finds its code, whichever class the checkpoint was saved from."""
    tiny_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_baka.BakaConfig",
        "AutoModel": "modeling_baka.BakaModel",
        "AutoModelForCausalLM": "modeling_baka.BakaForCausalLM",
        "AutoModelForDecision": "modeling_baka.BakaForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_baka.BakaForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_baka.BakaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_baka.BakaForTokenClassification",
    }
    assert BakaConfig(auto_map={"AutoConfig": "user/repo--x.Y"}).auto_map == {"AutoConfig": "user/repo--x.Y"}


def test_auto_map_is_each_configs_own() -> None:
    """Changing one config's map leaves the next one's as it was."""
    BakaConfig().auto_map["AutoModel"] = "elsewhere.Model"
    assert BakaConfig().auto_map["AutoModel"] == "modeling_baka.BakaModel"


@pytest.mark.parametrize(
    ("overrides", "num_key_value_heads", "head_dim"),
    [
        (dict(hidden_size=48, num_attention_heads=6), 6, 8),
        (dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3), 3, 8),
        (dict(hidden_size=48, num_attention_heads=6, head_dim=10), 6, 10),
        (dict(hidden_size=50, num_attention_heads=6, num_key_value_heads=1, head_dim=4), 1, 4),
    ],
)
def test_heads_are_derived(overrides: dict[str, int], num_key_value_heads: int, head_dim: int) -> None:
    """Without `num_key_value_heads` every query head has its own; without `head_dim` the heads share the width."""
    config = BakaConfig(**overrides)
    assert (config.num_key_value_heads, config.head_dim) == (num_key_value_heads, head_dim)


@pytest.mark.parametrize(
    ("arguments", "theta"),
    [
        (dict(), 10000.0),
        (dict(rope_theta=50.0), 50.0),
        (dict(rope_parameters={"rope_theta": 50}), 50),
        (dict(rope_parameters={"rope_type": "default"}), 10000.0),
        (dict(rope_parameters={"type": "default", "rope_theta": 50}), 50),
    ],
)
def test_rope_theta(arguments: dict[str, Any], theta: float) -> None:
    """The older argument `rope_theta` and incomplete `rope_parameters` are completed."""
    config = BakaConfig(**arguments)
    assert config.rope_parameters.items() >= {"rope_type": "default", "rope_theta": theta}.items()
    assert config.rope == ("default", theta, {})


def test_what_heads_share_is_in_the_plan_of_tensor_parallel() -> None:
    """Where there is some; and the plan is in no file."""
    for qk_norm in (True, False):
        config = BakaConfig(qk_norm=qk_norm, value_residual=not qk_norm)
        plan = config.base_model_tp_plan
        assert plan["layers.*.self_attn.q_proj"] == "colwise" and "base_model_tp_plan" not in config.to_dict()
        assert ("layers.*.self_attn.q_norm" in plan) is ("layers.*.self_attn.k_norm" in plan) is qk_norm
        assert ("layers.*.self_attn.value_residual" in plan) is not qk_norm


def test_rope_types_that_scale() -> None:
    """What transformers calls `rope_scaling` too, completed and said in one way; nothing else is asked for."""
    linear = BakaConfig(rope_scaling={"type": "linear", "factor": 2}, rope_theta=50.0)
    assert linear.rope == ("linear", 50.0, {"factor": 2.0})
    assert BakaConfig.from_dict(linear.to_dict()).rope == linear.rope
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    llama3 = BakaConfig(rope_parameters=LLAMA3)
    assert llama3.rope == ("llama3", 50.0, {name: float(LLAMA3[name]) for name in names})
    assert not hasattr(llama3, "max_position_embeddings")


def test_rope_parameters_are_copied() -> None:
    """Two configs made from one dict do not change with each other, and the dict stays the user's."""
    given = {"rope_theta": 50.0}
    first, second = BakaConfig(rope_parameters=given), BakaConfig(rope_parameters=given)
    first.rope_parameters["rope_theta"] = 7.0
    assert second.rope_parameters["rope_theta"] == 50.0
    assert given == {"rope_theta": 50.0}


def test_unknown_arguments_are_kept(tmp_path: Path) -> None:
    """As with every Hugging Face config, more fields than the model knows travel with it."""
    BakaConfig(tokenizer_note="bytes", num_labels=5).save_pretrained(tmp_path)
    config = BakaConfig.from_pretrained(tmp_path)
    assert config.tokenizer_note == "bytes"
    assert config.num_labels == 5


MISSPELT = {
    "num_memory_token": "num_memory_tokens",
    "memory_tokens": "num_memory_tokens",
    "num_mem_tokens": "num_memory_tokens",
    "num_pauses_tokens": "num_pause_tokens",
    "memory_solidifer": "memory_solidifier",
    "separate_solidifier": "separate_solidifiers",
    "pause_placment": "pause_placement",
    "memorynorm": "memory_norm",
    "chunksize": "chunk_size",
    "use_xlcache": "use_xl_cache",
    "bptt_chunk": "bptt_chunks",
    "num_hidden_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
    "hidden_sizes": "hidden_size",
    "haed_dim": "head_dim",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_refuses_misspelt_fields(name: str, tmp_path: Path) -> None:
    """Wherever a field can be given: it would be kept, and mean nothing."""
    BakaConfig().save_pretrained(tmp_path)
    config = BakaConfig()
    for give in (
        lambda: BakaConfig(**{name: 1}),
        lambda: BakaConfig.rung("carry", **{name: 1}),
        lambda: BakaConfig.from_dict({name: 1}),
        lambda: BakaConfig.from_pretrained(tmp_path, **{name: 1}),
        lambda: AutoConfig.from_pretrained(tmp_path, **{name: 1}),
        lambda: AutoConfig.for_model("baka", **{name: 1}),
        lambda: setattr(config, name, 1),
    ):
        with pytest.raises(ValueError, match=f"no field `{name}` in BakaConfig. Did you mean `{MISSPELT[name]}`"):
            give()


def test_takes_names_that_are_not_ours() -> None:
    """Those that transformers itself gives or reads, and ids of special tokens, however close they come."""
    names = set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict()) | {"num_labels", "name_or_path"}
    names |= {"eot_token_id", "eoi_token_id", "sep_token_id", "max_position_embeddings", "layer_types"}
    names |= {"tokenizer_class", "quantization_config", "is_decoder", "sliding_window", "attention_dropout"}
    for name in names:
        BakaConfig._refuse_misspelt(name)
    assert BakaConfig(eot_token_id=5, max_position_embeddings=9, is_decoder=True).eot_token_id == 5


@pytest.mark.parametrize(
    "fields",
    [
        dict(memory_update="other"),
        dict(memory_solidifier="glu"),
        dict(memory_solidifier="mlp", separate_solidifiers=True),
    ],
)
def test_refuses_what_is_done_with_no_memory(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEMORY_UPDATES, "other", BakaMemoryUpdate)
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"`{name}` must be .* when `num_memory_tokens` is 0, got {fields[name]!r}"):
        BakaConfig(num_memory_tokens=0, **fields)
    config = BakaConfig(**fields)
    config.num_memory_tokens = 0
    with pytest.raises(ValueError, match=f"`{name}` must be .* when `num_memory_tokens` is 0"):
        config.validate_architecture()


def test_takes_no_memory_where_the_default_does_something_with_one() -> None:
    assert Later(num_memory_tokens=0).memory_solidifier == "mlp"
    assert Later(num_memory_tokens=0, memory_solidifier="none").chunk_size == 512


REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    *[
        (name, value, {})
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -1, 2.0, "4", None, True)
    ],
    *[("num_key_value_heads", value, {}) for value in (0, -2, 2.0)],
    ("num_key_value_heads", 5, {}),  # does not divide 12
    ("num_key_value_heads", 24, {}),
    *[("head_dim", value, {}) for value in (0, -2, 64.0)],
    ("head_dim", 7, {}),
    ("hidden_size", 770, {}),  # 12 heads do not share it
    ("hidden_act", "elefant", {}),
    ("hidden_act", None, {}),
    *[
        (name, value, {})
        for name in ("layer_norm_eps", "initializer_range")
        for value in (0, -1e-5, "1e-5", None, True)
    ],
    ("layer_norm_eps", float("inf"), {}),
    ("initializer_range", float("nan"), {}),
    *[("residual_initializer_range", value, {}) for value in (-0.1, float("inf"), float("nan"), "0", False)],
    *[("norm_type", value, {}) for value in ("layer_norm", "RMSNorm", None, [])],
    ("rope_parameters", "yarn", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})),
    ("rope_parameters", "dynamic", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
    ("rope_parameters", "longrope", dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})),
    ("rope_parameters", "yarn", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0})),
    ("rope_parameters", "proportional", dict(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})),
    ("rope_parameters", ["linear"], dict(rope_parameters={"rope_type": ["linear"]})),
    ("rope_parameters", None, dict(rope_parameters={"rope_type": "linear"})),
    ("rope_parameters", -2, dict(rope_scaling={"type": "linear", "factor": -2})),
    ("rope_parameters", "8", dict(rope_parameters=LLAMA3 | dict(factor="8"))),
    ("rope_parameters", None, dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=None))),
    ("rope_parameters", 1.0, dict(rope_parameters=LLAMA3 | dict(high_freq_factor=1.0))),  # as low_freq_factor
    ("rope_parameters", "beta_fast", dict(rope_parameters=LLAMA3 | dict(beta_fast=32))),
    ("rope_parameters", "factor", dict(rope_parameters={"factor": 2.0})),
    ("rope_parameters", 0, dict(rope_parameters={"rope_theta": 0})),
    ("rope_parameters", -1.0, dict(rope_theta=-1.0)),
    ("rope_parameters", None, dict(rope_parameters={"rope_theta": None})),
    ("rope_parameters", "partial_rotary_factor", dict(rope_parameters={"partial_rotary_factor": 0.5})),
    *[("chunk_size", value, {}) for value in (0, -1, 8.0, True)],
    *[
        (name, value, {})
        for name in ("num_memory_tokens", "num_pause_tokens", "associative_dim")
        for value in (-1, 1.0, None, True)
    ],
    *[("associative_write", value, dict(associative_dim=8)) for value in ("carry", None, [])],
    ("associative_write", "memory", dict(associative_dim=8, num_memory_tokens=0)),
    *[("associative_layer_interval", value, dict(associative_dim=8)) for value in (0, 13, 1.0, None, True)],
    *[("associative_gate", value, dict(associative_dim=8)) for value in ("hard", None, [])],
    *[("associative_write_cost", value, dict(associative_dim=8)) for value in (-0.1, float("nan"), "0", None, True)],
    ("associative_write", "tokens", {}),  # of none
    ("associative_gate", "hard_sigmoid", {}),
    ("associative_write_cost", 0.1, {}),
    ("associative_layer_interval", 2, {}),
    ("num_pause_tokens", 513, {}),
    ("num_pause_tokens", 3, dict(chunk_size=2)),
    *[("memory_write", value, {}) for value in ("token", "", None)],
    *[("memory_update", value, {}) for value in ("gated", None, [])],
    *[("memory_solidifier", value, {}) for value in ("gated", None, True)],
    *[("pause_placement", value, {}) for value in ("Fixed", None)],
    ("separate_solidifiers", True, {}),  # of "none"
    ("memory_norm", False, dict(memory_update="gate")),
    *[
        (name, value, {})
        for name, default in DEFAULTS.items()
        if isinstance(default, bool)
        for value in (1, None, "yes")
    ],
    *[("bptt_chunks", value, {}) for value in (0, -1, 1.0, True, "2")],
]


@pytest.mark.parametrize(("name", "value", "others"), REFUSED)
def test_refuses(name: str, value: Any, others: dict[str, Any]) -> None:
    """A value outside what is allowed is a ValueError that names the field and the value."""
    arguments = others if name == "rope_parameters" else {name: value, **others}
    with pytest.raises(ValueError) as error:
        BakaConfig(**arguments)
    assert f"`{name}`" in str(error.value)
    # In a message about rope_parameters, None is the theta; strings are quoted as Python does.
    assert repr(value) in str(error.value)


def test_refuses_what_was_changed_afterwards() -> None:
    """A config made valid and spoilt later builds no model."""
    config = tiny_config()
    config.chunk_size = 1
    with pytest.raises(ValueError, match=r"`num_pause_tokens` must be at most `chunk_size` .*got 2"):
        BakaModel(config)
    config = tiny_config()
    config.num_memory_tokens = -1
    with pytest.raises(ValueError, match="`num_memory_tokens` must be an integer of at least 0, got -1"):
        BakaModel(config)


def test_says_what_is_allowed() -> None:
    """Whoever mistypes a name reads the names there are."""
    for field, allowed in (
        ("norm_type", ["layernorm", "rmsnorm"]),
        ("memory_write", ["carry", "tokens"]),
        ("memory_update", ["replace", "gate"]),
        ("memory_solidifier", ["none", "glu", "gelephant", "mlp", "layer"]),
        ("pause_placement", ["fixed", "random"]),
        ("hidden_act", ["elephant", "silu", "gelu"]),
    ):
        with pytest.raises(ValueError) as error:
            BakaConfig(**{field: "?"})
        assert all(name in str(error.value) for name in allowed)
