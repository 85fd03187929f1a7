"""Patterns of layers and pairs of numbers, which some Megatrons store as the text of a Python list."""

from __future__ import annotations

import ast
from typing import Any

LONGEST = 10_000  # layers, and characters, of a pattern


def pattern(value: Any, _: object) -> Any:
    """A frequency: a number, or a pattern of layers, which some versions store as the text of a Python list."""
    if isinstance(value, str):
        value = written(value)
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else value


def written(text: str) -> Any:
    """What `([0]*3+[1]*1)*2` or `(127, 0)` stands for; only lists, `+`, `*` and numbers are understood.

    Raises:
        ValueError: anything else, or more than any model has layers.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            items, times = sorted((value(node.left), value(node.right)), key=lambda side: type(side) is int)
            if len(items) * times <= LONGEST:
                return items * times
        raise ValueError("neither a number nor a list of numbers")

    try:
        return value(ast.parse(text[: LONGEST + 1], mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("neither a number nor a list of numbers") from error
