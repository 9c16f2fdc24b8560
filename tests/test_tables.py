"""Tables of data sets: what is read, and that what is wrong is refused by file, line and column."""
import re
from pathlib import Path

import pandas as pd
import pytest

from conftest import change_table
from util import tables
from util.errors import UserError


def refusal_of(root: Path) -> str:
    """The message with which a data folder's table is refused: one line that names the file, or the folder that has none."""
    with pytest.raises(UserError) as refusal:
        tables.read_esc50(root)
    message = str(refusal.value)
    path = root / "meta" / "esc50.csv"
    assert str(path if path.exists() else root) in message and "\n" not in message
    return message


def set_value(column, value, row=1):
    def change(table):
        table.loc[row, column] = value
    return change


@pytest.mark.parametrize("line, column, change", [
    (3, "fold", set_value("fold", "2.5")),
    (3, "fold", set_value("fold", "0")),
    (3, "fold", set_value("fold", "6")),
    (3, "fold", set_value("fold", "")),
    (5, "fold", set_value("fold", "x", row=3)),
    (3, "target", set_value("target", "50")),
    (3, "target", set_value("target", "-1")),
    (3, "target", set_value("target", "dog")),
    (3, "target", set_value("target", "9" * 30)),
    (3, "esc10", set_value("esc10", "maybe")),
    (3, "category", set_value("category", " ")),
    (3, "category", set_value("category", "two\nlines")),
    (3, "filename", set_value("filename", "1-0-A-0.wav")),  # that of another clip
    (3, "filename", set_value("filename", "../../etc/passwd")),
    (3, "filename", set_value("filename", "C:\\a.wav")),
    (3, "filename", set_value("filename", "..")),
    (3, "filename", set_value("filename", "")),
    (3, "filename", set_value("filename", "a\0.wav")),
    (5, "category", set_value("category", "other", row=3)),  # another than the target's
    (5, "target", set_value("target", "7", row=3)),
])
def test_a_bad_cell_is_refused_by_line_and_column(own_root, line, column, change):
    change_table(own_root, change)
    assert re.search(rf"\bline {line}: {column} ", refusal_of(own_root))


def test_lines_are_counted_as_an_editor_does(own_root):
    path = change_table(own_root, set_value("fold", "9", row=3))
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, "", "", *rows[:2], "", *rows[2:]]))
    assert "line 8: fold " in refusal_of(own_root)


HEADER = b"filename,fold,target,category,esc10"


@pytest.mark.parametrize("content, words", [
    pytest.param(b"\xff\xfe\x00", "UTF-8", id="not UTF-8"),
    pytest.param(b"", "", id="empty"),
    pytest.param(b"\n\n", "", id="blank"),
    pytest.param(b"filename,fold\na,1\n", "target, category, esc10", id="columns missing"),
    pytest.param(HEADER.replace(b",", b";") + b"\na;1;0;dog;True\n", "comma", id="semicolons"),
    pytest.param(HEADER + b'\n"a,1,0,dog,True\n', "", id="open quote"),
    pytest.param(HEADER + b"\n\na,1,0,dog\n", "line 3: esc10", id="row too short"),
    pytest.param(HEADER + b"\na,1,0,dog,True\nb,2,1,cat,True,x\n", "line 3", id="row too long"),
    pytest.param(HEADER + b"\na,1,0,dog,True,\nb,2,1,cat,True,\n", "", id="every row too long"),
    pytest.param(HEADER + b"\n", "lists no clips", id="no rows"),
    pytest.param(HEADER + b"\n" * (tables.MAX_TABLE_BYTES + 1), "16 MB", id="too large"),
])
def test_files_that_are_no_table_are_refused(own_root, content, words):
    (own_root / "meta" / "esc50.csv").write_bytes(content)
    assert words in refusal_of(own_root)


def test_a_folder_without_a_table_is_refused_with_what_to_do(tmp_path):
    message = refusal_of(tmp_path)
    assert message.startswith(f"--data {tmp_path}") and "--download" in message and "--demo" in message


def test_the_columns_have_their_types(own_root):
    table = tables.read_esc50(own_root)
    assert list(table.columns) == ["filename", "fold", "target", "category", "esc10"] and len(table) == 4
    assert table["fold"].tolist() == [1, 1, 2, 2] and table["target"].tolist() == [0, 1, 0, 1]
    assert table["esc10"].dtype == bool and table["esc10"].all()


def test_byte_order_mark_crlf_quotes_and_blank_lines_are_read(own_root):
    expected = tables.read_esc50(own_root)
    path = own_root / "meta" / "esc50.csv"
    lines = path.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*quoted[:2], "", *quoted[2:], "", ""]).encode())
    pd.testing.assert_frame_equal(tables.read_esc50(own_root), expected)


def test_names_that_look_like_missing_values_are_names(own_root):
    path = change_table(own_root, lambda table: table.assign(category=table["target"].map({"0": "NA", "1": "été 音"})))
    assert tables.read_esc50(own_root)["category"].tolist() == ["NA", "été 音"] * 2
    path.write_text(path.read_text().replace("True", "TRUE"))
    assert tables.read_esc50(own_root)["esc10"].all()
