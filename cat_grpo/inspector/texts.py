"""Turns a model's texts into HTML: maths becomes MathML, marks show where two texts differ.

A model wrote the text, so nothing in it may become markup. Words are escaped. A formula is built anew from
the elements and attributes named here. A formula that cannot be parsed, or takes too long, is shown as it is.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from html import unescape
from itertools import groupby
from xml.etree.ElementTree import Element

from latex2mathml.converter import Converter
from markupsafe import Markup, escape

LONGEST_FORMULA = 1_000
"""Characters. The parser recurses, and its time grows faster than the formula."""
MATHS_WITHIN = 10_000
"""Characters of a text that are searched for formulas: each sign that opens and never closes costs time."""
MOST_FORMULAS = 400
"""Later formulas of the same text are shown raw."""
MOST_WORDS = 400
"""Words of a text that are compared: time grows as the product of both lengths. Later words get no marks."""
PLAIN_BOXED = re.compile(r"\\boxed\s*\{([^\\^_{}$]*)\}")
"""A box of words and numbers. As a formula it would lose its spaces."""
MACROS = re.compile(r"\\(?:[exg]?def|(?:re)?newcommand|providecommand|let)\b")
"""Shown raw: a macro that uses another one twice doubles the formula with every line."""
MATHS = re.compile(
    r"\$\$(?P<a>.{1,1000}?)\$\$"
    r"|\\\[(?P<b>.{1,1000}?)\\\]"
    r"|\\\((?P<c>.{1,1000}?)\\\)"
    # No sum of money: no space just inside the dollars, no digit after them, and all in one line.
    r"|(?<![\\$])\$(?P<d>[^\s$](?:[^$\n]{0,1000}[^\s$\\])?)\$(?!\d)"
    r"|(?P<boxed>\\boxed\s{0,9}\{)",
    re.DOTALL,
)
ELEMENTS = frozenset(
    {"math", "mi", "mn", "mo", "mover", "mphantom", "mroot", "mrow", "mspace", "msqrt", "mstyle", "msub"}
    | {"msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover", "mfrac", "mpadded"}
)
ATTRIBUTES = frozenset(
    {"accent", "columnalign", "depth", "display", "displaystyle", "fence", "form", "height", "linethickness"}
    | {"lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "rspace", "scriptlevel", "separator"}
    | {"stretchy", "symmetric", "width"}
)
INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, including those that turn the direction of writing. They hide what a text says."""


def rendered(text: str) -> Markup:
    """The whole text as HTML."""
    return Markup("").join(_shown(part, is_maths) for part, is_maths in _parts(text))


def cut(text: str, width: int) -> Markup:
    """The text's beginning as HTML, for a cell of a table."""
    return rendered(clipped(text, width))


def clipped(text: str, width: int) -> str:
    """The text's beginning in one line. A formula that is cut in two is shown raw."""
    text = " ".join(text[: 4 * width].split())
    return text if len(text) <= width else f"{text[:width]}…"


def shown_name(text: str) -> Markup:
    """An id or a name as HTML, without maths. Invisible characters are shown by their numbers."""
    return _escaped(text)


def compared(reference: str | None, texts: Sequence[str]) -> tuple[Markup, list[Markup]]:
    """The reference and the texts as HTML.

    The reference marks what no text has, and each text marks what the reference lacks.
    """
    if reference is None:
        return Markup(""), [rendered(text) for text in texts]
    ours = list(_units(reference))
    shared = [False] * len(ours)
    shown = []
    for text in texts:
        theirs = list(_units(text))
        matched = [False] * len(theirs)
        for i, j in _matches([unit for unit, _ in ours], [unit for unit, _ in theirs]):
            shared[i] = matched[j] = True
        shown.append(_marked(theirs, matched))
    return _marked(ours, shared if texts else [True] * len(ours)), shown


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, in order, each with whether it is a formula."""
    start = 0
    for count, (first, last) in enumerate(_formulas(text)):
        if count == MOST_FORMULAS:
            break
        yield text[start:first], False
        yield text[first:last], True
        start = last
    yield text[start:], False


def _formulas(text: str) -> Iterator[tuple[int, int]]:
    """The start and end of each formula with its delimiters: dollars, brackets, or a bare \\boxed{...}."""
    place, text = 0, text[:MATHS_WITHIN]
    while hit := MATHS.search(text, place):
        end = _closing_brace(text, hit.end()) if hit["boxed"] else hit.end()
        if end is None:
            return
        yield hit.start(), end
        place = end


def _closing_brace(text: str, start: int) -> int | None:
    """The place after the brace that closes the one before `start`; None when none is near enough."""
    depth = 1
    for place in range(start, min(len(text), start + LONGEST_FORMULA)):
        if text[place - 1] != "\\":
            depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return None


def _shown(part: str, is_maths: bool) -> Markup:
    if not is_maths:
        return _escaped(part)
    if (plain := PLAIN_BOXED.fullmatch(part)) is not None:
        return Markup('<span class="boxed">{}</span>').format(_escaped(plain[1]))
    formula = MATHS.fullmatch(part)
    is_block = part.startswith(("$$", "\\["))
    latex = part if formula is None else next(filter(None, formula.groups()))
    return _mathml(latex, is_block) or _escaped(part)


def _escaped(text: str) -> Markup:
    """The escaped text. Invisible characters are shown by their numbers."""

    def number(hit: re.Match[str]) -> str:
        return Markup('<span class="control">U+{:04X}</span>').format(ord(hit[0]))

    return Markup(INVISIBLE.sub(number, str(escape(text))))


@lru_cache(maxsize=2048)
def _mathml(latex: str, is_block: bool) -> Markup | None:
    """The formula as MathML; None when it is too long, defines a macro or cannot be parsed."""
    if len(latex) > LONGEST_FORMULA or MACROS.search(latex) or INVISIBLE.search(latex):
        return None
    try:
        return _built(Converter(display="block" if is_block else "inline").convert_to_element(latex))
    except Exception:  # on a model's text the parser may raise anything; the text is then shown as it is
        return None


def _built(element: Element) -> Markup:
    """The formula, built anew from known elements and attributes alone.

    The library would let \\href, \\style and tags in \\text through.
    """
    inner = Markup("").join(
        [
            escape(unescape(element.text or "")),
            *(_built(child) + escape(unescape(child.tail or "")) for child in element),
        ]
    )
    if element.tag == "menclose":  # which browsers no longer draw
        kind = "boxed" if element.get("notation") == "box" else "struck"
        return Markup('<mrow class="{}">{}</mrow>').format(kind, inner)
    tag = element.tag if element.tag in ELEMENTS else "mrow"
    attributes = Markup("").join(
        Markup(' {}="{}"').format(name, value) for name, value in element.items() if name in ATTRIBUTES
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, attributes, inner)


def _units(text: str) -> Iterator[tuple[str, bool]]:
    """Words, spaces and formulas, each with whether it is a formula. A unit is marked as a whole or not."""
    for part, is_maths in _parts(text):
        if is_maths:
            yield part, True
        else:
            yield from ((unit, False) for unit in re.findall(r"\s+|\w+|[^\w\s]", part))


def _matches(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose units are the same, in both texts' order."""
    if ours == theirs:
        yield from ((place, place) for place in range(len(ours)))
        return
    words = [[i for i, unit in enumerate(side) if not unit.isspace()][:MOST_WORDS] for side in (ours, theirs)]
    first_words, second_words = [ours[i] for i in words[0]], [theirs[j] for j in words[1]]
    matcher = SequenceMatcher(None, first_words, second_words)
    for first, second, size in matcher.get_matching_blocks():
        yield from zip(words[0][first : first + size], words[1][second : second + size], strict=True)


def _marked(units: Sequence[tuple[str, bool]], matched: Sequence[bool]) -> Markup:
    """The units as HTML. Neighbours that differ share one mark; a space differs only between two that do."""
    words = [i for i, (unit, _) in enumerate(units) if not unit.isspace()][:MOST_WORDS]
    differs = {i for i in words if not matched[i]}
    differs |= {i for i, (unit, _) in enumerate(units) if unit.isspace() and {i - 1, i + 1} <= differs}
    shown = []
    for is_marked, run in groupby(range(len(units)), key=lambda i: i in differs):
        text = _joined([units[i] for i in run])
        shown.append(Markup("<mark>{}</mark>").format(text) if is_marked else text)
    return Markup("").join(shown)


def _joined(units: Sequence[tuple[str, bool]]) -> Markup:
    """The units as HTML. Words between two formulas are escaped at once."""
    runs = groupby(units, key=lambda unit: unit[1])
    return Markup("").join(
        _shown(part, is_maths)
        for is_maths, run in runs
        for part in ((one for one, _ in run) if is_maths else ["".join(one for one, _ in run)])
    )
