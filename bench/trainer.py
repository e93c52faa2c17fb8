"""What `lighthouse pretrain` costs compared with a bare loop over the same model, in each stage.

    python bench/trainer.py --json trainer.json
    python bench/trainer.py --model nano --context 2048 --steps 30 --device cpu

The bare loop: forward, loss, backward, clipping, fused AdamW, the schedule, rows already on the device, no
synchronisation. `lighthouse pretrain` is the whole command as a user runs it, on Transformers' Trainer: what it reports
as tokens per second, the median over its logs after the first steps. Both have the same model, layers compiled alike,
and the same precision. The loops' first losses are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import setting
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import get_cosine_schedule_with_warmup

from lighthouse import LighthouseWrapper
from lighthouse.text import data
from lighthouse.training import PretrainOptions, TrainingOptions, prepare
from lighthouse.training.model import model_of, new_config

STAGES = ("dense", "lighthouse")
WARM_UP = 20  # steps before the clock runs, compilation among them
CLOSE = 0.02  # of the first loss: the Trainer logs the mean of the first ten


def write_text(folder: Path, tokens: int) -> Path:
    """Files of random words, this many bytes in all."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(2000)]
    for number in range(16):
        text = " ".join(chance.choices(words, k=tokens // 16 // 6))
        (folder / f"{number}.txt").write_text(text)
    return folder


def options_for(stage: str, text: Path, folder: Path, options) -> tuple[PretrainOptions, TrainingOptions]:
    compiled = options.device == "cuda"
    run = PretrainOptions(
        model=options.model,
        context=options.context,
        data=str(text),
        held_out=1,
        compile_layers=compiled,
        dense_only=stage == "dense",
        lighthouse_only=stage == "lighthouse",
    )
    training = TrainingOptions(
        output_dir=str(folder / stage),
        max_steps=options.steps,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        report_to="tensorboard",
        use_cpu=options.device == "cpu",
        bf16=compiled,
        disable_tqdm=True,
    )
    return run, training


def by_trainer(stage: str, text: Path, folder: Path, options) -> tuple[float, float]:
    """Seconds of a step and the first loss that is logged, of `lighthouse pretrain`."""
    prepare(*options_for(stage, text, folder, options)).train()
    events = EventAccumulator(str(next((folder / stage).rglob("events*")).parent))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/tokens_per_second") if event.step > WARM_UP]
    return options.context / statistics.median(rates), events.Scalars("train/loss")[0].value


def by_loop(stage: str, text: Path, folder: Path, options) -> tuple[float, float]:
    """The same of the bare loop; the loss is the mean of the first ten steps."""
    run = prepare(*options_for(stage, text, folder / "loop", options))
    rows, _ = data.rows_of(run.corpus)
    order = torch.utils.data.RandomSampler(rows, generator=torch.Generator().manual_seed(run.training.seed))
    rows = [data.collate([rows[i]])["input_ids"].to(options.device) for i in list(order)[: options.steps]]
    model = model_of(new_config(options.model, options.context, run.tokenizer), run.training.seed)
    if stage == "lighthouse":
        model = LighthouseWrapper(model, dense_layers=run.options.dense_layers, min_tokens=0, max_share=1.0)
    model.to(options.device).train()
    if run.options.compile_layers:
        for layer in model.base_model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    training = run.training
    betas = (training.adam_beta1, training.adam_beta2)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, training.get_warmup_steps(options.steps), options.steps)
    first = torch.zeros((), device=options.device)
    for step in range(options.steps):
        if step == WARM_UP:
            setting.synchronize(options.device)
            start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=training.bf16):
            loss = model(input_ids=rows[step], labels=rows[step], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step < 10:
            first += loss.detach() / 10
    setting.synchronize(options.device)
    return (time.perf_counter() - start) / (options.steps - WARM_UP), first.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = str(Path(__file__).parent / "38m.json")
    parser.add_argument("--model", default=default, help="as in lighthouse pretrain (default: 38m.json)")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=100, help=f"of each loop, the first {WARM_UP} untimed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.steps < WARM_UP + 10:
        parser.error(f"--steps {options.steps}: at least {WARM_UP + 10} are needed")

    results = {
        "command": setting.command(),
        "device": setting.device_name(options.device),
        "versions": setting.versions(options.device),
        "settings": {"model": Path(options.model).name, "context": options.context, "steps": options.steps},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        text = write_text(folder / "text", max(20, options.steps) * options.context)
        for stage in STAGES:
            bare, its_loss = by_loop(stage, text, folder, options)
            whole, loss = by_trainer(stage, text, folder, options)
            if abs(loss - its_loss) > CLOSE * its_loss:
                raise SystemExit(f"{stage}: the Trainer's first losses are {loss:.4f}, the bare loop's {its_loss:.4f}")
            results[stage] = {
                "bare_loop_seconds": bare,
                "trainer_seconds": whole,
                "loss": loss,
                "bare_loop_loss": its_loss,
            }
            print(
                f"{stage}: {1e3 * bare:.1f} ms a step in the bare loop, {1e3 * whole:.1f} ms in lighthouse pretrain, "
                f"{100 * (whole / bare - 1):+.1f} %",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
