"""The noise scale in a Hugging Face Trainer: python examples/meter/huggingface.py, or with DDP

    torchrun --nproc-per-node 2 examples/meter/huggingface.py

The callback logs with the trainer's own figures, to whatever `report_to` names, and lets the gradient accumulation grow
with the critical batch.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from copus.meter.huggingface import NoiseCallback


def main(steps: int = 30, **options: Any) -> Trainer:
    """Train a tiny model on tokens that follow from each other; `options` are further arguments of the trainer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    rows = (64 * torch.rand(8 * steps, 16) ** 2).long()
    data = [{"input_ids": row, "labels": row} for row in rows]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data)
        trainer.add_callback(NoiseCallback(trainer, most_accumulation_steps=16))
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
