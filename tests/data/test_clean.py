"""Web mark-up goes, the words stay."""

import pytest

from prefixkit.data import Message, Row
from prefixkit.data.clean import clean_row
from prefixkit.texts import clean_text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("one<br />two", "one two"),
        ("one<br>two<BR/>three", "one two three"),
        ("a &amp; b &quot;c&quot; &#39;d&#39;", "a & b \"c\" 'd'"),
        ("&lt;br /&gt;escaped", "escaped"),
        ("  folded \t\n white\u00a0space  ", "folded white space"),
        ("1 < 2 and <b>bold</b> stay", "1 < 2 and <b>bold</b> stay"),
        ("", ""),
    ],
)
def test_mark_up_is_removed(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_every_text_of_a_row_is_cleaned_and_the_rest_stays() -> None:
    assert clean_row(Row(3, text="a<br />b", label="x<br />")) == Row(3, text="a b", label="x<br />")
    assert clean_row(Row(4, input=" a ", target="&amp;")) == Row(4, input="a", target="&")
    talk = Row(5, messages=(Message("user", "a<br>b"), Message("assistant", " c ")))
    assert clean_row(talk).messages == (Message("user", "a b"), Message("assistant", "c"))
