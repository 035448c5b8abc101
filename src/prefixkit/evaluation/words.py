"""Words of a text: what repetition, diversity and copying are counted in."""

import unicodedata
from collections.abc import Iterator, Sequence

import regex

#: Kana and Chinese characters: scripts written without spaces.
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#: Letters, digits and the marks that go on them, such as vowel signs, of other scripts.
_LETTERS = rf"[[\w\p{{M}}\p{{N}}]--[{_SPACELESS}]]+"
#: One character without spaces, or a run of letters with apostrophes inside.
_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]\p{{M}}*|{_LETTERS}(?:['’]{_LETTERS})*")
_LETTER = regex.compile(r"\p{L}")
#: Scripts that put no spaces between words: Chinese characters, and those that take more than characters to tell.
_HAN, _OTHERS = (
    regex.compile(r"\p{Han}"),
    regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"),
)
#: How many Chinese characters one of another such script is, where a text is still Chinese.
_MANY = 20

Gram = tuple[str, ...]


def split_words(text: str) -> list[str]:
    """Return the words of a text, folded to lower case and composed (NFC), without punctuation."""
    return [unicodedata.normalize("NFC", match[0].casefold()) for match in _WORD.finditer(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where each word of `split_words` starts and ends in the text, in characters."""
    return [match.span() for match in _WORD.finditer(text)]


def ngrams(words: Sequence[str], n: int) -> Iterator[Gram]:
    """Yield every run of n words."""
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def tokenizer_of(texts: Sequence[str]) -> str:
    """Return sacrebleu's tokenizer for texts of this script.

    ``13a``, the field's own, takes what stands between spaces for a word. Where most letters are of scripts without
    spaces that is a whole sentence: ``zh`` tells Chinese characters apart, ``char`` all characters.
    """
    letters, han, others = (sum(len(kind.findall(text)) for text in texts) for kind in (_LETTER, _HAN, _OTHERS))
    if 2 * (han + others) <= letters:
        return "13a"
    return "char" if _MANY * others > han else "zh"
