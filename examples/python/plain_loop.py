"""Lighthouse in a plain PyTorch loop: `model.lighthouse(False)` makes it dense, optimizer and parameters go on.

python examples/python/plain_loop.py --steps 40
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lighthouse import LighthouseWrapper


def batches(steps, rows, tokens, vocabulary):
    """Counting up from a place of its own in each row: text that a small model learns at once."""
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, vocabulary, (rows, 1), generator=chance)
        yield {"input_ids": (starts + torch.arange(tokens)) % vocabulary}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    switch_step = round(0.6 * options.steps)

    model.train()
    for step, batch in enumerate(batches(options.steps, 2, options.tokens, config.vocab_size)):
        if step == switch_step:
            model.lighthouse(False)
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 8) == 0 or step == options.steps - 1:
            stage = "Lighthouse" if model.lighthouse_enabled else "dense"
            print(f"step {step + 1:>3}  {stage:10}  loss {loss.item():.4f}")

    model = model.unwrap()
    print(f"ends with a plain {type(model).__name__}")


if __name__ == "__main__":
    main()
