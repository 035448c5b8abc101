"""transformers, silent for a moment: progress bars and warnings are switched off locally, never globally."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Silence transformers' log, Python warnings and progress bars, and restore all of them at the end.

    Args:
        bars: keep progress bars, for downloads a person is watching.
    """
    import logging as levels

    from transformers.utils import logging

    hub = levels.getLogger("huggingface_hub")
    hub_level = hub.level
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.CRITICAL)
    hub.setLevel(levels.ERROR)
    if not bars:
        logging.disable_progress_bar()
    try:
        # The GGUF reader draws a bar of its own on stderr, which transformers' switch does not reach.
        with warnings.catch_warnings(), nullcontext() if bars else redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if had_bars:
            logging.enable_progress_bar()
