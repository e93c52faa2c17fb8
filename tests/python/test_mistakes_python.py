"""Mistakes that people make from Python, each tried, with the message that it gets."""

import functools
import subprocess
import sys
import textwrap
import types

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lighthouse
from lighthouse import LighthouseWrapper, unwrap
from lighthouse.huggingface import LighthouseCallback
from small_llama import LIMIT, MODELS, SETTINGS, TOKENS, VOCABULARY, config, ids, plain, wrapped
from small_trainers import Container, Doubled, bare, rows, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def called(*args, **kwargs):
    """A call of a wrapped model with these arguments."""
    return lambda _: wrapped()(*args, **kwargs)


def trained(make, data=None, callbacks=(), **arguments):
    """Training of the model that `make` gives by a Trainer in a folder."""
    return lambda folder: trainer(make(), folder, data, callbacks, **arguments).train()


class DoubledEmbedding(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def with_head(make):
    def change(model):
        model.lm_head = make(32, VOCABULARY, bias=False)
        return model

    return change


def without_weights():
    with torch.device("meta"):
        return plain()


def of_a_wrapped_models_config():
    return LlamaForCausalLM(wrapped().config)


def on_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(lighthouse.core.devices, "has_cuda_kernels", lambda: False)
    with FakeTensorMode():
        return wrapped(min_tokens=TOKENS)({"input_ids": torch.zeros(1, TOKENS, dtype=torch.long, device="cuda")})


def forward_set_after_wrapping():
    model = wrapped()
    model.forward = types.MethodType(LlamaForCausalLM.forward, model)
    return model


def forward_that_calls_the_parts():
    """As TRL's SFTTrainer sets one on the model."""
    model = wrapped()
    parts = model.model

    @functools.wraps(type(model).forward)
    def forward(self, input_ids=None, labels=None, **kwargs):
        return self.lm_head(parts(input_ids=input_ids, **kwargs)[0])

    model.forward = types.MethodType(forward, model)
    return model


def switched(model, value):
    return model.lighthouse(value)


def padded():
    return torch.ones(2, TOKENS, dtype=torch.long).index_fill(1, torch.arange(3), 0)


def numbered():
    return 1 + torch.arange(TOKENS).expand(2, -1) // 40


TINY_GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
TINY_QWEN3 = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

WHAT_A_BATCH_IS = 'a batch is a mapping of tensors, such as {"input_ids": ids}'
ONLY_LLAMA = r"cannot be wrapped: .* only Llama's can so far \(LlamaModel, LlamaForCausalLM\)"
NO_LOGITS = "a bare LlamaModel has no logits to give; use a LlamaForCausalLM"

# What is done in an empty folder, the error, and its message.
MISTAKES = {
    # The batch
    "a tuple of ids and labels": (called((ids(), ids())), TypeError, "batch is a tuple of 2 .*" + WHAT_A_BATCH_IS),
    "a list of numbers": (called(ids()[0].tolist()), TypeError, r"batch is a list of 64 \(int\).*" + WHAT_A_BATCH_IS),
    "an empty list": (called([]), TypeError, "batch is a list of 0: " + WHAT_A_BATCH_IS),
    "two mappings": (called({"input_ids": ids()}, {"labels": ids()}), TypeError, "takes one mapping"),
    "one sequence without a batch": (called(ids()[0]), ValueError, r"input_ids is \[64\]: .*: input_ids\[None\]"),
    "a batch of batches": (called({"input_ids": ids()[None]}), ValueError, r"input_ids is \[1, 2, 64\]: \[batch, tok"),
    "no sequences": (called({"input_ids": ids()[:0]}), ValueError, r"input_ids is \[0, 64\]: at least one sequence"),
    "no tokens": (called({"input_ids": ids()[:, :0]}), ValueError, r"input_ids is \[2, 0\]: at least one sequence"),
    "a batch named input_ids": (called(input_ids={"input_ids": ids()}), TypeError, "a dict, a whole batch: call model"),
    "ids as a list": (called({"input_ids": ids().tolist()}), TypeError, r"is a list: .*; torch.tensor\(input_ids\)"),
    "ids of numpy": (called(input_ids=ids().numpy()), TypeError, r"is a ndarray: .* torch.from_numpy\(input_ids\)"),
    "a text": (called("Once upon a time"), TypeError, "input_ids is a str: .*the tokenizer makes them of text"),
    "ids as floats": (called({"input_ids": ids().float()}), TypeError, r"torch.float32: .*\.long\(\); .*inputs_embeds"),
    "ids as a file keeps them": (
        called({"input_ids": torch.from_numpy(ids().numpy().astype(numpy.uint16))}),
        TypeError,
        r"input_ids is of torch.uint16: whole numbers are needed, input_ids.long\(\)",
    ),
    "another tokenizer's ids": (
        called({"input_ids": ids() + 1}),
        ValueError,
        r"input_ids has 61, the model's vocabulary is 0 to 60: .*vocab_size=len\(tokenizer\)",
    ),
    "negative ids": (called({"input_ids": ids() - 1}), ValueError, "input_ids has -1, the model's vocabulary is 0 to"),
    "ids by another name": (called({"ids": ids()}), ValueError, "neither labels nor input_ids, only ids: .*a mapping"),
    "an empty batch": (called({}), ValueError, "neither labels nor input_ids: one of them"),
    "embeddings without labels": (
        called({"inputs_embeds": torch.zeros(2, TOKENS, 32)}),
        ValueError,
        "neither labels nor input_ids, only inputs_embeds",
    ),
    "ids as embeddings": (called(inputs_embeds=ids()), ValueError, r"inputs_embeds is \[2, 64\]: .*hidden_size\]"),
    "a column of texts": (
        called({"input_ids": ids(), "text": ["a", "b"]}),
        ValueError,
        "text is given: Lighthouse does not know it, .*leave it out of the batch",
    ),
    "labels by position": (called(ids(), ids()), ValueError, "attention_mask has values .*given by name: labels=..."),
    "labels as floats": (
        called(ids(), labels=ids().float()),
        TypeError,
        r"labels is of torch.float32.*labels.long\(\)",
    ),
    "labels as a list": (called(ids(), labels=ids().tolist()), TypeError, r"labels is a list.*torch.tensor\(labels\)"),
    "labels of another shape": (
        called(ids(), labels=ids()[:, 1:]),
        ValueError,
        r"labels is \[2, 63\], the batch \[2, ",
    ),
    "ignored labels marked -1": (called(ids(), labels=ids() - 1), ValueError, "labels has -1: .*-100 for tokens that"),
    "labels outside of the vocabulary": (called(ids(), labels=ids() + 1), ValueError, "labels has 61: token ids that "),
    "labels that are shifted already": (
        called(ids()[:, :-1], labels=ids()[:, 1:]),
        ValueError,
        "next tokens already, and the loss shifts them itself.*give labels=input_ids, or shift_labels=labels",
    ),
    "another name for the ids": (
        called(ids=ids()),
        ValueError,
        "neither input_ids nor inputs_embeds was given, only ids: exactly one",
    ),
    "ids misspelt in a batch": (
        called({"inputs_ids": ids(), "labels": ids()}),
        ValueError,
        "neither input_ids nor inputs_embeds was given, only inputs_ids, labels",
    ),
    "nothing at all": (called(), ValueError, "neither input_ids nor inputs_embeds was given: exactly one"),
    "ids and embeddings": (
        called(input_ids=ids(), inputs_embeds=torch.randn(2, 64, 32)),
        ValueError,
        "both were given: exactly one of input_ids and inputs_embeds",
    ),
    "embeddings of another width": (
        called(inputs_embeds=torch.randn(2, 64, 7)),
        ValueError,
        r"inputs_embeds is \[2, 64, 7\]: the model's hidden_size is",
    ),
    "embeddings that are ids": (
        called(inputs_embeds=torch.zeros(2, 64, 32, dtype=torch.int64)),
        TypeError,
        "inputs_embeds is of torch.int64: embeddings are needed",
    ),
    "labels that are shifted already, some of them hidden": (
        called(ids()[:, :-1], labels=ids()[:, 1:].index_fill(1, torch.tensor([0]), -100)),
        ValueError,
        "next tokens already, and the loss shifts them itself",
    ),
    "padding": (called({"input_ids": ids(), "attention_mask": padded()}), ValueError, "supports no padding yet"),
    "packed documents": (
        called({"input_ids": ids(), "attention_mask": numbered()}),
        ValueError,
        "one document per seq",
    ),
    "more tokens than the model allows": (
        called({"input_ids": ids(tokens=LIMIT + 1)}),
        ValueError,
        "129 tokens, the model allows 128: shorten it, or .*max_position_embeddings",
    ),
    # The model
    "GPT-2": (
        lambda _: LighthouseWrapper(GPT2LMHeadModel(GPT2Config(**TINY_GPT2))),
        ValueError,
        "GPT2LM.*" + ONLY_LLAMA,
    ),
    "Qwen3": (lambda _: LighthouseWrapper(Qwen3ForCausalLM(Qwen3Config(**TINY_QWEN3))), ValueError, ONLY_LLAMA),
    "a classifier": (lambda _: LighthouseWrapper(LlamaForSequenceClassification(config())), ValueError, ONLY_LLAMA),
    "the class": (
        lambda _: LighthouseWrapper(LlamaModel),
        TypeError,
        "the class LlamaModel, of which no model was made",
    ),
    "a path": (lambda _: LighthouseWrapper("me/my-model"), TypeError, "the text 'me/my-model', .*from_pretrained"),
    "a configuration": (
        lambda _: LighthouseWrapper(config()),
        TypeError,
        r"a LlamaConfig, .*LlamaForCausalLM\(config\)",
    ),
    "no model": (lambda _: LighthouseWrapper(None), TypeError, "a NoneType: a model of Transformers is needed"),
    "wrapped inside out": (
        lambda _: LighthouseWrapper(Container(plain())),
        TypeError,
        "a Container around a LlamaForCausalLM: wrap the LlamaForCausalLM first, then make the Container",
    ),
    "DataParallel first": (
        lambda _: LighthouseWrapper(nn.DataParallel(plain())),
        TypeError,
        "then make the DataParallel",
    ),
    "compiled first": (lambda _: LighthouseWrapper(torch.compile(plain())), TypeError, "make the OptimizedModule"),
    "wrapped twice": (lambda _: LighthouseWrapper(wrapped()), ValueError, "already wrapped.*unwrap it first"),
    "unwrapped twice": (lambda _: unwrap(wrapped().unwrap()), ValueError, "LlamaForCausalLM is not wrapped by"),
    "unwrapped from outside": (
        lambda _: unwrap(nn.DataParallel(wrapped())),
        ValueError,
        "this DataParallel is not wrapped by LighthouseWrapper; the LlamaForCausalLM in it is: unwrap that one",
    ),
    "no weights": (
        lambda _: LighthouseWrapper(without_weights(), **SETTINGS)({"input_ids": ids()}),
        ValueError,
        'on device "meta", without weights: make it on a device',
    ),
    "a second model of a wrapped one's configuration": (
        lambda _: of_a_wrapped_models_config()(ids()),
        ValueError,
        r"not part of a wrapped model\. .*configuration has this name too: wrap it, or .*attn_implementation=\"sdpa\"",
    ),
    "an output layer of one's own": (
        lambda _: wrapped(change=with_head(Doubled)),
        ValueError,
        'output layer is a Doubled of small_trainers, not a plain nn.Linear: use loss="model"',
    ),
    "an embedding of one's own": (
        lambda _: bare(change=lambda model: model.set_input_embeddings(DoubledEmbedding(VOCABULARY, 32)) or model),
        ValueError,
        "input embedding is a DoubledEmbedding of .* use a LlamaForCausalLM",
    ),
    # The settings
    "settings by position": (lambda _: LighthouseWrapper(plain(), [0.5]), TypeError, "1 positional argument but 2"),
    "a setting misspelt": (
        lambda _: LighthouseWrapper(plain(), topk=3),
        TypeError,
        "unexpected keyword argument 'topk'",
    ),
    "a ratio between two": (
        lambda _: wrapped(pool_ratios=[0.5, 0.3]),
        ValueError,
        "pool_ratios.1.=0.3: .*nearest: 1/4$",
    ),
    "a ratio that does not fit": (lambda _: wrapped(pool_ratios=[0.25, 0.2]), ValueError, "of 5 tokens.*nearest: 1/8$"),
    "a number of parents as a float": (lambda _: wrapped(select_topk=512.0), ValueError, "number of parents write 512"),
    "no layer left": (lambda _: wrapped(dense_layers=2), ValueError, "dense_layers=2: .*at most 1 can be dense"),
    "a window as a share": (
        lambda _: wrapped(local_window=0.5),
        TypeError,
        "local_window=0.5: a whole number of tokens",
    ),
    "the model's own loss of a bare model": (
        lambda _: bare(loss="model"),
        ValueError,
        'use "chunked" or a LlamaForCaus',
    ),
    "the switch by a word": (lambda _: switched(wrapped(), "off"), TypeError, r"lighthouse\('off'\): True or False"),
    # The Trainer
    "a callback without a wrapped model": (
        trained(plain, callbacks=[LighthouseCallback(switch_share=0.5)]),
        ValueError,
        r"the Trainer's LlamaForCausalLM is not wrapped: call LighthouseWrapper\(model, ...\) before",
    ),
    "a callback for two models": (
        trained(lambda: Container(wrapped(), wrapped()), callbacks=[LighthouseCallback(switch_share=0.5)]),
        ValueError,
        "the Trainer's Container has 2 wrapped models in it, and the switch is for one",
    ),
    "a callback that was not made": (
        trained(wrapped, callbacks=[LighthouseCallback]),
        ValueError,
        "nothing given: exactly one of switch_share, switch_step, switch_tokens is needed",
    ),
    "two switches": (
        lambda _: LighthouseCallback(switch_share=0.5, switch_step=3),
        ValueError,
        "switch_share and switch_step given: exactly one",
    ),
    "a switch in percent": (lambda _: LighthouseCallback(switch_share=60), ValueError, "switch_share=60: .*0 to 1"),
    "a switch by tokens that are not counted": (
        trained(wrapped, callbacks=[LighthouseCallback(switch_tokens=100)]),
        ValueError,
        'switch_tokens=100: .*include_num_input_tokens_seen="all"',
    ),
    "rows without labels": (
        trained(wrapped, data=rows(labels=False)),
        ValueError,
        r"the Trainer's batch has no labels, .*DataCollatorForLanguageModeling\(tokenizer, mlm=False\)",
    ),
    "rows without labels for a bare model": (trained(bare, data=rows(labels=False)), ValueError, "batch has no labels"),
    "smoothed labels of a bare model": (
        trained(bare, label_smoothing_factor=0.1),
        ValueError,
        "the Trainer's label_smoothing_factor=0.1: " + NO_LOGITS,
    ),
    "metrics of a bare model": (
        trained(bare, evaluated=rows(), metrics=lambda p: {}, eval_strategy="epoch"),
        ValueError,
        "the Trainer's compute_metrics: " + NO_LOGITS,
    ),
    "predictions of a bare model": (
        lambda folder: trainer(bare(), folder).predict(rows()),
        ValueError,
        NO_LOGITS,
    ),
    "reentrant checkpointing": (
        trained(wrapped, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        ValueError,
        'checkpointing is reentrant: .*"use_reentrant": False',
    ),
    "a forward set on the model": (
        trained(forward_set_after_wrapping),
        ValueError,
        "got its own forward on the instance after it was wrapped",
    ),
    "a forward set on the model that calls its parts": (
        trained(forward_that_calls_the_parts),
        ValueError,
        r"was called directly, .*without a forward that another library sets on it \(as TRL does\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake, tmp_path):
    do, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as raised:
        do(tmp_path)
    assert type(raised.value) is error and "\n" not in str(raised.value)


def test_a_device_without_kernels_is_named(monkeypatch):
    with pytest.raises(ValueError, match="input_ids is on cuda.* no CUDA kernels"):
        on_a_gpu_without_kernels(monkeypatch)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("state", ["off", "eval"])
def test_a_wrong_batch_is_named_where_the_plain_model_runs_too(model_class, state):
    model = wrapped(model_class).lighthouse(state != "off").train(state != "eval")
    for batch, message in (([ids(), ids()], "a list of 2"), ({"input_ids": ids() + 1}, "input_ids has 61")):
        with pytest.raises((TypeError, ValueError), match=message):
            model(batch)


def test_it_goes_on_after_a_mistake():
    model = wrapped()
    for batch in ([ids(), ids()], {"input_ids": ids() + 1}, ids()[0]):
        with pytest.raises((TypeError, ValueError)):
            model(batch)
    assert torch.equal(model({"input_ids": ids()}).loss, wrapped()({"input_ids": ids()}).loss)


# Versions: a package in the place of Transformers, in a process of its own

VERSIONS = {
    "too old": (
        '__version__ = "4.49.0"',
        r"Transformers 4.49.0 is installed, 5\S* or later is needed: pip install --upg",
    ),
    "broken": (
        "import no_such_package",
        "Transformers is installed but does not import: .*no_such_package.*pip install",
    ),
    "missing": (None, r'needs Transformers, which is not installed: pip install "lighthouse-attn\[train\]"'),
}


USES = ("import lighthouse; lighthouse.LighthouseWrapper(3)", "from lighthouse.huggingface import LighthouseCallback")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_transformers_that_does_not_do_is_named(version, tmp_path):
    content, message = VERSIONS[version]
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(content or "")
    code = f"""
        import re, sys
        sys.path.insert(0, {str(tmp_path)!r})
        if {content is None}:
            sys.modules["transformers"] = None
        for use in {USES}:
            try:
                exec(use)
            except ImportError as error:
                assert re.search({message!r}, str(error)), error
            else:
                raise AssertionError(use)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", [[ids(), ids()], {"input_ids": ids().float()}], ids=["two_tensors", "floats"])
def test_compiled_code_names_a_wrong_batch_too(batch):
    compiled = torch.compile(wrapped(config={"num_hidden_layers": 1}), backend="aot_eager")
    with pytest.raises(Exception, match="the batch is a list of 2|input_ids is of torch.float32"):
        compiled(batch)
