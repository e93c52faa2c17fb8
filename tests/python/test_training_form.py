"""What a run would be: a pure function of its options. And the text of a run, which the next need not find again."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from lighthouse.text import data
from lighthouse.training import prepare
from lighthouse.training.form import form_of
from training_runs import CONTEXT, options, training


@pytest.fixture
def nothing_is_looked_at(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a text or a tokenizer is looked at")

    monkeypatch.setattr(data, "load_tokenizer", refuse)
    monkeypatch.setattr(data, "open_source", refuse)
    monkeypatch.setattr(data.Encoder, "__init__", refuse)


# Options of a run, and of the Trainer; how many of its 5 steps are with Lighthouse.
SWITCHES = [
    ("six_tenths", {"share": 0.6}, {}, 3),
    ("never", {"share": 1.0}, {}, 5),
    ("one_step", {"share": 0.2}, {}, 1),
    ("none", {"share": 0}, {}, 0),
    ("after_a_step", {"switch_step": 2}, {}, 2),
    ("after_a_step_beyond_the_end", {"switch_step": 7}, {}, 5),
    ("after_a_number_of_tokens", {"switch_tokens": 3 * CONTEXT + 1}, {}, 4),
    ("after_tokens_of_larger_steps", {"switch_tokens": 3 * CONTEXT + 1}, {"gradient_accumulation_steps": 2}, 2),
    ("after_tokens_beyond_the_end", {"switch_tokens": 6 * CONTEXT - 1}, {}, 5),
    ("lighthouse_alone", {"lighthouse_only": True}, {}, 5),
    ("dense_alone", {"dense_only": True}, {}, 0),
]


@pytest.mark.parametrize("how, trainer, steps", [s[1:] for s in SWITCHES], ids=[s[0] for s in SWITCHES])
def test_the_first_steps_are_with_lighthouse(tmp_path, nothing_is_looked_at, how, trainer, steps):
    form = form_of(options(tmp_path / "none", **how), training(tmp_path / "run", **trainer))
    assert form["lighthouse_steps"] == steps
    assert form["tokens_per_step"] == CONTEXT * trainer.get("gradient_accumulation_steps", 1)


def test_a_form_is_every_option_as_json_has_it(tmp_path, nothing_is_looked_at):
    run, trainer = options(tmp_path / "none"), training(tmp_path / "run", lr_scheduler_type="linear", seed=7)
    form = form_of(run, trainer)
    names = {field.name for field in fields(TrainingArguments) if field.init} - {"resume_from_checkpoint"}
    assert form.keys() == vars(run).keys() | names | {"tokens_per_step", "lighthouse_steps"}
    assert json.loads(json.dumps(form)) == form == form_of(run, trainer)
    assert (form["lr_scheduler_type"], form["seed"], form["pool_ratios"]) == ("linear", 7, [0.5, 0.25])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "trainer", [{}, {"lr_scheduler_type": "constant", "dataloader_drop_last": True}], ids=["plain", "what_runs_set"]
)
def test_a_run_is_what_its_form_said_and_what_it_found(tmp_path, text, trainer):
    run, trainer = options(text), training(tmp_path / "run", **trainer)
    form = form_of(run, trainer)
    settings = prepare(run, trainer).settings()
    assert settings | form == settings and json.loads(json.dumps(settings)) == settings
    found = {"text", "tokenizer_identity", "processes", "devices", "device", "device_name", "versions"}
    assert settings.keys() - form.keys() == found


def test_runs_over_the_same_text_find_it_once(tmp_path, text, request):
    first = prepare(options(text), training(tmp_path / "a"))
    alone = prepare(options(text, dense_only=True), training(tmp_path / "b", max_steps=9))
    request.getfixturevalue("nothing_is_looked_at")
    shared = prepare(options(text, dense_only=True), training(tmp_path / "b", max_steps=9), corpus=first.corpus)
    assert shared.corpus is first.corpus and shared.tokenizer is first.tokenizer
    assert shared.settings() == alone.settings() and str(shared) == str(alone)


OTHER_TEXT = [
    ("another_context", {"context": 64}, {}),
    ("another_seed", {}, {"seed": 1}),
    ("less_held_out", {"held_out": 1}, {}),
    ("streamed", {"stream": True}, {}),
    ("other_files", {"data": "deep"}, {}),
]


@pytest.mark.parametrize("run, trainer", [case[1:] for case in OTHER_TEXT], ids=[case[0] for case in OTHER_TEXT])
def test_a_run_over_another_text_finds_its_own(tmp_path, text, run, trainer):
    run = {name: str(text / "deep") if name == "data" else value for name, value in run.items()}
    first = prepare(options(text), training(tmp_path / "a"))
    alone = prepare(options(text, **run), training(tmp_path / "b", **trainer))
    given = prepare(options(text, **run), training(tmp_path / "b", **trainer), corpus=first.corpus)
    assert given.corpus is not first.corpus and given.settings() == alone.settings()
    assert str(given) == str(alone)
