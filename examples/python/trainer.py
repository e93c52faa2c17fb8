"""Lighthouse in a script of your own with Transformers' Trainer: the wrapper, and a callback that makes it dense.

python examples/python/trainer.py --steps 40 --output runs/counting
python examples/python/trainer.py --steps 40 --output runs/counting --resume
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lighthouse import LighthouseWrapper
from lighthouse.huggingface import LighthouseCallback


class Counting(torch.utils.data.Dataset):
    """Rows that count up, each from a place of its own."""

    def __init__(self, rows, tokens, vocabulary):
        self.ids = (torch.arange(rows)[:, None] * 7 + torch.arange(tokens)) % vocabulary

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--output", default="runs/counting")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=options.tokens,
    )
    # min_tokens=0: a sequence this short would else run dense, since Lighthouse gains nothing there.
    model = LighthouseWrapper(LlamaForCausalLM(config), pool_ratios=[1 / 4, 1 / 16], select_topk=1 / 64, min_tokens=0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            learning_rate=5e-3,
            eval_strategy="steps",  # dense: a wrapped model is so by itself in eval()
            eval_steps=max(1, options.steps // 4),
            save_steps=max(1, options.steps // 4),
            logging_steps=max(1, options.steps // 8),
            report_to="none",
        ),
        train_dataset=Counting(64, options.tokens, config.vocab_size),
        eval_dataset=Counting(4, options.tokens, config.vocab_size),
        callbacks=[LighthouseCallback(switch_share=0.6)],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)

    model = trainer.model.unwrap()
    print(f"ends with a plain {type(model).__name__}")
    print(f"lighthouse export {options.output}/checkpoint-{options.steps} --output counting")


if __name__ == "__main__":
    main()
