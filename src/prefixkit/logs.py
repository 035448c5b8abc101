"""Logging: the library only speaks to stdlib loggers; the command line decides where that goes."""

import logging

from rich.console import Console

#: stderr is talk, stdout is data.
talk = Console(stderr=True, highlight=False)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module (pass ``__name__``)."""
    return logging.getLogger(name)


def configure(*, debug: bool = False, quiet: bool = False) -> None:
    """Send prefixkit's log to stderr; called by the command line only.

    Args:
        debug: with everything, and where it comes from.
        quiet: warnings alone.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if debug else "%(message)s"))
    logger = logging.getLogger("prefixkit")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
