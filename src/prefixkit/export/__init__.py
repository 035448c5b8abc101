"""Prefixes in other people's formats. Whatever a format cannot say exactly is refused, never approximated."""

from prefixkit.export.adapter import PEFT_FILES
from prefixkit.export.peft import from_peft, to_peft
from prefixkit.export.target import check_target

__all__ = ["PEFT_FILES", "check_target", "from_peft", "to_peft"]
