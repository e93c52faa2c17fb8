"""What is known of how exported weights were trained, and the model card that reports it.

Read from what lies beside a checkpoint: `run.json` and `results.json` of `lighthouse pretrain`, the Trainer's
`trainer_state.json` with the state of our callbacks in it. What none of them records is left out of the card.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lighthouse.core.method import Method
from lighthouse.core.settings import LEAST_DENSE_SHARE
from lighthouse.huggingface.callback import LighthouseCallback
from lighthouse.huggingface.steps import Steps, not_ready, tokens_counted
from lighthouse.huggingface.trainer_state import STATE, step_of
from lighthouse.huggingface.wrapped import WrappedModel
from lighthouse.training.callbacks import Record, steps_in_record
from lighthouse.training.checkpoints import weights_in
from lighthouse.training.result import DENSE, LIGHTHOUSE, RESULTS
from lighthouse.training.resume import FACTS, MODEL, SETTINGS

PAPER = "arXiv:2605.06554"
HELD_OUT_ROWS = 12

REFERENCE = """\
Peng, Ghosh, Quesnelle: *Long Context Pre-Training with Lighthouse Attention*,
[arXiv:2605.06554](https://arxiv.org/abs/2605.06554)."""

METHOD = """\
For part of its training, the layers used Lighthouse attention{but}: {what}. This was a modification of training only.
Nothing of it is in this folder: parameters, their names and the code that runs them are those of a plain {model_class},
with dense attention."""
PYRAMID = """\
queries, keys and values are averaged over windows into a pyramid, a small part of its entries is chosen, and causal
attention runs only on these"""
WINDOW = "each token attends exactly to the last {window:,} tokens"


@dataclass
class History:
    """What is known of how the exported weights were trained; None or an empty list means not known.

    `step` is that of the weights; `switch_step` is the last in which Lighthouse acted, 0 if it never did, and
    `lighthouse_steps` counts all of those. `still_on`, `ready` and `hardly_dense` are for a model in memory, whose
    steps are not known: whether Lighthouse is on, whether dense training has followed it, and if that is too little,
    (training forwards, dense ones). `held_out` are (step, loss); `losses_are_dense` is False if it is not recorded with
    which attention they were measured, `losses_are_ours` is False if another script's Trainer computed them.
    `tokenizer_identity` is that of the training tokenizer. `doubts` are about the records beside the weights.
    """

    step: int | None = None
    switch_step: int | None = None
    lighthouse_steps: int | None = None
    still_on: bool | None = None
    ready: bool | None = None
    hardly_dense: tuple[int, int] | None = None
    method: Method | None = None
    dense_layers: int | None = None
    context: int | None = None
    tokens: int | None = None
    lighthouse_tokens: int | None = None
    held_out: list[tuple[int, float]] = field(default_factory=list)
    losses_are_dense: bool = False
    losses_are_ours: bool = False
    tokenizer_identity: str | None = None
    doubts: list[str] = field(default_factory=list)

    @property
    def steps_with_lighthouse(self) -> int | None:
        """Of those up to `step`."""
        if self.step is None or self.switch_step is None:
            return None
        return min(self.step, self.switch_step) if self.lighthouse_steps is None else self.lighthouse_steps

    @property
    def stages(self) -> list[tuple[str, int, int | None]]:
        """(name, steps, tokens or None) of the stages up to `step`."""
        first = self.steps_with_lighthouse
        if self.step is None or first is None:
            return []
        tokens = first_tokens = rest = None
        if self.tokens is not None:
            tokens, first_tokens = self.tokens, self.lighthouse_tokens
            if first in (0, self.step):
                first_tokens = tokens if first else 0
            rest = None if first_tokens is None else tokens - first_tokens
        stages = [(LIGHTHOUSE, first, first_tokens), (DENSE, self.step - first, rest)]
        return [stage for stage in stages if stage[1] > 0]

    def warnings(self) -> list[str]:
        """What keeps the weights from being used, or may."""
        if self.still_on:
            return [
                "Lighthouse was still on when this model was exported: without steps of dense attention its weights "
                "are not ready for dense attention, which every other program uses."
            ]
        if self.ready is False:
            return [
                "No dense step has followed the last one with Lighthouse in these weights: they are not ready for "
                "dense attention, which every other program uses."
            ]
        if self.hardly_dense is not None:
            forwards, dense = self.hardly_dense
            return [
                f"Of the {forwards:,} training forwards of these weights only {dense:,} had dense attention: with less "
                f"than {LEAST_DENSE_SHARE:.0%} of them they are hardly ready for it, and every other program uses it."
            ]
        if self.still_on is not None:
            return []
        if self.switch_step is None:
            return ["It is not recorded beside the checkpoint whether these weights had a dense stage.", *self.doubts]
        return [*not_ready(self.step or 0, self.switch_step, self.lighthouse_steps), *self.doubts]


def history_of_model(model) -> History:
    """Of a model in memory: its settings, and whether Lighthouse is on. Nothing is known of a plain model."""
    if not isinstance(model, WrappedModel):
        return History(still_on=False)
    settings = model.lighthouse_settings
    return History(
        still_on=model.lighthouse_enabled,
        ready=model._lighthouse.ready,
        hardly_dense=model._lighthouse.hardly_dense,
        method=settings.method,
        dense_layers=settings.dense_layers,
    )


def history_of_checkpoint(folder: Path) -> History:
    """Of a checkpoint of any Trainer, or of a finished run's model."""
    state = _read(folder / STATE)
    if state is not None:
        callbacks = state.get("stateful_callbacks", {})
        record = callbacks.get(Record.__name__)
        return _of_a_trainer(folder, state) if record is None else _of_a_run(folder, record, state)
    results = _read(folder.parent / RESULTS)
    if results is None or folder.name != MODEL:  # the results belong only to that folder's weights
        return History()
    if results.get("weights", "") not in ("", weights_in(folder)):
        return History(
            doubts=[f"The weights are not those that the run beside them saved, so its {RESULTS} is not used."]
        )
    steps = steps_in_record({"stages": results["stages"]})
    history = _settings_of(results["settings"], steps, results["model_step"])
    history.held_out = [(point["step"], point["loss"]) for point in results["held_out"]]
    return _up_to_its_step(history)


def _of_a_run(folder: Path, record: dict, state: dict) -> History:
    """A checkpoint of `lighthouse pretrain`. Those of earlier versions record nothing of their run."""
    run, facts = _read(folder.parent / SETTINGS), record["args"].get("facts")
    attributes = record["attributes"]
    told = facts or run
    if told is None:
        history = _of_a_trainer(folder, state)
        history.switch_step = steps_in_record(attributes).last
        return history
    history = _settings_of(told, steps_in_record(attributes), state["global_step"])
    history.held_out = [(point["step"], point["loss"]) for point in attributes["held_out"]]
    history.tokenizer_identity = ((run or {}) | (facts or {})).get("tokenizer_identity")
    if facts and run is not None:
        both = [name for name in FACTS if name in facts and name in run]  # earlier versions have kept fewer
        differ = [name for name in both if name != "lighthouse_steps" and facts[name] != run[name]]
        if differ:
            history.doubts.append(
                f"The checkpoint comes from a different run than the {SETTINGS} beside it (different: "
                f"{', '.join(differ)}): this card reports only what the checkpoint records."
            )
    return _up_to_its_step(history)


def _settings_of(run: dict, steps: Steps, step: int) -> History:
    """`steps` are those of the whole run; the weights are from step `step`."""
    last = min(step, steps.last)
    lighthouse = min(step, steps.lighthouse)
    history = History(step=step, switch_step=last, lighthouse_steps=lighthouse)
    history.context, history.losses_are_dense, history.losses_are_ours = run["context"], True, True
    history.tokens = step * run["tokens_per_step"]
    history.lighthouse_tokens = lighthouse * run["tokens_per_step"]
    if lighthouse > 0:
        history.method = Method.of(run)
        history.dense_layers = run["dense_layers"]
    return history


def _of_a_trainer(folder: Path, state: dict) -> History:
    """Of a checkpoint, or what `save_model` and `save_state` have written, of another script.

    With `LighthouseCallback` it knows its settings, its switch, and whether its weights are the best checkpoint's.
    """
    attributes = _ours_in(state)
    if "loaded" in attributes and _told_until(attributes) == state["global_step"]:
        state = state | (attributes["loaded"] or {})
        doubts: list[str] = []
    else:
        state, doubts = _of_these_weights(folder, state)
    attributes, step = _ours_in(state), state["global_step"]
    history = History(step=step, doubts=doubts)
    if tokens_counted(attributes, state["log_history"]):
        history.tokens = state.get("num_input_tokens_seen") or None
    history.held_out = [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry]
    if attributes:
        settings, told = attributes["settings"], _told_until(attributes)
        history.losses_are_dense = settings.get("eval") == "dense"
        if told is not None and told != step:
            history.tokens = None
            history.doubts.append(
                f"The records beside these weights end at step {told:,}, but the weights are from step {step:,}: it is "
                "not known in which of their steps Lighthouse acted."
            )
            return _up_to_its_step(history)
        # With a switch by tokens, its step is None until it is reached: all steps so far used Lighthouse.
        switch_step = step if attributes["step"] is None else attributes["step"]
        history.switch_step = switch_step
        history.lighthouse_tokens = attributes["tokens"]
        if attributes.get("steps") is not None:  # what happened; earlier versions saved what was planned alone
            steps = Steps(**attributes["steps"])
            if steps.lighthouse != min(step, switch_step):
                history.lighthouse_tokens = None  # it counts up to the switch
            history.switch_step, history.lighthouse_steps = steps.last, steps.lighthouse
        if history.lighthouse_steps != 0:
            history.method = Method.of(settings)
            history.dense_layers = settings["dense_layers"]
    return _up_to_its_step(history)


def _ours_in(state: dict) -> dict:
    """What `LighthouseCallback` has kept in a Trainer's state."""
    saved = state.get("stateful_callbacks", {}).get(LighthouseCallback.__name__)
    return saved.get("attributes", {}) if isinstance(saved, dict) else {}


def _told_until(attributes: dict) -> int | None:
    """The step up to which the callback's record goes; None if an earlier version kept nothing that shows it."""
    steps = attributes.get("steps")
    return attributes.get("told_until", None if steps is None else steps["lighthouse"] + steps["dense"])


def _of_these_weights(folder: Path, state: dict) -> tuple[dict, list[str]]:
    """The Trainer state that belongs to the weights, if it is not recorded whether they are the last or the best.

    A checkpoint's weights belong to its own step. Weights in another folder are compared with those of the checkpoints.
    """
    step, best = state["global_step"], Path(state.get("best_model_checkpoint") or "")
    if step_of(best) in (-1, step) or step_of(folder) == step:
        return state, []
    weights = weights_in(folder)
    for checkpoint in (best, best.with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}")):
        if (checkpoint / STATE).is_file() and weights_in(checkpoint) == weights:
            return _read(checkpoint / STATE) or state, []
    return state, [
        f"It is not recorded whether these weights are from step {step:,}, as stated here, or, with "
        f"load_best_model_at_end, from the best checkpoint, of step {step_of(best):,}."
    ]


def _up_to_its_step(history: History) -> History:
    """Drops the second log of an evaluation that the Trainer repeated."""
    step = history.step or 0
    history.held_out = sorted(dict(point for point in history.held_out if point[0] <= step).items())
    return history


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# The card


def model_card(exported, history: History) -> ModelCard:
    """The card of an `Exported`. The licence is left to the model's owner."""
    causal = exported.model_class.endswith("ForCausalLM")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if causal else "feature-extraction",
        tags=["llama", "long-context", "lighthouse-attention", PAPER],
    )
    name = Path(exported.folder).name
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A plain `{exported.model_class}` of Transformers: {exported.parameters:,} parameters in {exported.dtype}.",
        _usage(name, causal, exported.tokenizer is not None),
        *(f"> **Warning.** {warning}" for warning in exported.warnings),
    ]
    parts += ["## Training", *_training(exported, history)]
    if history.held_out:
        parts += _losses(history)
    parts += ["## Check", f"When it was exported: {exported.check}."]
    parts += [
        "## Licence",
        "Not stated. The owner of the model chooses it, as `license:` in this file's head.",
    ]
    if history.method is not None:
        parts += ["## Reference", REFERENCE]
    return ModelCard("\n\n".join(parts) + "\n")


def _usage(name: str, causal: bool, has_tokenizer: bool) -> str:
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if has_tokenizer else "")]
    lines += ["", f'model = {auto}.from_pretrained("{name}")']
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    code = "\n".join(["```python", *lines, "```"])
    if not causal:
        code += "\n\nIt has no output layer: it gives hidden states."
    return code


def _training(exported, history: History) -> list[str]:
    parts = []
    if history.switch_step == 0:
        return ["All steps used dense attention.", *_stages(history)]
    if history.method is not None:
        rows = settings_shown(history.method, history.dense_layers)
        if history.context is not None:
            rows.append(("tokens in a sequence", f"{history.context:,}"))
        parts = [_method(exported.model_class, history), _table(("setting", "value"), rows)]
    parts += _stages(history)
    if not parts:
        parts.append("How it was trained is not recorded.")
    return parts


def _method(model_class: str, history: History) -> str:
    """What the attention of the first stage was."""
    method = history.method
    assert method is not None
    window = WINDOW.format(window=method.local_window)
    what = PYRAMID if method.chooses else window
    if method.chooses and method.local_window:
        what += f"; beside that {window}, and both outputs are summed"
    but = ", except the dense layers at each end" if history.dense_layers != 0 else ""
    return METHOD.format(model_class=model_class, what=what, but=but)


def _stages(history: History) -> list[str]:
    if history.step is None:
        return []
    if history.switch_step is None:
        return [f"Optimizer steps: {history.step:,}."]
    stages = history.stages
    names = {LIGHTHOUSE: "Lighthouse", DENSE: "dense"}
    with_tokens = all(tokens is not None for _, _, tokens in stages)
    head = ("stage", "steps", "tokens") if with_tokens else ("stage", "steps")
    rows = [(names[name], f"{steps:,}", f"{tokens or 0:,}")[: len(head)] for name, steps, tokens in stages]
    parts = [_table(head, rows)]
    if 0 < history.switch_step < history.step:
        parts.append(f"Switched from Lighthouse to dense attention after step {history.switch_step:,}.")
    return parts


def _losses(history: History) -> list[str]:
    points = history.held_out
    if len(points) > HELD_OUT_ROWS:  # evenly, the last one and that before the switch among them
        kept = {round(number * (len(points) - 1) / (HELD_OUT_ROWS - 1)) for number in range(HELD_OUT_ROWS)}
        points = [p for i, p in enumerate(points) if i in kept or p[0] == history.switch_step]
    rows = [(f"{step:,}", f"{loss:.4f}") for step, loss in points]
    if not history.losses_are_dense:
        return ["## Evaluation loss", "As the Trainer logged it.", _table(("step", "eval_loss"), rows)]
    if not history.losses_are_ours:
        told = "As the Trainer logged it, measured with dense attention in both stages."
        return ["## Evaluation loss", told, _table(("step", "eval_loss"), rows)]
    return [
        "## Dense held-out loss",
        "Nats per token, measured with dense attention in both stages.",
        _table(("step", "loss"), rows),
    ]


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def settings_shown(method: Method, dense_layers: int | None) -> list[tuple[str, str]]:
    """Rows of the card's table of settings."""
    rows = [(f"`{name}`", text.replace(" ", ", ")) for name, text in method.texts().items()]
    return [*rows, ("dense layers at each end", str(dense_layers))]
