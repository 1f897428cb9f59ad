"""What a trainer does with an engine between rollouts: other weights, and the memory back.

A part of `Engine`.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import jax

from ..errors import PagedDecodeError
from ..tiers import HostTier
from .keeping import Keeps

__all__ = ["InFlight", "Pages", "Trains"]

InFlight = Literal["keep", "recompute", "end"]
"""What becomes of requests in flight when the weights change."""
Pages = Literal["recompute", "host"]
"""Where the content of the pools is while an engine is asleep."""


class Trains(Keeps):
    """What an engine does for a trainer in the same process."""

    tier: HostTier | None
    _params: Any

    @abstractmethod
    def _alone(self) -> AbstractContextManager[None]:
        """Nobody else changes the engine meanwhile."""

    @abstractmethod
    def _take_calls(self) -> None:
        """What other threads have asked for."""

    @property
    def version(self) -> int:
        """How often the weights were replaced; what is drawn from now on has it in its events."""
        return self.scheduler.version

    @property
    def params(self) -> Any:
        """The weights; to assign others is `update_params`."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self.update_params(params)

    def update_params(
        self,
        params: Any,
        *,
        in_flight: InFlight = "recompute",
        keep_cached: bool = False,
        donate: bool = False,
    ) -> None:
        """Go on with other weights; call it between steps, or in a callback.

        The prefix cache, the host tier and its disk tier forget their pages, and pins are computed
        again. `version` is one more, and so it is in events of tokens that are drawn from now on.
        Arrays on devices are used as they are, without a copy. Weights of the same shapes that lie
        in the same way compile nothing.

        Args:
          params: the new weights: a tree like the old ones, with the same shapes and dtypes. An
            array of the old ones that is changed in place is not seen.
          in_flight: what becomes of requests in flight. "recompute": they compute their pages
            again, with the tokens that were read (those of events that were returned, or that wait
            to be); what a visit in flight has drawn is dropped. "keep": they go on behind the pages
            that they have, and get what a visit in flight has drawn with the old ones. "end": every
            request in the engine ends with the tokens that were read, reason "new_weights".
          keep_cached: nothing is forgotten or computed again: for weights with the same numbers, or
            where the difference does not matter. Of `in_flight` only "end" counts then.
          donate: delete the arrays of the old weights that are not among the new ones, whoever else
            refers to them; their memory is free when a visit in flight is over.

        Raises:
          ValueError: another word, a tree, a shape or a dtype that differs, or a leaf that is no
            array, or a deleted one. Whatever is raised, the old weights go on.
        """
        if in_flight not in get_args(InFlight):
            raise ValueError(f"in_flight must be one of {get_args(InFlight)}, got {in_flight!r}")
        with self._alone():
            placed, old = self.runner.placed(params), self.runner.params
            if self.runner.is_lost:
                self.loop.discard()
            if in_flight == "end":
                self._take_calls()
                self.loop.change(self.scheduler.end_all)
            if not keep_cached:
                scheduler = self.scheduler
                rows = self.loop.in_flight or scheduler.running or scheduler.ending
                self._forget(keep_pages=in_flight == "keep" or not rows)  # an idle device rests
            version = self.version + 1

            def change(cache: Any) -> Any:  # where no interrupt comes between two lines
                self.runner.use(placed)
                self._params, self.scheduler.version = params, version
                return cache

            self.runner.exchange(change)
            if donate:
                _delete(old, but=placed.params)

    @property
    def asleep(self) -> bool:
        """Whether the device memory of the pools was given back."""
        return self.runner.asleep

    def sleep(self, pages: Pages = "recompute") -> None:
        """Give the device memory of the pools back until `wake`; call it between steps.

        Requests in flight and pins stay, and get the same tokens afterwards. Meanwhile `submit`,
        `cancel`, `pin`, `unpin` are queued as ever, `update_params` and `gauges` work, `stream`
        yields what there is; `step`, `generate`, `fork`, `save`, `restore` and `warmup` raise
        RuntimeError. Where the engine is asleep already, nothing happens.

        Args:
          pages: "recompute": what the pools hold is given up. Requests lose their pages as if they
            were preempted: with a host tier they find them there, else they compute them again.
            "host": all of it is copied to host memory, as much as the pools have, and `wake` brings
            it back to the last bit: pages of requests, the prefix cache, and pages of sequences
            outside the engine.

        Raises:
          PagedDecodeError: with "recompute", sequences outside the engine hold pages; the engine
            stays awake.
          ValueError: another word.
        """
        if pages not in get_args(Pages):
            raise ValueError(f"pages must be one of {get_args(Pages)}, got {pages!r}")
        with self._alone():
            if self.asleep:
                return
            self._take_calls()
            self.loop.collect()
            if self.tier is not None:
                self.tier.settle()  # what is in flight lies on the device
            if pages == "recompute":
                self.loop.change(self.scheduler.store_all)
                self.loop.discard()
                if not self.allocator.reset_prefix_cache(same_weights=True):
                    raise PagedDecodeError(
                        "sequences outside the engine hold pages, which sleep would lose: free "
                        'them, or sleep("host")'
                    )
            self.runner.sleep(copy=pages == "host")

    def wake(self) -> None:
        """Make the pools again, as large as they were and where they were; nothing compiles.

        Where the engine is awake, nothing happens. If there is not enough memory, what is raised
        says so, and the engine stays asleep.
        """
        with self._alone():
            self.runner.wake()

    def _forget(self, *, keep_pages: bool) -> None:
        """Nothing that was computed so far is found from now on."""
        if self.tier is not None:
            self.tier.clear()

        def renew() -> None:
            self.allocator.new_weights()
            self.scheduler.keep_all()

        if keep_pages:
            self.loop.change(renew)
        else:
            self.allocator.new_weights()
            self.loop.discard()


def _delete(old: Any, *, but: Any) -> None:
    """Delete the arrays of a tree that are not in another one."""
    kept = {id(leaf) for leaf in jax.tree.leaves(but)}
    for leaf in jax.tree.leaves(old):
        if isinstance(leaf, jax.Array) and id(leaf) not in kept:
            leaf.delete()
