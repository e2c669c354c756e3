"""Pushed to a Hub and loaded from it, by the real client over HTTP, where the package is not installed.

Clients are processes of their own: the client reads its address and its cache's when it is imported.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import snippet, tiny_config, tiny_model
from huggingface_hub import ModelCard
from safetensors.torch import load
from stand_in_hub import TOKEN, Client, Fault, StandInHub

WEIGHTS = "model.safetensors"
HERE = Path(__file__).parent
CODE = {path.name for path in (HERE.parent / "src" / "baka_hf").glob("*_baka.py")}

# A model, and a tokenizer with a word for each of its 19 ids.
MAKE = """
import json, sys
from pathlib import Path
import torch
from helpers import random_tokens, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

def new_model(seed=0):
    return tiny_model(tiny_config(pad_token_id=0, memory_solidifier="layer"), torch.float32, seed)

backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(19)}, unk_token="w1"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
"""

PUSH = (
    MAKE
    + """
from huggingface_hub import HfApi
model, other = new_model(0), new_model(1)
model.push_to_hub("ada/baka", tags=["of-a-test"])
tokenizer.push_to_hub("ada/baka")
api = HfApi()
api.create_tag("ada/baka", tag="v1")
other.push_to_hub("ada/baka", commit_message="Other weights", revision="dev")
code = Path(sys.argv[1]).read_bytes() + b"\\nBakaForCausalLM.WHENCE = BakaModel.WHENCE = 'dev'\\n"
api.upload_file(path_or_fileobj=code, path_in_repo="modeling_baka.py", repo_id="ada/baka", revision="dev")
model.push_to_hub("ada/secret", private=True)
"""
)

# Where `import baka_hf` fails. The argument is a folder to write to.
LOAD = """
import sys
sys.modules["baka_hf"] = None
import json
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
target, found, trusted = Path(sys.argv[1]), {}, dict(trust_remote_code=True)
tokens = torch.arange(13)[None] * 5 % 19

def logits(revision, **arguments):
    model = AutoModelForCausalLM.from_pretrained("ada/baka", revision=revision, **trusted, **arguments)
    with torch.no_grad():
        return model, model(tokens).logits

config = AutoConfig.from_pretrained("ada/baka", **trusted)
model, main = logits("main")
decoder = AutoModel.from_pretrained("ada/baka", **trusted)
tokenizer = AutoTokenizer.from_pretrained("ada/baka", **trusted)
found["modules"] = [type(x).__module__ for x in (config, model, decoder)]
tag, commit = logits("v1")[1], logits(sys.argv[2])[1]
other, dev = logits("dev")
later, later_code = logits("main", code_revision="dev")
fixed, fixed_code = logits("dev", code_revision="v1")
found["whence"] = [getattr(type(x), "WHENCE", None) for x in (model, other, later, fixed)]
decoder = AutoModel.from_pretrained("ada/baka", revision="dev", code_revision="v1", **trusted)
found["whence"].append(getattr(type(decoder), "WHENCE", None))
with torch.no_grad():
    hidden = decoder(tokens).last_hidden_state
speak = pipeline("text-generation", model="ada/baka", device="cpu", **trusted)
found["text"] = speak("w3 w1 w4", max_new_tokens=9, do_sample=False)[0]["generated_text"]
found["ids"] = tokenizer("w3 w1 w4").input_ids
tensors = dict(main=main, tag=tag, commit=commit, dev=dev, later_code=later_code, fixed_code=fixed_code, hidden=hidden)
save_file(tensors, target / "tensors.safetensors")
(target / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    with StandInHub() as served:
        yield served
    unknown = [request for request in served.requests if request[2] == 501]
    assert not unknown


@pytest.fixture
def client(hub: StandInHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


@pytest.fixture(scope="module")
def pushed(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> StandInHub:
    """`push_to_hub` of models and a tokenizer: ada/baka with a branch and a tag, and ada/secret.

    By LFS, as without `hf_xet`; the Trainers below push as the client likes best.
    """
    author = Client(hub, tmp_path_factory.mktemp("author"))
    author.run(PUSH, HERE.parent / "src" / "baka_hf" / "modeling_baka.py", HF_HUB_DISABLE_XET="1")
    return hub


def holds_token(files: dict[str, bytes]) -> list[str]:
    return [name for name, content in files.items() if TOKEN.encode() in content]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# push_to_hub and from_pretrained


@pytest.mark.smoke
def test_round_trip(pushed: StandInHub, client: Client) -> None:
    """Every Auto class, by branch, tag and commit, the code's revision apart from the weights'; then without network.

    The reader is nobody in particular. Weights are bit-equal to those that were pushed.
    """
    first = pushed.repositories["ada/baka"].tags["v1"]
    client.run(LOAD, client.home, first, token=None)
    found = json.loads((client.home / "found.json").read_text())
    main = pushed.repositories["ada/baka"].branches["main"]
    assert all(
        f".{main}." in module and module.startswith("transformers_modules.ada.baka.") for module in found["modules"]
    )
    assert found["whence"] == [None, "dev", "dev", None, None]
    assert found["ids"] == [3, 1, 4] and found["text"].startswith("w3 w1 w4")

    tensors = load((client.home / "tensors.safetensors").read_bytes())
    tokens = torch.arange(13)[None] * 5 % 19
    config = tiny_config(pad_token_id=0, memory_solidifier="layer")
    for seed, names in ((0, ["main", "tag", "commit", "later_code"]), (1, ["dev", "fixed_code"])):
        model = tiny_model(config, torch.float32, seed)
        with torch.no_grad():
            for name in names:
                torch.testing.assert_close(tensors[name], model(tokens).logits, rtol=0, atol=1e-6)
    assert torch.equal(tensors["main"], tensors["commit"]) and torch.equal(tensors["dev"], tensors["fixed_code"])
    with torch.no_grad():
        torch.testing.assert_close(tensors["hidden"], model.model(tokens).last_hidden_state, rtol=0, atol=1e-6)

    asked = len(pushed.requests)
    client.run(LOAD, client.home, first, token=None, HF_HUB_OFFLINE="1")
    assert len(pushed.requests) == asked
    assert all(torch.equal(t, tensors[n]) for n, t in load((client.home / "tensors.safetensors").read_bytes()).items())


def test_what_is_pushed(pushed: StandInHub) -> None:
    """Model, code, card and tokenizer; the weights in storage, once, and what did not change is not pushed again."""
    files = pushed.files("ada/baka")
    assert set(files) >= CODE | {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "README.md"}
    assert {name for name in files if name.endswith(".py")} == CODE
    assert "of-a-test" in files["README.md"].decode()
    assert pushed.titles("ada/baka") == ["Upload tokenizer", "Upload BakaForCausalLM", "initial commit"]
    assert pushed.titles("ada/baka", "dev")[1:] == ["Other weights", *pushed.titles("ada/baka")]
    assert pushed.files("ada/baka", "dev")[WEIGHTS] != files[WEIGHTS] == pushed.files("ada/secret")[WEIGHTS]
    uploads = [path for path, _ in pushed.uploads()]
    assert uploads and len(uploads) == len(set(uploads))
    assert not holds_token(pushed.contents)


TUNE = """
import sys
sys.modules["baka_hf"] = None
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
token, target = sys.argv[1:3]
try:
    AutoModelForCausalLM.from_pretrained("ada/secret", trust_remote_code=True)
except OSError as error:
    print(error)
model = AutoModelForCausalLM.from_pretrained("ada/secret", trust_remote_code=True, token=token)
tokenizer = AutoTokenizer.from_pretrained("ada/baka", trust_remote_code=True, token=token)
with __import__("torch").no_grad():
    model.lm_head.weight.mul_(2)
model.save_pretrained(target)
tokenizer.save_pretrained(target)
model.push_to_hub("ada/tuned", token=token)
tokenizer.push_to_hub("ada/tuned", token=token)
"""


def test_a_private_model_is_tuned_and_pushed_where_the_package_is_missing(pushed: StandInHub, client: Client) -> None:
    """With a token as an argument, which no file keeps; the new repository brings its own code. Not without one."""
    refusal = client.run(TUNE, TOKEN, client.home / "tuned", token=None)
    assert "ada/secret is not a local folder and is not a valid model identifier" in refusal
    files = pushed.files("ada/tuned")
    assert {name for name in files if name.endswith(".py")} == CODE
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map.values()) and not any("--" in name for name in auto_map.values())
    original, tuned = (load(pushed.files(name)[WEIGHTS]) for name in ("ada/secret", "ada/tuned"))
    assert torch.equal(tuned["lm_head.weight"], 2 * original["lm_head.weight"])
    assert not holds_token(files) and not holds_token(files_below(client.home))


# Trainer

TRAIN = (
    MAKE
    + """
from transformers import Trainer, TrainerCallback, TrainingArguments
from baka_hf.data import LaneDataset
from baka_hf.training import BakaTrainer, BakaTrainingArguments
kind, folder, about = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = new_model()
documents = [random_tokens(model.config, 40, seed=seed).clamp(min=1) for seed in range(4)]
lanes = LaneDataset(documents, num_lanes=2, chunk_size=5, chunks_per_step=4)
trainer_class, arguments_class = (
    (BakaTrainer, BakaTrainingArguments) if kind == "BakaTrainer" else (Trainer, TrainingArguments)
)
arguments = arguments_class(
    folder, push_to_hub=True, per_device_train_batch_size=2, max_steps=4, save_steps=2, use_cpu=True, report_to=[],
    disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, **about
)

class Waits(TrainerCallback):
    # For the push of a checkpoint, which goes on in the background: else the next one may be left out.

    def on_save(self, *args, **kwargs):
        run._finish_current_push()

run = trainer_class(model, arguments, train_dataset=lanes, processing_class=tokenizer, callbacks=[Waits()])
run.train()
run.push_to_hub(dataset="numbers", license="mit")
if kind == "BakaTrainer":
    from baka_hf.results import Result, write_result
    write_result(Path(folder) / "results.db", Result.of(
        model, dict(loss=2.5, num_tokens=9), run_id=Path(folder).name, dataset="numbers", split="test", steps=4))
    run.push_to_hub(dataset="numbers", license="mit", commit_message="With scores")
    model.push_to_hub("ada/lanes", commit_message="Once more", tags=["again"])  # takes the card that is there
    arguments = arguments_class(folder + "-tuned", use_cpu=True, report_to=[], per_device_train_batch_size=2)
    BakaTrainer(type(model).from_pretrained("ada/lanes"), arguments, train_dataset=lanes).create_model_card()
"""
)

READ_BACK = """
import sys
sys.modules["baka_hf"] = None
import json
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM
card, info = ModelCard.load("ada/lanes"), HfApi().model_info("ada/lanes")
for revision in json.loads(sys.argv[1]):
    AutoModelForCausalLM.from_pretrained("ada/lanes", revision=revision, trust_remote_code=True)
scores = [
    [each.dataset_name, each.dataset_split, each.metric_type, each.metric_value] for each in card.data.eval_results
]
print(json.dumps(dict(
    scores=scores, license=info.card_data.license, tags=info.tags, task=info.pipeline_tag,
    library=vars(info)["library_name"],
)))
"""


def test_baka_trainer(hub: StandInHub, client: Client) -> None:
    """Pushes while training and after: every commit loads, the card is ours, its snippet runs, the token is nowhere."""
    about = dict(hub_model_id="ada/lanes", hub_token=TOKEN, hub_strategy="checkpoint")
    client.run(TRAIN, "BakaTrainer", client.home / "run", json.dumps(about), token=None, HF_TOKEN=TOKEN)
    titles = hub.titles("ada/lanes")
    assert titles[:3] == ["Once more", "With scores", "End of training"]
    assert "Training in progress, step 2" in titles and "Training in progress, step 4" in titles
    files = hub.files("ada/lanes")
    assert set(files) >= CODE | {"README.md", WEIGHTS, "tokenizer.json", "training_args.bin", "results.db"}
    assert any(name.startswith("last-checkpoint/lanes-rank-0/") for name in files)
    assert not holds_token(hub.contents) and not holds_token(files_below(client.home))

    card = files["README.md"].decode()
    assert "# lanes\n" in card and "trained from scratch on numbers" in card and "| Memory | carried on" in card
    assert 'from_pretrained("ada/lanes"' in card
    # What is trained on from there says so, and inherits the licence that the Hub tells.
    tuned = ModelCard.load(client.home / "run-tuned" / "README.md").data
    assert (tuned.base_model, tuned.license) == ("ada/lanes", "mit")

    commits = [c for c in hub.repositories["ada/lanes"].commits.values() if c.title != "initial commit"]
    halfway = [c.oid for c in commits if "step" in c.title and WEIGHTS in c.files]
    assert len(halfway) >= 2 and all("README.md" in hub.files("ada/lanes", oid) for oid in halfway)
    output = client.run(READ_BACK + snippet(card), json.dumps(halfway), token=None)
    found = json.loads(output.partition("\n")[0])
    assert found["scores"][0] == ["numbers", "test", "loss", 2.5]
    assert (found["license"], found["task"], found["library"]) == ("mit", "text-generation", "transformers")
    assert {"baka", "recurrent-memory", "license:mit"} <= set(found["tags"])


def test_stock_trainer(hub: StandInHub, client: Client) -> None:
    """The stock Trainer's push has all that a model needs. Its token comes from the environment, as it should."""
    client.run(TRAIN, "Trainer", client.home / "run", json.dumps(dict(hub_model_id="ada/stock")))
    files = hub.files("ada/stock")
    assert set(files) >= CODE | {"README.md", "config.json", WEIGHTS, "tokenizer.json", "training_args.bin"}
    assert not holds_token(files) and not holds_token(files_below(client.home))
    assert hub.titles("ada/stock")[0] == "End of training"


# Interrupted uploads

PUSH_ONE = """
import sys
import torch
from helpers import tiny_config, tiny_model
from huggingface_hub import HfApi
name, seed, attempts = sys.argv[1], *map(int, sys.argv[2:])
for _ in range(attempts):
    try:
        tiny_model(tiny_config(), torch.float32, seed).push_to_hub(name)
    except OSError as error:
        print(error.response.status_code, HfApi().list_repo_files(name))
"""


@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_an_interrupted_upload_is_completed_by_the_next(hub: StandInHub, client: Client, transfer: str) -> None:
    """Killed in the middle of the weights; the connection dropped there, and no commit; then whole.

    No revision ever is half of a model, and what was stored is not sent again.
    """
    if transfer == "xet":
        pytest.importorskip("hf_xet")
        upload, options = Fault("POST", "/xet/v1/xorbs/", times=1_000_000), {}
    else:
        upload, options = Fault("PUT", "/storage/", times=1_000_000), {"HF_HUB_DISABLE_XET": "1"}
    name, seed, sent = f"ada/late-{transfer}", 2 + (transfer == "lfs"), len(hub.uploads())

    hub.faults.append(upload)
    process = client.start(PUSH_ONE, name, seed, 1, **options)
    deadline = time.monotonic() + 120
    while len(hub.uploads()) == sent:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert {status for _, status in hub.uploads()[sent:]} == {0} and hub.files(name) == {}

    upload.times = 1
    hub.faults.append(Fault("POST", f"{name}/commit/", status=500))
    sent = len(hub.uploads())
    assert client.run(PUSH_ONE, name, seed, 2, **options) == "500 []\n"
    assert [status for _, status in hub.uploads()[sent:]] == [0, 200]  # tried again by the first push, not by the next
    assert set(hub.files(name)) >= CODE | {"config.json", WEIGHTS}
    assert hub.titles(name) == ["Upload BakaForCausalLM", "initial commit"]
