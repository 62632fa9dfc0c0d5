"""What reads the gradients of all parameters, and will find None once layers are frozen.

Such a loop, `p.grad.norm()` over `model.parameters()` for a log, raises in the first step after the
first freeze, hours into a run. Gradients of zeros would spare it that, but cost what freezing
saves, and feed momenta. So the loop is looked for when FreezeOut is built, in the source of what
builds it, and named; and hooks on parameters are named before they fall silent.
"""

import ast
import inspect
import linecache
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer

Names = Mapping[str, Any]  # what names stand for
Place = tuple[str, int]  # a file and a line in it

_PACKAGE = __name__.partition(".")[0]
_STANDARD_LIBRARY = os.path.dirname(os.__file__)
_INSTALLED = {"site-packages", "dist-packages"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tell_of_loops(model: nn.Module, parameters: Collection[nn.Parameter], first: int) -> None:
    """Warn, at the line itself, of a loop that reads the gradients of `parameters`, which freeze
    from step `first` on, and does not ask whether there are any.

    It is looked for in the functions that are building FreezeOut, and in what they call with the
    model; and in the methods of the model and of an object that builds it."""
    place: Place | None = None
    with suppress(Exception):  # reading foreign source, for a hint, may fail in any way
        place = next(_Search(set(parameters)).places(model), None)
    if place is not None:
        when = f"from step {first} on" if first else "from the start"
        warnings.warn_explicit(
            f"this loop reads .grad of parameters that freeze: {when} it is None for those of "
            "frozen layers; add `if p.grad is not None`",
            UserWarning,
            *place,
        )


class _Search:
    """Looks for loops over any of the parameters, in source, with what its names stand for now."""

    def __init__(self, parameters: set[nn.Parameter]) -> None:
        self._parameters = parameters
        self._seen: set[object] = set()

    def places(self, model: nn.Module) -> Iterator[Place]:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
            frame = frame.f_back
        file = frame.f_code.co_filename
        owners: list[Any] = [model]
        while _is_users(file) and frame is not None and frame.f_code.co_filename == file:
            owners.append(frame.f_locals.get("self"))
            yield from self._in(frame.f_code, {**frame.f_globals, **frame.f_locals})
            frame = frame.f_back  # type: ignore[assignment]
        for owner in owners:
            for method in vars(type(owner)).values():
                if isinstance(method, FunctionType):
                    yield from self._called(MethodType(method, owner), [], {})

    def _in(self, code: Any, names: Names) -> Iterator[Place]:
        """In the source of this code."""
        if code in self._seen or not _is_users(code.co_filename):
            return
        self._seen.add(code)
        if code.co_name == "<module>":
            lines, start = linecache.getlines(code.co_filename), 1
            nodes = list(_outside_functions(ast.parse("".join(lines))))
        else:
            lines, start = inspect.getsourcelines(code)
            nodes = list(ast.walk(ast.parse(textwrap.dedent("".join(lines)))))
        for node in nodes:
            if isinstance(node, ast.For):
                over = [node.iter]
            else:
                over = [each.iter for each in getattr(node, "generators", [])]
            if any(self._related(each, names) is not None for each in over) and not _asks(node):
                for read in filter(_reads, ast.walk(node)):
                    yield code.co_filename, start + read.lineno - 1  # type: ignore[attr-defined]
        for node in nodes:
            if isinstance(node, ast.Call):
                args = [self._related(each, names) for each in node.args]
                named = {each.arg: self._related(each.value, names) for each in node.keywords}
                if any(value is not None for value in (*args, *named.values())):
                    yield from self._called(_value(node.func, names), args, named)

    def _called(
        self, function: Any, args: list[Any], named: Mapping[str | None, Any]
    ) -> Iterator[Place]:
        """In the function, called with these arguments."""
        if not isinstance(function, FunctionType | MethodType):
            return
        inner: Callable[..., Any] = getattr(function, "__func__", function)
        if isinstance(function, MethodType):
            args = [function.__self__, *args]
        names = {key: value for key, value in named.items() if key is not None}
        with suppress(TypeError):
            given = inspect.signature(inner).bind_partial(*args, **names).arguments
            yield from self._in(inner.__code__, {**inner.__globals__, **given})

    def _related(self, expression: ast.AST, names: Names) -> Any:
        """The first thing named in the expression that holds any of the parameters."""
        for node in ast.walk(expression):
            if isinstance(node, ast.Name | ast.Attribute):
                value = _value(node, names)
                if not self._parameters.isdisjoint(_parameters_in(value)):
                    return value
        return None


def _parameters_in(value: Any) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Optimizer):
        yield from (p for group in value.param_groups for p in group["params"])
    elif isinstance(value, list | tuple):
        for each in value:  # parameters, pairs with a name, groups
            parts = list(each.values()) if isinstance(each, dict) else [each]
            for part in parts:
                several = part if isinstance(part, list | tuple) else [part]
                yield from (p for p in several if isinstance(p, nn.Parameter))


def _value(node: ast.AST, names: Names) -> Any:
    """What a name, or an attribute of one, stands for; no code runs to find out."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    of = _value(node.value, names)
    for own in (getattr(of, "__dict__", {}), getattr(of, "_modules", {})):
        if isinstance(own, Mapping) and node.attr in own:
            return own[node.attr]
    method = inspect.getattr_static(type(of), node.attr, None)
    return MethodType(method, of) if isinstance(method, FunctionType) else None


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that is not inside a function, which may not be called, or a class."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, _DEFINITIONS):
            yield child
            yield from _outside_functions(child)


def _reads(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign):
        return isinstance(node.target, ast.Attribute) and node.target.attr == "grad"
    return (
        isinstance(node, ast.Attribute) and node.attr == "grad" and isinstance(node.ctx, ast.Load)
    )


def _asks(loop: ast.AST) -> bool:
    """Whether anything in the loop is compared with None, or is asked for `requires_grad`, or a
    gradient itself is a condition."""
    for node in ast.walk(loop):
        match node:
            case ast.Attribute(attr="requires_grad"):
                return True
            case ast.Compare(comparators=[ast.Constant(value=None)]):
                return True
            case ast.If(test=test) | ast.IfExp(test=test) if any(map(_reads, ast.walk(test))):
                return True
            case ast.comprehension(ifs=tests) if any(map(_reads, tests)):
                return True
    return False


def _is_users(file: str) -> bool:
    return not file.startswith(_STANDARD_LIBRARY) and _INSTALLED.isdisjoint(Path(file).parts)


def hooked(parameters: Mapping[nn.Parameter, str]) -> tuple[str, str] | None:
    """The name of the first of the parameters that has a gradient hook, and what that is called."""
    for parameter, name in parameters.items():
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(parameter, attribute, None) or {}).values():
                home = getattr(hook, "__module__", None) or type(hook).__module__
                called = getattr(hook, "__qualname__", None) or type(hook).__qualname__
                return name, f"{home}.{called}"
    return None
