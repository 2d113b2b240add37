"""Text of others inside HTML."""

from __future__ import annotations

import html
import re

from clipquant.shown import shown

_LONG = 16  # characters that stand on one line anywhere


def escape(text: object, quote: bool = True) -> str:
    r"""Return text that shows as itself on a page: no markup, and nothing that turns its direction.

    >>> print(escape("<b>\u202egnp"))
    &lt;b&gt;\u202egnp
    """
    return html.escape(shown(text), quote=quote)


def breakable(text: object) -> str:
    """Return escaped text whose long names and paths break where their parts meet, not in mid-word.

    >>> breakable("encoder.layer_norm.weight"), breakable("at 0.972 <")
    ('encoder.<wbr>layer_<wbr>norm.<wbr>weight', 'at 0.972 &lt;')
    """
    return " ".join(map(_breakable, str(text).split(" ")))


def _breakable(word: str) -> str:
    said = escape(word)
    return said if len(word) <= _LONG else re.sub(r"([._/\\])(?=[^._/\\])", r"\1<wbr>", said)
