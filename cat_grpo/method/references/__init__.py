"""Stage 2: a group of rollouts becomes one pseudo-reference (CaT, section 3.1). Each estimator is a function.

    async def estimator(groups, engines, config, seeds) -> list[Reference]

One reference per group, in order, from the groups alone; `seeds` has one per group. `Reference(text)` is
enough.
"""

from collections.abc import Awaitable, Callable, Mapping

from cat_grpo.method.references.selection import majority
from cat_grpo.method.references.synthesis import synthesis
from cat_grpo.records import Reference

Estimator = Callable[..., Awaitable[list[Reference]]]

ESTIMATORS: Mapping[str, Estimator] = {"synthesis": synthesis, "majority": majority}
