"""A checkpoint on lanes belongs to no number of processes: whoever resumes finds the state of its own lanes."""

import json
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import CLOSE, CONFIGS, contents, logits_of, random_tokens, rows_out_of_phase, tiny_config, tiny_model
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import BatchSampler
from train_worker import (
    Record,
    ShardingTrainer,
    assert_resumed,
    assert_same,
    documents,
    in_processes,
    launched,
    train,
    trainer,
)

from baka_hf import BakaCache
from baka_hf.data import StreamingLanes
from baka_hf.evaluation import evaluate_documents
from baka_hf.training import lanes_of

# Which lanes are whose


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize(("processes", "lanes", "groups"), [(1, 3, 1), (2, 6, 1), (3, 6, 1), (2, 8, 2), (2, 6, 3)])
def test_processes_read_the_lanes_of_their_rows(processes: int, lanes: int, groups: int, split_batches: bool) -> None:
    """As accelerate deals the rows of a data set and of a stream, over three steps."""
    rows = lanes // groups // (1 if split_batches else processes)
    for rank in range(processes):
        shard = dict(num_processes=processes, process_index=rank, split_batches=split_batches)
        batches = list(BatchSamplerShard(BatchSampler(range(3 * lanes), rows, False), **shard))
        stream = list(IterableDatasetShard(list(range(3 * lanes)), rows, **shard))
        assert list(chain(*batches)) == stream
        expected = lanes_of(rank, processes, lanes, groups)
        assert [[index % lanes for index in batch] for batch in batches] == 3 * expected


def assert_equal(found: Record, expected: Record) -> None:
    """The last steps, but for the order in which numbers are added up."""
    assert found.losses == pytest.approx(expected.losses[-len(found.losses) :], rel=1e-6)
    assert found.eval_losses == pytest.approx(expected.eval_losses[-len(found.eval_losses) :], rel=1e-6)
    assert_same(found.final, expected.final, rtol=1e-9, atol=1e-12)


# States side by side


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_rows_of_several_states(overrides: dict[str, Any]) -> None:
    """They go on as each would alone, whatever each has read, and leave the states they came from as they were."""
    model = tiny_model(tiny_config(**overrides))
    _, rows = rows_out_of_phase(model, 3, 8, 11)
    states = [model.new_cache()]
    for indices in ([2, 0], [1]):
        states.append(rows.clone())
        states[-1].batch_select_indices(torch.tensor(indices))
    logits_of(model, random_tokens(model.config, 1, 6, seed=8), states[0])
    joined = BakaCache.cat(states)
    assert joined.get_seq_length() == 11 and len(joined) == model.config.num_hidden_layers
    single, exchanged = joined.split(), joined.clone()
    exchanged.put_row(-2, states[0])
    assert [state.get_seq_length() for state in single] == [6, 11, 3, 8] == joined.num_tokens.tolist()
    tokens = random_tokens(model.config, 4, 9, seed=7)
    found = logits_of(model, tokens, joined)
    expected = [logits_of(model, part, s) for part, s in zip(tokens.split([1, 2, 1]), states, strict=True)]
    assert_close(found, torch.cat(expected), **CLOSE)
    assert joined.num_tokens.tolist() == [15, 20, 12, 17]
    assert_close(torch.cat([logits_of(model, tokens[row : row + 1], single[row]) for row in range(4)]), found, **CLOSE)
    found[2] = logits_of(model, torch.cat([random_tokens(model.config, 1, 6, seed=8), tokens[2:3]], dim=1))[0, 6:]
    assert_close(logits_of(model, tokens, exchanged), found, **CLOSE)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_rows_put_at_once(overrides: dict[str, Any]) -> None:
    """As one after another, into some rows, from some, one text into several, and from their own."""
    model = tiny_model(tiny_config(**overrides))
    (_, rows), (_, others) = (rows_out_of_phase(model, *lengths) for lengths in ((3, 8, 11), (7, 1, 12)))
    expected, before = rows.clone(), contents(others)
    for row, other in ((2, 0), (0, 2), (1, 2)):
        expected.put_row(row, others[other])
    rows.put_rows([2, 0, -2], others, [0, -1, 2])
    assert contents(rows) == contents(expected) and contents(others) == before
    for wrong, of in (([0, 0], [1, 2]), ([0, -3], [1, 2]), ([0, 1], [2]), ([], [])):
        with pytest.raises(ValueError, match="as many rows, each once"):
            rows.put_rows(wrong, others, of)
    for wrong, of in (([3], [0]), ([0], [3])):
        with pytest.raises(IndexError):
            rows.put_rows(wrong, others, of)
    assert contents(rows) == contents(expected)
    rows.put_rows([0, 1, 2], rows, [2, 0, 1])
    expected.put_rows([0, 1, 2], expected.clone(), [2, 0, 1])
    assert contents(rows) == contents(expected)


@pytest.mark.parametrize("other", [None, "state", torch.zeros(2)], ids=str)
def test_what_is_no_state(other: Any) -> None:
    model = tiny_model(tiny_config())
    _, rows = rows_out_of_phase(model, 4, 11)
    before, kind = contents(rows), type(other).__name__
    for use, name in ((lambda: rows.put_rows([0], other), "`state`"), (lambda: BakaCache.cat([rows, other]), "each")):
        with pytest.raises(ValueError, match=f"expected {name}.* to be a BakaCache .*, got {kind}"):
            use()
    assert contents(rows) == before


def test_a_row_of_its_own() -> None:
    """A copy, which `generate` takes for the state of its text; and where a row is put nothing else changes."""
    model = tiny_model(tiny_config())
    texts, rows = rows_out_of_phase(model, 4, 11)
    before = contents(rows)
    assert [row.num_tokens.tolist() for row in rows] == [[4], [11]]
    options = dict(do_sample=False, max_new_tokens=9, eos_token_id=None)
    history = torch.cat([texts[0], random_tokens(model.config, 3, seed=5)])[None]
    told = model.generate(history, cache=rows[-2], **options)
    assert torch.equal(told, model.generate(history, **options))
    assert contents(rows) == before
    joined = BakaCache.cat([rows[1], rows[0]])
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), history], dim=1)
    both = torch.cat([torch.cat([texts[1], history[0, -3:]])[None], padded])
    mask = (torch.arange(14) >= torch.tensor([[0], [7]])).long()
    assert torch.equal(model.generate(both, attention_mask=mask, cache=joined, **options)[1:, 7:], told)

    graph = model(random_tokens(model.config, 2, 4), cache=rows).logits.square().sum()
    rows.put_row(0, joined[0].to(dtype=torch.float32))
    assert not rows[0].memory.requires_grad
    graph.backward()  # what it holds on to is as it was
    with pytest.raises(ValueError, match="only the last 0 were tokens"):
        rows.crop(-1)
    share, torn = joined[0], rows.clone()
    share.layers[1].values = share.layers[1].values[..., :2]
    with pytest.raises(RuntimeError):
        torn.put_row(0, share)
    with pytest.raises(ValueError, match="in the middle of a call"):
        torn.split()
    with pytest.raises(ValueError, match=r"as many rows, each once, as texts to put there, got \[0\] and \[0, 1\]"):
        rows.put_row(0, rows)
    with pytest.raises(ValueError, match="expected chunk_size=5, got 7"):
        rows.put_row(0, tiny_model(tiny_config(chunk_size=7)).new_cache())
    for use in (rows.__getitem__, lambda row: rows.put_row(row, joined[0])):
        with pytest.raises(IndexError):
            use(2)


def test_what_states_say_of_their_rows(tmp_path: Path) -> None:
    """Hashes, pauses, rows that were seeded or met EOS; and how far all rows can go back."""
    model = tiny_model(tiny_config(pause_placement="random", chunk_size=9)).train()
    states = [model.new_cache(2), model.new_cache(memory=torch.ones(2, 12))]
    tokens = random_tokens(model.config, 3, 8)
    for seed, (state, part) in enumerate(zip(states, (tokens[:2], tokens[2:]), strict=True)):
        torch.manual_seed(seed)
        model(part, cache=state, use_cache=True)  # with gradients, where pauses are random
        state.detach_()
    mask = torch.ones(2, 2).index_fill(1, torch.tensor([0]), 0).long()
    logits_of(model, tokens[:2, :2], states[0], attention_mask=mask)  # after padding one position can be taken back
    logits_of(model, tokens[2:, :2], states[1])
    states[1]._finished = torch.tensor([True])
    joined = BakaCache.cat(states)
    assert (states[0]._pauses != states[1]._pauses).any()
    for name in ("_pauses", "_history", "_num_tokens", "_seeded"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(state, name) for state in states])), name
    assert joined._finished is not None and joined._finished.tolist() == [False, False, True]
    assert joined.get_seq_length() == 10
    with pytest.raises(ValueError, match="only the last 1 were"):
        joined.crop(-2)
    joined.save_pretrained(tmp_path)
    assert_close(BakaCache.from_pretrained(tmp_path).memory, joined.memory, rtol=0, atol=0)

    states[0]._history = None  # unknown in one, unknown in all
    states[1]._is_beam_search = True
    joined = BakaCache.cat(states)
    assert joined._history is None and joined._is_beam_search


def test_states_that_do_not_go_together() -> None:
    model = tiny_model(tiny_config())
    read = model.new_cache()
    logits_of(model, random_tokens(model.config, 1, 3), read)
    cases: list[tuple[list[BakaCache], str]] = [
        ([], "at least one state, got none"),
        ([read, read.clone().to(dtype=torch.float32)], r"in one dtype.*torch.float64\) and .*torch.float32\)"),
        ([read, tiny_model(tiny_config(chunk_size=7)).new_cache()], "expected chunk_size=5, got 7"),
    ]
    for states, message in cases:
        with pytest.raises(ValueError, match=message):
            BakaCache.cat(states)


# A step of the lanes in several batches


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [(dict(), (1, 2, 3)), (dict(chunks_per_backward=1), (2,)), (dict(carry_memory=False), (2,))],
    ids=str,
)
def test_lanes_in_several_batches(tmp_path: Path, overrides: dict[str, Any], numbers: tuple[int, ...]) -> None:
    """Half the rows and twice the gradients accumulated: nothing else changes. Nor does evaluation with fewer rows."""
    settings = overrides | dict(lanes=6, num_train_epochs=2, eval_strategy="epoch")
    expected = train(tmp_path, gradient_accumulation_steps=2, **settings)
    for rows in numbers:
        batches = dict(per_device_train_batch_size=rows, per_device_eval_batch_size=rows)
        found = train(tmp_path, gradient_accumulation_steps=12 // rows, **batches, **settings)
        assert_equal(found, expected)
    if not overrides:
        model = tiny_model(tiny_config(memory_solidifier="glu"))
        model.load_state_dict(found.final)
        scored = evaluate_documents(model, documents(), progress=False)
        assert found.eval_losses[-1] == pytest.approx(scored["loss"], rel=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_lanes_in_several_batches_resume(tmp_path: Path, stream: bool) -> None:
    settings = dict(lanes=6, stream=stream, max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    settings |= dict(model=dict(pause_placement="random"), save_strategy="steps", save_steps=3)
    whole = train(tmp_path, **settings)
    for step in (3, 6, 9):
        assert_resumed(train(tmp_path / "resumed", tmp_path / f"checkpoint-{step}", **settings), whole)


def test_a_step_of_the_lanes_is_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a multiple of 3 batches.*got gradient_accumulation_steps=4"):
        train(tmp_path, lanes=6, per_device_train_batch_size=2, gradient_accumulation_steps=4)


# Other numbers of processes

STREAM = dict(stream=True, lanes=6, chunks_per_step=1)
RANDOM = dict(model=dict(pause_placement="random"))
# What both numbers of processes share, and what two and one have of their own.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "epochs": (RANDOM | dict(lanes=6, num_train_epochs=3, gradient_accumulation_steps=2, max_grad_norm=1.0), {}, {}),
    "pieces": (dict(lanes=2, chunks_per_step=4, chunks_per_backward=3, lr_scheduler_type="linear"), {}, {}),
    "split_batches": (
        dict(lanes=2, max_steps=5, per_device_train_batch_size=2, accelerator_config=dict(split_batches=True)),
        {},
        {},
    ),
    "stream": (STREAM | RANDOM | dict(max_steps=10), {}, {}),
    "sharded_stream": (
        STREAM | dict(max_steps=5, gradient_accumulation_steps=2, accelerator_config=dict(dispatch_batches=False)),
        {},
        {},
    ),
    "accumulated": (
        dict(lanes=2, max_steps=5, per_device_train_batch_size=1),
        dict(gradient_accumulation_steps=1),
        dict(gradient_accumulation_steps=2),
    ),
    "interleaved_stream": (
        STREAM | dict(max_steps=10),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=3),
        dict(per_device_train_batch_size=3, gradient_accumulation_steps=2),
    ),
}


def both_ways(
    folder: Path,
    settings: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]],
    on_one: Callable[[dict[Path, dict[str, Any]]], list[Record]],
    environment: dict[str, str] | None = None,
) -> dict[str, Record]:
    """Runs on one process and on two; parted are those that two go on with where the one was, merged the reverse."""
    saving, not_saving = dict(save_strategy="steps", save_steps=3), dict(save_strategy="no")
    one, two, parted, merged = {}, {}, {}, {}
    for name, (common, pair, alone) in settings.items():
        paths = {what: folder / f"{name}-{what}" for what in ("one", "two", "parted", "merged")}
        one[paths["one"]], two[paths["two"]] = common | alone | saving, common | pair | saving
        parted[paths["parted"]] = common | pair | not_saving | dict(resume=paths["one"] / "checkpoint-3")
        merged[paths["merged"]] = common | alone | not_saving | dict(resume=paths["two"] / "checkpoint-3")
    records = on_one(one) + in_processes(2, two | parted, environment) + on_one(merged)
    return dict(zip((path.name for path in one | two | parted | merged), records, strict=True))


def assert_both_ways(name: str, records: dict[str, Record]) -> None:
    whole = records[f"{name}-one"]
    for what in ("two", "parted", "merged"):
        found = records[f"{name}-{what}"]
        assert len(found.losses) == len(whole.losses) - (0 if what == "two" else 3) > 0
        assert_equal(found, whole)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ddp")
    records = both_ways(folder, SETTINGS, lambda runs: [train(path, **run) for path, run in runs.items()])
    return SimpleNamespace(folder=folder, records=records)


@pytest.mark.parametrize("name", SETTINGS)
def test_from_two_processes_to_one_and_back(ddp: SimpleNamespace, name: str) -> None:
    """What is resumed goes on as if never stopped, whoever began it."""
    assert_both_ways(name, ddp.records)


def test_sharded_from_two_processes_to_one_and_back(tmp_path: Path) -> None:
    """With FSDP2 as in the examples' configuration, whose checkpoints hold everything whole."""
    options = launched("fsdp2.yaml")
    options.mixed_precision = "no"
    environment = {name: value for name, value in prepare_multi_gpu_env(options).items() if "FSDP" in name}
    settings = RANDOM | dict(lanes=2, max_steps=5, max_grad_norm=1.0, trainer_class=ShardingTrainer)
    on_one = partial(in_processes, 1, environment=environment)
    assert_both_ways("sharded", both_ways(tmp_path, {"sharded": (settings, {}, {})}, on_one, environment))


def test_what_processes_save(ddp: SimpleNamespace) -> None:
    """A folder each; together they hold the rows that one process holds."""
    for name, groups in (("stream", (1, 1)), ("interleaved_stream", (3, 2))):
        rows: list[dict[int, tuple[list[int], Tensor]]] = [{}, {}]
        for number in (2, 1):
            checkpoint = ddp.folder / f"{name}-{('one', 'two')[number - 1]}" / "checkpoint-3"
            assert len(list(checkpoint.glob("lanes-rank-*"))) == number
            for rank in range(number):
                folder = checkpoint / f"lanes-rank-{rank}"
                about, state = json.loads((folder / "lanes.json").read_text()), BakaCache.from_pretrained(folder)
                assert (about["num_processes"], about["num_groups"]) == (number, groups[2 - number])
                lanes = chain(*lanes_of(rank, number, 6, about["num_groups"]))
                rows[number - 1] |= dict(zip(lanes, zip(about["places"], state.memory, strict=True), strict=True))
        for lane in range(6):
            assert rows[0][lane][0] == rows[1][lane][0]
            assert_close(rows[0][lane][1], rows[1][lane][1])


# What does not fit


def test_a_folder_that_is_missing(ddp: SimpleNamespace, tmp_path: Path) -> None:
    """Nothing is made up for it."""
    settings, checkpoint = SETTINGS["epochs"][0], ddp.folder / "epochs-two" / "checkpoint-3"
    folder = checkpoint / "lanes-rank-1"
    folder.rename(checkpoint / "elsewhere")
    with pytest.raises(ValueError, match=r"expected the state of lanes in .*lanes-rank-1, found none"):
        train(tmp_path, checkpoint, **settings)
    (checkpoint / "elsewhere").rename(folder)
    train(tmp_path, checkpoint, **settings)


@pytest.mark.parametrize(
    "change", [dict(gradient_accumulation_steps=2), dict(chunks_per_step=3), dict(chunks_per_step=1)], ids=str
)
def test_a_state_is_given_to_no_other_row(tmp_path: Path, change: dict[str, Any]) -> None:
    """Trainer skips as many batches as the steps would have read had they always been like this."""
    train(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match=r"the document in row \d to go on at \d+, where .*, got position \d+"):
        train(tmp_path, tmp_path / "checkpoint-3", **change)


def test_a_stream_goes_on_with_other_sizes(tmp_path: Path) -> None:
    """It goes by its own places, and reads everything that it has not read."""
    settings = dict(stream=True, lanes=3, max_steps=3)
    train(tmp_path, **settings, save_strategy="steps", save_steps=3)
    changed = settings | dict(max_steps=5, gradient_accumulation_steps=2, chunks_per_step=1)
    resumed = trainer(tmp_path, Record(), **changed)
    assert isinstance(resumed.train_dataset, StreamingLanes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.train_dataset.stats.num_tokens > 0
