"""The inspector's pages: what they show, what they never do, and what they do not read."""

import csv
import io
import json
import os
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element

import httpx
import pyarrow.parquet as pq
import pytest
from markupsafe import Markup
from starlette.datastructures import QueryParams

from cat_grpo.cli import app as command_line
from cat_grpo.cli import main
from cat_grpo.errors import BadInput
from cat_grpo.inspector.app import create_app
from cat_grpo.inspector.reading import NotThere, _rows_at, find_run, read_group, run_names
from cat_grpo.inspector.security import LOOPBACK, refuse_open_host
from cat_grpo.inspector.texts import MOST_WORDS, _built, clipped, compared, rendered
from cat_grpo.inspector.views import FILTERS, SORTS, View
from cat_grpo.report.reviews import REVIEWS, read_reviews
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.tables import ROW_GROUP
from inspecting import (
    FORMULAS,
    HOSTILE,
    HOSTILE_NAME,
    hostile_groups,
    make_run,
    plain_groups,
    write_shard,
    write_update,
)

HOST = "http://127.0.0.1:4280"
OURS = {"origin": HOST, "x-cat-grpo": "review"}
SAID = {"name": "Ada", "opinion": "wrong", "note": "seven, not eight"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder / "plain", plain_groups())
    return folder


@pytest.fixture
async def client(runs: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with visitor(runs) as client:
        yield client


def visitor(runs: Path, token: str | None = None, host: str = HOST) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(runs, token)), base_url=host)


async def shown(client: httpx.AsyncClient, query: str) -> list[int]:
    """The groups that a step's page shows, in its order, counted from 0."""
    page = await client.get(f"/run/plain/step/1{query}")
    assert page.status_code == 200, page.text
    return [int(group) for group in re.findall(r'data-row href="/run/plain/step/1/group/(\d+)', page.text)]


def words_of(page: httpx.Response) -> str:
    return " ".join(Markup(re.sub("<[^>]*>", " ", page.text)).unescape().split())


# Texts


def test_what_is_no_formula_is_escaped():
    assert rendered("1 < 2 & <b>") == "1 &lt; 2 &amp; &lt;b&gt;"


@pytest.mark.parametrize(
    "text", [r"$\frac{1}{2}$", r"\(\frac{1}{2}\)", r"$$\frac{1}{2}$$", r"\[\frac{1}{2}\]"]
)
def test_maths_becomes_mathml(text: str):
    fraction = "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"
    display = "block" if text[1] in "$[" else "inline"
    assert rendered(f"a {text} b") == f'a <math display="{display}"><mrow>{fraction}</mrow></math> b'


def test_a_boxed_answer_keeps_its_words():
    assert rendered(r"So \boxed{48, 26}.") == 'So <span class="boxed">48, 26</span>.'
    assert '<mrow class="boxed">' in rendered(r"So \boxed{\frac{1}{2}}.")


@pytest.mark.parametrize(
    "text",
    [
        *("$5 and $6", "costs $5", r"\$5 \$6", "$ a $", r"$\frac{$", r"$\left($", r"\boxed{a"),
        *("$" + "{" * 900 + "$", "$x" + "y" * 2000 + "$", r"$\def\a{aa}\a\a$"),
    ],
)
def test_what_cannot_be_read_or_is_no_formula_is_shown_as_it_is(text: str):
    assert rendered(text).unescape() == text


@pytest.mark.parametrize("text", HOSTILE)
def test_no_tag_or_attribute_of_a_text_gets_through(text: str):
    allowed = r"math|mrow|mi|mn|mo|mtext|mfrac|mtable|mtr|mtd|span"
    for tag in re.findall(r"<[^>]*>", rendered(text)):
        assert re.fullmatch(rf'</?({allowed})( (class|display|stretchy)="[\w-]+")*/?>', tag), tag


def test_an_element_that_is_no_mathematics_becomes_a_row():
    assert _built(Element("script", {"src": "x"})) == "<mrow></mrow>"


def test_characters_that_hide_a_text_are_shown():
    assert rendered("a\u202eb") == 'a<span class="control">U+202E</span>b'
    assert rendered("tab\tand\nline") == "tab\tand\nline"


def test_marks_by_hand():
    reference, [same, other] = compared("a b c", ["a b c", "a x y c"])
    assert (reference, same) == ("a b c", "a b c")
    assert other == "a <mark>x y</mark> c"


def test_the_reference_marks_what_no_text_has():
    assert compared("a new b", ["a b", "b a"])[0] == "a <mark>new</mark> b"


def test_a_formula_is_marked_as_a_whole():
    _, [text] = compared(r"is $\frac{1}{2}$", [r"is $\frac{1}{3}$"])
    assert text.startswith("is <mark><math") and text.endswith("</math></mark>")


def test_marked_texts_say_what_they_said():
    for text in HOSTILE:
        assert [Markup(re.sub("</?mark>", "", one)) for one in compared("a b", [text])[1]] == [rendered(text)]


def test_comparing_is_bounded():
    long = " ".join(f"w{i}" for i in range(10 * MOST_WORDS))
    marked = compared("other", [long])[1][0]
    assert f"w{MOST_WORDS - 1}</mark>" in marked
    assert marked.count("<mark>") == 1


@pytest.mark.parametrize("sign", ["\\[", "\\(", "$a ", "\\boxed{", "{"])
def test_signs_that_never_close_stay_as_they_are(sign: str):
    """Were the search for what closes them not bounded, this would take minutes."""
    assert rendered(sign * 20_000).unescape() == sign * 20_000


def test_a_clipped_text_is_short_and_in_one_line():
    assert clipped("a\n b", 10) == "a b"
    assert len(clipped("a" * 10**6, 10)) == 11


# A step's view


async def test_filters_by_hand(client: httpx.AsyncClient):
    await client.post("/run/plain/step/1/group/0/review", json=SAID, headers=OURS)
    expected = {
        "differs-majority": [1, 2],
        "differs-all": [2],
        "no-variance": [2],
        "no-reference": [3],
        "truncated": [4],
        "abstained": [4],
        "reviewed": [0],
        "not-reviewed": [1, 2, 3, 4],
        "wrong": [0],
    }
    assert expected.keys() == FILTERS.keys()
    assert {name: await shown(client, f"?only={name}") for name in FILTERS} == expected
    assert await shown(client, "?only=differs-majority&only=no-variance") == [2]


async def test_orders_by_hand(client: httpx.AsyncClient):
    """Mean rewards are 3/4, 1/4, 0, none, 3/8; none is last both ways."""
    assert await shown(client, "?sort=reward") == [2, 1, 4, 0, 3]
    assert await shown(client, "?sort=reward&order=desc") == [0, 4, 1, 2, 3]
    assert await shown(client, "?sort=tokens&order=desc") == [4, 0, 1, 2, 3]
    assert await shown(client, "?order=desc") == [4, 3, 2, 1, 0]
    for sort in SORTS:
        assert sorted(await shown(client, f"?sort={sort}")) == [0, 1, 2, 3, 4]


async def test_search_reads_prompts_and_references_in_any_case(client: httpx.AsyncClient):
    assert await shown(client, "?q=äpfel") == [4]
    assert await shown(client, "?q=SO+IT+IS") == [0, 1, 2]
    assert await shown(client, "?q=.*") == []


async def test_a_view_goes_through_its_address_unchanged():
    view = View("a&b=", ("wrong", "abstained"), "tokens", True, 3)
    assert View.of(QueryParams(view.query()[1:])) == View("a&b=", ("abstained", "wrong"), "tokens", True, 3)
    assert View().query() == ""
    assert View.of(QueryParams(view.toggled("wrong")[1:])).only == ("abstained",)


@pytest.mark.parametrize("query", ["?only=all", "?sort=luck", "?page=0", "?page=x", "?page=99999999999"])
async def test_an_unknown_view_is_one_line(client: httpx.AsyncClient, query: str):
    answer = await client.get(f"/run/plain/step/1{query}")
    assert answer.status_code == 400
    assert "there is no such filter, order or page" in answer.text


async def test_a_page_has_fifty_and_the_rest_follow(tmp_path: Path):
    make_run(tmp_path / "plain", plain_groups() * 11)
    async with visitor(tmp_path) as client:
        assert await shown(client, "") == [*range(50)]
        assert await shown(client, "?page=2") == [*range(50, 55)]
        assert await shown(client, "?page=3") == []


async def test_next_and_previous_follow_the_view(client: httpx.AsyncClient):
    page = (await client.get("/run/plain/step/1/group/1?sort=reward")).text
    assert re.findall(r'rel="(\w+)" href="[^"]*/group/(\d)\?sort=reward"', page) == [
        ("prev", "2"),
        ("next", "4"),
    ]
    assert "2 of 5" in page
    assert "not in the view" in (await client.get("/run/plain/step/1/group/1?only=abstained")).text


async def test_an_export_is_the_view(client: httpx.AsyncClient):
    await client.post("/run/plain/step/1/group/2/review", json=SAID, headers=OURS)
    lines = (await client.get("/run/plain/step/1/export?format=jsonl&sort=reward&only=differs-majority")).text
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [(row["group"], row["review"], row["note"]) for row in rows] == [
        (2, "wrong", "seven, not eight"),
        (1, None, None),
    ]
    table = await client.get("/run/plain/step/1/export?format=csv&q=äpfel")
    [row] = csv.DictReader(io.StringIO(table.text))
    assert (row["problem_id"], row["kl"]) == ("open", "[0.0, 0.25, 0.5, 0.75]")
    assert "attachment" in table.headers["content-disposition"]


async def test_no_cell_of_an_exported_table_is_a_formula(tmp_path: Path):
    make_run(tmp_path / "hostile", hostile_groups())
    async with visitor(tmp_path) as client:
        table = (await client.get("/run/hostile/step/0/export?format=csv")).text
    rows = list(csv.DictReader(io.StringIO(table)))
    assert {f"'{text}" for text in FORMULAS} <= {row["prompt"] for row in rows}
    texts = [
        cell for row in rows for name, cell in row.items() if name in ("prompt", "reference", "problem_id")
    ]
    assert not [text for text in texts if text.startswith(("=", "+", "-", "@", "\t"))]


# Pages


async def test_every_page_of_a_hostile_run_shows_texts_as_texts(tmp_path: Path):
    groups = hostile_groups()
    make_run(tmp_path / HOSTILE_NAME, groups)
    async with visitor(tmp_path) as client:
        for address in await addresses(client):
            page = await client.get(address)
            assert page.status_code == 200, address
            assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", words_of(page))
            assert "{{7*7}}" in page.text  # in the run's name
            for tag, attributes in Tags.of(page.text):
                assert not {name for name in attributes if name.startswith("on") or name == "style"}
                assert tag not in ("img", "script") or attributes["src"].startswith("/static/")
                for name in {"href", "src", "action"} & {*attributes}:
                    assert re.match(r"/(?!/)|#|\?", attributes[name]), attributes


class Tags(HTMLParser):
    """The elements of a page as a browser takes them apart, with their attributes."""

    @classmethod
    def of(cls, page: str) -> list[tuple[str, dict[str, str]]]:
        parser = cls()
        parser.found = []
        parser.feed(page)
        return parser.found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


async def addresses(client: httpx.AsyncClient) -> list[str]:
    """Every page that can be reached from the first one by links to pages."""
    seen, waiting = [], ["/"]
    while waiting:
        seen.append(address := waiting.pop())
        for link in re.findall(r'href="(/[^"#]*)"', (await client.get(address)).text):
            link = Markup(link).unescape()
            if not link.startswith("/static/") and not re.search(r"/export|[?&](only|sort|order)=", link):
                waiting += [link] if link not in seen and link not in waiting else []
    return seen


async def test_a_group_page_has_it_all(client: httpx.AsyncClient):
    page = words_of(await client.get("/run/plain/step/1/group/4"))
    for words in (
        "Group 5",
        "Step 2",
        "Write a note on ÄPFEL",
        "Is it kind?",
        "truncated",
        "What the anchor read",
    ):
        assert words in page
    for words in ("0.90", "penalty", "KL 0.250", "advantage +0.750", "10 tokens", "4 abstained", "0.5"):
        assert words in page


async def test_a_refused_reference_says_why_and_shows_what_the_anchor_wrote(client: httpx.AsyncClient):
    refused, usable = [(await client.get(f"/run/plain/step/0/group/{group}")).text for group in (3, 0)]
    assert "none: it has no final answer" in refused
    assert "What the anchor wrote" in refused and "I &lt;think&gt; so &amp; so." in refused
    assert "What the anchor wrote" not in usable


async def test_the_same_problem_across_steps(client: httpx.AsyncClient):
    page = (await client.get("/run/plain/problem", params={"id": "differs from all"})).text
    assert re.findall(r"/step/(\d)/group/(\d)", page) == [("1", "2"), ("0", "2")]
    assert (await client.get("/run/plain/problem?id=x")).status_code == 404


async def test_two_runs_beside_each_other(runs: Path):
    make_run(runs / "other", plain_groups()[::-1])
    async with visitor(runs) as client:
        page = (await client.get("/compare?a=plain&b=other&step=0")).text
    assert re.findall(r"/run/(\w+)/step/0/group/(\d)", page)[:4] == [
        ("plain", "0"), ("other", "4"), ("plain", "1"), ("other", "3"),
    ]  # fmt: skip


# A run that is being written


async def test_a_run_under_way_breaks_no_page(tmp_path: Path):
    groups = plain_groups()
    run = make_run(tmp_path / "plain", groups, num_steps=0)
    async with visitor(tmp_path) as client:
        for address in ("/", "/run/plain", "/compare?a=plain&b=plain"):
            assert (await client.get(address)).status_code == 200, address
        run.write_groups(1, 0, [group.group for group in groups[:2]])
        assert (await client.get("/run/plain")).status_code == 200
        assert (await client.get("/run/plain/step/1")).status_code == 404
        assert (await client.get("/run/plain/step/1/group/0")).status_code == 404
        write_shard(run, 1, 1, groups)
        assert await shown(client, "") == [2, 3]
        assert (await client.get("/run/plain/step/1/group/3")).status_code == 200
        assert (await client.get("/run/plain/step/1/group/0")).status_code == 404
        write_shard(run, 1, 0, groups)
        assert await shown(client, "?sort=reward") == [2, 1, 0, 3]
        write_shard(run, 1, 2, groups)
        write_update(run, 1, groups)
        assert await shown(client, "") == [0, 1, 2, 3, 4]
        run.stage_file(1, "rewards", 0).unlink()
        page = await client.get("/run/plain/step/1/group/0")
        assert (page.status_code, "has not been written yet" in page.text) == (404, True)


# What is read


def test_one_group_is_read_out_of_a_shard(runs: Path):
    run = RunDir(runs / "plain")
    for i, group in enumerate(plain_groups()):
        assert read_group(run, 1, i) == group


def test_only_the_row_groups_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "plain", [], num_steps=0)
    write_update(run, 0, plain_groups() * 400)
    path = run.summaries_file(0)
    read: list[list[int]] = []
    whole = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda file, groups: read.append(groups) or whole(file, groups)
    )
    wanted = [3 * ROW_GROUP + 1, 0, 3 * ROW_GROUP]
    assert [row["group"] for row in _rows_at(path, wanted)] == wanted
    assert read == [[0, 3]]


# The list of runs


def test_runs_are_found_below_and_not_inside(tmp_path: Path):
    for name in ("a", "b/c", "b/d/e", "b/d/f/g", "a/checkpoints/000001", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    assert run_names(tmp_path) == ["a", "b/c", "b/d/e"]
    for name in (".hidden", "a/.", "b//c"):
        with pytest.raises(NotThere):
            find_run(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    ["..", "../secret", "plain/../../secret", "/etc", "", "plain/..", "out", ".", "plain\0", "plain/steps"],
)
def test_no_name_leads_out(runs: Path, name: str):
    make_run(runs.parent / "secret", plain_groups())
    os.symlink(runs.parent / "secret", runs / "out")
    assert run_names(runs) == ["plain"]
    with pytest.raises(Exception, match="there is no run"):
        find_run(runs, name)


@pytest.mark.parametrize(
    "address",
    [
        *("/run/..%2Fsecret", "/run/%2E%2E/secret", "/static/../app.py", "/static/%2e%2e/app.py"),
        *("/run/plain/config.json", "/run/plain/reviews.jsonl", "/run/plain/step/1/rewards-00.parquet"),
        *("/docs", "/openapi.json"),
    ],
)
async def test_nothing_else_is_served(runs: Path, client: httpx.AsyncClient, address: str):
    make_run(runs.parent / "secret", plain_groups())
    assert (await client.get(address)).status_code in (404, 400)


async def test_the_list_says_how_far_runs_are(client: httpx.AsyncClient):
    await client.post("/run/plain/step/1/group/0/review", json=SAID | {"opinion": "right"}, headers=OURS)
    page = words_of(await client.get("/"))
    assert "plain lab:open 2" in page and "0.375" in page
    assert "100.0% of 1" in page


@pytest.mark.parametrize(
    ("folder", "words"), [("nowhere", "there is no such folder"), ("plain", "a run itself")]
)
def test_a_folder_without_runs_is_refused(runs: Path, folder: str, words: str):
    with pytest.raises(BadInput, match=words):
        create_app(runs / folder)


# Reviews


async def test_a_review_is_a_line_and_changes_the_accuracy(runs: Path, client: httpx.AsyncClient):
    """One right of two: 1/2, with sqrt(1/2 * 1/2 / 2) = 0.354 beside it."""
    right = SAID | {"opinion": "right"}
    told = await client.post("/run/plain/step/1/group/0/review", json=right, headers=OURS)
    assert (told.status_code, told.json()["run"]) == (201, "100.0% of 1")
    told = await client.post("/run/plain/step/0/group/4/review", json=SAID, headers=OURS)
    assert told.json() == {"run": "50.0% ± 35.4% of 2", "step": "0.0% of 1"}
    first, second = read_reviews(runs / "plain" / REVIEWS)
    assert (first.step, first.group, first.problem_id, first.opinion) == (1, 0, "agrees", "right")
    assert (second.name, second.note) == ("Ada", "seven, not eight")
    for page in ("/run/plain", "/run/plain/step/1", "/run/plain/step/1/group/0"):
        assert "50.0% ± 35.4% of 2" in (await client.get(page)).text


async def test_a_plain_form_is_enough(runs: Path, client: httpx.AsyncClient):
    address = "/run/plain/step/1/group/0/review?q=one"
    told = await client.post(address, data=SAID, headers={"origin": HOST})
    assert (told.status_code, told.headers["location"]) == (303, "/run/plain/step/1/group/0?q=one#review")
    assert "seven, not eight" in (await client.get(told.headers["location"])).text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-cat-grpo": "1"},
        {"origin": HOST},
        *(
            {"origin": other, "x-cat-grpo": "1"}
            for other in ("http://example.org", "null", "http://127.0.0.1:1")
        ),
    ],
)
async def test_no_other_site_can_review(runs: Path, client: httpx.AsyncClient, headers: dict[str, str]):
    told = await client.post("/run/plain/step/1/group/0/review", json=SAID, headers=headers)
    form = await client.post(
        "/run/plain/step/1/group/0/review",
        data=SAID,
        headers={"origin": "http://example.org"} if headers == {"origin": HOST} else headers,
    )
    assert (told.status_code, form.status_code) == (403, 403)
    assert not (runs / "plain" / REVIEWS).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"name": " "},
        {"name": "a" * 81},
        {"opinion": "maybe"},
        {"note": "a" * 2001},
        {"note": "a" * 20_000},
        {"x": "a" * 20_000},
    ],
)
async def test_an_unusable_review_is_refused(runs: Path, client: httpx.AsyncClient, change: dict[str, str]):
    told = await client.post("/run/plain/step/1/group/0/review", json=SAID | change, headers=OURS)
    assert told.status_code == 400
    told = await client.post("/run/plain/step/1/group/77/review", json=SAID, headers=OURS)
    assert told.status_code == 404
    assert not (runs / "plain" / REVIEWS).exists()


# Who may see it


@pytest.mark.parametrize(
    "address", ["/", "/run/plain", "/static/inspector.js", "/run/x", "/run/plain/step/1?page=0"]
)
async def test_every_answer_forbids_what_a_page_does_not_need(client: httpx.AsyncClient, address: str):
    headers = (await client.get(address)).headers
    assert headers["content-security-policy"].startswith(
        "default-src 'none'; style-src 'self'; script-src 'self'"
    )
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:4280", "127.0.0.1.example.org"])
async def test_another_name_for_this_machine_is_refused(runs: Path, host: str):
    async with visitor(runs, host=f"http://{host}") as client:
        assert (await client.get("/")).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:4280", "localhost:4280", "[::1]:4280"])
async def test_loopback_names_are_answered(runs: Path, host: str):
    async with visitor(runs, host=f"http://{host}") as client:
        assert (await client.get("/")).status_code == 200


async def test_a_token_is_asked_for_once(runs: Path):
    async with visitor(runs, token="s3cret", host="http://box.example.org") as client:
        closed = await client.get("/run/plain")
        assert (closed.status_code, "plain" in closed.text) == (401, False)
        assert (await client.get("/?token=wrong")).status_code == 401
        assert (await client.get("/static/inspector.css")).status_code == 200
        opened = await client.get("http://box.example.org//example.org/?token=s3cret&q=a")
        assert (opened.status_code, opened.headers["location"]) == (303, "/example.org/?q=a")
        cookie = opened.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "s3cret" not in cookie
        assert (await client.get("/run/plain")).status_code == 200


@pytest.mark.parametrize(("bearer", "status"), [("Bearer s3cret", 200), ("Bearer no", 401), ("s3cret", 401)])
async def test_a_program_brings_the_token_along(runs: Path, bearer: str, status: int):
    async with visitor(runs, token="s3cret") as client:
        assert (await client.get("/", headers={"authorization": bearer})).status_code == status


def test_an_address_that_others_reach_needs_a_token():
    for host in LOOPBACK:
        refuse_open_host(host, None)
    refuse_open_host("0.0.0.0", "s3cret")
    for host in ("0.0.0.0", "::", "192.168.1.2", "box.example.org", ""):
        with pytest.raises(BadInput, match="--token"):
            refuse_open_host(host, None)


def test_the_command_refuses_an_open_address_in_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["cat-grpo", "inspect", str(runs), "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
    assert "inspect" in [
        command.callback.__name__ for command in command_line.registered_commands if command.callback
    ]
