"""What a demo must have reached, and how it is shown."""

import pytest

from sims.demo.summary import LossPoint, Summary, judge, plot, print_summary
from sims.demo.view import SPARKS, DemoView, sparkline


def good(**changes):
    facts = {
        "refused": "E_NOT_MEMBER: no",
        "loss_end": 2.9,
        "loss_single": 2.6,
        "digests_equal": True,
        "bytes_ratio": 1.01,
        "state_sources": 3,
        "verified": True,
        "logits_equal": True,
        "tokens_equal": True,
        "curve": [LossPoint(0, 5.5), LossPoint(1000, 2.9)],
        "single_curve": [LossPoint(0, 5.5), LossPoint(1000, 2.6)],
    }
    return Summary(**(facts | changes))


def test_a_good_run_missed_nothing():
    assert judge(good()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"refused": ""}, "refused"),
        ({"loss_end": 3.01, "loss_single": 2.9}, "above 3.0"),
        ({"loss_single": 2.5}, "above a single process"),
        ({"digests_equal": False}, "different parameters"),
        ({"bytes_ratio": 0.94}, "closed form"),
        ({"bytes_ratio": 1.06}, "closed form"),
        ({"verified": False}, "verify"),
        ({"logits_equal": False}, "logits"),
        ({"tokens_equal": False}, "tokens"),
        ({"loss_end": float("nan")}, "above 3.0"),
    ],
    ids=str,
)
def test_each_miss_is_named(changes, word):
    missed = judge(good(**changes))
    assert any(word in line for line in missed)


def test_an_empty_run_misses_every_proof():
    assert len(judge(Summary())) >= 6


def test_summary_is_shown(capsys):
    print_summary(good(bytes_by_link={"a>b": 1234}))
    shown = capsys.readouterr().err
    assert "1234 B" in shown
    assert "equal on all peers" in shown


@pytest.mark.slow
def test_plot_is_a_png(tmp_path):
    plot(good(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([0.0, 1.0]) == SPARKS[0] + SPARKS[-1]
    assert sparkline([2.0, 2.0, 2.0]) == SPARKS[0] * 3  # flat, not a division by zero
    assert len(sparkline([float(i) for i in range(100)], width=7)) == 7
    falling = sparkline([8.0 - i for i in range(8)])
    assert falling == SPARKS[::-1]


def test_plain_view_writes_lines(capsys):
    with DemoView(["first", "second"]) as view:
        view.begin(0)
        view.loss(3.2, 1, 10)
        view.finish(0)
        view.say("hello")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["step 1: first", "hello"]
