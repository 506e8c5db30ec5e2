"""What there is to run on a page of the documentation.

A fence `sh HOST...` holds commands for these hosts; `fails` after the hosts says that the last of
them does, `stays` that it is a daemon. A comment `<!-- HOST...` holds commands that the reader does
not see, such as the fault that a paragraph is about. A fence `text` holds lines of what the
commands before it printed, `…` standing for anything; `text of flanneld` and such are quotations
from elsewhere. A fence `sh` without a host holds commands that another page or test runs. Nothing
else may be fenced or indented as code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^(?:```(?P<info>[^\n]*)\n(?P<fenced>.*?)^```$|"
    r"<!-- (?P<hosts>[^\n]*)\n(?P<hidden>.*?)^-->$)",
    re.MULTILINE | re.DOTALL,
)
_EXPORT = re.compile(r"^export .*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block; `kind` is sh or text, `ends` is fails, stays or nothing."""

    line: int
    kind: str
    hosts: tuple[str, ...]
    ends: str
    text: str
    is_quotation: bool = False

    @property
    def exports(self) -> str:
        """The variables that later commands find, too."""
        return "".join(f"{line}\n" for line in _EXPORT.findall(self.text))

    @property
    def commands(self) -> list[str]:
        """The commands, each on one line; the lines of a here-document are one each."""
        return [
            " ".join(x.split()) for x in self.text.replace("\\\n", " ").splitlines() if x.strip()
        ]

    def is_printed_in(self, printed: str) -> bool:
        """Whether every line of a text occurs in what was printed, in this order."""
        wanted = re.split(r"…|\n", self.text.strip())
        pattern = ".*?".join(re.escape(" ".join(part.split())) for part in wanted)
        return re.search(pattern, " ".join(printed.split())) is not None


def blocks(path: Path) -> Iterator[Block]:
    """Yield what is to run and to compare; AssertionError at code that is neither."""
    text = path.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield _block(f"{path.name}:{line}", line, found)
    rest = _BLOCK.sub("", text)
    assert "```" not in rest, f"{path.name}: an unfinished or indented fence"
    assert not re.search(r"\n\n(    |\t)", rest), f"{path.name}: indented code, which nobody runs"


def _block(place: str, line: int, found: re.Match[str]) -> Block:
    if found["hidden"] is not None:
        kind, words, text = "sh", found["hosts"].split(), found["hidden"]
    else:
        kind, *words = found["info"].split() or [""]
        text = found["fenced"]
    assert kind in ("sh", "text"), f"{place}: {kind!r} is neither sh nor text"
    if kind == "text":
        return Block(line, kind, (), "", text, is_quotation=bool(words))
    ends = words.pop() if words[-1:] in (["fails"], ["stays"]) else ""
    hosts = tuple(words)
    assert all(re.fullmatch(r"host\d", x) for x in hosts), f"{place}: no host {hosts}"
    return Block(line, kind, hosts, ends, text)
