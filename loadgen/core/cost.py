"""Energy and money: what a token, a watt and an hour come to. Prices are the user's own; none is built in."""

from __future__ import annotations

import math


def per_joule(made: float, energy_j: float | None) -> float | None:
    """Tokens (or videos) per joule; None where no energy was measured."""
    return made / energy_j if energy_j and energy_j > 0 and made > 0 else None


def joules_each(made: float, energy_j: float | None) -> float | None:
    """Joules per token (or video)."""
    return energy_j / made if energy_j and energy_j > 0 and made > 0 else None


def cost_per(amount: float, per_s: float, price_per_hour: float | None, gpus: int = 1) -> float | None:
    """Price of `amount` tokens (or videos) made at `per_s` on `gpus` GPUs of `price_per_hour` each.

    A million tokens at 1000 tokens/s on a GPU of 3.60 an hour cost 1.00. None without a price or a rate.
    """
    if price_per_hour is None or not per_s > 0 or not math.isfinite(per_s):
        return None
    return amount / per_s / 3600 * price_per_hour * gpus


def break_even(price: float | None, per_s: float, other_per_s: float) -> float | None:
    """The price per hour at which a GPU making `other_per_s` costs as much per token as one of `price` making `per_s`.

    Above it the other one is dearer. Both rates per GPU. None without a price or a rate.
    """
    return price * other_per_s / per_s if price is not None and per_s > 0 and other_per_s > 0 else None
