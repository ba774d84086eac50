"""Which slot goes to which server, and what each of them did."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import make_rows

from loadgen.core.record import Outcome
from loadgen.core.split import by_server, only_of, pattern


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_every_server_gets_its_share_and_turns_are_spread(shares):
    turns = pattern(shares)
    assert Counter(turns) == dict(enumerate(shares))
    for server, share in enumerate(shares):
        seen = np.cumsum([turn == server for turn in turns])
        even = share * np.arange(1, len(turns) + 1) / len(turns)
        assert np.abs(seen - even).max() < max(2, len(shares)), "no server is ahead or behind by more than a few turns"


def test_equal_shares_are_round_robin():
    assert pattern([1, 1, 1]) == [0, 1, 2] and pattern([5]) == [0] * 5 and pattern([2, 1]) == [0, 1, 0]


def test_what_each_server_did():
    specs = [
        {"due": k * 100, "chunks": [k * 100 + 10 * (1 + k % 2)], "tokens": [3], "server": k % 2} for k in range(10)
    ]
    specs[3] |= {"outcome": "error", "chunks": [], "tokens": [], "done": 400}
    first, second = by_server(make_rows(specs), 2)
    assert (first["requests"], first["failed"], first["tokens_out"]) == (5, 0, 15)
    assert (second["requests"], second["failed"], second["tokens_out"]) == (5, 1, 12)
    assert first["ttft_ns"]["p50"] == 10 and second["e2e_ns"]["p50"] == 20
    assert second["ttft_ns"]["p99"] is None, "a failed request is slower than any"


@pytest.mark.parametrize(("failing", "named"), [([1], [1]), ([0, 1], []), ([0], [0])])
def test_failures_of_one_server_are_told_apart(failing, named):
    specs = [{"due": k, "chunks": [k], "tokens": [1], "server": k % 2} for k in range(8)]
    for k, spec in enumerate(specs):
        if k % 2 in failing:
            spec |= {"outcome": "error", "chunks": [], "tokens": []}
    assert only_of(make_rows(specs), Outcome.ERROR, 2) == named
    assert only_of(make_rows(specs), Outcome.ERROR, 1) == []
