"""Text as such: whether it can be encoded, and web mark-up out of it."""

import html
import re

_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; half a surrogate pair, which JSON can spell, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def fold_whitespace(text: str) -> str:
    """Turn every run of white space into one space, none at the ends."""
    return " ".join(text.split())


def clean_text(text: str) -> str:
    """Unescape HTML entities, turn ``<br />`` into a space, and fold white space."""
    return fold_whitespace(_LINE_BREAK.sub(" ", html.unescape(text)))
