"""A text in sentences, by punctuation alone."""

from __future__ import annotations

import re

# After . ! ? … or their East Asian forms, with closing quotes and brackets, white space, and then no small letter; and
# at an empty line. One capital letter, or a short title, before the point is an abbreviation.
END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*\s+(?![a-zß-öø-ÿ])|[。！？]+[」』”’）]*\s*|\n\s*\n\s*)")
ABBREVIATED = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|al|Fig|No|Vol|pp?|ca))\.\s+$")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space that follows it: joined, they are the text."""
    cuts = [match.end() for match in END.finditer(text) if not ABBREVIATED.search(text, max(match.start() - 8, 0), match.end())]
    bounds = [0, *cuts, len(text)]
    return [text[first:stop] for first, stop in zip(bounds, bounds[1:], strict=False) if stop > first]
