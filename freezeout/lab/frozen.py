"""The option `frozen`: which layers are frozen from the start, as text. Torch is not imported."""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import InvalidType, InvalidValue
from ..plan import Frozen, Plan

if TYPE_CHECKING:
    from torch import nn

_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ALLOWED = (
    "a number of layers (5), all but the last ones (-1), a share of them in (0, 1) (0.5), or a "
    "module's name"
)


def frozen_plan(text: str, then: Plan | None = None) -> Frozen:
    """The plan that `--frozen TEXT` asks for; `then` is for the layers that are left.

    InvalidValue or InvalidType for a text that is none of these.

    >>> frozen_plan("5"), frozen_plan("-2")
    (Frozen(first=5), Frozen(all_but_last=2))
    >>> frozen_plan("0.5"), frozen_plan("encoder.layer.3")
    (Frozen(share=0.5), Frozen(up_to='encoder.layer.3'))
    """
    if not isinstance(text, str):
        raise InvalidType(f"frozen must be {_ALLOWED}, as text, got {text!r}")
    number = float(text) if _REAL.fullmatch(text) else None
    if number is not None and _WHOLE.fullmatch(text) and number != 0:
        count = int(text)
        if count > 0:
            return Frozen(first=count, then=then)
        return Frozen(all_but_last=-count, then=then)
    if number is not None and 0 < number < 1:
        return Frozen(share=number, then=then)
    if number is not None or not text or re.search(r"\s", text):
        none = "; for none, leave it out" if number == 0 else ""
        raise InvalidValue(f"frozen must be {_ALLOWED}, got {text!r}{none}")
    return Frozen(up_to=text, then=then)


def check_named(plan: Plan, model: "nn.Module") -> None:
    """InvalidValue if the plan names a module that the model does not have."""
    if not isinstance(plan, Frozen) or plan.up_to is None:
        return
    names = [name for name, _ in model.named_modules() if name]
    if plan.up_to not in names:
        alike = [name for name in names if name.count(".") <= plan.up_to.count(".")]
        near = get_close_matches(plan.up_to, alike) or [n for n, _ in model.named_children()]
        raise InvalidValue(
            f"frozen must be {_ALLOWED} such as {', '.join(near[:3])}; got {plan.up_to!r}"
        )
