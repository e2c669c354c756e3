"""The checkpoint in the repository: small, in order, loadable without the package, and it speaks English."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from baka_hf import BakaConfig

FOLDER = Path(__file__).parents[1] / "checkpoints" / "enwiki-7m"
CODE = Path(__file__).parents[1] / "src" / "baka_hf"

TEXT = (
    "The Severn is a river in the west of Great Britain. It rises in the hills of Wales and flows through several "
    "towns before it reaches the sea. The first bridge over the river was built of iron in the eighteenth century, "
    "and it is still in use today. Many of the people who live near it worked in the coal industry until the mines "
    "were closed after the Second World War."
)

# Run where `import baka_hf` fails, and so does the Hub.
LOAD = """
import sys
sys.modules["baka_hf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
state = model.new_cache()
prompt = tokenizer(tokenizer.bos_token + "The river", return_tensors="pt")
torch.manual_seed(0)
text = model.generate(**prompt, cache=state, max_new_tokens=40)
print(type(model).__module__.split(".")[0], model.dtype, int(state.num_tokens), text.shape[1])
"""


def test_it_is_small_and_its_code_is_the_package_s() -> None:
    """Code files are links, so that there is one of each."""
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 16e6 and {x.dtype for x in load_file(weights).values()} == {torch.bfloat16}
    linked = {path.name: path.resolve() for path in FOLDER.glob("*.py")}
    assert linked == {path.name: path.resolve() for path in CODE.glob("*_baka.py")}
    assert all(path.is_symlink() for path in FOLDER.glob("*.py"))


def test_it_loads_offline_where_the_package_is_not(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, FOLDER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, dtype, read, length = done.stdout.split()
    assert (module, dtype) == ("transformers_modules", "torch.float32")
    assert int(read) == int(length) - 1


def test_it_has_learned_english() -> None:
    """Words in their order are worth less than 1.5 bits per byte, and the same words in another order more than 2."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    generator = torch.Generator().manual_seed(0)
    words = TEXT.split()
    shuffled = " ".join(words[index] for index in torch.randperm(len(words), generator=generator))
    found = []
    for text in (TEXT, shuffled):
        ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        found.append(loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode()))
    assert found[0] < 1.5 < 2 < found[1]


def test_the_card_says_what_it_is() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    config = BakaConfig.from_pretrained(FOLDER)
    parameters = sum(x.numel() for x in load_file(FOLDER / "model.safetensors").values())
    assert f"{parameters:,} parameters" in card and f"chunks of {config.chunk_size} tokens" in card
    for words in ("license: cc-by-sa-3.0", "Wikipedia", "CC BY-SA 3.0", "## A sample"):
        assert words in card, words


def test_it_samples_by_itself() -> None:
    """Greedy search says the same over and over: `generate` samples if nothing else is asked for."""
    chosen = json.loads((FOLDER / "generation_config.json").read_text())
    assert chosen["do_sample"] is True and 0 < chosen["top_p"] < 1


def test_what_it_says_does_not_go_in_circles() -> None:
    """By itself `generate` has a penalty on what was said before."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    prompt = tokenizer([tokenizer.bos_token + "The river"] * 4, return_tensors="pt")

    def share_said_before(**asked: Any) -> float:
        """Of each text's runs of six tokens, a mean."""
        torch.manual_seed(0)
        said = model.generate(**prompt, max_new_tokens=250, **asked).unfold(1, 6, 1).tolist()
        texts = [[tuple(run) for run in text if tokenizer.pad_token_id not in run] for text in said]
        return 1 - fmean(len(set(text)) / len(text) for text in texts)

    assert share_said_before() < 0.05 < 0.5 < share_said_before(do_sample=False, repetition_penalty=1.0)


def test_saved_again_it_has_code_of_its_own(tmp_path: Path) -> None:
    """Whoever trains a copy on writes into no file of the package."""
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER, copy, symlinks=True)
    for link in copy.glob("*.py"):
        target = link.resolve() if link.exists() else CODE / link.name
        link.unlink()
        link.symlink_to(target)
    model = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    model.save_pretrained(copy)
    saved = {path.name for path in copy.glob("*.py")}
    assert saved == {path.name for path in CODE.glob("*_baka.py")}
    assert not any(path.is_symlink() for path in copy.glob("*.py"))
