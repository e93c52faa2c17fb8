"""What `lighthouse.attention` refuses before any work, and what it says of input that it takes as it is not meant."""

import logging
import math

import pytest
import torch

import lighthouse
from cases import rand_qkv
from lighthouse.core import inputs


def bad(change, tokens=64):
    query, key, value = rand_qkv(tokens, query_heads=4, kv_heads=2, dtype=torch.float32)
    arguments = {"query": query, "key": key, "value": value}
    arguments.update(change(query, key, value))
    return arguments


BAD_INPUT = {
    "heads_that_do_not_divide": (
        lambda q, k, v: {"key": k.repeat(1, 2, 1, 1)[:, :3], "value": v.repeat(1, 2, 1, 1)[:, :3]},
        ValueError,
        "key has 3 heads, query 4: the query heads must be a multiple of the key heads",
    ),
    "more_key_heads": (lambda q, k, v: {"query": q[:, :1]}, ValueError, "key has 2 heads, query 1"),
    "value_heads": (lambda q, k, v: {"value": v[:, :1]}, ValueError, "value has 1 heads, key 2"),
    "mixed_dtypes": (
        lambda q, k, v: {"key": k.double()},
        ValueError,
        "key has dtype torch.float64, query torch.float32",
    ),
    "mixed_devices": (lambda q, k, v: {"value": v.to("meta")}, ValueError, "value has device meta, query cpu"),
    "mixed_lengths": (lambda q, k, v: {"key": k[:, :, :9]}, ValueError, "key has tokens 9, query 64"),
    "mixed_batches": (lambda q, k, v: {"value": v.repeat(2, 1, 1, 1)}, ValueError, "value has batch 2, query 1"),
    "mixed_head_dims": (lambda q, k, v: {"value": v[..., :4]}, ValueError, "value has head_dim 4, query 8"),
    "whole_numbers": (lambda q, k, v: {"query": q.int()}, ValueError, "query has dtype torch.int32: float32, bfloat16"),
    "three_dimensions": (lambda q, k, v: {"query": q[0]}, ValueError, r"query has shape \[4, 64, 8\]"),
    "no_tokens": (lambda q, k, v: {"query": q[:, :, :0]}, ValueError, "every size must be at least 1"),
    "not_a_tensor": (lambda q, k, v: {"key": None}, TypeError, "key is a NoneType"),
    "scores_not_a_pair": (lambda q, k, v: {"scores": k.norm(dim=-1)}, TypeError, "scores must be a pair"),
    "scores_of_another_shape": (
        lambda q, k, v: {"scores": (q.norm(dim=-1), k.norm(dim=-1))},
        ValueError,
        r"scores\[0\] has shape \[1, 4, 64\]: \[1, 2, 64\] is needed",
    ),
    "scores_of_another_dtype": (
        lambda q, k, v: {"scores": (k.norm(dim=-1), k.norm(dim=-1).double())},
        ValueError,
        r"scores\[1\] has dtype torch.float64",
    ),
    "dropout_of_one": (lambda q, k, v: {"dropout_p": 1.0}, ValueError, "dropout_p=1.0"),
    "dropout_that_is_text": (lambda q, k, v: {"dropout_p": "0.1"}, TypeError, "dropout_p='0.1'"),
    "dropout_that_is_no_number": (lambda q, k, v: {"dropout_p": math.nan}, ValueError, "dropout_p=nan"),
    "scale_of_zero": (lambda q, k, v: {"scale": 0.0}, ValueError, "scale=0.0: a finite number above 0"),
    "scale_that_is_infinite": (lambda q, k, v: {"scale": math.inf}, ValueError, "scale=inf"),
    "scale_that_is_text": (lambda q, k, v: {"scale": "1"}, TypeError, "scale='1': a number above 0"),
    "scale_that_is_learned": (lambda q, k, v: {"scale": torch.ones(())}, TypeError, "scale is a tensor.*no gradient"),
    "cover_start_that_is_text": (
        lambda q, k, v: {"cover_start": "False"},
        TypeError,
        "cover_start='False': True or False",
    ),
    "sparse": (lambda q, k, v: {"value": v.to_sparse()}, ValueError, "value has layout torch.sparse_coo.*to_dense"),
    "sparse_scores": (
        lambda q, k, v: {"scores": (k.norm(dim=-1).to_sparse(),) * 2},
        ValueError,
        r"scores\[0\] has layout torch.sparse_coo",
    ),
    "nested": (
        lambda q, k, v: dict.fromkeys(
            ("query", "key", "value"), torch.nested.nested_tensor([q[0], q[0, :, :9]], layout=torch.jagged)
        ),
        ValueError,
        "query is a nested tensor.*pass each by itself",
    ),
    "complex": (lambda q, k, v: {"query": q.to(torch.complex64)}, ValueError, "query has dtype torch.complex64"),
    "quarter_precision": (lambda q, k, v: {"query": q.to(torch.float8_e4m3fn)}, ValueError, "torch.float8_e4m3fn"),
    "ratio": (lambda q, k, v: {"pool_ratios": [0.3]}, ValueError, r"pool_ratios\[0\]=0.3"),
    "topk": (lambda q, k, v: {"select_topk": 0}, ValueError, "select_topk=0"),
    "inner_that_is_a_name": (lambda q, k, v: {"inner": "flash"}, TypeError, "inner='flash': a function inner"),
    "inner_gives_a_tuple": (
        lambda q, k, v: {"inner": lambda q, k, v, **_: (q, None)},
        TypeError,
        "inner returned a tuple",
    ),
    "inner_of_another_shape": (
        lambda q, k, v: {"inner": lambda q, k, v, **_: q[:, :, :1]},
        ValueError,
        "inner returned",
    ),
    "inner_of_another_device": (
        lambda q, k, v: {"inner": lambda q, k, v, **_: q.to("meta")},
        ValueError,
        "on meta for a query of .* on cpu",
    ),
    "inner_that_is_sparse": (
        lambda q, k, v: {"inner": lambda q, k, v, **_: q.to_sparse()},
        ValueError,
        "what inner returned has layout torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    change, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        lighthouse.attention(**bad(change))


def test_an_inner_attention_without_a_gradient_is_refused_where_one_is_asked_for():
    query, key, value = rand_qkv(64)
    detached = lambda q, k, v, **_: q.detach()  # noqa: E731
    lighthouse.attention(query, key, value, inner=detached)
    value.requires_grad_()
    with torch.no_grad():
        lighthouse.attention(query, key, value, inner=detached)
    with pytest.raises(ValueError, match="inner returned an output without a gradient for a query that requires one"):
        lighthouse.attention(query, key, value, inner=detached)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scores_that_require_a_gradient_get_none_and_that_is_said_once(compiled, caplog, monkeypatch):
    monkeypatch.setattr(inputs, "_said_of_scores", set())
    query, key, value = rand_qkv(64, dtype=torch.float32)
    learned, plain = (key.norm(dim=-1).requires_grad_(required) for required in (True, False))
    call = torch.compile(lighthouse.attention, fullgraph=True, backend="eager") if compiled else lighthouse.attention
    with caplog.at_level(logging.WARNING, logger="lighthouse"):
        for _ in range(2):
            assert not call(query, key, value, scores=(learned, plain)).requires_grad
    assert [record.message.split(" requires")[0] for record in caplog.records] == ["Lighthouse: scores[0]"]
