"""Budgets: the sum never exceeds them, who wants more gets what others leave."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import ConfigError, ResourceExhausted
from fabric.net.budget_config import BudgetConfig, parse_budget, parse_rate
from fabric.net.rate_book import RateBook, Use, fill

AMOUNTS = st.floats(0, 1e9) | st.just(math.inf)


def book_of(uses, **config):
    """Return a book with one connection per (peer, bytes/s, waiting)."""
    book = RateBook(BudgetConfig(**config))
    for key, (peer, rate, waiting) in enumerate(uses):
        book.add(key, peer)
        book.report(key, Use(rate, waiting))
    return book


@given(
    st.floats(1, 1e9),
    st.dictionaries(st.integers(), AMOUNTS, max_size=12),
    st.floats(1, 1e9) | st.just(math.inf),
)
def test_fill_is_max_min_fair(capacity, wanted, most):
    got = fill(capacity, wanted, most)
    assert sum(got.values()) <= capacity * (1 + 1e-9)
    assert all(amount <= most for amount in got.values())
    short = [key for key in wanted if got[key] < min(wanted[key], most) * (1 - 1e-9)]
    for key in short:  # who does not get its wish has as much as anybody
        assert got[key] >= max(got.values()) * (1 - 1e-9) - 1e-6


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.floats(0, 1e8), st.booleans())),
    st.sampled_from([0, 1e6, 5e7]),
    st.sampled_from([0, 4e5, 2e7]),
)
def test_budgets_hold_for_any_use(uses, total, each):
    book = book_of(
        uses, max_up_bytes_per_second=total, max_up_bytes_per_second_per_peer=each
    )
    for _ in range(8):
        rates = book.rates()
        assert len(rates) == len(uses)
        assert sum(rates.values()) <= (total or math.inf) * (1 + 1e-9)
        for peer in "ABC":
            mine = sum(rates[key] for key, use in enumerate(uses) if use[0] == peer)
            assert mine <= (each or math.inf) * (1 + 1e-9)
        assert all(rate > 0 for rate in rates.values())
        for key, use in enumerate(uses):
            book.report(key, Use(min(use[1], rates[key]), use[2]))


def test_greedy_connections_use_the_whole_budget_and_split_it_by_peer():
    uses = [("A", 0, True), ("A", 0, True), ("B", 0, True), ("C", 0, False)]
    rates = book_of(uses, max_up_bytes_per_second=1e6).rates()
    assert rates[0] + rates[1] == pytest.approx(rates[2])
    assert sum(rates[key] for key in range(3)) >= 0.97e6


def test_a_slow_link_leaves_its_share_to_others():
    book = book_of([("A", 0, True), ("B", 0, True)], max_up_bytes_per_second=1e6)
    for _ in range(12):  # the link to A carries 100 kB/s and no more
        rates = book.rates()
        book.report(0, Use(min(1e5, rates[0]), True))
        book.report(1, Use(rates[1], True))
    assert 1e5 <= rates[0] <= 2.1e5
    assert rates[1] >= 0.78e6


def test_idle_connections_share_all_until_somebody_sends():
    book = book_of([("A", 0, False), ("B", 0, False)], max_up_bytes_per_second=1e6)
    assert book.rates() == {0: 5e5, 1: 5e5}
    book.report(0, Use(0, True))
    assert book.rates()[0] >= 0.98e6


def test_removed_connections_count_no_more():
    book = book_of([("A", 0, False)] * 2, max_connections_per_peer=2)
    with pytest.raises(ResourceExhausted) as refused:
        book.check("A")
    assert refused.value.code == "E_BUDGET"
    assert refused.value.next_step
    book.check("B")
    book.remove(0)
    book.remove(0)
    book.check("A")


def test_the_total_of_connections_is_refused():
    book = book_of([("A", 0, False), ("B", 0, False)], max_connections=2)
    with pytest.raises(ResourceExhausted):
        book.check("C")
    book.config = BudgetConfig(max_connections=0)
    book.check("C")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("20Mbit", 2.5e6), ("2.5MB", 2.5e6), ("800kbit/s", 1e5), ("1Gbps", None)],
)
def test_rates_are_read(text, rate):
    if rate is None:
        with pytest.raises(ConfigError):
            parse_rate(text)
    else:
        assert parse_rate(text) == rate


def test_the_flag_is_read_in_parts():
    assert parse_budget("20Mbit,vram=80%") == (2.5e6, {"vram": "80%"})
    assert parse_budget("up=20Mbit") == (2.5e6, {})
    assert parse_budget("vram=80%") == (0.0, {"vram": "80%"})
    for wrong in ("", "20", "20Mbit,30Mbit", "vram=", "vram=1,vram=2", "8kbit", "-1MB"):
        with pytest.raises(ConfigError) as refused:
            parse_budget(wrong)
        assert refused.value.code == "E_BUDGET_FORM"


@given(st.text(max_size=40))
def test_any_flag_is_read_or_refused(text):
    try:
        rate, _ = parse_budget(text)
    except ConfigError:
        return
    assert rate >= 0


def test_settings_that_cannot_be_meant_are_refused():
    for wrong in (
        {"max_up_bytes_per_second": 10.0},
        {"max_up_bytes_per_second_per_peer": math.nan},
        {"max_connections": -1},
    ):
        with pytest.raises(ValueError, match=r"budget|number"):
            BudgetConfig(**wrong)
