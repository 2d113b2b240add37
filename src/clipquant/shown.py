"""Text of others made fit to be printed."""

from __future__ import annotations

import unicodedata

# Controls, formats (bidirectional overrides among them), lone surrogates, line and paragraph separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


def shown(text: object) -> str:
    r"""Return text whose every character is seen: what would steer a terminal or a page is written out.

    Escape sequences, line breaks, bidirectional overrides and the like become `\x1b`, `\n`, `\u202e`; all
    other characters stay, of any script.

    Args:
        text: What is to be printed, such as a name out of a file.

    >>> print(shown("a\x1b[31mb\u202ec"), shown("Größe, 大きさ"))
    a\x1b[31mb\u202ec Größe, 大きさ
    """
    said = str(text)
    if said.isascii() and said.isprintable():
        return said
    return "".join(map(_seen, said))


def shown_lines(text: object) -> str:
    """Return text of this package's own, its line breaks kept and all else as `shown` gives it."""
    return "\n".join(map(shown, str(text).split("\n")))


def _seen(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
