"""Parts from outside the package, those of docs/extending.md among them: they go every way that ours go.

A part is compared with its formula in a naive reading, or with a model that is the same by weights of other values.
"""

import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from helpers import checkpoint_activations, naive_read, random_tokens, run_script, tiny_config, tiny_model
from safetensors.torch import load_file
from stand_in_hub import Client, StandInHub
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import baka_hf
from baka_hf import (
    BakaCache,
    BakaConfig,
    BakaForCausalLM,
    BakaMemoryUpdate,
    Held,
    decoding_graphs_baka,
    import_parts,
    register_activation,
    register_association,
    register_memory,
    register_norm,
    register_solidifier,
    training_graphs_baka,
)
from baka_hf.associative_baka import ASSOCIATIONS, BakaTokenAssociation
from baka_hf.functions_baka import ACTIVATIONS, NORMS
from baka_hf.memory_baka import MEMORY_UPDATES
from baka_hf.part_files_baka import as_in_checkpoint
from baka_hf.parts_baka import REGISTERED
from baka_hf.solidifiers_baka import SOLIDIFIERS

EXACT = dict(rtol=0, atol=1e-9)
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
TABLES = dict(
    hidden_act=ACTIVATIONS,
    norm_type=NORMS,
    memory_update=MEMORY_UPDATES,
    memory_solidifier=SOLIDIFIERS,
    associative_write=ASSOCIATIONS,
)
PARTS: dict[str, dict[str, Any]] = {
    "gru": dict(memory_update="gru", memory_norm=True),
    "every_second": dict(
        **dict(memory_update="every_second", memory_solidifier="cross_attention"),
        **dict(separate_solidifiers=True, num_concepts=3),
    ),
    "block": dict(
        **dict(hidden_act="own_relu2", norm_type="doubled", parallel_residual=False),
        **dict(associative_dim=3, associative_write="doubled_tokens"),
    ),
}
ALL = dict(memory_update="gru", memory_norm=True, memory_solidifier="cross_attention", num_concepts=3)
every_part = pytest.mark.parametrize("fields", PARTS.values(), ids=PARTS)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square()


class Doubled(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledTokens(BakaTokenAssociation):
    def read(self, query: Tensor, held: tuple[Tensor, ...]) -> Tensor:
        return 2 * super().read(query, held)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = {field: dict(table) for field, table in TABLES.items()}
    known = {field: dict(parts) for field, parts in REGISTERED.items()}
    yield
    for now, then in ((TABLES, before), (REGISTERED, known)):
        for field, table in now.items():
            table.clear()
            table.update(then[field])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the page shows, where Python finds them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name in FILES or name.removeprefix("baka_hf.") in FILES:
            del sys.modules[name]


@pytest.fixture
def parts(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts, known to the naive reading too."""
    for name in FILES:
        importlib.import_module(name)
    register_activation("own_relu2")(Squared)
    register_norm("doubled")(Doubled)
    register_association("doubled_tokens")(DoubledTokens)
    monkeypatch.setitem(naive.SOLIDIFIERS, "cross_attention", naive_cross_attention)


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for graphs in (decoding_graphs_baka, training_graphs_baka):
        monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    yield
    decoding_graphs_baka._idle.clear()
    training_graphs_baka._recorders.clear()


def naive_cross_attention(config: Any, weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    concepts = weights[f"{name}.concepts.weight"]
    normed = F.layer_norm(x, x.shape[-1:], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], 1e-5)
    query, key, value = (
        y @ weights[f"{name}.{part}_proj.weight"].T for y, part in ((normed, "q"), (concepts, "k"), (concepts, "v"))
    )
    attended = (query @ key.T / x.shape[-1] ** 0.5).softmax(-1) @ value
    return x + attended @ weights[f"{name}.o_proj.weight"].T


def formula(model: BakaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """What a text's memories become, one after another."""
    weights, count = {name.rpartition("memory_update.")[2]: x for name, x in model.named_parameters()}, iter(range(99))

    def update(memory: Tensor, written: Tensor) -> Tensor:
        if model.config.memory_update == "every_second":
            return memory if next(count) % 2 else written
        D = memory.shape[-1]
        W, V = weights["gates.weight"], weights["candidate.weight"]
        gates = torch.sigmoid(memory @ W[:, :D].T + written @ W[:, D:].T + weights["gates.bias"])
        z, r = gates[:, :D], gates[:, D:]
        u = torch.tanh((r * memory) @ V[:, :D].T + written @ V[:, D:].T + weights["candidate.bias"])
        return z * memory + (1 - z) * u

    return update


def expected_logits(model: BakaForCausalLM, tokens: Tensor) -> Tensor:
    """[T, V], by a naive reading; of the parts of a block by a model of ours whose weights are doubled."""
    if model.config.norm_type != "doubled":
        return naive_read(model, tokens, update=formula(model)).logits
    config = BakaConfig.from_dict(
        model.config.to_dict() | dict(hidden_act="relu2", norm_type="rmsnorm", associative_write="tokens", parts=None)
    )
    twin = BakaForCausalLM(config).to(torch.float64).eval()
    doubled = ("norm.weight", "layernorm.weight", "association.o_proj.weight")
    weights = model.state_dict().items()
    twin.load_state_dict({name: 2 * weight if name.endswith(doubled) else weight for name, weight in weights})
    with torch.no_grad():
        return twin(tokens[None]).logits[0]


def made(fields: dict[str, Any]) -> BakaForCausalLM:
    return tiny_model(tiny_config(**fields))


# Everything that a part goes through


@every_part
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.usefixtures("parts")
def test_however_it_is_cut(fields: dict[str, Any], with_gradients: bool) -> None:
    """Rows in step, and rows out of step."""
    model = made(fields)
    tokens = random_tokens(model.config, 3, 33)
    expected = [expected_logits(model, row) for row in tokens]
    with torch.set_grad_enabled(with_gradients):
        state = model.new_cache(3)
        parts = [model(part, cache=state).logits for part in tokens.split([1, 3, 11, 2, 16], dim=1)]
        assert_close(torch.cat(parts, dim=1), torch.stack(expected), **EXACT)
        mask = torch.rand(3, 33, generator=torch.Generator().manual_seed(0)) < 0.7
        logits = model(tokens, attention_mask=mask.long()).logits
    for row in range(3):
        assert_close(logits[row, mask[row]], expected_logits(model, tokens[row, mask[row]]), **EXACT)


@every_part
@pytest.mark.usefixtures("parts", "on_cpus")
def test_graphs(fields: dict[str, Any]) -> None:
    """Chunks and tokens of a static state, and training calls."""
    model = made(fields)
    tokens = random_tokens(model.config, 2, 41)
    state = model.new_cache(2, static=True)
    cuts = [0, 10, *range(11, 28), 33, *range(34, 42)]
    with torch.no_grad():
        found = torch.cat([model(tokens[:, a:b], cache=state).logits for a, b in itertools.pairwise(cuts)], dim=1)
    assert state.is_static and state._reader is not None
    assert_close(found[1], expected_logits(model, tokens[1]), rtol=0, atol=1e-5)

    plain, graphed = model.train(), made(fields).train()
    graphed.cuda_graphs_enable()
    for _ in range(3):
        for each in (plain, graphed):
            each.zero_grad()
            each(tokens[:, :13], labels=tokens[:, :13]).loss.backward()
    (recorder,) = training_graphs_baka._recorders.values()
    assert recorder.graphs
    for parameter, twin in zip(plain.parameters(), graphed.parameters(), strict=True):
        assert_close(twin.grad, parameter.grad)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.usefixtures("on_cpus")
@torch.no_grad()
def test_an_association_of_other_layers(name: str) -> None:
    """With a bias that those of the package lack, and of two: a static state is read as any other."""

    @register_association("of_others")
    class OfOthers(BakaTokenAssociation):
        def __init__(self, config: BakaConfig):
            super().__init__(config)
            before = getattr(self, name)
            first = nn.Linear(before.in_features, before.out_features)
            setattr(self, name, nn.Sequential(first) if config.num_hidden_layers == 1 else first)

    for count in (1, 2):
        model = made(dict(associative_dim=3, associative_write="of_others", num_hidden_layers=count))
        tokens, state = random_tokens(model.config, 2, 14), model.new_cache(2, static=True)
        found = [
            model(tokens[:, :12], cache=state).logits,
            *(model(x, cache=state).logits for x in tokens[:, 12:].split(1, 1)),
        ]
        assert_close(torch.cat(found, dim=1), model(tokens).logits, **EXACT)


@pytest.mark.usefixtures("parts", "fresh_compiler")
def test_compiled() -> None:
    """All at once, beside what is not compiled."""
    model = made(ALL | PARTS["block"] | dict(num_hidden_layers=1)).train()
    tokens = random_tokens(model.config, 2, 13)
    loss, compiled = (each(tokens, labels=tokens).loss for each in (model, torch.compile(model, backend="eager")))
    assert_close(compiled, loss, **EXACT)
    names, weights = zip(*model.named_parameters(), strict=True)
    for name, *gradients in zip(names, *(torch.autograd.grad(x, weights) for x in (loss, compiled)), strict=True):
        assert_close(*gradients, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("fields", [PARTS["gru"], PARTS["every_second"]], ids=["gru", "every_second"])
@pytest.mark.usefixtures("parts")
def test_gradients(fields: dict[str, Any]) -> None:
    """Those of the formula, computed once or again in the backward pass."""
    model = made(fields)
    tokens = random_tokens(model.config, 18)
    weights = dict(model.named_parameters())
    loss = naive.read(model.config, weights, tokens.tolist(), update=formula(model)).logits.square().sum()
    expected = torch.autograd.grad(loss, list(weights.values()))
    checkpoint_activations(model.train(), "chunk")
    model(tokens[None]).logits.square().sum().backward()
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        scale = max(1.0, gradient.abs().max().item())
        assert_close(weight.grad / scale, gradient / scale, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@every_part
@pytest.mark.usefixtures("parts")
def test_generate_and_states(fields: dict[str, Any], tmp_path: Path) -> None:
    """Beams, a state in a file, and one in half precision."""
    model = made(fields)
    tokens = random_tokens(model.config, 2, 8)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    state = model.new_cache(2)
    found = model.generate(tokens, cache=state, **options)
    assert expected_logits(model, found[0]).argmax(1)[7:-1].tolist() == found[0, 8:].tolist()
    beams = dict(options, num_beams=2)
    assert model.generate(tokens, **beams).equal(model.generate(tokens, use_cache=False, **beams))
    state.save_pretrained(tmp_path, model)
    loaded = BakaCache.from_pretrained(tmp_path, model=model)
    assert all(loaded.carried[name].equal(x) for name, x in state.carried.items())
    half = model.bfloat16()
    state = half.new_cache(2)
    half(tokens, cache=state)
    assert state.memory.dtype == (torch.float32 if "gru" in fields.values() else torch.bfloat16)


# In a checkpoint

# Where `import baka_hf` fails. Arguments: a checkpoint and a folder to write to.
ELSEWHERE = """
import sys
sys.modules["baka_hf"] = None
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
source, target = map(Path, sys.argv[1:3])
trusted = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(source, **trusted)
assert config.memory_update == "gru" and config.num_concepts == 3
model, tokens = AutoModelForCausalLM.from_pretrained(source, **trusted), torch.arange(13)[None] * 5 % 19
state = model.new_cache()
with torch.no_grad():
    logits = model(tokens, cache=state).logits
    assert AutoModel.from_pretrained(source, **trusted)(tokens).last_hidden_state.shape == (1, 13, 12)
fresh = type(model)(config)
assert (fresh.model.memory_update.gates.bias == 1).all()
assert 0.5 < fresh.model.solidifier.concepts.weight.std() < 2
assert fresh.model.solidifier.o_proj.weight.abs().max() < 0.01
save_file(dict(logits=logits), target / "tensors.safetensors")
state.save_pretrained(target / "state", model)
model.save_pretrained(target)
"""
TOKENS = torch.arange(13)[None] * 5 % 19


@pytest.mark.smoke
@pytest.mark.usefixtures("parts")
def test_a_checkpoint_where_the_package_is_missing(tmp_path: Path) -> None:
    """It loads there, is saved again, and loads from that, here and elsewhere; so do its states."""
    model = tiny_model(tiny_config(**ALL), torch.float32)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    model.save_pretrained(source)
    run_script(ELSEWHERE, tmp_path, source, target)
    loaded = BakaForCausalLM.from_pretrained(target)
    state = loaded.new_cache()
    with torch.no_grad():
        found = load_file(target / "tensors.safetensors")["logits"]
        assert torch.equal(loaded(TOKENS, cache=state).logits, found)
        assert_close(found, model(TOKENS).logits, rtol=0, atol=1e-5)
    assert torch.equal(BakaCache.from_pretrained(target / "state", model=loaded).memory, state.memory)
    code = {path.name: path.read_text() for path in source.glob("*.py")}
    assert code == {path.name: path.read_text() for path in target.glob("*.py")}
    assert {"gru_memory.py", "cross_attention.py", "extended_baka.py"} < set(code) and "every_second.py" not in code

    model.config.memory_solidifier = "none"
    del model.model.solidifier
    model.config.memory_update = "replace"
    model.model.memory_update = BakaMemoryUpdate(model.config)
    model.save_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert written["auto_map"] == BakaConfig().auto_map and "parts" not in written


TRAIN_AND_PUSH = """
import torch
from transformers import Trainer, TrainingArguments
from helpers import tiny_config
import gru_memory
from baka_hf import BakaForCausalLM
torch.manual_seed(0)
model = BakaForCausalLM(tiny_config(memory_update="gru", memory_norm=True))
before = model.model.memory_update.candidate.weight.clone()
samples = [dict(input_ids=list(range(17)), labels=list(range(17)))] * 8
options = dict(max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = Trainer(model, TrainingArguments("out", hub_model_id="ada/gru", **options), train_dataset=samples)
trainer.train()
assert not torch.equal(before, model.model.memory_update.candidate.weight)
trainer.push_to_hub()
print(model.eval()(torch.arange(17)[None]).logits.sum().item())
"""
# Where the package is missing.
LOAD_FROM_HUB = """
import sys
sys.modules["baka_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("ada/gru", trust_remote_code=True)
model.generate(torch.arange(17)[None], max_new_tokens=9)
model.push_to_hub("ada/again")
print(model(torch.arange(17)[None]).logits.sum().item())
"""
# Where it is imported, and somebody else's part is not.
IMPORT_FROM_HUB = """
from baka_hf import BakaConfig, import_parts
try:
    BakaConfig.from_pretrained("ada/again")
except ValueError as error:
    assert "is the class GRUMemory of gru_memory.py" in str(error) and "import_parts" in str(error), error
else:
    raise AssertionError
import_parts("ada/again")
import_parts("ada/gru")
assert BakaConfig.from_pretrained("ada/again").memory_update == "gru"
"""


@pytest.mark.smoke
def test_by_way_of_a_hub(files: Path, tmp_path: Path) -> None:
    """Trained and pushed by its author, loaded by others."""
    assert len(FILES["gru_memory"].splitlines()) < 40
    with StandInHub() as hub:
        home = tmp_path / "home"
        home.mkdir()
        author, reader = Client(hub, files), Client(hub, home)
        trained, loaded = author.run(TRAIN_AND_PUSH, HF_HUB_DISABLE_XET="1"), reader.run(LOAD_FROM_HUB)
        assert trained.splitlines()[-1] == loaded.splitlines()[-1]
        reader.run(IMPORT_FROM_HUB)
        code = {name: hub.files(name)["gru_memory.py"] for name in ("ada/gru", "ada/again")}
        assert code["ada/gru"] == code["ada/again"] and b"from .memory_baka import Baka" in code["ada/gru"]


def test_where_a_part_is_unknown(files: Path, tmp_path: Path) -> None:
    """Refused, and by name; likewise if the name is another class's, or ours by now, or the code another."""
    importlib.import_module("gru_memory")
    folder = tmp_path / "checkpoint"
    model = tiny_model(tiny_config(**PARTS["gru"]))
    model.save_pretrained(folder)
    state = model.new_cache()
    state.save_pretrained(tmp_path / "state")

    def forget() -> None:
        del MEMORY_UPDATES["gru"]
        REGISTERED["memory_update"].clear()

    forget()
    unknown = r"`memory_update` 'gru' of this checkpoint is the class GRUMemory of gru_memory\.py, .*got nothing"
    for load in (BakaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, BakaConfig.from_pretrained):
        with pytest.raises(ValueError, match=unknown):
            load(folder)
    with pytest.raises(ValueError, match=r"a memory_update that is not here: 'gru'\. Import the file"):
        BakaCache.from_pretrained(tmp_path / "state")
    with pytest.raises(ValueError, match=r"`memory_update` must be one of replace, gate, got 'gru'\."):
        tiny_config(memory_update="gru")

    class Other(BakaMemoryUpdate):
        pass

    register_memory("gru")(Other)
    with pytest.raises(ValueError, match=r"got test_extending\..*Other under that name\. Import gru_memory before"):
        BakaForCausalLM.from_pretrained(folder)
    forget()
    import_parts(folder)
    assert type(BakaForCausalLM.from_pretrained(folder).model.memory_update).__module__ == "baka_hf.gru_memory"
    BakaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.py")}
    assert again == {path.name: path.read_bytes() for path in folder.glob("*.py")}
    with open(folder / "gru_memory.py", "a") as file:
        file.write("# other code\n")
    with pytest.raises(ValueError, match=r"expected gru_memory\.py of .*checkpoint to be that of .*imported before"):
        import_parts(folder)


def test_a_class_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is saved, with a warning; nothing leads to code that is not there."""
    warnings: list[str] = []
    monkeypatch.setattr(baka_hf.part_files_baka.logger, "warning_once", warnings.append)

    @register_memory("local")
    class Local(BakaMemoryUpdate):
        pass

    model = BakaForCausalLM(tiny_config(memory_update="local"))
    model.save_pretrained(tmp_path)
    assert (
        len(warnings) == 1 and "the code of Local (memory_update local) does not go with the checkpoint" in warnings[0]
    )
    assert not (tmp_path / "extended_baka.py").exists()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == BakaConfig().auto_map
    assert type(BakaForCausalLM.from_pretrained(tmp_path).model.memory_update) is Local


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from baka_hf import (\n    Held,  # one\n    BakaConfig as C,\n)\n", 2),
        ("if True:\n    from baka_hf.memory_baka import Held as H; x = 1\n", 1),
        ("from beside import y\nfrom math import pi\nimport torch\n", 1),
        ("import baka_hf\n", None),
        ("import beside\n", None),
        ("from baka_hf import memory_baka\n", None),
        ("from baka_hf.training import BakaTrainer\n", None),
        ("from .absent import x\n", None),
        ("from . import beside\n", None),
        ("from ..mine import beside\n", None),
    ],
)
def test_what_a_file_imports(text: str, expected: int | None, tmp_path: Path) -> None:
    """From its neighbours in a checkpoint, and all that it defines is as before."""
    (tmp_path / "beside.py").write_text("y = 1\n")
    (tmp_path / "part.py").write_text(text)
    if expected is None:
        with pytest.raises(ValueError, match=r"expected the code of parts to import from baka_hf .*part\.py"):
            as_in_checkpoint([tmp_path / "part.py"])
        return
    found = as_in_checkpoint([tmp_path / "part.py"])
    assert set(found) == ({"part.py", "beside.py"} if "beside" in text else {"part.py"})
    lines = [line for line in found["part.py"].splitlines() if line.strip().startswith("from .")]
    assert len(lines) == expected and "baka_hf" not in found["part.py"]
    here: dict[str, Any] = {"__package__": "baka_hf", "__name__": "baka_hf.part"}
    if "beside" not in text:
        exec(compile(found["part.py"], "part.py", "exec"), here)
        assert (here.get("Held") or here.get("H")) is Held
        assert here.get("C", BakaConfig) is BakaConfig and here.get("x", 1) == 1


def test_files_of_the_same_name(tmp_path: Path) -> None:
    for name in ("memory_baka.py", "a/part.py", "b/part.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for names in (["memory_baka.py"], ["a/part.py", "b/part.py"]):
        with pytest.raises(ValueError, match="expected a name that no other file of the checkpoint has, got"):
            as_in_checkpoint([tmp_path / name for name in names])


# What is refused


def test_what_is_no_part() -> None:
    class Empty(nn.Module):
        pass

    for decorator, part in (
        (register_memory("mine"), nn.Identity),
        (register_memory("mine"), BakaMemoryUpdate.forward),
        (register_solidifier("mine"), Empty),
        (register_activation("mine"), torch.relu),
        (register_norm("mine"), None),
        (register_association("mine"), nn.Identity),
    ):
        with pytest.raises(ValueError, match=r"expected a subclass of \w+( or \w+)? .*='mine', got"):
            decorator(part)
    for name in ("replace", "gate"):
        with pytest.raises(ValueError, match=rf"expected a name for a memory_update that is none of .*, got '{name}'"):
            register_memory(name)(BakaMemoryUpdate)
    for decorator in (register_solidifier("none"), register_solidifier("glu"), register_activation("silu")):
        with pytest.raises(ValueError, match="expected a name for a"):
            decorator(nn.Identity)
    for bad in ("", None, 3):
        with pytest.raises(ValueError, match="expected a name for a memory_update, a string that is not empty, got"):
            register_memory(bad)(BakaMemoryUpdate)
    register_activation("mine")(nn.ReLU)
    register_activation("mine")(nn.ReLU)
    with pytest.raises(ValueError, match=r"none of elephant, mine, .*got 'mine'"):
        register_activation("mine")(nn.GELU)
    config = tiny_config(hidden_act="mine")
    for field in TABLES:
        with pytest.raises(ValueError, match=f"`{field}` must be "):
            BakaConfig.from_dict(config.to_dict() | {field: "missing"})
    with pytest.raises(ValueError, match="'elephant' or 'mine' or a name"):
        tiny_config(hidden_act="missing")


def updates(**given: Any) -> type[BakaMemoryUpdate]:
    """A class that declares or returns this."""

    class Wrong(BakaMemoryUpdate):
        @classmethod
        def held(cls, config: Any) -> dict[str, Any]:
            return given.get("held", super().held(config))

        def forward(self, memory: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
            return given["returns"](memory, written)

    return Wrong


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(held={}), 'expected Wrong.held to have a "memory" of shape'),
        (dict(held={"memory": Held((3, 12))}), r"a \"memory\" of shape \(2, 12\), got"),
        (dict(held={"memory": (2, 12)}), "expected Wrong.held to give a `Held` of each name"),
        (dict(held={"memory": Held((2, 12)), "a.b": Held(())}), "expected Wrong.held to give a `Held` of each name"),
        (
            dict(returns=lambda memory, written: {}),
            r"expected Wrong to give tensors \{'memory': \[1, 2, 12\]\}, got \{\}",
        ),
        (dict(returns=lambda memory, written: {"memory": written[:, :1]}), r"got \{'memory': \[1, 1, 12\]\}"),
        (dict(returns=lambda memory, written: memory | {"more": written}), "expected Wrong to give tensors"),
    ],
)
def test_an_update_that_does_not_fit(given: dict[str, Any], message: str) -> None:
    register_memory("wrong")(updates(**given))
    with pytest.raises(ValueError, match=message):
        BakaForCausalLM(tiny_config(memory_update="wrong"))(TOKENS)


def test_a_solidifier_that_does_not_fit() -> None:
    @register_solidifier("wrong")
    class Wrong(nn.Module):
        def __init__(self, config: Any):
            super().__init__()

        def forward(self, memory: Tensor) -> Tensor:
            return memory[:, :1]

    with pytest.raises(ValueError, match=r"expected Wrong to give a memory \[1, 2, 12\], got \[1, 1, 12\]"):
        BakaForCausalLM(tiny_config(memory_solidifier="wrong"))(TOKENS)


def test_a_subclass_put_in_by_hand_is_not_saved(tmp_path: Path) -> None:
    """Nothing of it shows in names or weights: it would load as what it is built on."""

    class Mine(BakaMemoryUpdate):
        def forward(self, memory: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
            return {"memory": -written}

    model = BakaForCausalLM(tiny_config())
    model.model.memory_update = Mine(model.config)
    with pytest.raises(ValueError, match=r"expected `model\.memory_update` to be a BakaMemoryUpdate, .* got a Mine"):
        model.save_pretrained(tmp_path)
