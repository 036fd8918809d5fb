"""A picture inside the terminal window, for the terminals that have a way to show one."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from sdfleet.settings import Terminal

Protocol = Literal["kitty", "iterm2"]

# The kitty protocol takes at most this much base64 in one escape sequence.
_KITTY_CHUNK_CHARS = 4096


def protocol_of(terminal: Terminal) -> Protocol | None:
    """The way this terminal shows pictures; None when it has none, or something stands in between.

    Kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol. iTerm2: https://iterm2.com/documentation-images.html.
    """
    # tmux and screen swallow or garble both protocols unless set up for it.
    if terminal.is_ci or terminal.term in ("", "dumb") or terminal.term.startswith(("tmux", "screen")):
        return None
    if terminal.program in ("iTerm.app", "WezTerm"):
        return "iterm2"
    if terminal.is_kitty or terminal.term in ("xterm-kitty", "xterm-ghostty") or terminal.program == "ghostty":
        return "kitty"
    return None


def show(png: bytes, *, protocol: Protocol, stream: TextIO) -> None:
    """Write a PNG file to the terminal behind `stream`."""
    text = base64.standard_b64encode(png).decode("ascii")
    if protocol == "iterm2":
        stream.write(f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:{text}\x07\n")
    else:
        chunks = [text[i : i + _KITTY_CHUNK_CHARS] for i in range(0, len(text), _KITTY_CHUNK_CHARS)]
        for i, chunk in enumerate(chunks):
            # a=T: send and show; f=100: PNG; q=2: no answer, which would end up in the shell's input.
            first = "a=T,f=100,q=2," if i == 0 else ""
            stream.write(f"\x1b_G{first}m={int(i < len(chunks) - 1)};{chunk}\x1b\\")
        stream.write("\n")
    stream.flush()
