"""The class swap by itself: whatever stands on top of the swapped class, the module gets its own class back."""

import pytest
import torch
from torch.nn.utils import parametrize

from lighthouse.huggingface.class_swap import Swapped, swap, unswap


class Behaviour(Swapped):
    def forward(self, value):
        return super().forward(value) * 3


class Double(torch.nn.Module):
    def forward(self, value):
        return value * 2


def test_modules_that_are_parametrized_differently_get_their_own_classes_back():
    x, layers = torch.rand(2, 3), [torch.nn.Linear(3, 3) for _ in range(4)]
    for layer, names in zip(layers, ([], ["weight"], ["bias"], ["weight", "bias"]), strict=True):
        swap(layer, Behaviour)
        for name in names:
            parametrize.register_parametrization(layer, name, Double())
    before = [layer(x) for layer in layers]
    for layer in layers:
        unswap(layer)
    for layer, tripled in zip(layers, before, strict=True):
        assert not isinstance(layer, Behaviour)
        torch.testing.assert_close(3 * layer(x), tripled)
        for name in list(getattr(layer, "parametrizations", ())):
            parametrize.remove_parametrizations(layer, name)
        assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_first", "second_first"])
def test_one_that_is_unswapped_leaves_the_other_as_it_is(order):
    layers = [torch.nn.Linear(3, 3) for _ in range(2)]
    for layer, name in zip(layers, ("weight", "bias"), strict=True):
        swap(layer, Behaviour)
        parametrize.register_parametrization(layer, name, Double())
    x = torch.rand(2, 3)
    before = [layer(x) for layer in layers]
    first, second = order
    unswap(layers[first])
    torch.testing.assert_close(3 * layers[first](x), before[first])
    assert torch.equal(layers[second](x), before[second])


def test_modules_of_one_class_on_top_share_one_afterwards():
    layers = [torch.nn.Linear(3, 3) for _ in range(2)]
    for layer in layers:
        swap(layer, Behaviour)
    on_top = type("OnTop", (type(layers[0]),), {})
    for layer in layers:
        layer.__class__ = on_top
        unswap(layer)
    assert type(layers[0]) is type(layers[1]) is not torch.nn.Linear
    assert type(layers[0]).__bases__ == (torch.nn.Linear,)
