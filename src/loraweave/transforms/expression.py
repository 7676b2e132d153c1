"""Expressions on experts' names, ``a - 0.4*b``, to weights: read by Python's parser, never evaluated by Python."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass

from loraweave.errors import LoraweaveError

LONGEST = 10_000
"""Characters; the parser's stack is not for longer ones."""

_EXAMPLE = "expected names, numbers, + - * / and parentheses, for example 'a - 0.4*b'"


@dataclass(frozen=True)
class _Value:
    """``sum_i weights_i expert_i + number``; an expression is one or the other, never both."""

    weights: dict[str, float]
    number: float = 0.0

    def times(self, factor: float) -> _Value:
        return _Value({name: weight * factor for name, weight in self.weights.items()}, self.number * factor)


def read_expression(text: str) -> dict[str, float]:
    """``"(a + b) / 2"`` -> ``{"a": 0.5, "b": 0.5}``, in the order in which the names first occur.

    Raises:
        LoraweaveError: it is no linear combination of experts; the message says at which character.
    """
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        # Same length, so that positions stay: Python has no backticks, and an expression may be on several lines.
        self.code = re.sub(r"`([^`\"'\\]*)`", r'"\1"', re.sub(r"[\r\n\t]", " ", text))
        self.lead = len(self.code) - len(self.code.lstrip())

    def read(self) -> dict[str, float]:
        if len(self.text) > LONGEST:
            raise LoraweaveError(f"expression: longer than {LONGEST:,} characters; {_EXAMPLE}")
        if not self.code.strip():
            raise LoraweaveError(f"expression: it is empty; {_EXAMPLE}")
        for mark in "#\\`\0":
            if mark in self.code:
                raise self.wrong(self.code.index(mark), f"{mark!r} has no meaning here; {_EXAMPLE}")
        try:
            value = self.value(ast.parse(self.code.lstrip(), mode="eval").body)
        except SyntaxError as error:
            # Python says 0 where the text ends too early.
            place = self.lead + error.offset - 1 if error.offset else len(self.code.rstrip())
            raise self.wrong(
                place, f"not an expression; {_EXAMPLE}; names like 'my-lora' stand in quotes or backticks"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise LoraweaveError(f"expression: nested too deeply; {_EXAMPLE}") from error
        if not value.weights:
            raise LoraweaveError(f"expression {self.text!r}: it names no expert; {_EXAMPLE}")
        return value.weights

    def value(self, node: ast.expr) -> _Value:
        found = self.linear(node)
        if not all(map(math.isfinite, (found.number, *found.weights.values()))):
            raise self.wrong(self.place(node), f"{self.source(node)!r} comes to more than a number can hold")
        return found

    def linear(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Name):
            # The parser normalises letters; experts are called what was written.
            return _Value({self.source(node): 1.0})
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return self.value(node.operand).times(-1.0 if isinstance(node.op, ast.USub) else 1.0)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            return self.added(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self.multiplied(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return self.divided(node)
        hint = "; a name with dots stands in quotes or backticks" if isinstance(node, ast.Attribute) else ""
        raise self.wrong(self.place(node), f"{self.source(node)!r} cannot be used here; {_EXAMPLE}{hint}")

    def constant(self, node: ast.Constant) -> _Value:
        if isinstance(node.value, str):
            return _Value({node.value: 1.0})
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            try:
                number = float(node.value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return _Value({}, number)
        raise self.wrong(self.place(node), f"{self.source(node)!r} is neither a finite number nor a name; {_EXAMPLE}")

    def added(self, node: ast.BinOp) -> _Value:
        left, right = self.value(node.left), self.value(node.right)
        if bool(left.weights) != bool(right.weights):
            number = node.right if left.weights else node.left
            raise self.wrong(
                self.place(number), f"{self.source(number)!r} is a number and cannot be added to an expert; use '*'"
            )
        right = right.times(-1.0 if isinstance(node.op, ast.Sub) else 1.0)
        weights = dict(left.weights)
        for name, weight in right.weights.items():
            weights[name] = weights.get(name, 0.0) + weight
        return _Value(weights, left.number + right.number)

    def multiplied(self, node: ast.BinOp) -> _Value:
        left, right = self.value(node.left), self.value(node.right)
        if left.weights and right.weights:
            raise self.wrong(self.place(node.right), "experts cannot be multiplied with each other, only with numbers")
        return left.times(right.number) if left.weights else right.times(left.number)

    def divided(self, node: ast.BinOp) -> _Value:
        left, right = self.value(node.left), self.value(node.right)
        if right.weights:
            raise self.wrong(self.place(node.right), "cannot divide by an expert, only by numbers")
        if right.number == 0:
            raise self.wrong(self.place(node.right), "division by zero")
        # Each weight is divided, not multiplied by a rounded reciprocal.
        return _Value(
            {name: weight / right.number for name, weight in left.weights.items()}, left.number / right.number
        )

    def place(self, node: ast.expr) -> int:
        """Character at which a node starts; Python counts bytes."""
        return self.lead + len(self.code.lstrip().encode()[: node.col_offset].decode())

    def source(self, node: ast.expr) -> str:
        return self.code.lstrip().encode()[node.col_offset : node.end_col_offset].decode()

    def wrong(self, place: int, problem: str) -> LoraweaveError:
        shown = self.text if len(self.text) <= 80 else self.text[max(0, place - 30) : place + 30]
        return LoraweaveError(f"expression {shown!r}, character {place + 1}: {problem}")
