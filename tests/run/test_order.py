"""Which problems a step takes: epochs, orders, and data that grows and shrinks."""

import itertools

import pytest

from cat_grpo.records import Problem
from cat_grpo.run.order import (
    Change,
    ProblemOrder,
    change_lines,
    changes_with,
    read_changes,
    rollout_keys,
)


def ids(n: int, prefix: str = "p") -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(n))


def steps(changes, num_steps: int, per_step: int, seed: int = 0) -> list[list[str]]:
    order = ProblemOrder(changes, per_step, seed)
    return [order.ids_of(step) for step in range(num_steps)]


def test_a_problem_that_comes_again_in_a_step_is_seeded_anew():
    a, b, c = (Problem(name, ({"role": "user", "content": "?"},), "open") for name in ids(3))
    assert rollout_keys([a, b, a, c, a, b]) == ["p0", "p1", "p0 1", "p2", "p0 2", "p1 1"]


@pytest.mark.parametrize(("num_problems", "per_step"), [(12, 4), (10, 4), (7, 7), (5, 1), (3, 8), (1, 3)])
def test_each_epoch_has_each_problem_once(num_problems, per_step):
    drawn = steps([Change(0, ids(num_problems))], 3 * num_problems, per_step)
    assert all(len(step) == per_step for step in drawn)
    flat = list(itertools.chain(*drawn))
    epochs = [flat[i : i + num_problems] for i in range(0, len(flat), num_problems)]
    assert all(sorted(epoch) == sorted(ids(num_problems)) for epoch in epochs)


def test_steps_and_epochs_and_seeds_have_orders_of_their_own():
    data = [Change(0, ids(40))]
    first, second, next_epoch = steps(data, 3, 20)
    assert not set(first) & set(second)
    assert first != next_epoch
    assert first != steps(data, 1, 20, seed=1)[0]
    assert first != list(ids(40))[:20]


def test_a_step_does_not_depend_on_which_was_asked_before():
    changes = (Change(0, ids(10)), Change(2, ids(3, "q"), ("p1",)))
    order = ProblemOrder(changes, 4, 3)
    forwards = [order.ids_of(step) for step in range(8)]
    backwards = [order.ids_of(step) for step in reversed(range(8))]
    assert forwards == backwards[::-1]
    assert ProblemOrder(changes, 4, 3).ids_of(5) == forwards[5]


def test_what_comes_amid_an_epoch_is_taken_at_its_end_and_once():
    old, new = ids(6), ids(4, "q")
    before = steps([Change(0, old)], 3, 2)
    after = steps([Change(0, old), Change(2, new)], 5, 2)
    assert after[:3] == before  # the epoch goes on as it was
    assert sorted(after[3] + after[4]) == sorted(new)
    all_of_it = steps([Change(0, old), Change(2, new)], 10, 2)[5:10]
    assert sorted(itertools.chain(*all_of_it)) == sorted(old + new)


def test_what_has_left_is_not_taken_again():
    drawn = steps([Change(0, ids(6)), Change(1, (), ("p2", "p3"))], 12, 2)
    taken = list(itertools.chain(*drawn[1:]))
    assert not {"p2", "p3"} & set(taken)
    assert {taken.count(name) for name in ("p0", "p1", "p4", "p5")} <= {5, 6}


def test_changes_ahead_of_the_same_step_all_count():
    changes = [Change(0, ids(2)), Change(1, ids(1, "q")), Change(1, ids(1, "r"), ("p0",))]
    assert "p0" not in itertools.chain(*steps(changes, 9, 2)[1:])
    assert {"q0", "r0"} <= set(itertools.chain(*steps(changes, 9, 2)[1:]))


def test_a_change_is_what_came_and_what_left():
    changes = changes_with((), ["a", "b", "c"], 0)
    assert changes == (Change(0, ("a", "b", "c")),)
    assert changes_with(changes, ["c", "a", "b"], 7) == changes  # the order of the rows is no change
    changes = changes_with(changes, ["c", "d", "a"], 7)
    assert changes[1] == Change(7, ("d",), ("b",))
    assert changes_with(changes, ["a", "b", "c", "d"], 9)[2] == Change(9, ("b",))


def test_changes_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "changes.jsonl"
    assert read_changes(path) == ()
    changes = (Change(0, ("a\u2028b", "é")), Change(3, (), ("é",)))
    path.write_text(change_lines(changes))
    assert read_changes(path) == changes
