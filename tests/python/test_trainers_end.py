"""What a Trainer with `LighthouseCallback` leaves behind at its end: counts, the best checkpoint, tokens, the model."""

from __future__ import annotations

import json
import shutil

import pytest

from lighthouse.export.card import history_of_checkpoint, history_of_model
from lighthouse.huggingface import LighthouseCallback, state
from small_llama import TOKENS, wrapped
from test_huggingface_training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = 2 * TOKENS  # tokens of an optimizer step
COUNTED = {"include_num_input_tokens_seen": "all"}
EVERY = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}


def trained(folder, switch, losses=None, resume=None, **arguments):
    """(callback, Trainer) after a training of 4 steps, whose evaluations by step give `losses`, where they are given.

    Model and state are saved in `folder` too, as example scripts do at their end.
    """
    callback = LighthouseCallback(**switch)
    run = trainer(wrapped(), folder, [callback], **arguments)
    if losses is not None:
        measured = run.evaluate
        run.evaluate = lambda *args, **kwargs: measured(*args, **kwargs) | {"eval_loss": losses[run.state.global_step]}
    run.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    run.save_model()
    run.save_state()
    return callback, run


def edited(folder, change) -> None:
    """`change` is done to what the callback has kept in the folder's state."""
    path = folder / "trainer_state.json"
    told = json.loads(path.read_text())
    change(told["stateful_callbacks"]["LighthouseCallback"]["attributes"])
    path.write_text(json.dumps(told))


COUNTS = [
    ("nothing_saved", {}, None, {}),
    ("the_best_saved_alone", BEST, {1: 1, 2: 2, 3: 3, 4: 4}, {}),
    ("saved_before_alone", {"save_strategy": "steps", "save_steps": 2}, None, {"resume": 2, "save_strategy": "no"}),
]


@pytest.mark.parametrize("first, losses, then", [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
def test_the_end_is_told_and_not_the_last_checkpoint(tmp_path, first, losses, then):
    trained(tmp_path, {"switch_step": 3}, losses, **first)
    if then:
        trained(tmp_path, {"switch_step": 3}, **(first | then))
    history = history_of_checkpoint(tmp_path)
    assert history.stages == [("lighthouse", 3, None), ("dense", 1, None)] and not history.warnings()
    assert history.method is not None and history.losses_are_dense


STALE = [
    ("ends_before", {"told_until": 2}),
    ("never_began", {"told_until": 0, "settings": {}, "step": None}),
    ("of_an_earlier_version", {"told_until": None, "steps": {"lighthouse": 1, "dense": 0, "mixed": 0, "last": 1}}),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained(folder, {"switch_step": 2}, **COUNTED)
    return folder


@pytest.mark.parametrize("change", [s[1] for s in STALE], ids=[s[0] for s in STALE])
def test_counts_that_end_before_the_weights_are_doubted(whole, tmp_path, change):
    folder = shutil.copytree(whole, tmp_path / "copy")

    def stale(attributes):
        attributes |= change
        if change["told_until"] is None:
            del attributes["told_until"]

    edited(folder, stale)
    history = history_of_checkpoint(folder)
    assert history.step == 4 and history.switch_step is None and history.tokens is None and not history.stages
    recorded, known = history.warnings()[:2]
    assert "not recorded" in recorded and "the weights are from step 4: it is not known in which" in known


def test_the_best_checkpoints_weights_are_told_of_as_that_checkpoint(tmp_path, monkeypatch):
    """By the callback wherever the folder lies; of a state without it by comparing, or they are doubted."""
    monkeypatch.setattr(state, "_said", set())
    folder, losses = tmp_path / "run", {1: 3, 2: 1, 3: 4, 4: 5}
    run = trained(folder, {"switch_step": 2}, losses, load_best_model_at_end=True, **EVERY, **COUNTED)[1]
    history, checkpoint = history_of_checkpoint(folder), history_of_checkpoint(folder / "checkpoint-2")
    assert history == checkpoint and history.stages == [("lighthouse", 2, 2 * STEP)]
    assert [step for step, _ in history.held_out] == [1, 2] and "All 2 steps" in history.warnings()[0]
    assert "No dense step has followed" in history_of_model(run.model).warnings()[0]
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert history_of_checkpoint(moved) == history

    edited(folder, lambda attributes: attributes.pop("loaded"))  # as earlier versions left it
    assert history_of_checkpoint(folder) == checkpoint
    shutil.copy(folder / "checkpoint-4" / "model.safetensors", folder)
    last = history_of_checkpoint(folder)
    assert last.stages == [("lighthouse", 2, 2 * STEP), ("dense", 2, 2 * STEP)] and not last.warnings()
    shutil.copy(folder / "checkpoint-1" / "model.safetensors", folder)
    [doubt] = history_of_checkpoint(folder).warnings()
    assert "from step 4, as stated here, or, with load_best_model_at_end, from the best checkpoint, of step 2" in doubt
    mine = shutil.copytree(folder / "checkpoint-4", tmp_path / "mine")
    assert history_of_checkpoint(mine).step == 4 and not history_of_checkpoint(mine).warnings()


def test_the_best_of_the_lighthouse_stage_is_saved_where_it_is_measured(tmp_path):
    """Else the Trainer takes its loss for the best and loads another checkpoint, of which this is not true."""
    every = EVERY | {"eval_steps": 2, "save_steps": 2}
    _, run = trained(tmp_path, {"switch_step": 3}, {2: 5, 3: 2, 4: 4}, load_best_model_at_end=True, **every)
    assert run.state.best_model_checkpoint.endswith("checkpoint-3") and run.state.best_metric == 2
    assert history_of_checkpoint(tmp_path).step == 3


def test_a_best_loss_without_a_checkpoint_is_not_what_was_loaded(tmp_path, caplog):
    """The Trainer's own evaluations may be closer than its checkpoints: what it loads is the last best it has saved."""
    every = EVERY | {"save_steps": 2}
    losses = {1: 9, 2: 8, 3: 1, 4: 2, 5: 3, 6: 4}
    arguments = every | {"max_steps": 6, "load_best_model_at_end": True}
    callback, run = trained(tmp_path, {"switch_step": 2}, losses, **arguments)
    assert run.state.best_global_step == 3 and run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert "the best checkpoint's weights, of step 2, from before the dense stage" in caplog.text
    assert callback.loaded["global_step"] == 2 and history_of_checkpoint(tmp_path).step == 2


TOKENS_TOLD = [
    ("from_the_first_step", COUNTED, COUNTED, 4 * STEP),
    ("from_the_middle_on", {}, COUNTED, None),
    ("up_to_the_middle", COUNTED, {}, None),
    ("otherwise_since_the_middle", COUNTED, {"include_num_input_tokens_seen": "non_padding"}, None),
]


@pytest.mark.parametrize("first, then, tokens", [t[1:] for t in TOKENS_TOLD], ids=[t[0] for t in TOKENS_TOLD])
def test_tokens_are_told_where_all_of_them_were_counted(tmp_path, first, then, tokens):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, {"switch_step": 1}, max_steps=2, **saved, **first)
    trained(tmp_path, {"switch_step": 1}, resume=2, **saved, **then)
    history = history_of_checkpoint(tmp_path / "checkpoint-4")
    assert history.tokens == tokens and all(stage[2] is None for stage in history.stages) == (tokens is None)
    if then and tokens is None:  # nor do they decide when to switch
        with pytest.raises(ValueError, match="switch_tokens=9: the 4 steps .* use switch_step"):
            trained(tmp_path, {"switch_tokens": 9}, resume=4, max_steps=5, **saved, **then)


def test_steps_are_on_by_the_share_that_was_theirs(tmp_path, caplog):
    """A new wish does not make earlier steps ones in which Lighthouse was on and did not act."""
    saved = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, {"switch_step": 1}, max_steps=3, **saved)
    callback, _ = trained(tmp_path, {"switch_step": 5}, resume=3, max_steps=6, **saved)
    assert (callback.on_steps, callback.steps.lighthouse, callback.steps.last) == (3, 3, 5)
    assert "in which it was on" not in caplog.text


def test_a_model_in_memory_with_hardly_any_dense_training_is_not_ready(tmp_path, monkeypatch, caplog):
    """`export` and `unwrap` say the same, in a resumed run too, in which the earlier steps were another process's."""
    monkeypatch.setattr(state, "_said", set())
    saved = {"save_strategy": "steps", "save_steps": 39, "logging_steps": 50}
    _, first = trained(tmp_path, {"switch_step": 39}, max_steps=40, **saved)
    _, resumed = trained(tmp_path, {"switch_step": 39}, resume=39, max_steps=40, **saved)
    for run in (first, resumed):
        caplog.clear()
        [warning] = history_of_model(run.model).warnings()
        assert "Of the 40 training forwards of these weights only 1 had dense attention" in warning
        run.model.unwrap()
        assert "of this model's 40 training forwards only 1 had dense attention" in caplog.text
