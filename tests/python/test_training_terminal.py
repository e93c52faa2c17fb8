"""What a run prints: nothing but lines that a user reads, each above the progress bar."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from lighthouse.cli import main
from lighthouse.training import PretrainOptions, TrainingOptions, configuration, terminal
from training_runs import write_text

pytestmark = pytest.mark.usefixtures("one_thread")

# All that a run prints, line by line, but for the table at its end. A new line belongs here only if nobody has to learn
# to ignore it.
LINES = [
    r"run: model nano, context 128, held_out 2, pool_ratios 1/2 1/4, select_topk 4, .* max_steps",
    r"\d, logging_steps 0.5, eval_steps 0.25, .* all else as by default \(config.yaml has every",
    r"option\)",
    r"text: 11 files of [\d,]+ tokens to train on, 1 file of [\d,]+ tokens held out, 2 x 128 tokens of them evaluated",
    r"Continuing from \S+checkpoint-4\.",
    r"max_steps was 4, is now 6: the learning rate now follows the schedule of 6 steps\.",
    r"\d steps of 128 tokens: 2 with Lighthouse, \d dense\.",
    r"Lighthouse plan for 128 tokens, .*",
    r" +level +window +entries +chosen",
    r" +\d( +\d+)+",
    r"  strata \(coarsest level\): .*",
    r"  sub-sequence S = .*",
    r"  local window of .*",
    r"  attention work .*",
    r"Note: at 128 tokens with these settings dense attention is as fast\.",
    r"The held-out loss is measured with dense attention, also while Lighthouse is on: .*",
    r"depends on later ones, so losses with it, its stage's training loss too, are not comparable with dense ones\.",
    r"The run reads the [\d,]+ training rows [\d.]+ times; the last \d+ tokens do not fill a row\.",
    r"step \d/\d  (Lighthouse|dense     )  loss \d.*",
    r"step \d/\d  dense held-out loss \d\.\d{4}",
]
SMALL = "--model nano --context 128 --held_out 2 --pool_ratios 1/2 1/4 --select_topk 4 --local_window 16 --use_cpu"
OFTEN = "--logging_steps 0.5 --save_steps 0.25 --eval_steps 0.25 --report_to tensorboard"


def test_a_normal_run_and_a_resumed_one_print_nothing_to_ignore(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    arguments = ["pretrain", "--data", "text", "--output_dir", "run"]
    arguments += [*SMALL.split(), *OFTEN.split(), "--switch_step", "2", "--disable_tqdm", "true"]
    for steps, more in (("4", []), ("6", ["--resume"])):
        assert main([*arguments, "--steps", steps, *more]) == 0
        found = capfd.readouterr()
        lines = re.split(r"\n +\d steps at 128 tokens *\n", found.out)[0].splitlines()
        other = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in LINES)]
        assert not other and not found.err and not caplog.records
        assert sum("held-out loss" in line for line in lines) > 1


def test_what_is_logged_stands_above_the_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])
    with terminal.tqdm(total=2, file=screen, ascii=True) as bar:
        bar.update()
        with terminal.above_the_bar():
            logging.getLogger("of.somebody").warning("a note")
    assert re.search(r"\r +\ra note\n\r 50%", screen.getvalue())
    logging.getLogger("of.somebody").warning("after it")
    assert screen.getvalue().endswith("after it\n")


GIVEN = [
    ("nothing", {}, {}, []),
    ("ours", {"context": 4096, "select_topk": "1/32"}, {}, ["context 4096", "select_topk 1/32"]),
    ("the_trainers", {}, {"max_steps": 7, "data_seed": 0}, ["max_steps 7", "data_seed 0"]),
    ("a_list_of_one_name_is_as_by_default", {}, {"report_to": ["tensorboard"]}, []),
    ("no_report", {}, {"report_to": "none"}, ["report_to none"]),
    ("the_text_is_said_besides", {"data": ["a", "b"]}, {}, []),
]


@pytest.mark.parametrize("ours, trainers, lines", [g[1:] for g in GIVEN], ids=[g[0] for g in GIVEN])
def test_the_options_that_were_chosen(tmp_path, ours, trainers, lines):
    training = TrainingOptions(**{"output_dir": str(tmp_path), **trainers})
    assert sorted(configuration.given(PretrainOptions(**ours), training)) == sorted(lines)
