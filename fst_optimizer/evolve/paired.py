"""Whether a proposal is better than its parent: a paired test that may be looked at any time. Pure functions.

Both run the same examples, and d is the proposal's score on one less its parent's: what is hard for both cancels out.
A gambler who stakes a share s of what he has on d > 0 at every example is left with the product of 1 + s d. Where d is
0 or less on average he does not win on average, whatever its distribution, and his wealth ever reaches 1 / ERROR with
chance at most ERROR, however often one looks (Ville's inequality). So a wealth that high is evidence for d > 0.

- `better`: the wealth of bets on d > 0, over the examples that the reflector did not read. A text may have been written
  for those that it read, so they say nothing for it. A proposal that is no better on average is called `better` with
  chance at most ERROR.
- `no better`: the wealth of bets on d < WORTH, over all of them. A proposal that is better by WORTH or more is called
  `no better` with chance at most ERROR.

Source: I. Waudby-Smith and A. Ramdas, Estimating means of bounded random variables by betting, JRSS B 86 (2024),
section 4; our stakes are a fixed grid instead of a predictable plug-in, so that the same numbers give the same verdict
in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from fst_optimizer.stats import mean

Verdict = Literal["better", "no better", "open"]

ERROR = 0.2
"""The chance of each of the two mistakes. A search can take it: what is accepted is then scored on the whole anchor."""
WORTH = 0.25
"""A mean difference that should not be missed."""
STAKES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the wealth that are bet; the wealth is the mean over them."""


def wealth(bets: Sequence[float]) -> float:
    """What 1 becomes when shares of it are staked on these, each at least -1; 1 is evidence of nothing."""
    return mean([math.prod(1 + stake * bet for bet in bets) for stake in STAKES])


def verdict(seen: Sequence[float], fresh: Sequence[float]) -> Verdict:
    """What differences, on examples that the reflector read and on fresh ones, say so far; `open`: draw more.

    Scores are meant to be in [0, 1]: a difference beyond -1 or 1 counts as that.
    """
    seen, fresh = ([max(-1.0, min(1.0, difference)) for difference in part] for part in (seen, fresh))
    # WORTH - d is at least WORTH - 1: divided by 1 - WORTH, it may be bet on with the same stakes.
    if wealth([(WORTH - difference) / (1 - WORTH) for difference in (*seen, *fresh)]) >= 1 / ERROR:
        return "no better"
    return "better" if wealth(fresh) >= 1 / ERROR else "open"
