"""Other weights, or no pages, under requests that run: the part of `Scheduler` for trainers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from .journal import Journal, Outcome
from .requests import Sample
from .scores import Scores
from .swapping import Swapping
from .taking_up import TakesUp

__all__ = ["Renews"]


class Renews(TakesUp):
    """What a scheduler does with samples when weights or pages go."""

    swapping: Swapping | None
    _journal: Journal

    @property
    def version(self) -> int:
        """Of the weights that the next plans are carried out with."""
        return self._journal.version

    @version.setter
    def version(self, version: int) -> None:
        self._journal.version = version

    @abstractmethod
    def _conclude(self, outcomes: Sequence[Outcome]) -> None:
        """Enter what has become of samples."""

    @abstractmethod
    def _leave(self, sample: Sample) -> None:
        """Take a sample out of wherever it is."""

    @abstractmethod
    def _store(self, sample: Sample) -> None:
        """Begin to copy the pages of a sample to the host tier, if they are to go there."""

    def _unended(self) -> list[Sample]:
        return [s for group in self.living.values() for s in group if not s.ended]

    def end_all(self) -> None:
        """Every request ends with the tokens that were read."""
        ends = [Outcome(s, len(s.tokens), (), "new_weights") for s in self._unended()]
        self._conclude(ends)
        self.release()

    def store_all(self) -> None:
        """The pages are about to go: what the host tier is to have of them is copied out."""
        for sample in self._seats.running:
            self._store(sample)
        if self.swapping is not None:
            self.swapping.settle()

    def keep_all(self) -> None:
        """The allocator's pages are of the weights of before: whoever runs keeps its own.

        Pins are for others, who must not find them: they are computed again. So is a prompt whose
        log-probabilities are asked for, until its first token was launched for.
        """
        again = [pin for pin in self.pins.samples.values() if pin.handle is not None]
        anew: dict[int, Scores] = {}
        for sample in self._unended():
            if sample.scores is None or sample.generated or sample.in_flight:
                continue
            sample.scores = anew.setdefault(id(sample.scores), Scores(sample.prompt_len))
            if sample.handle is not None:
                again.append(sample)
        for sample in again:
            self._leave(sample)
            self.waiting.put(sample)
        self.release()
