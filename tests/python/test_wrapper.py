"""Wrapping and unwrapping: the same object throughout, and settings that are checked before anything happens."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from lighthouse import LighthouseWrapper
from lighthouse.core.method import Method
from lighthouse.core.settings import LighthouseSettings
from lighthouse.huggingface import WrappedModel
from lighthouse.huggingface.class_swap import Swapped, swap, swapped_class, unswap
from lighthouse.wrapper import unwrap
from small_llama import LAYERS, LIGHTHOUSE_LAYERS, MODELS, SETTINGS, Spy, config, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


# The same object


@both
def test_the_object_and_its_parameters_stay_the_same(model_class):
    model = plain(model_class)
    before = dict(model.named_parameters())
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]

    model_again = LighthouseWrapper(model, **SETTINGS)

    assert model_again is model
    assert isinstance(model, model_class) and isinstance(model, WrappedModel)
    for _ in range(2):  # wrapped, then unwrapped
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == modules
        after = dict(model.named_parameters())
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)
        if isinstance(model, WrappedModel):
            assert model.unwrap() is model


@both
def test_unwrap_leaves_no_trace(model_class):
    model, never = plain(model_class), plain(model_class)
    LighthouseWrapper(model, **SETTINGS)
    model({"input_ids": ids()}).loss.backward()
    model.eval()
    model.train()
    model.unwrap()

    assert type(model) is model_class
    for (name, module), (_, other) in zip(model.named_modules(), never.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert set(vars(module)) == set(vars(other)), name
        if hasattr(module, "config"):
            assert module.config is model.config, name
    assert model.config.to_dict() == never.config.to_dict() and model.loss_type == never.loss_type
    assert model.config._attn_implementation == never.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids())[0], never(ids())[0])


def test_the_class_goes_by_the_plain_name():
    model = wrapped()
    assert type(model).__name__ == type(model).__qualname__ == "LlamaForCausalLM"
    assert str(type(model)) == str(LlamaForCausalLM)  # Transformers finds recorded outputs by this
    assert "LighthouseSettings" in repr(model) and "enabled=True" in repr(model)


def test_the_class_of_a_wrapped_model_makes_plain_models(tmp_path):
    model = wrapped()
    assert type(type(model)(config())) is LlamaForCausalLM
    model.save_pretrained(tmp_path)
    assert type(type(model).from_pretrained(tmp_path)) is LlamaForCausalLM


def test_wrapping_again_after_unwrapping_uses_the_same_class():
    model = wrapped()
    first = type(model)
    LighthouseWrapper(model.unwrap(), **SETTINGS)
    assert type(model) is first


def test_a_shared_config_keeps_its_attention():
    shared = config()
    model, other = LlamaForCausalLM(shared), LlamaForCausalLM(shared)
    LighthouseWrapper(model, **SETTINGS)
    assert model.config._attn_implementation == "lighthouse"
    assert model.model.config is model.config and model.model.rotary_emb.config is model.config
    assert shared._attn_implementation == other.config._attn_implementation == "sdpa"
    assert torch.isfinite(other(ids(), labels=ids()).loss)


def test_the_config_stays_the_models_own_copy():
    model = plain()
    came_with = model.config
    LighthouseWrapper(model, **SETTINGS).unwrap()
    assert model.config is not came_with and model.config.to_dict() == came_with.to_dict()


def test_changes_to_the_config_survive_unwrapping():
    model = wrapped()
    model.config.pad_token_id = 7
    assert model.unwrap().config.pad_token_id == 7


# Copies


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@both
@pytest.mark.parametrize("copying", [copied, pickled, saved])
def test_a_copy_is_wrapped_and_independent(model_class, copying):
    model = wrapped(model_class, spy=Spy())
    other = copying(model)

    assert type(other) is type(model) and other is not model
    assert other.lighthouse_settings.method == model.lighthouse_settings.method
    assert other.config is not model.config
    expected = model({"input_ids": ids()}).loss
    assert other.lighthouse_settings.inner.calls == 0
    assert torch.equal(other({"input_ids": ids()}).loss, expected)
    assert other.lighthouse_settings.inner.calls == LIGHTHOUSE_LAYERS
    other.unwrap()
    assert type(other) is model_class and isinstance(model, WrappedModel)
    assert model.config._attn_implementation == "lighthouse"


def test_a_pickle_needs_nothing_imported_before(tmp_path):
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps(wrapped()))
    code = f"""
        import pickle, torch
        model = pickle.load(open({str(path)!r}, "rb"))
        model({{"input_ids": torch.ones(1, 64, dtype=torch.long)}}).loss.backward()
        assert model.unwrap().__class__.__module__ == "transformers.models.llama.modeling_llama"
    """
    run(code)


def test_settings_pickle_and_print():
    settings = wrapped(dense_layers=1).lighthouse_settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.pool_ratios == (1 / 2, 1 / 4) and settings.select_topk == 4 and not hasattr(settings, "ratio")
    assert "select_topk=4" in str(settings) and "dense_layers=1" in str(settings)
    with pytest.raises(AttributeError):
        settings.method.select_topk = 5


# Saving


def test_save_pretrained_writes_plain_models(tmp_path):
    for model_class in MODELS:
        folder = tmp_path / model_class.__name__
        model = wrapped(model_class)
        model.save_pretrained(folder)
        text = (folder / "config.json").read_text()
        assert "lighthouse" not in text.lower() and f'"{model_class.__name__}"' in text
        with torch.no_grad():
            torch.save((ids(), model.unwrap().eval()(ids())[0]), folder / "expected.pt")
    run(f"""
        import sys
        sys.modules["lighthouse"] = None  # not installed
        import torch, transformers
        for name in {[model_class.__name__ for model_class in MODELS]}:
            folder = {str(tmp_path)!r} + "/" + name
            model = getattr(transformers, name).from_pretrained(folder).eval()
            ids, expected = torch.load(folder + "/expected.pt")
            with torch.no_grad():
                assert torch.equal(model(ids)[0], expected), name
    """)


def test_auto_classes_load_what_was_saved(tmp_path):
    wrapped().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


# Bad input


WRONG_SETTINGS = [
    ("ratio_not_one_over_a_whole_number", {"pool_ratios": [0.3]}, ValueError, "pool_ratios"),
    ("nothing_at_all", {"select_topk": 0, "local_window": 0}, ValueError, "select_topk=0 chooses nothing"),
    ("topk_bool", {"select_topk": True}, TypeError, "select_topk"),
    ("no_layer_left", {"dense_layers": 2}, ValueError, "dense_layers=2: .* at most 1"),
    ("dense_layers_negative", {"dense_layers": -1}, ValueError, "dense_layers=-1"),
    ("dense_layers_bool", {"dense_layers": True}, TypeError, "dense_layers=True"),
    ("dense_layers_fraction", {"dense_layers": 0.5}, TypeError, "dense_layers=0.5"),
    ("eval_unknown", {"eval": "sparse"}, ValueError, "eval='sparse'.*'dense', 'lighthouse'"),
    ("loss_unknown", {"loss": None}, ValueError, "loss=None.*'chunked', 'model'"),
    ("min_tokens_negative", {"min_tokens": -1}, ValueError, "min_tokens=-1"),
    ("max_share_zero", {"max_share": 0}, ValueError, "max_share=0"),
    ("max_share_above_one", {"max_share": 1.5}, ValueError, "max_share=1.5"),
    ("max_share_not_a_number", {"max_share": float("nan")}, ValueError, "max_share=nan"),
    ("max_share_bool", {"max_share": True}, TypeError, "max_share=True"),
    ("cover_start_number", {"cover_start": 1}, TypeError, "cover_start=1"),
    ("inner_not_callable", {"inner": "sdpa"}, TypeError, "inner='sdpa'"),
]


@pytest.mark.parametrize(
    ("settings", "error", "message"), [c[1:] for c in WRONG_SETTINGS], ids=[c[0] for c in WRONG_SETTINGS]
)
def test_wrong_settings_are_refused_and_change_nothing(settings, error, message):
    model = plain()
    before = model.config
    with pytest.raises(error, match=message):
        LighthouseWrapper(model, **settings)
    assert type(model) is LlamaForCausalLM and model.config is before
    assert not any(hasattr(module, "lighthouse_settings") for module in model.modules())


WRONG_CONFIGS = [
    ("sliding_window", {"sliding_window": 16}, "sliding_window=16"),
    ("soft_capping", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("attention_sinks", {"attention_sinks": 4}, "attention_sinks=4"),
    ("layer_types", {"layer_types": ["sliding_attention"] * LAYERS}, "sliding_attention"),
    ("not_causal", {"is_causal": False}, "is_causal=False"),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in WRONG_CONFIGS], ids=[c[0] for c in WRONG_CONFIGS])
def test_configs_with_other_attention_are_refused(changes, message):
    model = plain()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        LighthouseWrapper(model)


def bert():
    return BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16))


def part_wrapped():
    model = plain()
    LighthouseWrapper(model.model, **SETTINGS)
    return model


def with_forward():
    model = plain()
    model.forward = lambda *args, **kwargs: None
    return model


def with_loss_function():
    model = plain()
    model.loss_function = lambda **kwargs: None
    return model


WRONG_MODELS = [
    ("without_causal_attention", bert, ValueError, "a BertModel cannot be wrapped: .*LlamaModel, LlamaForCausalLM"),
    ("classifier", lambda: LlamaForSequenceClassification(config()), ValueError, "LlamaForSequenceClassification"),
    ("not_of_transformers", lambda: torch.nn.Linear(2, 2), TypeError, "Linear: .*LlamaModel"),
    ("not_a_module", lambda: 3, TypeError, "a int: .*LlamaModel"),
    ("compiled", lambda: torch.compile(plain()), TypeError, "OptimizedModule around a LlamaForCausalLM"),
    ("wrapped", wrapped, ValueError, "already wrapped.*unwrap it first"),
    ("part_wrapped", part_wrapped, ValueError, "part of this LlamaForCausalLM is already wrapped"),
    ("forward_on_the_instance", with_forward, ValueError, "its own forward on the instance"),
    ("loss_of_its_own", with_loss_function, ValueError, 'loss="model"'),
]


@pytest.mark.parametrize(("make", "error", "message"), [c[1:] for c in WRONG_MODELS], ids=[c[0] for c in WRONG_MODELS])
def test_models_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        LighthouseWrapper(make())


def test_a_bare_model_has_no_loss_of_its_own():
    with pytest.raises(ValueError, match='loss="model": a LlamaModel'):
        LighthouseWrapper(plain(LlamaModel), loss="model")


def test_unwrapping_twice_is_an_error():
    model = wrapped()
    unwrap(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not wrapped"):
        unwrap(model)
    with pytest.raises(AttributeError, match="unwrap"):
        model.unwrap()
    with pytest.raises(ValueError, match="str is not wrapped"):
        unwrap("llama")


def test_the_switch_takes_a_bool():
    with pytest.raises(TypeError, match="lighthouse\\(1\\)"):
        wrapped().lighthouse(1)


def test_without_transformers_only_wrapping_fails_and_names_the_extra():
    run("""
        import sys
        import lighthouse
        assert "transformers" not in sys.modules
        sys.modules["transformers"] = None  # not installed
        try:
            lighthouse.LighthouseWrapper(object())
        except ImportError as error:
            assert 'pip install "lighthouse-attn[train]"' in str(error), error
        else:
            raise AssertionError("no error")
    """)


# Which layers stay dense


DENSE_LAYERS = [
    ("one_layer", 1, None, 0, 0),
    ("two_layers", 2, None, 0, 0),
    ("three_layers", 3, None, 0, 1),
    ("eleven_layers", 11, None, 0, 1),
    ("twelve_layers", 12, None, 0, 2),
    ("thirty_layers_as_in_the_paper", 30, None, 0, 2),
    ("none_asked", 30, 0, 0, 0),
    ("all_but_one_asked", 5, 2, 0, 2),
    ("a_local_window_needs_none", 30, None, 256, 0),
    ("some_asked_with_a_local_window", 30, 1, 256, 1),
]


@pytest.mark.parametrize(
    ("layers", "asked", "window", "dense"), [c[1:] for c in DENSE_LAYERS], ids=[c[0] for c in DENSE_LAYERS]
)
def test_dense_layers(layers, asked, window, dense):
    settings = LighthouseSettings(Method(local_window=window), dense_layers=asked).for_layers(layers)
    assert settings.dense_layers == dense
    acting = [layer for layer in range(layers) if settings.acts_in_layer(layer, layers)]
    assert acting == list(range(dense, layers - dense))


# The class swap by itself


class Loud(Swapped):
    def forward(self, value):
        return super().forward(value) * 2


def test_a_class_put_on_top_survives_the_way_back():
    class OnTop:
        pass

    instance = torch.nn.Linear(2, 2)
    swap(instance, Loud)
    instance.__class__ = type("OnTopLinear", (OnTop, type(instance)), {"mark": 3})
    unswap(instance)
    assert isinstance(instance, OnTop) and not isinstance(instance, Swapped)
    assert type(instance).__mro__[1:3] == (OnTop, torch.nn.Linear) and instance.mark == 3


def test_a_swapped_class_is_made_once():
    assert swapped_class(Loud, torch.nn.Linear) is swapped_class(Loud, torch.nn.Linear)


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
