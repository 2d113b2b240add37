"""Text of others inside HTML."""

from __future__ import annotations

import html

from clipquant.shown import shown


def escape(text: object, quote: bool = True) -> str:
    r"""Return text that shows as itself on a page: no markup, and nothing that turns its direction.

    >>> print(escape("<b>\u202egnp"))
    &lt;b&gt;\u202egnp
    """
    return html.escape(shown(text), quote=quote)
