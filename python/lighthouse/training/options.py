"""The options of a run, as dataclasses: Transformers' HfArgumentParser makes command line options of them.

`TrainingOptions` is Transformers' `TrainingArguments` with other defaults, so every option of the Trainer is there
under its own name. Each checks its own values; what needs the model or the text is checked in `run.prepare`.
"""

from __future__ import annotations

import math
import os
from argparse import SUPPRESS
from dataclasses import Field, dataclass, field, fields, make_dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from lighthouse.core.acting import why_it_cannot_act
from lighthouse.core.method import SWITCHES, Method, text_of, written
from lighthouse.core.settings import RECOMMENDED, SHARE, LighthouseSettings
from lighthouse.huggingface.processes import launched, strangers
from lighthouse.huggingface.switch import Switch
from lighthouse.text.files import ORDERS
from lighthouse.training.configuration import kinds_of
from lighthouse.training.model import SIZES, check_model

# Options of the Trainer that are text or a switch. The command line and a file give them as text, which is true to the
# Trainer whatever it says.
TEXT_OR_SWITCH = ("fsdp", "trackio_static_space_id")
# Numbers of the Trainer that it uses without looking, or refuses only when the text is cut: the least, and what they
# must stay below.
NUMBERS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "ddp_timeout"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), (0, math.inf)),
    **dict.fromkeys(("warmup_steps", "eval_delay", "dataloader_num_workers", "neftune_noise_alpha"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (math.nextafter(0, 1), math.inf)),
    "max_grad_norm": (0, None),  # infinity clips nothing
    "seed": (0, 2**32),
}
FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # or the JSON itself
WITHOUT_WARM_UP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, getattr(SchedulerType, "GREEDY", None))


@dataclass(kw_only=True)
class ModelOptions:
    """Which model is trained, from scratch."""

    _argument_group_name = "model"

    model: str = field(
        default="tiny",
        metadata={
            "help": "Size of the Llama: " + "; ".join(map(str, SIZES.values())) + ". Or a Hugging Face configuration "
            "of one: a config.json, or a folder that has it.",
            "metavar": "SIZE|CONFIG",
        },
    )
    context: int = field(default=8192, metadata={"help": "Tokens in a sequence, in training and evaluation."})
    compile_layers: bool = field(
        default=torch.cuda.is_available(),
        metadata={
            "help": "Compile each layer with torch.compile; layers with the same attention share the compiled code, so "
            "it takes seconds and nothing is left to compile at the switch. The default on a GPU. --torch_compile "
            "compiles the whole model instead."
        },
    )


@dataclass(kw_only=True)
class DataOptions:
    """Which text it is trained on."""

    _argument_group_name = "data"

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders (searched recursively) and patterns such as 'books/**/*.txt.xz': UTF-8 text, also "
            "compressed with gzip, bzip2, xz or zstd. Each file is a document. Default: the sources of the running "
            "Python's standard library.",
            "metavar": "PATH",
        },
    )
    order: Literal["shuffled", "path"] = field(
        default="shuffled",
        metadata={
            "help": "How the files are joined: shuffled, or path: in the order of their paths, so that the files of a "
            "folder stand together and what belongs together lies thousands of tokens apart. Training rows come in "
            "random order either way. A dataset's rows stay in their own order."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --data: a dataset for datasets.load_dataset: a name on the Hub, a folder, or json, "
            "parquet, csv with --data as its files. Each row is a document.",
            "metavar": "NAME",
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    stream: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the text while training, without a cache: for text too large for the disk."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or name of a Hugging Face tokenizer with an end token. Default: bytes.",
            "metavar": "NAME",
        },
    )
    held_out: int = field(
        default=16,
        metadata={
            "help": "Contexts of held-out text in each evaluation. Whole documents are held out, about a tenth of the "
            "text at most."
        },
    )


def _as_text(setting: Field) -> tuple[str, Any, Any]:
    """A setting of `Method` as an option: text, which `Method.of` reads, or a switch."""
    default = getattr(RECOMMENDED, setting.name)
    if isinstance(default, bool):
        return setting.name, bool, field(default=default, metadata=setting.metadata)
    if isinstance(default, tuple):
        many = field(default_factory=partial(written, default), metadata=setting.metadata)
        return setting.name, list[str], many
    return setting.name, str, field(default=text_of(default), metadata=setting.metadata)


# All settings of the method, whichever there are.
MethodOptions: Any = make_dataclass("MethodOptions", map(_as_text, Method.settings()), kw_only=True)


@dataclass(kw_only=True)
class LighthouseOptions(MethodOptions):
    """How Lighthouse is used."""

    _argument_group_name = "lighthouse"

    share: float = field(
        default=SHARE, metadata={"help": "Share of the steps that use Lighthouse, 0 to 1; the others are dense."}
    )
    switch_step: int | None = field(
        default=None, metadata={"help": "Instead of --share: the number of steps that use Lighthouse."}
    )
    switch_tokens: int | None = field(
        default=None,
        metadata={"help": "Instead of --share: Lighthouse until this many tokens were trained on, in whole steps."},
    )
    dense_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers at each end that stay dense. Default: none; without a local window a sixth of all layers, "
            "at least 1, at most 2."
        },
    )
    dense_only: bool = field(default=False, metadata={"help": "Train the plain model, for comparison."})
    lighthouse_only: bool = field(
        default=False,
        metadata={"help": "Lighthouse in every step, for comparison; the model is then not ready for dense attention."},
    )


@dataclass(kw_only=True)
class PretrainOptions(ModelOptions, DataOptions, LighthouseOptions):
    """All options of a run but the Trainer's (`TrainingOptions`).

    The settings of `Method` may be numbers too; text such as "1/64" is turned into them. `data` may be one path.

    Raises `ValueError` or `TypeError` naming the option and the rule.
    """

    def __post_init__(self):
        _check_given(self)
        if isinstance(self.data, str):
            self.data = [self.data]
        if self.context < 2:
            raise ValueError(f"context={self.context}: at least 2 tokens are needed")
        if self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: at least one context is needed")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: one of {', '.join(ORDERS)} is needed")
        self.switch  # noqa: B018 - raises for what does not go together
        for name, value in self.method.values().items():
            setattr(self, name, value)
        settings = LighthouseSettings(self.method, self.dense_layers)
        layers = check_model(self.model, self.context)
        if self.uses_lighthouse:
            self.dense_layers = settings.for_layers(layers).dense_layers
            why_not = why_it_cannot_act(self.context, self.method)
            if why_not is not None:
                raise ValueError(f"context={self.context}: {why_not}; or train dense with dense_only")

    @property
    def method(self) -> Method:
        """What Lighthouse does where it is used."""
        return Method.of(self)

    @property
    def switch(self) -> Switch:
        """When Lighthouse ends. Raises `ValueError` or `TypeError`."""
        given = [name for name in ("switch_step", "switch_tokens") if getattr(self, name) is not None]
        given += [name for name in ("dense_only", "lighthouse_only") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: only one of them can say when Lighthouse is used")
        if not given:
            return Switch(share=self.share, share_name="share")
        Switch(share=self.share, share_name="share")  # it is checked all the same
        return Switch(step=0 if self.dense_only else self.switch_step, tokens=self.switch_tokens)

    @property
    def uses_lighthouse(self) -> bool:
        """Whether any step may use Lighthouse."""
        return self.switch.is_used

    def lighthouse_steps(self, steps: int, tokens_per_step: int) -> int:
        """How many of a run's `steps` use Lighthouse; they are the first."""
        planned = self.switch.steps(steps, tokens_per_step)
        return steps if planned is None else min(steps, planned)


@dataclass(kw_only=True)
class TrainingOptions(TrainingArguments):
    """Transformers' `TrainingArguments` with defaults for pre-training a small model.

    `max_steps` (also `--steps`) decides the length, and `num_train_epochs` is refused. Steps are optimizer steps.

    Raises `ValueError` where a launcher has started several processes that are not joined.
    """

    _argument_group_name = "training (every option of Transformers' TrainingArguments)"

    output_dir: str | None = field(
        default="runs/pretrain",
        metadata={"help": "Folder for the run: checkpoints, results, the final model.", "aliases": ["--output"]},
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps.", "aliases": ["--steps"]})
    num_train_epochs: float = field(default=0, metadata={"help": SUPPRESS})  # refused
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in the output folder, in either stage."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Sequences per device in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between log lines; below 1, a share of all steps."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to measure the dense held-out loss."})
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Steps between evaluations; below 1, a share of all steps."}
    )
    save_steps: float = field(
        default=0.1, metadata={"help": "Steps between checkpoints; below 1, a share of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where logs go: tensorboard, none, ..."})
    bf16: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Use bfloat16 autocast; the default on a GPU."}
    )
    seed: int = field(
        default=42, metadata={"help": "Seed of the weights, the order of the text, the held-out documents."}
    )

    def __post_init__(self):
        self.debug = "" if self.debug is None else self.debug  # which the parser makes of no debug
        _check_given(self)
        for name in TEXT_OR_SWITCH:
            value = getattr(self, name, None)
            if isinstance(value, str):
                setattr(self, name, SWITCHES.get(value.lower(), value))
        if self.report_to is None:
            self.report_to = "none"
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: at least one step is needed")
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ValueError(f"output_dir={self.output_dir!r}: the name of a folder is needed")
        _check_numbers(self)
        _check_files(self)
        moves_are_ours, use_cpu = self.accelerator_config is None, self.use_cpu
        # accelerate joins processes on a CPU only if it is set to use one. The option stays as given:
        # the same configuration may be used on a machine with a GPU.
        self.use_cpu = use_cpu or (launched()[1] > 1 and not torch.accelerator.is_available())
        super().__post_init__()
        self.use_cpu = use_cpu
        why_not = strangers(self.world_size)
        if why_not is not None:
            raise ValueError(why_not)
        if moves_are_ours and isinstance(self.accelerator_config, AcceleratorConfig) and self.device.type == "cuda":
            self.accelerator_config.non_blocking = True  # else each step waits for the one before, then for its launch
        self.logging_nan_inf_filter = False  # it hides what must stop the run, and waits for the device in each step
        self.remove_unused_columns = False  # a row's place in the text is one
        self.dataloader_drop_last = False  # steps are whole, and all held-out rows are evaluated
        if self.lr_scheduler_type in WITHOUT_WARM_UP and self.warmup_steps == TrainingOptions.warmup_steps:
            self.warmup_steps = 0  # so that it is written down as it is; another number is refused
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for; torch would warn


def _check_given(options) -> None:
    """Raises `ValueError` for an option that is None and may not be: a file could not say what is then done."""
    kinds = kinds_of(type(options))
    for option in fields(options):
        if option.init and option.default is not None and getattr(options, option.name) is None:
            if type(None) not in kinds[option.name]:
                raise ValueError(f"{option.name}=None: a value is needed; leave it out for the default")


def _check_numbers(options) -> None:
    for name, (least, below) in NUMBERS.items():
        value = getattr(options, name, None)
        if isinstance(value, (int, float)) and not (value >= least and (below is None or value < below)):
            rule = f"at least {least}" if least in (0, 1) else "above 0"
            rule += "" if below is None else " and finite" if below == math.inf else f" and below {below}"
            raise ValueError(f"{name}={value}: it must be {rule}")


def _check_files(options) -> None:
    for name in FILES:
        value = getattr(options, name, None)
        if isinstance(value, str) and value and not value.lstrip().startswith("{") and not os.path.isfile(value):
            raise FileNotFoundError(f"{name}={value!r} does not exist; a JSON file, or the JSON itself, is needed")
    if options.deepspeed and find_spec("deepspeed") is None:
        raise ValueError(f"deepspeed={options.deepspeed!r}: the package is not installed: pip install deepspeed")
    backends = [backend.value.lower() for backend in DynamoBackend]
    if options.torch_compile_backend is not None and options.torch_compile_backend.lower() not in backends:
        raise ValueError(
            f"torch_compile_backend={options.torch_compile_backend!r}: one of {', '.join(backends)} is needed"
        )


def field_names(*classes) -> set[str]:
    """The options that these dataclasses declare themselves, without those they inherit."""
    return {f.name for cls in classes for f in fields(cls) if f.name in cls.__annotations__}
