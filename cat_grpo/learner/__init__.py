"""The learner owns the policy's weights and their optimizer, in this process or spread over many."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cat_grpo.learner.batches import Batch


class TrainsPolicy(Protocol):
    """The methods that a run needs of its learner."""

    model: Any
    """The live module, which engines may share. It has the new weights after every update."""

    def update(self, batch: "Batch") -> dict[str, float]:
        """Makes the step's optimizer updates and returns their figures."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights, for `from_pretrained`, and the optimizer's state."""
        ...

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote there, bit for bit."""
        ...

    def close(self) -> None:
        """Frees processes and devices."""
        ...
