"""Which seed each picture of a run gets, so that a run with `--seed` can be repeated picture by picture."""

from __future__ import annotations

import random

from library.messages import log

LARGEST = 0x7FFFFFFF


class SeedPlan:
    """Seeds of a run's pictures, drawn from one random stream that also serves dynamic prompts and shuffling.

    Args:
        seed: of the run; None draws every seed anew.
        count: pictures that are foreseen; a single one gets the seed itself.
        same_per_iteration: one seed for all pictures of an iteration (without `seed` only).
        rng: the stream without a seed (None: unseeded).
    """

    def __init__(
        self, seed: int | None, count: int, *, same_per_iteration: bool = False, rng: random.Random | None = None
    ) -> None:
        self.rng = random.Random(seed) if seed is not None else rng or random.Random()
        self._same_per_iteration = same_per_iteration and seed is None
        self._iteration_seed = 0
        self._planned: list[int] | None = None
        if seed is not None:
            self._planned = [self._draw() for _ in range(count)]
            if count == 1:
                self._planned = [seed]
        self._said_used_up = count == 0

    def start_iteration(self) -> None:
        """Draw the iteration's own seed (also where nothing uses it: later draws depend on it)."""
        self._iteration_seed = self._draw()

    def next(self, line_seeds: list[int] | None) -> int:
        """The next picture's seed.

        Args:
            line_seeds: what is left of the seeds in the prompt line, shortened by one here; the last one stays.
        """
        if line_seeds:
            return line_seeds.pop(0) if len(line_seeds) > 1 else line_seeds[0]
        if self._planned:
            return self._planned.pop(0)
        if self._planned is not None and not self._said_used_up:
            log.info("more pictures than foreseen: their seeds are drawn at random")
            self._said_used_up = True
        if self._same_per_iteration:
            return self._iteration_seed
        return self._draw()

    def _draw(self) -> int:
        return self.rng.randint(0, LARGEST)
