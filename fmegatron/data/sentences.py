"""A text in sentences: by punctuation alone, or by punkt, the learned splitter of nltk that Megatron's tool uses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache

from fmegatron.data.text import needed

# After . ! ? … or their East Asian forms, with closing quotes and brackets, white space, and then no small letter; and
# at an empty line. One capital letter, or a short title, before the point is an abbreviation.
END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*\s+(?![a-zß-öø-ÿ])|[。！？]+[」』”’）]*\s*|\n\s*\n\s*)")
ABBREVIATED = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|al|Fig|No|Vol|pp?|ca))\.\s+$")
STRETCH = 1_000_000  # characters that punkt sees at once, in Megatron's tool too: its cuts there are ours


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space that follows it: joined, they are the text."""
    cuts = [match.end() for match in END.finditer(text) if not ABBREVIATED.search(text, max(match.start() - 8, 0), match.end())]
    bounds = [0, *cuts, len(text)]
    return [text[first:stop] for first, stop in zip(bounds, bounds[1:], strict=False) if stop > first]


@lru_cache(1)
def splitter(name: str) -> Callable[[str], list[str]]:
    """What makes sentences of a text: `punctuation`, `punkt` or `punkt:LANGUAGE`. Raises ValueError for what is not there.

    punkt leaves out the white space between sentences, as Megatron's tool does without --keep-newlines. Its model is
    nltk's data `punkt_tab`, which is searched where nltk searches (NLTK_DATA names another folder).
    """
    kind, _, language = name.partition(":")
    if name == "punctuation":
        return sentences
    if kind != "punkt":
        raise ValueError(f"splitter {name}: choose punctuation, punkt (English) or punkt:LANGUAGE")
    punkt, language = needed("nltk.tokenize.punkt", f"splitter {name}"), language or "english"
    try:
        model = punkt.PunktTokenizer(language)
    except (LookupError, ValueError, OSError):
        raise ValueError(f"splitter {name}: nltk has no punkt_tab for {language} here: python -m nltk.downloader punkt_tab, "
                         "or name the folder that has it: NLTK_DATA=FOLDER") from None  # fmt: skip

    def split(text: str) -> list[str]:
        return [found for at in range(0, len(text), STRETCH) for found in model.tokenize(text[at : at + STRETCH])]

    return split


def environment(name: str | None) -> dict[str, str]:
    """The variables by which another process finds what `splitter(name)` finds in this one."""
    if name is None or not name.startswith("punkt"):
        return {}
    return {"NLTK_DATA": os.pathsep.join(map(str, needed("nltk.data", f"splitter {name}").path))}
