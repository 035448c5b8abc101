"""One progress for a whole evaluation, made of the progress of its parts."""

from collections.abc import Callable

#: Told what is going on, how much of the whole evaluation is done, and of how much.
OnProgress = Callable[[str, int, int], None]

#: Told how many rows or texts of one stage are done, and of how many.
OnTexts = Callable[[int, int], None]


class Progress:
    """Adds up stages.

    Args:
        tell: told about every step; None for silence.
        total: rows to score and texts to generate, over all stages.
    """

    def __init__(self, tell: OnProgress | None, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0

    def stage(self, words: str, size: int) -> OnTexts:
        """Begin a stage of this many rows or texts, and return what its worker calls with (done, all)."""
        before = self._done
        self._done += size

        def told(done: int, of: int) -> None:
            if self._tell is not None:
                self._tell(words, before + size * done // max(1, of), self._total)

        told(0, size)
        return told
