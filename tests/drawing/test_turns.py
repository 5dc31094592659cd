"""Whose turn it is: one at a time, in the order they came; who waits knows how many are before, and can leave."""

import threading
import time

import pytest

from t2ilib.drawing.turns import Line


def test_turns_are_taken_in_the_order_they_came():
    line, began, told = Line(), [], {}

    def work(name):
        with line.turn(lambda before: told.setdefault(name, []).append(before)):
            assert (len(began) - began.count("done") * 2) == 0, "nobody else has it"
            began.append(name)
            time.sleep(0.02)
            began.append("done")

    with line.turn():
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for number, thread in enumerate(threads):
            thread.start()
            while len(line) < number + 2:
                time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert [name for name in began if name != "done"] == list("abcd")
    assert [told[name][0] for name in "abcd"] == [1, 2, 3, 4]
    assert told["d"][-1] == 1
    assert sorted(told["d"], reverse=True) == told["d"]
    assert len(line) == 0


def test_who_waits_can_leave_and_who_fails_gives_the_turn_back():
    line = Line()

    class Enough(Exception):
        pass

    def leave(before):
        raise Enough

    with line.turn():
        with pytest.raises(Enough), line.turn(leave):
            raise AssertionError("it was not their turn")
        assert len(line) == 1
    with pytest.raises(ValueError, match="oops"), line.turn():
        raise ValueError("oops")
    with line.turn():
        assert len(line) == 1
