"""A fault put into a module that is loaded already: functions take the faulty code, constants the new values."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cached_property, partial
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__module__", "__hash__", "__slots__", "__orig_bases__")
OF_CLASSES += ("__annotations__", "__parameters__", "__match_args__", "__abstractmethods__", "_abc_impl")
OF_CLASSES += ("__dataclass_fields__", "__dataclass_params__")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def swap(module: ModuleType, text: str) -> bool:
    """Let `module` run as if `text` were its source; whoever holds its functions and classes holds the faulty ones.

    False where nothing is changed, or not in place: a function that closes over other names. Raises what `text` raises.
    """
    fresh = ModuleType(module.__name__)
    kept = ("__file__", "__package__", "__spec__", "__loader__")
    vars(fresh).update({name: vars(module)[name] for name in kept if name in vars(module)})
    sys.modules[module.__name__] = fresh  # where dataclasses look names up
    try:
        exec(compile(text, module.__file__ or "", "exec", dont_inherit=True), vars(fresh))
    finally:
        sys.modules[module.__name__] = module
    exchange = _Exchange(module)
    for name, value in list(vars(fresh).items()):
        if not name.startswith("__"):
            exchange.attribute(module, name, value)
    return exchange.is_complete and exchange.num_changes > 0


class _Exchange:
    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.num_changes = 0
        self.is_complete = True

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Exchange an attribute of the module or of one of its classes."""
        if name not in vars(owner):
            self.num_changes += 1
            setattr(owner, name, value)
            return
        old = vars(owner)[name]
        if isinstance(value, type) and self._is_own(value):
            for each, part in list(vars(value).items()):
                if each not in OF_CLASSES and not isinstance(part, (MemberDescriptorType, GetSetDescriptorType)):
                    self.attribute(old, each, part)
        elif _functions(old) and _functions(value):
            for ours, theirs in zip(_functions(old), _functions(value), strict=False):
                if self._is_own(ours) and self._is_own(theirs):
                    self._function(ours, theirs)
            getattr(old, "cache_clear", lambda: None)()
        elif not same(old, value):
            self._constant(owner, name, old, self._translated(value))

    def _function(self, ours: FunctionType, theirs: FunctionType) -> None:
        if ours.__code__ != theirs.__code__:
            if len(ours.__code__.co_freevars) != len(theirs.__code__.co_freevars):
                self.is_complete = False
                return
            ours.__code__ = theirs.__code__
            self.num_changes += 1
        for name in ("__defaults__", "__kwdefaults__"):
            if not same(getattr(ours, name), getattr(theirs, name)):
                setattr(ours, name, getattr(theirs, name))
                self.num_changes += 1

    def _constant(self, owner: Any, name: str, old: Any, value: Any) -> None:
        """In place where it can be, and wherever it was imported to."""
        self.num_changes += 1
        if isinstance(old, (dict, set)):
            old.clear()
            old.update(value)
        elif isinstance(old, list):
            old[:] = value
        else:
            holders = [owner, *sys.modules.values()] if owner is self._module else [owner]
            for holder in holders:
                if getattr(holder, "__dict__", {}).get(name) is old:
                    setattr(holder, name, value)

    def _translated(self, value: Any) -> Any:
        """With the module's own functions and classes in place of their twins."""
        if isinstance(value, dict):
            return {self._translated(key): self._translated(part) for key, part in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(map(self._translated, value))
        is_named = inspect.isfunction(value) or inspect.isclass(value)
        return vars(self._module).get(value.__qualname__, value) if is_named and self._is_own(value) else value

    def _is_own(self, value: Any) -> bool:
        return getattr(value, "__module__", None) == self._module.__name__


def _functions(value: Any) -> list[FunctionType]:
    """The plain functions behind a method, a property, a decorated function."""
    if isinstance(value, property):
        return [each for part in (value.fget, value.fset) for each in _functions(part)]
    found = []
    while value is not None:
        if isinstance(value, FunctionType):
            found.append(value)
        if isinstance(value, (partial, cached_property)):
            value = value.func
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        else:
            value = vars(value).get("__wrapped__") if hasattr(value, "__dict__") else None
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two constants are alike, functions and classes by their names."""
    if one is other or isinstance(one, ModuleType):
        return True
    if callable(one) and callable(other) and hasattr(one, "__qualname__"):
        return one.__qualname__ == getattr(other, "__qualname__", None)
    if type(one).__qualname__ != type(other).__qualname__:
        return False
    if isinstance(one, dict):
        return list(map(str, one)) == list(map(str, other)) and same([*one.values()], [*other.values()])
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is type(other):
        return ADDRESS.sub("", repr(one)) == ADDRESS.sub("", repr(other))
    return same(vars(one), vars(other))
