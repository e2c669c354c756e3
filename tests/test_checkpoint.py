"""A checkpoint is loaded as what it is, and whole, or refused; and what cannot be loaded is not saved."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits_of, random_tokens, run_script, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from baka_hf import (
    BakaConfig,
    BakaForCausalLM,
    BakaForQuestionAnswering,
    BakaForSequenceClassification,
    BakaForTokenClassification,
    BakaModel,
)

SOURCES = Path(__file__).parents[1] / "src" / "baka_hf"
# What may be given on loading, of a model with all that is learned, that would lose something of it.
LOSING: list[dict[str, Any]] = [
    dict(num_memory_tokens=0, memory_solidifier="none", memory_norm=False),
    dict(num_memory_tokens=0),
    dict(num_pause_tokens=0),
    dict(memory_solidifier="none"),
    dict(memory_solidifier="mlp"),
    dict(separate_solidifiers=True),
    dict(memory_norm=False),
    dict(num_hidden_layers=1),
]


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    return tiny_model(tiny_config(memory_solidifier="glu", memory_norm=True), torch.float32)


@pytest.fixture(scope="module")
def checkpoint(model: BakaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


# All that was learned


@pytest.mark.smoke
@pytest.mark.parametrize("fields", LOSING, ids=str)
def test_nothing_learned_is_lost(fields: dict[str, Any], checkpoint: Path) -> None:
    """With a field given on loading, through any class and a config of one's own too."""
    for load in (BakaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"expected no learned parameters but|must be 'none' when"):
            load(checkpoint, **fields)
    if "memory_solidifier" in fields or "num_memory_tokens" not in fields:
        config = BakaConfig.from_dict(tiny_config(memory_solidifier="glu", memory_norm=True).to_dict() | fields)
        with pytest.raises(ValueError, match="expected no learned parameters but"):
            BakaForCausalLM.from_pretrained(checkpoint, config=config)


def test_it_says_what_would_be_lost(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"got model\.pause_token\.weight\. Load .* make a BakaForCausalLM of"):
        BakaForCausalLM.from_pretrained(checkpoint, num_pause_tokens=0)


def test_a_part_is_left_out_on_purpose(model: BakaForCausalLM) -> None:
    """As the error says."""
    plain = BakaForCausalLM(tiny_config(num_memory_tokens=0))
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_what_loses_nothing_is_given_on_loading(checkpoint: Path, model: BakaForCausalLM) -> None:
    loaded, about = BakaForCausalLM.from_pretrained(
        checkpoint, use_xl_cache=False, chunk_size=7, bptt_chunks=1, output_loading_info=True
    )
    assert (loaded.config.use_xl_cache, loaded.config.chunk_size, loaded.config.bptt_chunks) == (False, 7, 1)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_another_head_is_no_loss(checkpoint: Path, model: BakaForCausalLM, tmp_path: Path) -> None:
    """Decoder and classifier from a language model; decoder and language model from a classifier."""
    decoder = BakaModel.from_pretrained(checkpoint)
    classifier = BakaForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    classifier.save_pretrained(tmp_path)
    answers = BakaForQuestionAnswering.from_pretrained(checkpoint)
    answers.save_pretrained(tmp_path / "answers")
    labels = BakaForTokenClassification.from_pretrained(tmp_path / "answers")
    assert torch.equal(BakaForTokenClassification.from_pretrained(tmp_path).score.weight, classifier.score.weight)
    for found in (decoder, classifier.model, labels.model, AutoModel.from_pretrained(tmp_path)):
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.model.state_dict().items())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is BakaForCausalLM


def test_a_head_of_ones_own_is_no_other_head(tmp_path: Path) -> None:
    """Under the name that ours has, it would be lost, and ours be new."""
    classifier = BakaForSequenceClassification(tiny_config(num_labels=3))
    classifier.score = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got score\.0\.bias, "):
        BakaForSequenceClassification.from_pretrained(tmp_path)


# Other architectures


@pytest.mark.smoke
def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    """Its weights fit by name; a part of them would be lost, the rest make another function of it."""
    sizes = dict(vocab_size=19, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    for cls in (BakaConfig, BakaModel, BakaForCausalLM, BakaForSequenceClassification):
        with pytest.raises(ValueError, match=r"expected a checkpoint of model_type 'baka', got 'llama'.*none are"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got model\.layers\.0\.post_attention_layernorm\.weight"):
        BakaForCausalLM.from_pretrained(tmp_path, config=BakaConfig(**sizes))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


# Classes with code of their own

SUBCLASS = """
import torch
from baka_hf import BakaForCausalLM

class Doubling(BakaForCausalLM):  # nothing of it shows in the weights
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs
"""

# Where the package cannot be imported.
REFUSED_ELSEWHERE = """
import sys
sys.modules["baka_hf"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    assert "got one of Doubling" in str(error), error
else:
    raise AssertionError
"""

FORK_ELSEWHERE = """
import sys
sys.modules["baka_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "Doubling"
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
tokens = torch.arange(13)[None]
assert torch.equal(model(tokens).logits, again(tokens).logits)
print(model(tokens).logits.sum().item())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of a user's with a class of model; it is gone after the test."""
    (tmp_path / "doubling.py").write_text(SUBCLASS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("doubling")
    del sys.modules["doubling"]


@pytest.mark.smoke
def test_a_subclass_is_loaded_by_its_own_class_alone(module: Any, tmp_path: Path) -> None:
    """Everywhere else it is refused: by the classes it is built on, by Auto classes, where the package is missing."""
    folder, config = tmp_path / "checkpoint", tiny_config()
    model = module.Doubling(config).eval()
    model.save_pretrained(folder)
    tokens = random_tokens(config, 1, 13)
    assert torch.equal(logits_of(module.Doubling.from_pretrained(folder), tokens), logits_of(model, tokens))
    for cls in (BakaForCausalLM, BakaModel, AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        for trusted in (dict(), dict(trust_remote_code=True)):
            trusted = trusted if cls.__name__.startswith("Auto") else {}
            with pytest.raises(ValueError, match="got one of Doubling, which is another class with code of its own"):
                cls.from_pretrained(folder, **trusted)
    run_script(REFUSED_ELSEWHERE, tmp_path, folder)


def test_a_subclass_starts_from_a_checkpoint_of_ours(module: Any, checkpoint: Path, model: BakaForCausalLM) -> None:
    tokens = random_tokens(model.config, 1, 13)
    loaded = module.Doubling.from_pretrained(checkpoint)
    assert torch.equal(logits_of(loaded, tokens), 2 * logits_of(BakaForCausalLM.from_pretrained(checkpoint), tokens))


def test_a_subclass_of_the_same_name(module: Any, tmp_path: Path) -> None:
    """Registered, so that the checkpoint says where its code is."""
    module.Doubling.__name__ = "BakaForCausalLM"
    config = tiny_config()
    config.auto_map["AutoModelForCausalLM"] = "doubling.BakaForCausalLM"
    module.Doubling(config).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"got one of doubling\.BakaForCausalLM"):
        BakaForCausalLM.from_pretrained(tmp_path / "checkpoint")


def test_a_registered_subclass_brings_along_what_it_is_built_on(module: Any, tmp_path: Path) -> None:
    """It cannot where it imports the installed package, or stands in a script."""
    module.Doubling.register_for_auto_class("AutoModelForCausalLM")
    model = module.Doubling(tiny_config())
    with pytest.raises(ValueError, match=r"registered for AutoModelForCausalLM, got none in doubling\. Put it"):
        model.save_pretrained(tmp_path / "checkpoint")
    module.Doubling.__module__ = "__main__"
    with pytest.raises(ValueError, match="got none in __main__"):
        model.save_pretrained(tmp_path / "checkpoint")


def test_a_fork_beside_copies_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error says: its checkpoint loads where there is neither package, and is refused by our classes."""
    package = tmp_path / "fork"
    package.mkdir()
    for path in SOURCES.glob("*_baka.py"):
        shutil.copy(path, package)
    (package / "__init__.py").touch()
    (package / "modeling_doubling.py").write_text(SUBCLASS.replace("from baka_hf", "from .modeling_baka"))
    monkeypatch.syspath_prepend(tmp_path)
    fork = importlib.import_module("fork.modeling_doubling")
    fork.Doubling.register_for_auto_class("AutoModelForCausalLM")
    model = fork.Doubling(tiny_config()).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    run_script(FORK_ELSEWHERE, tmp_path, tmp_path / "checkpoint", tmp_path / "again")
    with pytest.raises(ValueError, match=r"got one of Doubling, modeling_doubling\.Doubling"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fork"]:
        del sys.modules[name]


def test_a_config_with_code_of_its_own(tmp_path: Path) -> None:
    """Of our model type it would be read as ours, and its own fields mean nothing."""

    class ForkConfig(BakaConfig):
        doubling: bool = True

    ForkConfig().save_pretrained(tmp_path)
    assert ForkConfig.from_pretrained(tmp_path).doubling
    for cls in (BakaConfig, AutoConfig):
        with pytest.raises(ValueError, match="expected a checkpoint of BakaConfig, got one of ForkConfig"):
            cls.from_pretrained(tmp_path)


# Parts that no configuration asks for


@pytest.mark.parametrize("part", ["activation", "activation of a solidifier", "solidifier", "no solidifier", "norm"])
def test_a_part_that_was_put_in_is_not_saved(part: str, tmp_path: Path) -> None:
    model = BakaForCausalLM(tiny_config(memory_solidifier="glu"))
    model.save_pretrained(tmp_path / "before")
    decoder = model.model
    if part == "activation":
        decoder.layers[1].mlp.act_fn = nn.ReLU()
    elif part == "activation of a solidifier":
        decoder.solidifier.gate = nn.Tanh()
    elif part == "solidifier":
        decoder.solidifier = nn.Identity()
    elif part == "no solidifier":
        del decoder.solidifier
    else:
        decoder.norm = nn.RMSNorm(12)
    with pytest.raises(ValueError, match=r"expected `model\..*` to be a .*, as the configuration says, got a"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("field", ["hidden_act", "memory_solidifier", "memory_update"])
def test_a_part_that_other_code_added(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads it without that code is told what is missing."""
    from transformers.activations import ACT2FN

    from baka_hf import configuration_baka, memory_baka, solidifiers_baka

    class Mine(nn.Identity):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    with monkeypatch.context() as added:
        added.setitem(ACT2FN, "mine", Mine)
        added.setattr(configuration_baka, "MEMORY_SOLIDIFIERS", (*configuration_baka.MEMORY_SOLIDIFIERS, "mine"))
        added.setitem(solidifiers_baka.SOLIDIFIERS, "mine", Mine)
        added.setitem(memory_baka.MEMORY_UPDATES, "mine", memory_baka.BakaMemoryUpdate)
        BakaForCausalLM(tiny_config(**{field: "mine"})).save_pretrained(tmp_path)
        assert getattr(BakaForCausalLM.from_pretrained(tmp_path).config, field) == "mine"
    with pytest.raises(ValueError, match=f"`{field}` must be .*got 'mine'. If other code added it before"):
        BakaForCausalLM.from_pretrained(tmp_path)


def test_saving_changes_nothing(model: BakaForCausalLM, tmp_path: Path) -> None:
    """No random number is drawn for it, no field is changed: a training goes on as if nothing had been saved."""
    before, fields = torch.get_rng_state(), json.loads(model.config.to_json_string())
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads(model.config.to_json_string()) == fields
