"""Logging: the library only speaks to stdlib loggers; the command line decides where that goes."""

import logging

from rich.console import Console
from rich.logging import RichHandler

#: stderr is talk, stdout is data.
talk = Console(stderr=True, highlight=False)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one module (pass ``__name__``)."""
    return logging.getLogger(name)


def configure(*, debug: bool = False) -> None:
    """Send prefixkit's log to stderr; called by the command line only."""
    handler = RichHandler(console=talk, show_time=False, show_path=False, show_level=debug, markup=False)
    logger = logging.getLogger("prefixkit")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
