"""README.ja.md says what README.md says."""
import re
from collections import Counter

import pytest

from conftest import PROJECT


def read(name: str) -> tuple[str, list[str]]:
    """The text of a README, and the lines of its code blocks, which are indented."""
    lines = (PROJECT / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("    ")), [line for line in lines if line.startswith("    ")]


def test_both_readmes_have_the_same_parts():
    (english, code), (japanese, japanese_code) = read("README.md"), read("README.ja.md")
    assert japanese_code == code
    for pattern in (r"^#+ ", r"!\[.*?\]\((.*?)\)", r"^\|.*?\|", r"^- "):  # headings, pictures, rows of tables, lists
        found, expected = (re.findall(pattern, text, re.MULTILINE) for text in (japanese, english))
        assert [part for part in found if not part.startswith("|")] == [part for part in expected if not part.startswith("|")]
        assert len(found) == len(expected)
    assert Counter(re.findall(r"`[^`]+`", japanese)) == Counter(re.findall(r"`[^`]+`", english))


def test_both_readmes_have_the_same_links_and_each_leads_to_the_other():
    links = [re.findall(r"\]\(([^#)][^)]*)\)", read(name)[0]) for name in ("README.md", "README.ja.md")]
    assert links[0].pop(0) == "README.ja.md" and links[1].pop(0) == "README.md"
    assert sorted(links[0]) == sorted(links[1])


@pytest.mark.parametrize("path", [*PROJECT.glob("README*.md"), *(PROJECT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_each_link_leads_to_a_file_and_a_heading(path):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        target = path.parent / name if name else path
        assert target.exists(), name
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], anchor


def test_both_readmes_have_the_same_numbers():
    """English spells out small ones."""
    english, japanese = (Counter(re.findall(r"\d+(?:\.\d+)*", read(name)[0])) for name in ("README.md", "README.ja.md"))
    assert not english - japanese
    assert all(number.isdecimal() and int(number) <= 10 for number in japanese - english)
