"""What the reader of pages refuses: code that nobody would run, and quotations of nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.page import Block, blocks


def read(tmp_path: Path, text: str) -> list[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    return list(blocks(path))


@pytest.mark.parametrize(
    "text",
    [
        "```\nip link\n```\n",
        "```console\n$ ip link\n```\n",
        "```sh host1 here\nip link\n```\n",
        "1. List:\n\n   ```sh host1\n   ip link\n   ```\n",
        "List:\n\n    ip link\n",
        "```sh host1\nip link\n",
    ],
)
def test_code_that_nobody_would_run_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError, match=r"page\.md"):
        read(tmp_path, text)


def test_a_page(tmp_path: Path) -> None:
    text = (
        "# Page\n\n```sh host1 host2\nexport A=1\nip link \\\n  show\n```\n\n"
        "<!-- host1 fails\nfalse\n-->\n\n```text\nno …\n```\n\n```text of flanneld\nwell\n```\n"
        "\n<!-- a remark -->\n"
    )
    run, fault, said, quoted = read(tmp_path, text)
    assert (run.hosts, run.ends, run.exports) == (("host1", "host2"), "", "export A=1\n")
    assert run.commands == ["export A=1", "ip link show"]
    assert (fault.hosts, fault.ends, fault.line) == (("host1",), "fails", 9)
    assert (said.kind, said.is_quotation, quoted.is_quotation) == ("text", False, True)


@pytest.mark.parametrize(
    ("text", "printed", "found"),
    [
        ("state  ready", "x\n  state     ready\n", True),
        ("a … d\ne", "a b\nc d\nf e", True),
        ("b\na", "a\nb\n", False),
        ("a.c", "abc", False),
    ],
)
def test_quoted_lines_come_in_their_order(text: str, printed: str, found: bool) -> None:
    assert Block(1, "text", (), "", text).is_printed_in(printed) is found
