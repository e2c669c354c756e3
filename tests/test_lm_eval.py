"""EleutherAI's lm-eval scores a checkpoint as the model itself does, with memory carried through whole documents."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saving import byte_tokenizer, save_checkpoint

from baka_hf import BakaForCausalLM

lm_eval = pytest.importorskip("lm_eval")

TOKENIZER = byte_tokenizer()
TEXT = "The river runs by the mill, and the miller's daughter keeps the key of the gate. " * 7
DOCUMENTS = [TEXT[:37], TEXT[5:], TEXT[20:260]]  # 7, 112 and 48 chunks
PROMPTS = [TEXT[:203], TEXT[11:20], TEXT[30:171]]
LIMIT = 600  # `max_length`, as lm-eval calls it: no document is longer
NEW_TOKENS = 24
STOP = "{"

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
output_type: {name}
metric_list: {metrics}
"""


def log_likelihood(model: BakaForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The sum of the continuation's log-probabilities, read seven tokens at a time with the state carried on, and
    whether each of its tokens is the likeliest."""
    tokens, state = torch.tensor([context + continuation]), model.new_cache(1)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=state).logits for piece in tokens[:, :-1].split(7, 1)], 1)
    logits, targets = logits[0, -len(continuation) :].double(), tokens[0, -len(continuation) :]
    found = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint, a folder with a local task of each kind, and what the model itself says of them."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = save_checkpoint(folder / "checkpoint")
    answers = []
    for prompt in PROMPTS:
        inputs = TOKENIZER(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(TOKENIZER.decode(output[0, inputs.input_ids.shape[1] :]))
    until_stop = [answer.split(STOP)[0] for answer in answers]
    assert len(set(map(len, until_stop))) == len(PROMPTS)  # rows of a batch stop at different times

    rows: dict[str, list[tuple[str, str]]] = {
        "loglikelihood": [(PROMPTS[0], answers[0]), (PROMPTS[1], " mill"), (PROMPTS[2], "!")],
        "loglikelihood_rolling": [("", document) for document in DOCUMENTS],
        "generate_until": list(zip(PROMPTS, until_stop, strict=True)),
    }
    metrics = {
        "loglikelihood": "[{metric: perplexity}, {metric: acc}]",
        "loglikelihood_rolling": "[{metric: bits_per_byte}]",
        "generate_until": "[{metric: exact_match}]",
    }
    for name, pairs in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in pairs))
        task = TASK.format(name=name, data=data, metrics=metrics[name])
        if name == "generate_until":
            task += f"generation_kwargs: {{until: ['{STOP}'], max_gen_toks: {NEW_TOKENS}, do_sample: false}}"
        (folder / f"{name}.yaml").write_text(task)

    scores = [
        log_likelihood(model, TOKENIZER(prompt).input_ids, TOKENIZER(target).input_ids)
        for prompt, target in rows["loglikelihood"]
    ]
    assert [greedy for _, greedy in scores] == [True, False, False]
    rolling = [log_likelihood(model, [TOKENIZER.eos_token_id], TOKENIZER(text).input_ids)[0] for text in DOCUMENTS]
    expected = {
        "perplexity": math.exp(-sum(score for score, _ in scores) / len(scores)),
        "acc": 1 / 3,
        "bits_per_byte": -sum(rolling) / math.log(2) / sum(len(text.encode()) for text in DOCUMENTS),
        "exact_match": 1.0,
    }
    return SimpleNamespace(folder=folder, names=list(rows), expected=expected)


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """Of all tasks: each has metrics of its own."""
    return {
        name.removesuffix(",none"): value
        for task in results["results"].values()
        for name, value in task.items()
        if name.endswith(",none") and "stderr" not in name
    }


def evaluate(tasks: SimpleNamespace, names: list[str], batch_size: int | str, **model_args: Any) -> dict[str, float]:
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=dict(pretrained=str(tasks.folder / "checkpoint"), trust_remote_code=True) | model_args,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks.folder), include_defaults=False),
        batch_size=batch_size,
        max_batch_size=8,  # "auto" begins here, with texts of `max_length`
        device="cpu",
        bootstrap_iters=0,
    )
    return metrics_of(results)


def test_command_line(tasks: SimpleNamespace) -> None:
    """`lm_eval` in a process of its own knows nothing of this package but the code in the checkpoint."""
    arguments = (
        f"--model hf --model_args pretrained=checkpoint,trust_remote_code=True,max_length={LIMIT} --device cpu "
        f"--tasks {','.join(tasks.names)} --include_path . --batch_size 1 --output_path results"
    )
    hidden = "import sys; sys.modules['baka_hf'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", hidden, *arguments.split()],
        cwd=tasks.folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (results,) = tasks.folder.glob("results/**/*.json")
    assert metrics_of(json.loads(results.read_text())) == pytest.approx(tasks.expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [4, "auto"])  # and 1 by the command line
def test_batch_sizes_agree(tasks: SimpleNamespace, batch_size: int | str) -> None:
    """Rows of other lengths in the batch, padded on the right to be scored and on the left to be continued, change
    nothing."""
    found = evaluate(tasks, tasks.names, batch_size, max_length=LIMIT)
    assert found == pytest.approx(tasks.expected, rel=1e-4)


def test_a_limit_cuts_memory(tasks: SimpleNamespace) -> None:
    """lm-eval reads a text in windows of `max_length` tokens, 2048 when nothing is said, each with an empty memory: it
    must be told a length that no text exceeds."""
    for max_length, is_whole in ((50, False), (None, True)):
        found = evaluate(tasks, ["loglikelihood_rolling"], 4, max_length=max_length)["bits_per_byte"]
        assert (found == pytest.approx(tasks.expected["bits_per_byte"], rel=1e-3)) == is_whole
