"""How sure a difference of two results is: the bootstrap over images or sequences."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """A value of the second result less that of the first, and the interval that holds 95 % of the resamples."""

    value: float
    low: float
    high: float
    samples: int

    def sentence(self, what: str, items: str, *, scale: float = 1, digits: int = 1) -> str:
        """Describe the difference in `what`, from resampling `items`; numbers are multiplied by `scale`."""
        sure = "it excludes 0" if self.low > 0 or self.high < 0 else f"it contains 0: these {items} do not tell"
        value, low, high = (f"{scale * number:+.{digits}f}" for number in (self.value, self.low, self.high))
        interval = f"95 % interval {low} to {high} over {self.samples} resamples of the {items}"
        return f"difference in {what} {value}, {interval}; {sure}"


def bootstrap(difference: Callable[[np.ndarray], float], items: int, *, samples: int, seed: int = 0) -> Difference:
    """Return a difference and its interval from drawing `items` with replacement, the same for both results.

    Args:
        difference: of the two results, where each item counts weight (items,) times.
        items: number of images or sequences.
        samples: number of resamples.
        seed: random seed of the draws.
    """
    random = np.random.default_rng(seed)
    drawn = [difference(random.multinomial(items, np.full(items, 1 / items))) for _ in range(samples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Difference(difference(np.ones(items)), float(low), float(high), samples)
