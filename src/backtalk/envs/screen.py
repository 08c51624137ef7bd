r"""Show an output as a terminal would: of a progress bar its last frame, of colours the text.

The terminal has 50 lines and what scrolled off above them, and is wide enough for every line. It knows what programs
use to write over what they wrote: ``\r``, ``\b``, ``\t``, and the sequences that move the cursor, erase, save and
restore it, or open another screen for a while. Other sequences and other control characters show nothing.
"""

from __future__ import annotations

import re
from unicodedata import combining, east_asian_width

HEIGHT = 50
_WIDTH = 200  # the furthest that a sequence moves the cursor; text may be longer
_TAB = 8
_JOINED = "\u200d\ufe0e\ufe0f"  # beside combining characters: they change the character before them

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# Text; ESC [ numbers letter; ESC ] ... BEL, and other strings; other sequences; single control characters.
_TOKEN = re.compile(
    r"(?P<text>[^\x00-\x1f\x7f]+)|\x1b\[(?P<numbers>[0-?]*)[ -/]*(?P<letter>[@-~])"
    r"|\x1b\[[0-?]*[ -/]*\Z|\x1b[]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*(?P<escape>[0-~])"
    r"|(?P<control>[\x00-\x1f\x7f])"
)


def shown_text(output: str) -> str:
    """Return an output as a terminal shows it, lines ended by newlines; unchanged if it has no control characters."""
    output = re.sub(r"\r+\n", "\n", output)
    if not _CONTROL.search(output):
        return output
    screen = _Screen()
    for token in _TOKEN.finditer(output):
        if text := token["text"]:
            screen.write(text)
        elif letter := token["letter"]:
            screen.sequence(letter, token["numbers"])
        else:
            screen.control(token["control"] or f"\x1b{token['escape']}")
    return screen.text()


class _Screen:
    """Rows of cells and a cursor. A character of several cells, a tab too, is followed by empty cells."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.saved = (0, 0)
        self.erased: set[int] = set()  # rows written over, in which blanks at the end are what was erased
        self.other: _Screen | None = None  # the one below, while a program shows a screen of its own

    def text(self) -> str:
        """Return the text on the screen, without the empty rows below the cursor."""
        self._switch(opens=False)
        lines = ["".join(cells) for cells in self.rows]
        lines = [line.rstrip(" ") if row in self.erased else line for row, line in enumerate(lines)]
        while len(lines) > self.row + 1 and not lines[-1]:
            lines.pop()
        return "\n".join(lines)

    def write(self, text: str) -> None:
        """Write text without control characters at the cursor."""
        cells = [*text] if text.isascii() else []
        for character in "" if cells else text:
            if cells and (combining(character) or character in _JOINED):
                cells[-1] += character
            else:
                cells += [character, ""] if east_asian_width(character) in "WF" else [character]
        self._put(cells)

    def control(self, character: str) -> None:
        """Follow one control character, or ESC and one character."""
        match character:
            case "\r":
                self.column = 0
            case "\n":
                self._go(self.row + 1, 0, scroll=True)
            case "\v" | "\f":
                self._go(self.row + 1, self.column, scroll=True)
            case "\b":
                self.column = max(0, self.column - 1)
            case "\t":
                width = _TAB - self.column % _TAB
                if self.column < len(self.rows[self.row]):  # it moves over what is there
                    self.column += width
                else:
                    self._put(["\t", *[""] * (width - 1)])
            case "\x1b7":
                self.saved = self.row, self.column
            case "\x1b8":
                self._go(*self.saved)
            case "\x1bM":
                self._go(self.row - 1, self.column)

    def sequence(self, letter: str, numbers: str) -> None:
        """Follow the sequence ESC [ numbers letter."""
        given = [int(number or 0) for number in re.findall(r"\d{1,6}|(?<=;)(?=;|$)|^(?=;)", numbers)]
        first, second = (*given, 0, 0)[:2]
        count, top = max(1, first), self._top
        match letter:
            case "A" | "F":
                self._go(self.row - count, 0 if letter == "F" else self.column)
            case "B" | "E":
                self._go(self.row + count, 0 if letter == "E" else self.column)
            case "C":
                self._go(self.row, self.column + count)
            case "D":
                self._go(self.row, self.column - count)
            case "G" | "`":
                self._go(self.row, count - 1)
            case "H" | "f":
                self._go(top + count - 1, max(1, second) - 1)
            case "d":
                self._go(top + count - 1, self.column)
            case "K":
                self._erase(self.row, first)
            case "J" if first == 3:  # what has scrolled off
                del self.rows[:top]
                self.row -= top
                self.erased = {row - top for row in self.erased if row >= top}
            case "J":
                self._erase(self.row, first)
                for row in range(self.row + 1 if first == 0 else top, self.row if first == 1 else len(self.rows)):
                    self._erase(row, 2)
            case "P":
                del self.rows[self.row][self.column : self.column + count]
            case "X":
                place = self.column
                self._put([" "] * min(count, max(0, len(self.rows[self.row]) - place)))
                self.column = place
            case "s":
                self.saved = self.row, self.column
            case "u":
                self._go(*self.saved)
            case "h" | "l" if numbers in ("?47", "?1047", "?1049"):
                self._switch(letter == "h")

    @property
    def _top(self) -> int:
        return max(0, len(self.rows) - HEIGHT)

    def _go(self, row: int, column: int, *, scroll: bool = False) -> None:
        """Move the cursor: not above the screen, and below its last line only where that ``scroll``s it."""
        self.row = max(self._top, row if scroll else min(row, self._top + HEIGHT - 1))
        self.rows += [[] for _ in range(len(self.rows), self.row + 1)]
        self.column = min(max(0, column), max(_WIDTH, len(self.rows[self.row])))

    def _put(self, cells: list[str], *, move: bool = True) -> None:
        """Write cells at the cursor; blank the rest of a character that is written over in part."""
        line, start, end = self.rows[self.row], self.column, self.column + len(cells)
        if start < len(line):
            self.erased.add(self.row)
        line += [" "] * (start - len(line))
        for edge in (start, end):
            if edge < len(line) and line[edge] == "":
                head = max(place for place in range(edge) if line[place])
                after = next((place for place in range(edge, len(line)) if line[place]), len(line))
                line[head:after] = " " * (after - head)
        line[start:end] = cells
        if move:
            self.column = end

    def _erase(self, row: int, part: int) -> None:
        """Erase a row: from the cursor on (0), up to it (1), or all of it (2, 3)."""
        line = self.rows[row]
        self.erased.add(row)
        if part != 1:
            del line[self.column if part == 0 else 0 :]
        else:
            line[: self.column + 1] = " " * min(self.column + 1, len(line))

    def _switch(self, opens: bool) -> None:
        """Open an empty screen for a program, or show again the one that was there before."""
        if opens and self.other is None:
            self.other = _Screen()
            self.other.rows, self.other.row, self.other.column = self.rows, self.row, self.column
            self.other.erased, self.rows, self.erased = self.erased, [[]], set()
            self.row = self.column = 0
        elif not opens and (below := self.other) is not None:
            self.rows, self.row, self.column, self.erased = below.rows, below.row, below.column, below.erased
            self.other = None
