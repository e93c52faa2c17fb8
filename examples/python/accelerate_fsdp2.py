"""Lighthouse under accelerate with FSDP2: every process holds its shard of the parameters, in both stages.

    torchrun --nproc_per_node 2 examples/python/accelerate_fsdp2.py

On GPUs accelerate shards the model. On a CPU it leaves FSDP out without a word and makes copies (DDP), so there this
script shards it with torch's `fully_shard`, as accelerate would, and makes sure of it.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lighthouse import LighthouseWrapper


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cpu", action="store_true", help="on a machine with GPUs too")
    options = parser.parse_args()

    on_cpu = options.cpu or not torch.cuda.is_available()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=None if on_cpu else plugin)
    set_seed(0)  # the same weights everywhere
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
    if on_cpu:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)  # gloo
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    if on_cpu:
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule) and type(model).__name__ == "FSDPLlamaForCausalLM", type(model)

    chance = torch.Generator().manual_seed(accelerator.process_index)  # other rows in each process
    model.train()
    for step in range(options.steps):
        if step == round(0.6 * options.steps):
            model.lighthouse(False)  # in every process behind the same step
        starts = torch.randint(0, config.vocab_size, (2, 1), generator=chance)
        ids = ((starts + torch.arange(options.tokens)) % config.vocab_size).to(accelerator.device)
        loss = model({"input_ids": ids}).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 8) == 0 or step == options.steps - 1:
            loss = accelerator.reduce(loss.detach(), "mean").item()
            stage = "Lighthouse" if model.lighthouse_enabled else "dense"
            accelerator.print(f"step {step + 1:>3}  {stage:10}  loss {loss:.4f}")

    model = model.unwrap()
    accelerator.print(f"{accelerator.num_processes} processes end with a plain {type(model).__name__}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
