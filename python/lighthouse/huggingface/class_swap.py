"""An object gets new behaviour by a new class: the same object, the same attributes, and a way back.

A swapped class is made once per pair of (behaviour, plain class), keeps the plain class's name, and pickles through
the plain class, since pickle cannot find it by that name. The trap: others swap classes too. `fully_shard` puts
`FSDP<Class>` on top of whatever class it finds, so the way back has to rebuild what stands on top.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary


class Swapped:
    """Base of every behaviour that is put over a plain class."""

    plain_class: type  # set in each class that `swapped_class` makes

    @classmethod
    def namespace(cls, plain: type) -> dict:
        """What the class over `plain` gets besides this behaviour's methods."""
        return {}

    def __init__(self, *args, **kwargs):
        # `type(model)(config)` is asked for a model, not for a wrapped one.
        self.__class__ = unswapped_class(type(self))
        type(self).__init__(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        made = vars(type(self)).get("plain_class")
        if made is None:  # another class on top: its own affair
            return reduced
        behaviour = type(self).__mro__[1]
        return (_new, (behaviour, made), *reduced[2:])


def _new(behaviour: type[Swapped], plain: type):
    cls: Any = swapped_class(behaviour, plain)  # type: ignore[arg-type]  # of a class as key of a cache
    return cls.__new__(cls)


@functools.cache
def swapped_class(behaviour: type[Swapped], plain: type) -> type:
    """The subclass of `behaviour` and `plain` that goes by the name of `plain`."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (behaviour, plain), {**names, **behaviour.namespace(plain), "plain_class": plain})


def swap(instance, behaviour: type[Swapped]) -> None:
    """Puts `behaviour` over the class of `instance`, in place; does nothing if it is already there."""
    if not isinstance(instance, behaviour):
        instance.__class__ = swapped_class(behaviour, type(instance))  # type: ignore[arg-type]  # as above


def unswap(instance) -> None:
    """Removes the behaviour; classes that others have put on top stay."""
    instance.__class__ = unswapped_class(type(instance))


def unswapped_class(cls: type) -> type:
    """`cls` without any `Swapped` in it."""
    if "plain_class" in vars(cls):
        return unswapped_class(vars(cls)["plain_class"])
    if not issubclass(cls, Swapped):
        return cls
    bases = tuple(unswapped_class(base) for base in cls.__bases__)
    made, key = _made_again(cls, bases[-1])
    if key not in made:
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        made[key] = type(cls.__name__, bases, own)
    return made[key]


# Class on top -> the same over the plain class. Each has its own: `parametrize` makes one for every module.
_over_plain: MutableMapping[type, type] = WeakKeyDictionary()


def _made_again(cls: type, plain: type) -> tuple[MutableMapping[type, type], type]:
    """Where the class that `cls` becomes over `plain` is kept, and under what: for FSDP, torch's own table.

    The compiler looks FSDP classes up in that table, and a model that is sharded later shares the class then.
    """
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fully_shard")
    table = getattr(module, "cls_to_fsdp_cls", None)
    if table is not None and table.get(cls.__bases__[-1]) is cls:
        return table, plain
    return _over_plain, cls
