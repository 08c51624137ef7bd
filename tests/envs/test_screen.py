"""What a terminal shows of an output, worked out by hand."""

from __future__ import annotations

import time

import pytest

from backtalk.envs.screen import shown_text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        # Nothing to follow: every character stays, tabs and blanks at the end of a line too.
        ("", ""),
        ("a\tb  \n\n\u00e9\u65e5\U0001f600", "a\tb  \n\n\u00e9\u65e5\U0001f600"),
        # Lines of DOS.
        ("a  \r\nb\t\r\r\n", "a  \nb\t\n"),
        # Frames: the last one, with what is longer of those before.
        ("10%\r55%\r100%\ndone\n", "100%\ndone\n"),
        ("loading...\rok\n", "okading...\n"),
        ("loading...\rok        \nnext  \n", "ok\nnext  \n"),
        ("loading...\r\x1b[Kok\n", "ok\n"),
        ("loading...\r\x1b[2Kok\n", "ok\n"),
        ("loading...\x1b[2K\rok", "ok"),
        ("abc\x1b[1K|\n", "   |\n"),
        ("99%\r", "99%"),
        ("|\b/\b-\b\\\bok\n", "ok\n"),
        ("ab\b\b\b\bxyz", "xyz"),
        ("12345\x1b[3Dx", "12x45"),
        ("12345\r\x1b[2Cx", "12x45"),
        ("12345\x1b[2Gx", "1x345"),
        ("12345\r\x1b[2P", "345"),
        ("12345\r\x1b[2X", "  345"),
        # Two bars, each written over in its own line.
        ("a 1\nb 1\n\x1b[2Aa 2\nb 2\n\x1b[2A\x1b[Ka 3\n\x1b[Kb 3\n", "a 3\nb 3\n"),
        ("top\nmiddle\n\x1b[1F\x1b[Jend\n", "top\nend\n"),
        ("one\x1b7 two\x1b8!", "one!two"),
        ("one\x1b[s two\x1b[u!", "one!two"),
        # Colours, titles, bells and marks of paste show nothing.
        ("\x1b[1;31mred\x1b[0m and \x1b[38;5;12mblue\x1b[m\a\n", "red and blue\n"),
        ("\x1b]0;title\aa\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n", "alink\n"),
        ("a\0b\x7f\x1b[?25lc\x1b[?2004h\x1b(Bd", "abcd"),
        ("cut in a sequence\x1b[3", "cut in a sequence"),
        # A cleared screen, and one of a program's own.
        ("old\nold\n\x1b[H\x1b[2J\x1b[3Jnew\n", "new\n"),
        ("before\n\x1b[?1049h\x1b[Hfile\n~\n~\x1b[?1049lafter\n", "before\nafter\n"),
        # Tabs: kept where they make blanks, a movement over what is there.
        ("x\ra\tb\n", "a\tb\n"),
        ("\x1b[1ma\tb\x1b[0m\n", "a\tb\n"),
        ("12345678901\r\tX", "12345678X01"),
        ("a\tb\r123456789", "123456789"),
        ("a\tb\r12", "12      b"),
        # Wide characters take two cells, combining ones none.
        ("\u65e5\u672c\rab", "ab\u672c"),
        ("\u65e5\u672c\ra", "a \u672c"),
        ("e\u0301x\ra", "ax"),
        ("\u2588\u2588\u258c 50%\r\u2588\u2588\u2588 99%", "\u2588\u2588\u2588 99%"),
    ],
)
def test_what_is_shown(written: str, shown: str) -> None:
    assert shown_text(written) == shown
    assert shown_text(shown_text(written)) == shown


def test_a_bar_of_many_frames_is_its_last_one() -> None:
    frames = [f"\rDownloading: {i:3d}% |{'#' * (i * 2 // 5):<40s}|" for i in range(101)]
    assert shown_text("".join(frames) + "\n") == frames[-1][1:] + "\n"


def test_what_scrolled_off_stays_and_cannot_be_reached() -> None:
    lines = "".join(f"{n}\n" for n in range(100))
    assert shown_text(f"{lines}\x1b[999A!\n").split("\n")[50:53] == ["50", "!1", "52"]  # 49 lines above the cursor's
    assert shown_text(f"{lines}\x1b[2J\x1b[Hx").split("\n")[-2:] == ["50", "x"]


@pytest.mark.parametrize(
    "written",
    [
        "\n" * 30_000 + "\x1b[2J" * 8_000,
        "\x1b[99999999C" * 6_000,
        "a" * 60_000 + "\x1b[P" * 1_500,
        "\x1b[9999B" * 9_000,
    ],
)
def test_no_output_costs_much(written: str) -> None:
    began = time.process_time()
    assert len(shown_text(written)) <= len(written)
    assert time.process_time() - began < 2
