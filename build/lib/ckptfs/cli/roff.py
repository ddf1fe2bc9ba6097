"""A manual page in man(7), as far as ours need it: sections, paragraphs, lists of terms, lines for a shell.

Texts are plain, with backticks around what a user types: it is set in bold.
"""

import re
from textwrap import wrap

WIDTH = 78
"""Of a line of text in the source, as mandoc likes it."""


class Page:
    """A page that grows from its top to its end; ``date`` is YYYY-MM-DD."""

    def __init__(self, name: str, section: int, summary: str, *, version: str, date: str) -> None:
        self._lines = [
            f'.TH {name.upper()} {section} {date} "ckptfs {version}"',
            ".nh",  # words that a user types are not to be hyphenated
            ".ad l",
            ".ss 12 0",  # one space behind a sentence, wherever a source line ends
        ]
        self.section("NAME")
        self._lines.append(f"{escape(name)} \\- {escape(summary)}")

    def section(self, title: str) -> None:
        """Begin a section."""
        self._lines.append(f".SH {quoted(title)}")

    def subsection(self, title: str) -> None:
        """Begin a part of a section."""
        self._lines.append(f".SS {quoted(title)}")

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs; one that is indented is a line for a shell."""
        for paragraph in paragraphs:
            if paragraph.startswith(" "):
                self.example(paragraph)
            else:
                self._begin_paragraph()
                self._lines += marked(paragraph)

    def item(self, term: str, *paragraphs: str) -> None:
        """Add a term, in backticks where it is to be typed, and what it means."""
        first, *more = paragraphs
        self._lines += [".TP", *marked(term, width=0), *marked(first)]
        for paragraph in more:
            self._lines += [".IP", *marked(paragraph)]

    def example(self, text: str) -> None:
        """Add lines as they are typed."""
        lines = [_protected(escape(line.strip())) for line in text.strip().splitlines()]
        self._begin_paragraph()
        self._lines += [".RS 4", ".nf", *lines, ".fi", ".RE"]

    def _begin_paragraph(self) -> None:
        if not self._lines[-1].startswith((".SH", ".SS")):  # which have begun one
            self._lines.append(".PP")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


def marked(text: str, width: int = WIDTH) -> list[str]:
    """The lines of a text, with what is in backticks in bold; ``width`` 0: one line."""
    parts = re.split(r"`([^`]*)`", " ".join(text.split()))
    parts[1::2] = [f"\\fB{escape(part)}\\fR" for part in parts[1::2]]
    parts[::2] = [escape(part) for part in parts[::2]]
    line = "".join(parts)
    if not width:
        return [_protected(line)]
    return [_protected(part) for part in wrap(line, width, break_long_words=False, break_on_hyphens=False)]


def escape(text: str) -> str:
    """The characters of a text, and not what troff takes them for."""
    return text.translate(_ESCAPES)


def quoted(text: str) -> str:
    """An argument of a macro."""
    return '"' + escape(text).replace('"', "\\(dq") + '"'


def _protected(line: str) -> str:
    """A line that is no request, whatever it begins with."""
    return f"\\&{line}" if line[:1] in (".", "'") else line


_ESCAPES = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga"})
