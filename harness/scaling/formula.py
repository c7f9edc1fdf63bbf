"""Column expressions, as people write them on a command line: `FLOP / (6 * N)`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from harness.config import HarnessError

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(text: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Numbers, column names, + - * / ** and brackets; nothing else is run. A name that is not one word stands in
    braces: `{Training FLOP} / (6 * {Model Size})`, and alone it may stand as it is. HarnessError, one line."""
    if text in columns:
        return columns[text]
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return f" _{names.setdefault(match[1], str(len(names)))}_ "

    try:
        tree = ast.parse(re.sub(r"\{([^{}]*)\}", name, text).strip(), mode="eval")
    except SyntaxError:
        raise HarnessError(f"{text!r}: is neither a column nor a formula; {_known(columns)}") from None
    behind = {f"_{place}_": column for column, place in names.items()}
    with np.errstate(all="ignore"):  # what is not finite is refused with its row
        return np.asarray(_value(tree.body, text, columns, behind), dtype=np.float64)


def _value(node: ast.AST, text: str, columns: Mapping[str, np.ndarray], behind: Mapping[str, str]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=word):
            column = behind.get(word, word)
            if column not in columns:
                raise HarnessError(f"{text!r}: there is no column {column!r}; {_known(columns)}")
            return columns[column]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text, columns, behind)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            sides = _value(left, text, columns, behind), _value(right, text, columns, behind)
            return _OPERATORS[type(sign)](*map(np.asarray, sides))
    raise HarnessError(f"{text!r}: only numbers, columns, + - * / ** and brackets are known; {_known(columns)}")


def _known(columns: Mapping[str, np.ndarray]) -> str:
    return f"columns: {', '.join(columns) or 'none'}"
