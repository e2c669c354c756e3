"""TRL's `SFTTrainer` as it comes: chats are learned with memory, and packed ones as if each were alone."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer, tiny_config, tiny_model
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from baka_hf import BakaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from trl.trainer.utils import disable_dropout_in_model  # noqa: E402

# TRL 1.16 and PEFT 0.21 still call activation checkpointing by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CHUNK = 6
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'][0] + '>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
Chat = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config(**overrides: Any) -> Any:
    """The answer stands three chunks after what it asks for, and nothing but memory leads there."""
    fields = dict(vocab_size=258, chunk_size=CHUNK, num_pause_tokens=1, use_xl_cache=False)
    return tiny_config(**fields | overrides)


def question(digit: int) -> Chat:
    return [dict(role="user", content=f"{digit} is it. what is it?")]


def quiz() -> Any:
    chats = [[*question(digit), dict(role="assistant", content=str(digit))] for digit in range(10)]
    return datasets.Dataset.from_list([dict(messages=chat) for chat in chats])


def small_talk() -> Any:
    """Chats of one to three turns, two to twelve chunks long."""
    turns = [("hi", "hello"), ("what is the time?", "ten past three."), ("so late? bye", "bye bye, see you tomorrow.")]
    chats = []
    for count in (3, 1, 2, 1, 3, 2, 1, 2):
        said = [(role, text) for turn in turns[:count] for role, text in zip(("user", "assistant"), turn, strict=True)]
        chats.append([dict(role=role, content=text + str(len(chats))) for role, text in said])
    return datasets.Dataset.from_list([dict(messages=chat) for chat in chats])


def trainer(folder: Path, model: Any, data: Any, tokenizer: PreTrainedTokenizerFast, **arguments: Any) -> Any:
    given = {name: arguments.pop(name) for name in ("peft_config", "eval_dataset") if name in arguments}
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        dataloader_pin_memory=False,
    )
    args = trl.SFTConfig(**defaults | arguments)
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **given)


def answers(model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What a model says to the ten questions of the quiz, read in one batch."""
    prompt = tokenizer.apply_chat_template(
        [question(digit) for digit in range(10)], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)
    return tokenizer.batch_decode(text[:, prompt["input_ids"].shape[1] :])


def test_a_chat_is_learned_and_ends(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With default settings. Without memory tokens the same training can only guess."""
    said = {}
    for memories in (2, 0):
        torch.manual_seed(0)
        model = BakaForCausalLM(
            config(hidden_size=32, intermediate_size=48, num_memory_tokens=memories, initializer_range=0.1)
        )
        trained = trainer(
            tmp_path,
            model,
            quiz(),
            tokenizer,
            per_device_train_batch_size=10,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_steps=110,
        )
        assert trained.accelerator.unwrap_model(trained.model) is model
        trained.train()
        said[memories] = answers(model, tokenizer)
    right = [f"{digit}</s>" for digit in range(10)]
    assert said[2] == right
    assert sum(found == expected for found, expected in zip(said[0], right, strict=True)) <= 2


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_messages_with_the_tokenizer_of_the_example(assistant_only_loss: bool, tmp_path: Path) -> None:
    """By the chat template that it brings: answers alone are learned from, or all that is said."""
    train.train_tokenizer(["who is it? it is 5."], vocab_size=260).save_pretrained(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    model = BakaForCausalLM(config(vocab_size=260))
    arguments = dict(assistant_only_loss=assistant_only_loss, max_steps=1)
    trained = trainer(tmp_path, model, quiz(), tokenizer, **arguments)
    batch = next(iter(trained.get_train_dataloader()))
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    digits = [text.removesuffix("<|endoftext|>")[-1] for text in learned]
    asked = "" if assistant_only_loss else "<|endoftext|>User: {0} is it. what is it?\nAssistant:"
    assert learned == [f"{asked} {{0}}<|endoftext|>".format(digit) for digit in digits]
    trained.train()
    assert trained.state.global_step == 1


def gradients(model: BakaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def documents_of(batch: dict[str, Any]) -> list[tuple[int, slice]]:
    """Where the texts of a batch stand: row and columns."""
    found = []
    for row in range(len(batch["input_ids"])):
        if "position_ids" in batch:
            begins = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
            found += [(row, slice(*ends)) for ends in zip(begins, [*begins[1:], None], strict=True)]
        else:
            found.append((row, slice(0, int(batch["attention_mask"][row].sum()))))
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(assistant_only_loss=True),
        dict(packing=True, max_length=120),
        dict(packing=True, max_length=120, assistant_only_loss=True),
        dict(packing=True, packing_strategy="bfd_split", max_length=40),
        dict(padding_free=True, max_length=None),
        dict(padding_free=True, max_length=None, pad_to_multiple_of=32),
        dict(loss_type="dft"),
    ],
    ids=lambda arguments: "-".join(str(value) for value in arguments.values()) or "default",
)
def test_loss_is_that_of_each_sample_alone(
    arguments: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(config(use_xl_cache=True, memory_solidifier="glu"))
    trained = trainer(tmp_path, model, small_talk(), tokenizer, **arguments)
    batch = next(iter(trained.get_train_dataloader()))
    documents = documents_of(batch)
    lengths = [len(batch["input_ids"][row, columns]) for row, columns in documents]
    assert max(lengths) > 5 * CHUNK
    assert ("position_ids" in batch) == ("packing" in arguments or "padding_free" in arguments)
    assert len(documents) > (1 if "position_ids" in batch else 3)

    alone = tiny_model(config(use_xl_cache=True, memory_solidifier="glu")).train()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, columns in documents:
        ids, labels = batch["input_ids"][row : row + 1, columns], batch["labels"][row : row + 1, columns]
        logits = alone(ids).logits
        assert_close(trained.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[row, columns], logits[0])
        losses = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")
        if arguments.get("loss_type") == "dft":
            losses = losses * (-losses).exp().detach()
        total, count = total + losses.sum(), count + int((labels[0, 1:] != -100).sum())
    loss = trained.compute_loss(trained.model.train(), dict(batch))
    assert_close(loss.double(), total / count, rtol=1e-6, atol=1e-6)
    expected, found = gradients(alone, total / count), gradients(trained.model, loss)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    if "loss_type" not in arguments:
        plain = trained.model(**batch, use_cache=False).loss  # the model's own loss
        assert_close(plain.double(), total / count, rtol=1e-6, atol=1e-6)


def test_assistant_only_loss_has_the_answers_as_targets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = small_talk()
    trained = trainer(tmp_path, tiny_model(config()), data, tokenizer, assistant_only_loss=True)
    targets = [[label for label in row["labels"] if label != -100] for row in trained.train_dataset]
    said = [
        "".join(turn["content"] + "</s>" for turn in row["messages"] if turn["role"] == "assistant") for row in data
    ]
    assert [tokenizer.decode(row) for row in targets] == said


def test_packed_evaluation_is_that_of_separate_samples(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = {}
    for packing in (True, False):
        trained = trainer(
            tmp_path,
            tiny_model(config()),
            small_talk(),
            tokenizer,
            eval_dataset=small_talk(),
            packing=packing,
            max_length=1000,
            per_device_eval_batch_size=8,
        )
        found[packing] = trained.evaluate()["eval_loss"]
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_a_checkpoint_folder_is_trained_with_an_adapter(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model(config(memory_solidifier="glu"), torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "proj"], modules_to_save=["memory_tokens"]
    )
    trained = trainer(
        tmp_path / "out",
        str(tmp_path / "base"),
        small_talk(),
        None,
        peft_config=adapter,
        trust_remote_code=True,
        packing=True,
        max_length=120,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
    )
    before = trained.model.get_base_model().model.memory_tokens.weight.clone()
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained.save_model()
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).merge_and_unload()
    assert (merged.model.memory_tokens.weight - before).abs().max() > 0.01
    ids = tokenizer("<u>hi0<a>", return_tensors="pt").input_ids
    assert_close(merged(ids).logits, trained.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def preferences() -> Any:
    pairs = [("who is there?", "a friend", "nobody at all"), ("what is it?", "a very small thing", "none")]
    return datasets.Dataset.from_list([dict(prompt=p, chosen=c, rejected=r) for p, c, r in pairs])


def preference_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=2,
        max_steps=1,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return defaults | settings


def randomly_paused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> BakaForCausalLM:
    """A checkpoint in `folder`, loaded."""
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tiny_model(config(pause_placement="random", num_pause_tokens=3, **special), torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BakaForCausalLM.from_pretrained(folder)


def test_random_pauses_are_a_kind_of_dropout() -> None:
    """They are drawn in training mode, and not where dropout is switched off as TRL does, or nothing is trained."""
    model = tiny_model(config(pause_placement="random", num_pause_tokens=3))
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        assert_close(model(ids).logits, expected)
    disable_dropout_in_model(model)
    assert_close(model(ids).logits, expected)


def test_preferences_begin_with_a_policy_that_is_its_reference(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """DPO switches dropout off by itself: the first loss is log 2, with random pauses too."""
    policy, reference = (randomly_paused(tmp_path, tokenizer) for _ in range(2))
    args = trl.DPOConfig(**preference_settings(tmp_path))
    trained = trl.DPOTrainer(policy, reference, args, train_dataset=preferences(), processing_class=tokenizer)
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_rewards_begin_with_a_policy_that_is_its_reference(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """GRPO's divergence is 0 in the first step if dropout is switched off, which is not its default."""
    policy = randomly_paused(tmp_path, tokenizer)
    settings = dict(beta=0.1, num_generations=2, max_completion_length=12, disable_dropout=True)
    args = trl.GRPOConfig(**preference_settings(tmp_path, **settings))
    trained = trl.GRPOTrainer(
        policy,
        lambda completions, **_: [float(len(set(text))) for text in completions],
        args,
        train_dataset=preferences().select_columns("prompt"),
        processing_class=tokenizer,
    )
    trained.train()
    assert abs(trained.state.log_history[0]["kl"]) < 1e-6
