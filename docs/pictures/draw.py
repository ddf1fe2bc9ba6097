#!/usr/bin/env python3
"""Draws the pictures of the documentation: `docs/pictures/draw.py` writes the SVG files beside it."""

from collections.abc import Callable
from html import escape
from pathlib import Path

BLUE, GREEN, YELLOW, RED, GREY = "#cfe2f3", "#d9ead3", "#fff2cc", "#f4cccc", "#eeeeee"


class Picture:
    """Shapes on a white ground; positions are in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="13">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, text: str = "", fill: str = GREY) -> None:
        """A box, with its text in the middle; a line of text for each line."""
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#555"/>')
        lines = text.splitlines()
        for number, line in enumerate(lines):
            self.text(
                x + width // 2, y + height // 2 + 5 + 17 * number - 17 * (len(lines) - 1) // 2, line, "middle"
            )

    def text(self, x: int, y: int, text: str, anchor: str = "start") -> None:
        """A line of text."""
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, x: int, y: int, to_x: int, to_y: int, text: str = "", both: bool = False) -> None:
        """An arrow, with a text beside its middle."""
        start = ' marker-start="url(#tip)"' if both else ""
        self._parts.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="black"{start} marker-end="url(#tip)"/>'
        )
        if text:
            middle_x, middle_y = (x + to_x) // 2, (y + to_y) // 2
            if x == to_x:
                self.text(middle_x + 7, middle_y, text)
            else:
                self.text(middle_x, middle_y - 6, text, "middle")

    def line(self, x: int, y: int, to_x: int, to_y: int) -> None:
        """A dashed line."""
        self._parts.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="#999" stroke-dasharray="4 3"/>'
        )

    def svg(self) -> str:
        """The file."""
        return "\n".join([*self._parts, "</svg>", ""])


def where_ram_lies() -> Picture:
    """Who serves a page to the guest: with a mount, and without."""
    picture = Picture(760, 330, "Where RAM lies and who serves it")
    picture.text(180, 24, "on a mount", "middle")
    picture.box(60, 40, 240, 44, "QEMU: the guest's RAM, mapped", BLUE)
    picture.box(60, 124, 240, 44, "the kernel's page cache", GREY)
    picture.box(60, 208, 240, 44, "daemon: pages written since", YELLOW)
    picture.box(60, 276, 240, 40, "checkpoint file (the base)", GREEN)
    picture.arrow(180, 84, 180, 124, "first touch of a page", both=True)
    picture.arrow(180, 168, 180, 208, "FUSE: read, write back", both=True)
    picture.arrow(180, 276, 180, 252, "read what nobody has written")
    picture.text(560, 24, "ckptfs run, or RAM of QEMU's own", "middle")
    picture.box(440, 40, 240, 44, "QEMU: what the guest has written", YELLOW)
    picture.box(440, 124, 240, 44, "the kernel's page cache", GREY)
    picture.box(440, 276, 240, 40, "checkpoint file", GREEN)
    picture.arrow(500, 124, 500, 84, "mapped private")
    picture.arrow(500, 276, 500, 168, "read ahead")
    picture.arrow(700, 62, 700, 296)
    picture.line(680, 62, 700, 62)
    picture.line(700, 296, 680, 296)
    picture.text(690, 246, "ckptfs save --qmp", "end")
    return picture


def live_save() -> Picture:
    """What happens when, in a save of a machine whose RAM is on the mount."""
    picture = Picture(760, 250, "The time line of a live save")
    for y, name in ((50, "guest"), (110, "QEMU"), (170, "daemon")):
        picture.text(10, y + 20, name)
    picture.box(80, 50, 200, 30, "runs", GREEN)
    picture.box(280, 50, 120, 30, "stands still", RED)
    picture.box(400, 50, 340, 30, "runs", GREEN)
    picture.box(280, 110, 120, 30, "device state", BLUE)
    picture.box(120, 170, 160, 30, "flush, while it runs", GREY)
    picture.box(280, 170, 120, 30, "flush, new epoch", YELLOW)
    picture.box(400, 170, 200, 30, "write pages", GREY)
    picture.box(600, 170, 100, 30, "sync, rename", BLUE)
    for x, word in ((120, "save"), (280, "stop"), (400, "cont"), (700, "ok saved")):
        picture.line(x, 36, x, 210)
        picture.text(x, 28, word, "middle")
    picture.arrow(280, 222, 400, 222, both=True)
    picture.text(340, 240, "the pause: milliseconds", "middle")
    return picture


def life_of_a_page() -> Picture:
    """The states that pages/ shows, and what leads from one to another."""
    picture = Picture(760, 290, "The life of a page")
    picture.box(40, 40, 150, 50, "0: zero", GREY)
    picture.box(40, 170, 150, 50, "1: in the checkpoint,\nnot read yet", GREEN)
    picture.box(330, 170, 130, 50, "2: read", BLUE)
    picture.box(570, 100, 150, 50, "3: written since", YELLOW)
    picture.arrow(190, 195, 330, 195, "read, restore")
    picture.arrow(190, 60, 570, 110, "write")
    picture.arrow(460, 190, 570, 142, "write")
    picture.arrow(190, 178, 568, 128, "write")
    for corner in ((610, 150, 610, 242), (610, 242, 395, 242), (680, 150, 680, 272), (680, 272, 115, 272)):
        picture.line(*corner)
    picture.arrow(395, 242, 395, 222)
    picture.arrow(115, 272, 115, 222)
    picture.text(500, 236, "save", "middle")
    picture.text(400, 286, "reset: as in the checkpoint, or zero", "middle")
    return picture


def addresses() -> Picture:
    """How the blocks of a PC with 5 GiB lie in its physical memory."""
    picture = Picture(760, 260, "RAM blocks and guest-physical addresses")
    picture.text(10, 60, "blocks")
    picture.text(10, 200, "physical")
    picture.box(90, 40, 450, 34, "pc.ram: 5 GiB", GREEN)
    picture.box(560, 40, 70, 34, "vga.vram", BLUE)
    picture.box(650, 40, 70, 34, "pc.bios", YELLOW)
    picture.box(90, 180, 270, 34, "pc.ram, 0 to 3 GiB", GREEN)
    picture.box(360, 180, 90, 34, "", "white")
    picture.text(405, 172, "the hole", "middle")
    picture.box(450, 180, 180, 34, "pc.ram, 3 to 5 GiB", GREEN)
    picture.box(372, 180, 26, 34, "", BLUE)
    picture.box(422, 180, 26, 34, "", YELLOW)
    for block, physical in ((90, 90), (360, 360), (360, 450), (540, 630)):
        picture.line(block, 74, physical, 180)
    picture.arrow(595, 74, 388, 178)
    picture.arrow(685, 74, 436, 178)
    for x, word in ((90, "0"), (360, "3 GiB"), (450, "4 GiB"), (630, "6 GiB")):
        picture.text(x, 234, word, "middle")
    picture.text(90, 254, "views/map lists these ranges; views/phys has them at their addresses.")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "where-ram-lies": where_ram_lies,
    "live-save": live_save,
    "life-of-a-page": life_of_a_page,
    "addresses": addresses,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg())
