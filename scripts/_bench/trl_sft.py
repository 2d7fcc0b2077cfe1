"""A process of its own, in TRL's environment: `trl.SFTTrainer` with a PEFT adapter.

    python -m _bench.trl_sft WORKLOAD.json FOLDER [--sampling random]

The time is that between the trainer's own `on_step_begin` and `on_step_end`, so that making the batches, saving and
starting up are not in it. Gradient checkpointing, which TRL turns on by itself and which computes twice, is off.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

from _bench import workload
from _bench.workload import BATCH_SIZE, FINAL_SHARE, LEARNING_RATE, RANK, SCALE, WEIGHT_DECAY, Step, Trained, Workload

#: The linear modules of a layer, as Llama and Qwen name them.
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sampling", choices=("group_by_length", "random"), default="group_by_length")
    arguments = parser.parse_args()
    work = workload.load(arguments.workload)
    recorder = _Recorder()
    trainer = _trainer(work, arguments.folder, arguments.sampling, recorder)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: recorder.count(collate(rows))
    trainer.train()
    Trained(
        steps=[
            Step(loss, targets, seconds)
            for loss, targets, seconds in zip(recorder.losses, recorder.targets, recorder.seconds, strict=True)
        ],
        seconds=sum(recorder.seconds),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        adapters=[
            str(arguments.folder / f"checkpoint-{(at + 1) * work.steps_per_epoch}" / "adapter_model.safetensors")
            for at in range(work.epochs)
        ],
        notes={
            "sampling": arguments.sampling,
            "device": str(trainer.args.device),
            "blas": "MKL" if torch.backends.mkl.is_available() else "as torch was built",
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (torch, trl, peft, transformers)},
        },
    ).save(arguments.folder)


def _trainer(work: Workload, folder: Path, sampling: str, recorder: _Recorder) -> trl.SFTTrainer:
    total = json.loads((work.model / "config.json").read_text())["num_hidden_layers"]
    return trl.SFTTrainer(
        model=str(work.model),
        args=trl.SFTConfig(
            output_dir=str(folder),
            model_init_kwargs={"dtype": "float32"},
            num_train_epochs=work.epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": FINAL_SHARE},
            warmup_steps=0,
            optim="adamw_torch",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=0.0,
            max_length=work.max_length,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy=sampling,
            logging_steps=1,
            # A step whose loss is not finite would be logged as the last one that was.
            logging_nan_inf_filter=False,
            save_strategy="epoch",
            save_only_model=True,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            seed=work.seed,
        ),
        train_dataset=datasets.Dataset.from_list(_rows(work.data / "train.jsonl")),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=int(SCALE * RANK),
            lora_dropout=0.0,
            target_modules=_MODULES,
            layers_to_transform=list(range(total - work.layers, total)),
            layers_pattern="layers",
        ),
        callbacks=[recorder],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """As prompt and completion, so that the loss is on the answer alone."""
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]


class _Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.targets: list[int] = []
        self.seconds: list[float] = []
        self._begun = 0.0

    def count(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.targets.append(int((batch["labels"] != -100).sum()))
        return batch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


if __name__ == "__main__":
    main()
