"""Text as such."""


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; half a surrogate pair, which JSON can spell, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
