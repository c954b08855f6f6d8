"""Observers follow a run: they hear of its stages and figures, and are asked once a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cat_grpo.metrics import Metrics
from cat_grpo.run.rundir import RunDir


class Observer:
    """Hears what a run does. This one does nothing: a subclass overrides what it wants to hear."""

    def started(self, stage: str, step: int) -> None:
        """A stage of the step has begun, with its first shard."""

    def finished(self, stage: str, step: int, error: BaseException | None) -> None:
        """The stage has ended: all its shards are done, or one of them failed with `error`."""

    async def accepts(self, run: RunDir, step: int) -> bool:
        """Returns whether the step's references may train the policy; asked between rewards and update."""
        return True

    async def figures(self, run: RunDir, history: Sequence[Metrics], reason: str | None) -> None:
        """The history's last step is done; `reason` says why an alarm stops the run there, if one does."""


class Telling:
    """Tells an observer of one stage of one step, whose shards come and go in any order."""

    def __init__(self, observer: Observer, stage: str, step: int, num_shards: int = 1) -> None:
        self._observer, self._about = observer, (stage, step)
        self._has_begun, self._num_left = False, num_shards

    @contextmanager
    def of_shard(self) -> Iterator[None]:
        """Wraps one shard's part of the stage."""
        if not self._has_begun:
            self._observer.started(*self._about)
            self._has_begun = True
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        self._num_left -= 1
        if self._num_left == 0:
            self._observer.finished(*self._about, None)

    def end(self, error: BaseException) -> None:
        """Ends the stage by a fault, also one of another stage: shards that are still to come never will."""
        if self._has_begun and self._num_left > 0:
            self._num_left = 0
            self._observer.finished(*self._about, error)
