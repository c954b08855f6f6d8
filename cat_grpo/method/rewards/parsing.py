"""Rubrics and verdicts are read as XML from what anchor and judge wrote.

Model output is untrusted: a hardened parser reads it, and what cannot be read is None. None is never a no.
"""

import re
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from cat_grpo.records import Rubric


def parse_rubric(text: str) -> Rubric | None:
    """The criteria of the last `<rubric>` in a text, without repetitions; None when there is none to read."""
    rubric = _last_element(text, "rubric")
    if rubric is None:
        return None
    criteria = (" ".join("".join(child.itertext()).split()) for child in rubric.iter("criterion"))
    distinct = tuple(dict.fromkeys(criterion for criterion in criteria if criterion))
    return Rubric(distinct) if distinct else None


def parse_verdict(text: str) -> bool | None:
    """Yes or no of the last `<verdict>` in a text; None when it says neither."""
    verdict = _last_element(text, "verdict")
    if verdict is None:
        return None
    return {"yes": True, "no": False}.get("".join(verdict.itertext()).strip().lower())


def _last_element(text: str, tag: str) -> Element | None:
    """The last `<tag>...</tag>` of a text, parsed; None when there is none, or it is not well-formed XML."""
    found = re.findall(rf"<{tag}>(?:(?!<{tag}>).)*?</{tag}>", text, flags=re.DOTALL)
    if not found:
        return None
    try:
        return fromstring(found[-1])
    except (ParseError, DefusedXmlException, UnicodeEncodeError):  # the last: half of a surrogate pair
        return None
