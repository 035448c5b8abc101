"""Reading a model's licence from its card."""

import re
from pathlib import Path

UNKNOWN = "unknown"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license(?:_name)?:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)


def find_licence(*, folder: Path | None = None, hub_id: str | None = None, revision: str | None = None) -> str:
    """Return the licence a model card names, or ``unknown``; a missing or unreadable card is no error."""
    card: Path | None = None
    if folder is not None:
        card = folder / "README.md"
    elif hub_id is not None:
        card = _hub_card(hub_id, revision)
    if card is None or not card.is_file():
        return UNKNOWN
    return licence_of_card(card.read_text(encoding="utf-8", errors="replace"))


def licence_of_card(text: str) -> str:
    """Return ``license`` (or ``license_name``, where that is ``other``) from a card's front matter."""
    head = _FRONT_MATTER.match(text)
    names = _LICENCE.findall(head.group(1)) if head else []
    return next((name for name in names if name != "other"), names[0] if names else UNKNOWN)


def _hub_card(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "README.md", revision=revision))
    except Exception:
        # The model itself is loaded; a card that cannot be had only leaves its licence unknown.
        return None
