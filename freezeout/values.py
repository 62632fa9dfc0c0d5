"""Numbers as a user gives them: checked, and made plain, so that every file can hold them."""

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any, SupportsIndex

from .errors import InvalidType, InvalidValue


def whole_number(name: str, value: object, minimum: int = 1) -> int:
    """`value` as an int, or an error that says what is allowed (`True` is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidType(f"{name} must be a whole number, got {value!r}")
    number = operator.index(value)
    if number < minimum:
        raise InvalidValue(f"{name} must be at least {minimum}, got {number}")
    return number


def fraction(name: str, value: object, *, zero: bool = False, one: bool = True) -> float:
    """`value` as a float in (0, 1], or an error; `zero` and `one`: whether that end is allowed."""
    allowed = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType(f"{name} must be a number in {allowed}, got {value!r}")
    number = float(value)
    if not (number >= 0 if zero else number > 0) or not (number <= 1 if one else number < 1):
        raise InvalidValue(f"{name} must be in {allowed}, got {number}")  # NaN too
    return number


def plain(value: Any) -> Any:
    """The value as JSON, or `torch.load(weights_only=True)`, can hold it: of numpy's numbers the
    numbers, of tuples lists, of whatever else its `repr`."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, SupportsIndex):
        return operator.index(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return repr(value)
