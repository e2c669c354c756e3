"""What `save_pretrained` writes is a model of its own: it loads where `baka_hf` is not installed."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import contents, logits_of, random_tokens, run_script, tiny_config, tiny_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from baka_hf import BakaCache, BakaConfig, BakaForCausalLM, BakaForSequenceClassification, BakaModel

CODE = {path.name for path in (Path(__file__).parents[1] / "src" / "baka_hf").glob("*_baka.py")}
PROMPTS = ["w3 w1 w4 w1 w5 w9 w2 w6", "w7"]
LENGTH = 12  # of answers: three boundaries and more

# Run where `import baka_hf` fails. Arguments: folders to read from and to write to.
LOAD = """
import sys
sys.modules["baka_hf"] = None
import json
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, AutoTokenizer, pipeline
)
source, target = map(Path, sys.argv[1:3])
prompts, length, found = json.loads(sys.argv[3]), int(sys.argv[4]), {}
trusted = dict(trust_remote_code=True)
tokens = torch.arange(13)[None] * 5 % 19
config = AutoConfig.from_pretrained(source, **trusted)
model = AutoModelForCausalLM.from_pretrained(source, **trusted)
decoder = AutoModel.from_pretrained(source, **trusted)
classifier = AutoModelForSequenceClassification.from_pretrained(source / "classifier", **trusted)
torch.manual_seed(0)
heads = [AutoModelForTokenClassification, AutoModelForQuestionAnswering]
heads = [head.from_pretrained(source, **trusted) for head in heads]  # new, on the decoder
found["classes"] = [f"{type(x).__module__} {type(x).__name__}" for x in (config, model, decoder, classifier, *heads)]
state = model.new_cache(1)
with torch.no_grad():
    tensors = dict(
        labels=heads[0](tokens).logits, starts=heads[1](tokens).start_logits,
        logits=model(tokens).logits, hidden=decoder(tokens).last_hidden_state, verdict=classifier(tokens).logits,
    )
    model(tokens, cache=state)
tensors["generated"] = model.generate(tokens, max_new_tokens=length, do_sample=False)
save_file(tensors, target / "tensors.safetensors")
state.save_pretrained(target / "state")
block = dict(norm_type="rmsnorm", parallel_residual=False, qk_norm=True, attention_bias=True, mlp_bias=True)
fresh = type(model)(type(config).from_dict(config.to_dict() | block | dict(residual_initializer_range=0.0)))
for name, weight in fresh.named_parameters():
    is_zero = name.endswith("bias") or (".layers." in name and ("o_proj" in name or "down_proj" in name))
    assert (weight == 1).all() if "norm" in name else weight.any() != is_zero, name
speak = pipeline("text-generation", model=str(source), device="cpu", **trusted)
arguments = dict(max_new_tokens=length, do_sample=False, return_full_text=False)
found["single"] = [speak(prompt, **arguments)[0]["generated_text"] for prompt in prompts]
found["batched"] = [answer[0]["generated_text"] for answer in speak(prompts, batch_size=2, **arguments)]
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, **trusted).save_pretrained(target)
classifier.save_pretrained(target / "classifier")
(target / "found.json").write_text(json.dumps(found))
"""

RESUME = """
import sys
sys.modules["baka_hf"] = None
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
source, target = map(Path, sys.argv[1:3])
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
classifier = AutoModelForSequenceClassification.from_pretrained(source / "classifier", trust_remote_code=True)
state = type(model.new_cache(1)).from_pretrained(source / "state")
tokens = torch.arange(13)[None] * 5 % 19
with torch.no_grad():
    tensors = dict(
        logits=model(tokens).logits,
        verdict=classifier(tokens).logits,
        resumed=model(tokens + 1 - 19 * (tokens == 18), cache=state).logits,
    )
save_file(tensors, target / "resumed.safetensors")
"""

# Where the package cannot be imported. Arguments: the folder that all of them are in, and their names.
FOLDERS = """
import json, os, sys
sys.modules["baka_hf"] = None
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folders = [os.path.join(sys.argv[1], name) for name in json.loads(sys.argv[2])]
classes = {get_class_from_dynamic_module("modeling_baka.BakaForCausalLM", folder) for folder in folders}
assert len(classes) == len(folders)
tokens = torch.arange(13)[None] * 5 % 19
ends = (folders[0], folders[-1])
first, last = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in ends)
assert {type(first), type(last)} <= classes
assert torch.equal(first(tokens).logits, last(tokens).logits)
"""
# The first two differ in nothing but what no name of Python's may hold.
NAMES = ["my model", "my_model", "it's", 'the "best"', "a[b]", "a(b)", "{b}", "c++", "user@host", "a,b", "a=b", "a&b;c"]
NAMES += ["100%", "a#b", "$x", "a:b", "a\\b", "v1.0.2", "7b", "-x", "über", "模型", "🐘"]


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    return tiny_model(tiny_config(memory_solidifier="layer", pad_token_id=0), torch.float32, seed=1)


@pytest.fixture(scope="module")
def checkpoint(
    model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Model and tokenizer, and a classifier in a folder below."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BakaForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def elsewhere(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process without the package made of the checkpoint, and another one of what that one saved."""
    target = tmp_path_factory.mktemp("elsewhere")
    run_script(LOAD, tmp_path_factory.mktemp("home"), checkpoint, target, json.dumps(PROMPTS), LENGTH)
    run_script(RESUME, tmp_path_factory.mktemp("another_home"), target, target)
    return target


TOKENS = torch.arange(13)[None] * 5 % 19


def test_a_checkpoint_holds_its_code(checkpoint: Path) -> None:
    """The files of the remote-code set, and no other Python file, beside whichever model was saved."""
    for folder in (checkpoint, checkpoint / "classifier"):
        assert {path.name for path in folder.glob("*.py")} == CODE


@pytest.mark.smoke
def test_logits_elsewhere(elsewhere: Path, checkpoint: Path) -> None:
    """AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification: all bit-equal."""
    found = load_file(elsewhere / "tensors.safetensors")
    model = BakaForCausalLM.from_pretrained(checkpoint)
    classifier = BakaForSequenceClassification.from_pretrained(checkpoint / "classifier")
    with torch.no_grad():
        assert torch.equal(found["logits"], model(TOKENS).logits)
        assert torch.equal(found["hidden"], model.model(TOKENS).last_hidden_state)
        assert torch.equal(found["verdict"], classifier(TOKENS).logits)
    assert found["labels"].shape == (1, 13, 2) and found["starts"].shape == (1, 13)
    classes = json.loads((elsewhere / "found.json").read_text())["classes"]
    assert all(name.startswith("transformers_modules.") for name in classes)
    names = ["BakaConfig", "BakaForCausalLM", "BakaModel", "BakaForSequenceClassification"]
    names += ["BakaForTokenClassification", "BakaForQuestionAnswering"]
    assert [name.split()[1] for name in classes] == names


def test_the_checkpoint_is_the_model(model: BakaForCausalLM, checkpoint: Path) -> None:
    """The weights are those in memory, bit for bit."""
    loaded = BakaForCausalLM.from_pretrained(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert_close(logits_of(loaded, TOKENS), logits_of(model, TOKENS), rtol=0, atol=1e-5)


@pytest.mark.smoke
def test_generation_elsewhere(elsewhere: Path, model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """`generate`, and `pipeline("text-generation")` for one text and a batch of texts of different lengths."""
    found = load_file(elsewhere / "tensors.safetensors")["generated"]
    arguments = dict(max_new_tokens=LENGTH, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    assert torch.equal(found, model.generate(TOKENS, **arguments))
    found = json.loads((elsewhere / "found.json").read_text())
    for index, prompt in enumerate(PROMPTS):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(tokens, max_new_tokens=LENGTH, do_sample=False)[0, tokens.shape[1] :]
        for answers in (found["single"], found["batched"]):
            # `decode` drops the pad token, as a special one.
            assert answers[index].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


@pytest.mark.smoke
def test_saved_again_elsewhere(elsewhere: Path) -> None:
    """A model loaded with remote code saves a checkpoint that loads in another process, bit-equal, code included."""
    first, second = load_file(elsewhere / "tensors.safetensors"), load_file(elsewhere / "resumed.safetensors")
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["verdict"], second["verdict"])
    for folder in (elsewhere, elsewhere / "classifier"):
        assert {path.name for path in folder.glob("*.py")} == CODE
    with_package = BakaForCausalLM.from_pretrained(elsewhere)
    with torch.no_grad():
        assert torch.equal(with_package(TOKENS).logits, first["logits"])


def test_a_state_saved_elsewhere(elsewhere: Path, checkpoint: Path) -> None:
    """Saved in one process, resumed in a second one, and in this one: bit-identical to never having stopped."""
    model = BakaForCausalLM.from_pretrained(checkpoint)
    state = model.new_cache(1)
    logits_of(model, TOKENS, state)
    resumed = BakaCache.from_pretrained(elsewhere / "state", config=model.config)
    assert contents(resumed) == contents(state)
    expected = logits_of(model, (TOKENS + 1) % 19, state)
    assert torch.equal(load_file(elsewhere / "resumed.safetensors")["resumed"], expected)
    assert torch.equal(logits_of(model, (TOKENS + 1) % 19, resumed), expected)


@pytest.mark.smoke
def test_code_is_found_in_folders_of_any_name(model: BakaForCausalLM, tmp_path: Path) -> None:
    """Side by side in one process: each has its own copy, whose operators must not meet."""
    model.save_pretrained(tmp_path / NAMES[0])
    for name in NAMES[1:]:
        (tmp_path / name).mkdir()
        for path in (tmp_path / NAMES[0]).iterdir():
            os.link(path, tmp_path / name / path.name)
    run_script(FOLDERS, tmp_path, tmp_path, json.dumps(NAMES))


# With the package at hand


@pytest.mark.parametrize("trust", [True, False])
def test_local_classes_come_first(checkpoint: Path, trust: bool) -> None:
    """Where the package is imported, Auto classes give its classes and ask no questions."""
    trusted = dict(trust_remote_code=True) if trust else {}
    assert type(AutoConfig.from_pretrained(checkpoint, **trusted)) is BakaConfig
    assert type(AutoModel.from_pretrained(checkpoint, **trusted)) is BakaModel
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint, **trusted)) is BakaForCausalLM
    folder = checkpoint / "classifier"
    found = AutoModelForSequenceClassification.from_pretrained(folder, **trusted)
    assert type(found) is BakaForSequenceClassification


def test_pipeline(checkpoint: Path, model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """`pipeline("text-generation")` with local classes."""
    speak = pipeline("text-generation", model=str(checkpoint), device="cpu")
    found = speak(PROMPTS[0], max_new_tokens=LENGTH, do_sample=False, return_full_text=False)[0]["generated_text"]
    tokens = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = model.generate(tokens, max_new_tokens=LENGTH, do_sample=False)[0, tokens.shape[1] :]
    assert found.split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_states_of_both_classes_are_one(checkpoint: Path) -> None:
    """A state of the package's class is taken by a model of the checkpoint's code, and the other way round."""
    local = BakaForCausalLM.from_pretrained(checkpoint)
    remote = get_class_from_dynamic_module("modeling_baka.BakaForCausalLM", str(checkpoint)).from_pretrained(checkpoint)
    assert type(remote) is not BakaForCausalLM and type(remote.new_cache(1)) is not BakaCache
    whole = random_tokens(local.config, 2, 22).clamp(min=1)  # 0 is padding
    tokens, more = whole[:, :13], whole[:, 13:]
    expected = logits_of(local, whole)[:, 13:]
    for reader, other in ((local, remote), (remote, local)):
        state = reader.new_cache(2)
        logits_of(reader, tokens, state)
        assert_close(logits_of(other, more, state.clone()), expected, rtol=0, atol=1e-5)
        found = other.generate(whole, cache=state, max_new_tokens=5, do_sample=False)
        assert torch.equal(found, local.generate(whole, max_new_tokens=5, do_sample=False))


def test_a_remote_config_is_no_stranger(checkpoint: Path) -> None:
    """The package's model and state take a config of the checkpoint's code: nothing asks for its very class."""
    config = get_class_from_dynamic_module("configuration_baka.BakaConfig", str(checkpoint)).from_pretrained(checkpoint)
    assert type(config) is not BakaConfig
    assert BakaCache(config, 2).nbytes == BakaCache(tiny_config(memory_solidifier="layer"), 2).nbytes
