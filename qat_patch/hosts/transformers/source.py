"""Reads the code of attention modules: how they call attention, and what they do with keys and values from a cache.

Each class is read once. If the source is not available (typed at a prompt, compiled), nothing is known, and callers decide.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


class CachedUse(NamedTuple):
    """What a module's code does with keys and values from a cache."""

    flag: str | None
    """The attribute of the module that has to be true for it; None: it is always done."""
    what: str


class AttentionCode(NamedTuple):
    """The method of a class that calls attention."""

    file: str
    """Its Python module. Some modules replace functions of the interface."""
    default: str
    """The function in its file that it calls for "eager"."""
    keywords: frozenset[str] | None
    """The arguments that it passes to attention by name; None: its source is not available."""
    uses_mask: str | None
    """What it does with its mask, other than passing it or a part of it to attention."""
    touches_cached: tuple[CachedUse, ...]
    """What it does with keys and values from a cache, other than passing them to attention."""


def attention_code(module: object) -> AttentionCode | None:
    """The code of a module's class; None if no method mentions the interface: some classes accept any name and ignore it."""
    kind: Any = type(module)
    return _attention_code(kind)


def host_function(module: object, implementation: str) -> Callable[..., Any]:
    """The function that a module's code calls for the name of an implementation."""
    file, default = _names_of_host(type(module))
    namespace = sys.modules[file]
    return getattr(namespace, _INTERFACE).get_interface(implementation, getattr(namespace, default, None))


@torch.compiler.assume_constant_result
def _names_of_host(kind: Any) -> tuple[str, str]:
    code = _attention_code(kind)
    assert code is not None, "it has called attention"
    return code.file, code.default


@lru_cache
def _attention_code(kind: Any) -> AttentionCode | None:
    for function in _functions(kind):
        if _INTERFACE in function.__code__.co_names:
            tree = _parse(function)
            return AttentionCode(
                file=function.__globals__["__name__"],
                default="eager_attention_forward" if tree is None else _default(tree),
                keywords=None if tree is None else _keywords(tree),
                uses_mask=None if tree is None else _uses_mask(tree),
                touches_cached=_touches_cached(tree, kind.__name__),
            )
    return None


def reads_padding(model: object) -> bool:
    """Whether a model's forward takes position_ids and makes positions or masks itself; models around it only pass both on."""
    kind: Any = type(model)
    return _reads_padding(kind)


@lru_cache
def _reads_padding(kind: Any) -> bool:
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        return False
    tree = _parse(inspect.unwrap(kind.forward))
    names = [] if tree is None else [x for x in ast.walk(tree) if isinstance(x, ast.Name)]
    makes_masks = any(x.id.startswith("create_") and "mask" in x.id for x in names)
    return tree is None or makes_masks or any(x.id == "position_ids" and isinstance(x.ctx, ast.Store) for x in names)


def recurrent(model: torch.nn.Module) -> str | None:
    """The first class of a model's modules that carry a state from token to token: linear attention, and convolutions."""
    kinds: dict[Any, None] = dict.fromkeys(type(module) for module in model.modules())
    return next((kind.__name__ for kind in kinds if _is_recurrent(kind)), None)


@lru_cache
def _is_recurrent(kind: Any) -> bool:
    names = {name for function in _functions(kind) for name in function.__code__.co_names}
    return not names.isdisjoint({"update_conv_state", "update_recurrent_state", "set_linear_cache"})


def opens_caches(model: object) -> str | None:
    """What a model's file does with caches, other than passing them to attention; such code expects transformers' caches."""
    kind: Any = type(model)
    return _opens_caches(kind)


@lru_cache
def _opens_caches(kind: Any) -> str | None:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    except (KeyError, OSError, TypeError):
        return f"the source of {kind.__name__} cannot be found"
    nodes = list(ast.walk(tree))
    own = {x.name for x in nodes if isinstance(x, ast.ClassDef) and any(ast.unparse(base).endswith("Cache") for base in x.bases)}
    made = {ast.unparse(x.func) for x in nodes if isinstance(x, ast.Call)} & own
    if made:
        return f"the model has a cache of its own, {', '.join(sorted(made))}"
    attention = [x for x in nodes if isinstance(x, ast.ClassDef) and any(_INTERFACE in _names(y) for y in x.body)]
    elsewhere = set(nodes) - {y for x in attention for y in ast.walk(x)} - {x.func for x in nodes if isinstance(x, ast.Call)}
    looks = [x for x in elsewhere if isinstance(x, ast.Attribute) and x.attr in ("keys", "values") and not _is_of_torch(x.value)]
    return f"the model looks into caches: {ast.unparse(min(looks, key=lambda x: x.lineno))}" if looks else None


def _is_of_torch(node: ast.expr) -> bool:
    """Whether this is the result of a torch function with a field `values`."""
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("max", "min", "sort", "topk")
    )


def _functions(kind: type) -> Iterator[FunctionType]:
    """The methods of a class, and those of its bases that are used: not overridden, or called through `super`."""
    for name, _ in inspect.getmembers(kind, inspect.isfunction):
        for base in kind.__mro__:
            if inspect.isfunction(method := vars(base).get(name)):
                yield (function := inspect.unwrap(method))
                if "super" not in function.__code__.co_names:
                    break


def _parse(function: FunctionType) -> ast.AST | None:
    try:
        return _UnderOurName().visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, SyntaxError, TypeError):
        return None


class _UnderOurName(ast.NodeTransformer):
    """Removes branches that run only for another attention implementation, such as "eager"."""

    def __init__(self) -> None:
        self.untrue: set[str] = set()

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if self._is_untrue(node.value):
            self.untrue |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if self._is_untrue(node.test) else node

    def _is_untrue(self, test: ast.AST) -> bool:
        match test:
            case ast.Name(id=name):
                return name in self.untrue
            case ast.BoolOp(op=ast.And(), values=values):
                return any(map(self._is_untrue, values))
            case ast.Compare(left=ast.Attribute(attr="_attn_implementation"), ops=[ast.Eq() | ast.In()]):
                return True
        return False


def _default(tree: ast.AST) -> str:
    """The name of the function for "eager": the second argument of get_interface."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="ALL_ATTENTION_FUNCTIONS")), args=[_, ast.Name(id=name)]):
                return name
    return "eager_attention_forward"


def _attention_calls(tree: ast.AST) -> list[ast.Call]:
    """Calls of functions from the interface: of every name that was assigned from an expression that mentions it."""
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _names(node.value) & {_INTERFACE}
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _names(node.func) & (names | {_INTERFACE})]


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _keywords(tree: ast.AST) -> frozenset[str]:
    return frozenset(keyword.arg for call in _attention_calls(tree) for keyword in call.keywords if keyword.arg)


def _touches_cached(tree: ast.AST | None, kind: str) -> tuple[CachedUse, ...]:
    """Keys and values come from `cache.update`. After it only one call of attention may name them."""
    if tree is None:
        return (CachedUse(None, f"the source of {kind} cannot be found"),)
    update = next(filter(_is_update, ast.walk(tree)), None)
    if not isinstance(update, ast.Assign) or not isinstance(update.value, ast.Call):
        return (CachedUse(None, "it does not take its keys and values from the update of a cache"),)
    calls = [call for call in _attention_calls(tree) if not isinstance(call.func, ast.Attribute)]
    loops = [x for loop in ast.walk(tree) if isinstance(loop, ast.For | ast.While) for x in ast.walk(loop)]
    if len(calls) != 1 or calls[0] in loops:
        return (CachedUse(None, "it calls attention more than once"),)
    if [ast.unparse(x) for x in update.value.args[2:3]] != ["self.layer_idx"]:
        return (CachedUse(None, "it does not keep to its place in a cache"),)
    cached, end = _names(update.targets[0]), update.end_lineno or update.lineno
    handed_on = _arguments(calls)
    names = [x for x in ast.walk(tree) if isinstance(x, ast.Name) and x.id in cached and x.lineno > end and x not in handed_on]
    return tuple(CachedUse(_flag(tree, name), f"it uses what a cache returned: {_statement(tree, name)}") for name in names)


def _flag(tree: ast.AST, name: ast.Name) -> str | None:
    """The attribute of the module in an `if self.attribute:` around a name."""
    for node in ast.walk(tree):
        match node:
            case ast.If(test=ast.Attribute(value=ast.Name(id="self"), attr=flag), body=body):
                if any(name in ast.walk(statement) for statement in body):
                    return flag
    return None


def _uses_mask(tree: ast.AST) -> str | None:
    """The mask may only be sliced and compared with None."""
    known = _arguments(_attention_calls(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=ast.Name() as mask, ops=[ast.Is() | ast.IsNot()]):
                known.append(mask)
            case ast.Assign(targets=[ast.Name(id="attention_mask")], value=ast.Subscript(value=ast.Name() as mask)):
                known.append(mask)
    masks = [x for x in ast.walk(tree) if isinstance(x, ast.Name) and x.id == "attention_mask" and isinstance(x.ctx, ast.Load)]
    others = [x for x in masks if x not in known]
    return _statement(tree, others[0]) if others else None


def _arguments(calls: list[ast.Call]) -> list[ast.AST]:
    return [x for call in calls for x in (*call.args, *(keyword.value for keyword in call.keywords))]


def _statement(tree: ast.AST, node: ast.Name) -> str:
    """The first line of the innermost statement around a name."""
    around = [x for x in ast.walk(tree) if isinstance(x, ast.stmt) and x.lineno <= node.lineno <= (x.end_lineno or x.lineno)]
    return ast.unparse(max(around, key=lambda x: x.lineno)).splitlines()[0]


def _is_update(node: ast.AST) -> bool:
    """Whether this is `key, value = cache.update(...)`."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(), ast.Name()])], value=ast.Call(func=ast.Attribute(attr="update"))):
            return True
    return False
