"""Lighthouse under DeepSpeed ZeRO-2: gradients and optimizer states in shards, the switch on the engine's module.

    torchrun --nproc_per_node 2 examples/python/deepspeed_zero2.py

On a CPU with DS_ACCELERATOR=cpu in the environment (DeepSpeed installed with DS_BUILD_OPS=0).
"""

import argparse

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lighthouse import LighthouseWrapper


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)  # the same weights everywhere
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
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    rank = torch.distributed.get_rank()
    chance = torch.Generator().manual_seed(rank)  # other rows in each process
    engine.train()
    for step in range(options.steps):
        if step == round(0.6 * options.steps):
            engine.module.lighthouse(False)  # in every process behind the same step
        starts = torch.randint(0, config.vocab_size, (2, 1), generator=chance)
        ids = ((starts + torch.arange(options.tokens)) % config.vocab_size).to(engine.device)
        loss = engine({"input_ids": ids}).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step % max(1, options.steps // 8) == 0 or step == options.steps - 1):
            stage = "Lighthouse" if engine.module.lighthouse_enabled else "dense"
            print(f"step {step + 1:>3}  {stage:10}  loss {loss.item():.4f}", flush=True)

    model = engine.module.unwrap()
    if rank == 0:
        print(f"{torch.distributed.get_world_size()} processes end with a plain {type(model).__name__}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
