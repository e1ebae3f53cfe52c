"""Bounded numbers for settings: bounds are checked when settings are parsed; a type checker sees plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    NonNegativeFloat = float
else:
    from jsonargparse.typing import NonNegativeFloat as NonNegativeFloat
    from jsonargparse.typing import NonNegativeInt as NonNegativeInt
    from jsonargparse.typing import PositiveFloat as PositiveFloat
    from jsonargparse.typing import PositiveInt as PositiveInt
