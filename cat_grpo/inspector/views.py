"""Searches, filters and sorts a step's groups. The query of an address holds the whole view."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from cat_grpo.errors import BadInput
from cat_grpo.inspector.reading import summaries, summary_rows_at
from cat_grpo.report.reviews import Review
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.tables import Row

PAGE = 50
EXPORTED_AT_ONCE = 500
FILTERS = {
    "differs-majority": "Differs from the majority",
    "differs-all": "Differs from every rollout",
    "no-variance": "No variance",
    "no-reference": "No reference",
    "truncated": "Truncated",
    "abstained": "Abstained",
    "reviewed": "Reviewed",
    "not-reviewed": "Not reviewed",
    "wrong": "Marked wrong",
}
SORTS = {
    "position": ("group", "Position"),
    "reward": ("mean_reward", "Mean reward"),
    "std": ("reward_std", "Reward std"),
    "tokens": ("mean_tokens", "Tokens"),
    "votes": ("num_votes", "Votes"),
}
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet reads a text that starts like this as a formula, so an apostrophe is put in front of it."""


@dataclass(frozen=True, slots=True)
class View:
    """Which groups are shown, and in what order."""

    search: str = ""
    only: tuple[str, ...] = ()
    sort: str = "position"
    descending: bool = False
    page: int = 1

    @classmethod
    def of(cls, query: QueryParams) -> "View":
        """The view that a query describes. BadInput for an unknown filter, order or page."""
        only = tuple(name for name in FILTERS if name in query.getlist("only"))
        unknown = {*query.getlist("only")} - {*FILTERS}
        sort, page = query.get("sort", "position"), query.get("page", "1")
        if unknown or sort not in SORTS or not (page.isdecimal() and 0 < int(page) < 10**6):
            raise BadInput("there is no such filter, order or page")
        return cls(query.get("q", "").strip(), only, sort, query.get("order") == "desc", int(page))

    def query(self, **changes: Any) -> str:
        """The query of the view with these changes, with its question mark; empty for the plain list."""
        view = replace(self, **changes)
        pairs = [("q", view.search)] if view.search else []
        pairs += [("only", name) for name in view.only]
        pairs += [("sort", view.sort)] if view.sort != "position" else []
        pairs += [("order", "desc")] if view.descending else []
        pairs += [("page", str(view.page))] if view.page > 1 else []
        return f"?{urlencode(pairs)}" if pairs else ""

    def toggled(self, name: str) -> str:
        """The query with this filter switched on or off."""
        only = tuple(one for one in FILTERS if (one in self.only) != (one == name))
        return self.query(only=only, page=1)

    def sorted_by(self, name: str) -> str:
        """The query in this order. If the view has this order already, its direction is reversed."""
        return self.query(sort=name, descending=name == self.sort and not self.descending, page=1)

    def places(self, run: RunDir, step: int, reviews: Mapping[int, Review]) -> list[int]:
        """The rows of the step's table that the view shows, in its order, on all pages."""
        key, texts = SORTS[self.sort][0], ("prompt", "reference") if self.search else ()
        names = {"group", key, *texts, *(CHOSEN_BY[name][0] for name in self.only if name in CHOSEN_BY)}
        columns = summaries(run, step, sorted(names)).to_pydict()
        places: Iterable[int] = range(len(columns["group"]))
        for name in self.only:
            chosen = _chosen(name, columns, reviews)
            places = [place for place in places if chosen[place]]
        if wanted := self.search.casefold():
            read = [columns[text] for text in texts]
            places = [p for p in places if any(wanted in (text[p] or "").casefold() for text in read)]
        return _in_order(places, columns[key], self.descending)

    def on_page(self, places: Sequence[int]) -> Sequence[int]:
        return places[(self.page - 1) * PAGE : self.page * PAGE]


CHOSEN_BY: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "differs-majority": ("agrees_with_majority", lambda agrees: agrees is False),
    "differs-all": ("differs_from_all", bool),
    "no-variance": ("no_variance", bool),
    "no-reference": ("reference", lambda reference: reference is None),
    "truncated": ("truncated", bool),
    "abstained": ("abstained", bool),
}
"""The column that each filter reads, and its test. A value that is not known passes no test."""


def _chosen(name: str, columns: Mapping[str, list[Any]], reviews: Mapping[int, Review]) -> list[bool]:
    """Whether the filter keeps the row, for each place."""
    if name in CHOSEN_BY:
        column, keeps = CHOSEN_BY[name]
        return [keeps(value) for value in columns[column]]
    if name == "wrong":
        return [group in reviews and reviews[group].opinion == "wrong" for group in columns["group"]]
    return [(group in reviews) == (name == "reviewed") for group in columns["group"]]


def _in_order(places: Iterable[int], values: Sequence[Any], descending: bool) -> list[int]:
    """The places by value. Rows without one come last in both directions. Ties keep the step's order."""
    known, unknown = [], []
    for place in places:
        (unknown if values[place] is None else known).append(place)
    return [*sorted(known, key=lambda place: values[place], reverse=descending), *unknown]


def exported_jsonl(
    run: RunDir, step: int, places: Sequence[int], reviews: Mapping[int, Review]
) -> Iterator[str]:
    """One line per group."""
    for row in _exported(run, step, places, reviews):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def exported_csv(
    run: RunDir, step: int, places: Sequence[int], reviews: Mapping[int, Review]
) -> Iterator[str]:
    """A header and one line per group. Lists are written as JSON."""
    line = io.StringIO()
    writer: csv.DictWriter | None = None
    for row in _exported(run, step, places, reviews):
        if writer is None:
            writer = csv.DictWriter(line, fieldnames=list(row))
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _exported(run: RunDir, step: int, places: Sequence[int], reviews: Mapping[int, Review]) -> Iterator[Row]:
    for start in range(0, len(places), EXPORTED_AT_ONCE):
        for row in summary_rows_at(run, step, places[start : start + EXPORTED_AT_ONCE]):
            review = reviews.get(row["group"])
            said = (review.opinion, review.name, review.note) if review else (None, None, None)
            yield {"step": step, **row, **dict(zip(("review", "reviewer", "note"), said, strict=True))}


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
