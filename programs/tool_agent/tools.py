"""The agent's tools. Both raise on what they cannot do: `dspy.ReAct` shows the error to the model."""

import ast
import math
import operator
from collections.abc import Callable

from .goods import records

LONGEST = 200
"""Characters of an expression."""
LARGEST = 1e12
"""Of any number in a calculation, and of its result."""
LARGEST_POWER = 64
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def lookup(name: str) -> str:
    """Looks up one good, or one maker, by its name."""
    found = records().get(" ".join(name.lower().split()))
    if found is None:
        raise ValueError(f"nothing is called {name!r}; give the name of one good or one maker, as it is written")
    return found


def calculator(expression: str) -> float:
    """Calculates numbers with + - * / ** and brackets, for example 3 * (12.5 + 4)."""
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; give at most {LONGEST}")
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        # From None: the agent reads the traceback, and the parser's would double it.
        raise ValueError(f"{expression!r} is no calculation; use numbers, + - * / ** and brackets only") from None
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero") from None
    except OverflowError:
        raise ValueError(f"{expression!r} is too large to calculate") from None
    return round(value, 6)


def evaluate(node: ast.expr) -> float:
    """The value of a parsed expression. Raises ValueError for anything but bounded arithmetic; nothing is executed."""
    match node:
        case ast.Constant(value=bool()):
            raise ValueError(f"{node.value!r} is not a number")
        case ast.Constant(value=int() | float() as number):
            return bounded(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            one, other = evaluate(left), evaluate(right)
            if isinstance(op, ast.Pow) and abs(other) > LARGEST_POWER:
                raise ValueError(f"the power {other:g} is too large; give at most {LARGEST_POWER}")
            return bounded(OPERATIONS[type(op)](one, other))
    raise ValueError(f"{ast.unparse(node)!r} cannot be calculated; use numbers, + - * / ** and brackets only")


def bounded(value: object) -> float:
    """The value as a float, if it is a real number within bounds."""
    if not isinstance(value, int | float) or abs(value) > LARGEST or math.isnan(value):
        raise ValueError(f"the calculation leaves the numbers from {-LARGEST:g} to {LARGEST:g}")
    return float(value)
