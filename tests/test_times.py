"""Times in text: what a person reads without doubt is read, anything else is left unread, nothing is misread."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.rewards import parse_highlights, parse_span, parse_spans
from tempsamp_fast.times import read_times


def spans(answer):
    return parse_spans(f"<answer>{answer}</answer>")


@pytest.mark.parametrize(
    "answer, span",
    [
        ("12,5 to 17,8", (12.5, 17.8)),
        ("12,50s - 17,80s", (12.5, 17.8)),
        ("0,500 to 0,75", (0.5, 0.75)),
        ("12,5 to 17", (12.5, 17)),
        ("1,234.5 to 1,300.2", (1234.5, 1300.2)),
        ("1.234,5 to 1.300,25", (1234.5, 1300.25)),
        ("00:00:12,500 --> 00:00:17,800", (12.5, 17.8)),
        ("00:12,500 to 01:17,800", (12.5, 77.8)),
        ("1.5 to 2 minutes", (90, 120)),
        ("1 min 30 s to 2 min 5 s", (90, 125)),
        ("1m30s to 2m5s", (90, 125)),
        ("1 minute and 30 seconds to 2 minutes", (90, 120)),
        ("1 minute to 90 s", (60, 90)),
        ("1h5m to 2 hours", (3900, 7200)),
        ("1:30 minutes to 2:10 minutes", (90, 130)),
        ("12\u201317 s", (12, 17)),
        ("12 \u2212 17", (12, 17)),
        ("**12.54 to 17.83**", (12.54, 17.83)),
        ('["12.5 to 17.8"]', (12.5, 17.8)),
        ("answer:12to17", (12, 17)),
        ("1 to 2, 3 to 4", (3, 4)),
        ("5.0, 12.5 to 20", (12.5, 20)),
        ("12.5 to 17.8, 3 to be sure", (12.5, 17.8)),
        ("scene 2: 12 to 17, then nothing", (12, 17)),
        ("12 to 20 seconds, which are frames 300 to 500", None),
        ("12 s to 20 s, which are frames 300 to 500", (12, 20)),
        ("it lasts from 12 to 17 s", (12, 17)),
        ("the last time is 12 to 17", (12, 17)),
        ("first from 12 to 17 s, at the end", (12, 17)),
        ("12 to\u00a017 s", (12, 17)),
    ],
)
def test_what_is_unambiguous_is_read(answer, span):
    assert parse_span(f"<answer>{answer}</answer>") == span


@pytest.mark.parametrize(
    "answer",
    [
        *(
            f"{minus}{space}5 to 13"
            for minus in "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
            for space in ("", " ")
        ),
        *("5 to -13", "5 to \u221213", "5 - -13", "12 -17", "minus 5 to 13", "from negative 5 to 13"),
        *("10% to 20%", "10 to 20 %", "10 to 20 percent", "10 to 20 per cent", "at 50 % of it: 10 to 20"),
        *("frames 12 to 20", "frame 12 to frame 20", "12 to 20 frames", "12 to 20 and 30 to 40 frames"),
        *("12 to 17 ms", "12 to 17 m", "2 to 3 times", "in minutes: 1 to 2", "1 to 2 (hours)"),
        *("12, 5 to 17, 8", "12, 5 to 17", "5 to 17, 8", "1 to 2, 3", "12,  5 - 17"),
        *("1,234 to 1,300", "12,500 to 13,200", "1 234.5 to 1 300.2", "1'234.5 to 1'300", "100 to 2\u00a0000"),
        *("1 to 2,3 to 4", "1-2,3-4", "2026-11-28", "1-2-3", "12/5 to 17", "12\u00b75 to 17\u00b78", "12\u066b5 to 17"),
        *("1.2.3 to 4", "1,2,3 to 4", "1.234.567 to 4", ".5 to .75", "1e3 to 2e3", "\u00bd to 3", "1\u0662 to 17"),
        *("30 to 2 minutes", "1 minute to 90", "1 min 30 to 90", "1 minute 90 seconds to 3 minutes", "5' to 10'"),
        *("1 minute, 30 seconds to 2 minutes", "1 to 1 h 5 min", "1:30 to 2 hours", "0:05 to 20", "2 to 3:30"),
        *("5 to 7 pm", "5 to 7 p.m.", "5 to 7 o'clock", "5 to 7 €", "2 x 5 to 7", "5 to 7 x 2", "12\u20095 to 17"),
        *(
            "for 5 to 7 seconds",
            "It lasts 5 to 7 s.",
            "the first 5 to 7 seconds",
            "every 5 to 7 seconds",
            "5 to 7 s ago",
        ),
        *(
            "the last 5 to 7 seconds",
            "10 to 5 seconds before the end",
            "5 to 7 s from the end",
            "lasting about 5 to 7 s",
        ),
        *("12:5 to 17:8", "1:75 to 2:10", "00:00:12:05 to 00:00:17:00", "0:05,0:07 to 0:09", "$5 to $13", "5x to 6x"),
    ],
)
def test_what_has_no_or_another_reading_is_left_unread(answer):
    assert spans(answer) == []


def test_a_list_keeps_the_spans_that_are_sure():
    assert spans("1 to 2s,3 to 4s; (5 to 6),(7 to 8)") == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert spans("\n- 5 to 13\n- 20 to 30") == [(5, 13), (20, 30)]
    assert spans("1,2 to 3,4 and 5,6 to 7,8") == [(1.2, 3.4), (5.6, 7.8)]


NUMBERS = st.one_of(
    st.integers(0, 4000).map(lambda n: (str(n), float(n))),
    st.integers(0, 400_000).map(lambda n: (f"{n / 100:.2f}", n / 100)),
    st.integers(0, 400_000).map(lambda n: (f"{n / 100:.2f}".replace(".", ","), n / 100)),
    st.integers(0, 400_000).map(lambda n: (f"{n / 100:,.2f}", n / 100)),
    st.integers(0, 7199).map(lambda n: (f"{n // 3600}:{n // 60 % 60:02}:{n % 60:02}", float(n))),
    st.integers(0, 7_199_999).map(lambda n: (f"{n // 60_000:02}:{n // 1000 % 60:02},{n % 1000:03}", n / 1000)),
    st.integers(0, 90).map(lambda n: (f"{n} min", 60.0 * n)),
    st.integers(0, 5000).map(lambda n: (f"{n // 60} min {n % 60} s", float(n))),
)


@given(NUMBERS, NUMBERS, st.sampled_from([" to ", " and ", " - ", "\u2013"]), st.sampled_from(["", " seconds", " s."]))
def test_a_span_is_read_as_it_was_written_or_not_at_all(first, second, join, unit):
    """A bare number before minutes may be meant in minutes too."""
    found = spans(first[0] + join + second[0] + unit)
    shared = [(60 * first[1], second[1])] if first[0].isdigit() or "." in first[0] or "," in first[0] else []
    assert all(any(span == pytest.approx(read) for read in [(first[1], second[1]), *shared]) for span in found)
    is_plain = all(re.fullmatch(r"\d+(\.\d\d)?", text) for text, _ in (first, second))
    assert found or not is_plain


PREFIXES = ["-", "\u2212", "\u2013", "minus ", "$", "#", "x", "1,", "1.2.", "7/", "7:", "1 000 ", "frame ", "\u0661"]
SUFFIXES = ["%", " %", " frames", " ms", "x", "e3", ",500,1", ".2.3", "/7", "\u00b2", " percent", ":7", "\u0661"]


@given(
    st.integers(100, 999), st.integers(100, 999), st.sampled_from(PREFIXES), st.sampled_from(SUFFIXES), st.booleans()
)
def test_a_number_that_is_part_of_something_else_is_not_read(first, second, prefix, suffix, is_first):
    """Whichever of the two it is."""
    written = f"{prefix}{first} to {second}" if is_first else f"{first} to {second}{suffix}"
    assert spans(written) == []


@given(st.text("0123456789.,:-\u2212 tosmin%/'(\n", max_size=30))
def test_no_number_is_read_that_is_not_written(text):
    """Its digits stand in the text in one piece, up to a point, a comma or a colon; it is finite and not negative."""
    for time in read_times(text):
        written = text[time.start : time.end]
        assert re.match(r"\d", written)
        if time.seconds is not None:
            assert time.start == 0 or not re.match(r"[\d.\-\u2212/%]", text[time.start - 1]) or "-" in text
            assert 0 <= time.seconds < float("inf")
            plain = re.fullmatch(r"(\d+)(?:[.,](\d+))?", written)
            if plain and time.unit == 0:
                assert time.seconds == float(f"{plain[1]}.{plain[2] or 0}")


def test_highlights_with_a_number_of_two_readings_are_left_unread():
    said = "The highlight timestamps are in the {} seconds. Their saliency scores are {}."
    read = lambda *lists: parse_highlights(f"<answer>{said.format(*lists)}</answer>")
    assert read("82, 84", "1,3, 1,7") == {82.0: 1.3, 84.0: 1.7}
    assert read("82, -84", "1.3, 1.7") is None
    assert read("1,234, 84", "1.3, 1.7") is None
    assert read("82 %, 84 %", "1.3, 1.7") is None
