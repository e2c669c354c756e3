"""Train the memory that a converted decoder was given, by LoRA or in full, on documents longer than a chunk.

    python -m baka_hf.convert HuggingFaceTB/SmolLM2-135M smollm2-with-memory --chunk_size 512
    python examples/give_memory.py --model smollm2-with-memory --train books.jsonl.xz --valid held_out.jsonl.xz \\
        --stages 1 2 4 8 --steps 200 --lora_rank 16 --output smollm2-that-remembers

Documents are read in lanes that carry memory from step to step, and a step has more chunks from stage to stage, so that
gradients reach further back. What remembers (memory vectors, their norm, update and solidifiers, associations, pauses)
has a learning rate of its own; with --lora_rank all else is trained by adapters. Held-out documents are then scored
with their own memory and, where there are two or more, with another document's: gain_by_depth.png shows by how much it
helps, and how deep. The output folder holds the model, or the adapters and what remembers, and the tokenizer.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, HfArgumentParser, default_data_collator, set_seed

from baka_hf import BakaForCausalLM
from baka_hf.data import IGNORED, LaneDataset
from baka_hf.evaluation import evaluate_documents, gain_by_depth
from baka_hf.optimizers import remembers
from baka_hf.texts import load_tokens
from baka_hf.training import BakaTrainer, BakaTrainingArguments

BLOCKS = r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # what adapters are put on


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of a converted decoder, see `python -m baka_hf.convert`."})
    train: list[str] = field(
        metadata={"help": 'Training text: .jsonl (a document a line, in "text") or text files, also .xz.'}
    )
    valid: list[str] = field(metadata={"help": "Held-out text, files of the same kinds."})
    output: str = field(metadata={"help": "Folder for the model or its adapters, scores and the plot."})
    stages: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Chunks of a step, by stage."})
    steps: int = field(default=200, metadata={"help": "Optimizer steps of a stage."})
    num_lanes: int = field(default=8, metadata={"help": "Documents read side by side on each device."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of adapters; 0: all weights are trained."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak rate of AdamW; adapters like 2e-4."})
    memory_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of what remembers."})
    memory_muon_learning_rate: float = field(
        default=0.0, metadata={"help": "Peak rate of Muon (0.02, say) for matrices of what remembers; 0: without it."}
    )
    strength_bias: float = field(
        default=0.0, metadata={"help": "Of new associations' writes: by a sigmoid -2 writes with 0.12, 0 with 0.5."}
    )
    warmup_steps: int = field(default=10, metadata={"help": "Steps of linear warm-up, in each stage."})
    skip_first_chunk: bool = field(
        default=False, metadata={"help": "No loss on a document's first chunk, which has nothing to remember."}
    )
    valid_chars: int = field(default=200_000, metadata={"help": "Characters that are read of a held-out document."})
    eval_batch_size: int = field(default=8, metadata={"help": "Held-out documents read side by side."})
    seed: int = field(default=0, metadata={"help": "Of the order of documents, and of adapters."})


def put_adapters_on(model: BakaForCausalLM, rank: int) -> Any:
    """The model with LoRA in its blocks; what remembers is trained as it is, and saved with the adapters."""
    import peft

    whole = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if remembers(name.rpartition(".")[2])})
    lora = peft.LoraConfig("CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=BLOCKS, modules_to_save=whole)
    return peft.get_peft_model(model, lora)


def collate(rows: list[dict[str, torch.Tensor]], first: int) -> dict[str, torch.Tensor]:
    """A batch without the targets that a document's first `first` tokens have."""
    batch = default_data_collator(rows)
    batch["shift_labels"][batch["position_ids"] < first] = IGNORED
    batch["labels"][batch["position_ids"] <= first] = IGNORED
    return batch


def train(model: Any, documents: list[Any], args: Arguments) -> None:
    """Stage after stage, each with lanes, an optimizer and a schedule of its own."""
    n, on_gpu = model.config.chunk_size, torch.cuda.is_available()
    has_memory = any(remembers(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for chunks in args.stages:
        arguments = BakaTrainingArguments(
            str(Path(args.output) / f"{chunks}-chunks"),
            per_device_train_batch_size=args.num_lanes,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            memory_learning_rate=args.memory_learning_rate if has_memory else None,
            memory_muon_learning_rate=args.memory_muon_learning_rate or None,
            adam_beta2=0.95,
            warmup_steps=args.warmup_steps,
            lr_scheduler_type="cosine",
            bf16=on_gpu,
            tf32=on_gpu or None,  # what is kept in float32: associations
            torch_compile=on_gpu,
            cuda_graphs=on_gpu,  # where all weights are trained; adapters are read without
            seed=args.seed,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=on_gpu,
        )
        lanes = LaneDataset(documents, args.num_lanes * arguments.world_size, n, chunks, seed=args.seed)
        BakaTrainer(model, arguments, lambda rows: collate(rows, n if args.skip_first_chunk else 0), lanes).train()
        for name in ("forward", "_original_forward"):  # accelerate's, in autocast: scores and the next stage do without
            model.__dict__.pop(name, None)
        model.cuda_graphs_enable(False)  # what this stage has recorded makes room for the next
    model.config.use_cache = True  # the Trainer switches it off


def draw(gains: list[dict[str, Any]], title: str) -> Figure:
    """Gains by depth, with twice their standard errors where there are any."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    errors = [2 * (gain["standard_error"] or 0) for gain in gains]
    axes.errorbar([g["first_chunk"] for g in gains], [g["gain"] for g in gains], errors, marker="o", capsize=3)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", base=2)
    axes.set(xlabel="chunks read before", ylabel="nats per token", title=title)
    return figure


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__.split("\n")[0])
    (args,) = parser.parse_args_into_dataclasses()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    try:
        if not args.memory_learning_rate > 0:
            raise ValueError(f"memory_learning_rate: expected a positive number, got {args.memory_learning_rate}.")
        if not args.memory_muon_learning_rate >= 0:
            rate = args.memory_muon_learning_rate
            raise ValueError(f"memory_muon_learning_rate: expected a positive number, or 0, got {rate}.")
        model = BakaForCausalLM.from_pretrained(args.model)
        if (args.memory_muon_learning_rate or args.strength_bias) and not model.config.associative_dim:
            raise ValueError("memory_muon_learning_rate, strength_bias: expected a model with associations.")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokens = load_tokens(
            output / "tokens.npz",
            {"train": args.train, "valid": args.valid},
            args.model,
            end_of_text=tokenizer.bos_token or tokenizer.eos_token,
            num_chars={"valid": args.valid_chars},
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    for name, parameter in model.named_parameters():
        if args.strength_bias != 0 and name.endswith("association.beta_proj.bias"):
            torch.nn.init.constant_(parameter, args.strength_bias)
    model = put_adapters_on(model, args.lora_rank) if args.lora_rank else model
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = tokens.documents["valid"]
    options: dict[str, Any] = dict(batch_size=args.eval_batch_size, by_document=True)
    before = evaluate_documents(model, held_out, **options)
    train(model, tokens.documents["train"], args)
    own = evaluate_documents(model, held_out, num_bytes=tokens.num_bytes["valid"], **options)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    has_memory = model.config.num_memory_tokens or model.config.associative_dim
    scores: dict[str, Any] = {"loss": own["loss"], "bits_per_byte": own["bits_per_byte"]}
    comparisons = {"over itself before training": before}
    if len(held_out) > 1 and args.eval_batch_size > 1 and has_memory:
        comparisons["own memory over another document's"] = evaluate_documents(
            model, held_out, memory="exchanged", **options
        )
    for name, others in comparisons.items():
        scores[name] = gain_by_depth(own, others)
        print(f"\n{name}, nats per token:")
        for gain in scores[name]:
            error = gain["standard_error"]
            spread = f" ± {2 * error:.4f}" if error else ""
            print(f"  chunk {gain['first_chunk']:>4} on  {gain['gain']:+.4f}{spread}")
    (output / "scores.json").write_text(json.dumps(scores, indent=1))
    draw(scores[name], name).savefig(output / "gain_by_depth.png")
    print(f"\nloss {own['loss']:.4f}, {own['bits_per_byte']:.4f} bits per byte; all of it: {output}/")


if __name__ == "__main__":
    main()
