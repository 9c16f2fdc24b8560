"""Tables of data sets: what is read, and that what is wrong is refused by file, line and column."""
import math
import os
import re
import sys
import unicodedata
import wave
from pathlib import Path

import pandas as pd
import pytest
import soundfile

from conftest import change_table, tone
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
    pytest.param("\ufefffilename,fold".encode("utf-16"), "encoding", id="UTF-16"),
    pytest.param(HEADER + b"\na,1,0,\xe9,True\n", "encoding", id="Latin-1"),
    pytest.param(b"", "", id="empty"),
    pytest.param(b"\n\n", "", id="blank"),
    pytest.param(b"filename,fold\na,1\n", "target, category, esc10", id="columns missing"),
    pytest.param(HEADER.replace(b",", b";") + b"\na;1;0;dog;True\n", "semicolons", id="semicolons"),
    pytest.param(HEADER.replace(b",", b";") + b"\na;1,5;0;dog;True\n", "semicolons", id="semicolons and decimal commas"),
    pytest.param(HEADER + b'\n"a\nb",1,0,dog,True\n"c,1,0,dog,True\nd,1,0,dog,True\n', "line 4", id="open quote"),
    pytest.param(HEADER + b"\n\na,1,0,dog\n", "line 3: esc10", id="row too short"),
    pytest.param(HEADER + b'\n"a\nb",1,0,dog,True\nb,2,1,cat,True,x\n', "line 4", id="row too long"),
    pytest.param(HEADER + b',fold\na,1,0,dog,True,2\n', "fold", id="a column twice"),
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
    assert list(table.columns) == ["filename", "fold", "target", "category", "esc10", "file"] and len(table) == 4
    assert table["fold"].tolist() == [1, 1, 2, 2] and table["target"].tolist() == [0, 1, 0, 1]
    assert table["esc10"].dtype == bool and table["esc10"].all()


def test_byte_order_mark_crlf_quotes_and_blank_lines_are_read(own_root):
    expected = tables.read_esc50(own_root)
    path = own_root / "meta" / "esc50.csv"
    lines = path.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*quoted[:2], "", *quoted[2:], "", ""]).encode())
    pd.testing.assert_frame_equal(tables.read_esc50(own_root), expected)


def test_spaces_before_a_cell_mean_nothing(own_root):
    expected = tables.read_esc50(own_root)
    path = own_root / "meta" / "esc50.csv"
    lines = [", ".join(f'"{cell}"' for cell in line.split(",")) for line in path.read_text().splitlines()]
    path.write_text("\n".join([*lines[:2], "  ", " , ", *lines[2:]]))
    pd.testing.assert_frame_equal(tables.read_esc50(own_root), expected)


def test_names_that_look_like_missing_values_are_names(own_root):
    path = change_table(own_root, lambda table: table.assign(category=table["target"].map({"0": "NA", "1": "été 音"})))
    assert tables.read_esc50(own_root)["category"].tolist() == ["NA", "été 音"] * 2
    path.write_text(path.read_text().replace("True", "TRUE"))
    assert tables.read_esc50(own_root)["esc10"].all()


# --- layouts ----------------------------------------------------------------------------------------------------------

def write_sounds(root: Path, names: list[str]) -> Path:
    """Recordings of a twentieth of a second."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(root / name), "wb") as file:
            file.setparams((1, 2, 8000, 400, "NONE", ""))
            file.writeframes(bytes(800))
    return root


def write_table(root: Path, *lines: str, name: str = "metadata.csv") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def refused(root: Path, folds=None) -> str:
    with pytest.raises(UserError) as refusal:
        tables.read_table(root, folds)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


URBANSOUND = "slice_file_name,fsID,start,end,salience,fold,classID,class"


def test_urbansound8k_is_read_as_published(tmp_path):
    root = write_table(tmp_path, URBANSOUND, "100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark",
                       "100263-2-0-117.wav,100263,58.5,62.5,1,10,2,children_playing", name="metadata/UrbanSound8K.csv")
    layout, table, notes = tables.read_table(root)
    assert layout == "UrbanSound8K" and len(notes) == 1 and "children_playing (1); dog_bark (1)" in notes[0], "of each one clip"
    assert table["file"].tolist() == ["audio/fold10/100263-2-0-117.wav", "audio/fold5/100032-3-0-0.wav"]
    assert table["category"].tolist() == ["children_playing", "dog_bark"] and table["fold"].tolist() == [10, 5]
    # its start and end are those of the clip in its source: the file is the clip
    assert table["start"].tolist() == [0.0, 0.0] and table["end"].isna().all()
    assert "--folds 5" in refused(root, folds=5)


def test_a_table_of_ones_own_has_parts_groups_and_other_columns(tmp_path):
    root = write_table(tmp_path, "file_name,label,start,end,group,place", "day/a.wav,rain,,,,roof", "b.mp3,dog,2.5,7,street,yard",
                       "b.mp3,cat,7,9.5,street,yard", "c.wav,dog,,,,", "d.wav,rain,1,,,")
    layout, table, notes = tables.read_table(root, folds=2)
    assert layout == "a table" and table["file"].tolist() == ["b.mp3", "b.mp3", "c.wav", "d.wav", "day/a.wav"]
    assert table["start"].tolist() == [2.5, 7.0, 0.0, 1.0, 0.0] and table["end"].tolist()[:2] == [7.0, 9.5]
    assert table["end"].isna().tolist() == [False, False, True, True, True]
    assert table["category"].tolist() == ["dog", "cat", "dog", "rain", "rain"] and table["place"][4] == "roof"
    assert table["group"].tolist() == ["street", "street", "c.wav", "d.wav", "day/a.wav"]
    assert set(table["fold"]) == {1, 2} and table["fold"][0] == table["fold"][1]
    assert len(notes) == 3 and notes[0].endswith(": place") and "assigned to 2" in notes[1] and "cat (1)" in notes[2]


def test_columns_of_ones_own_table_are_found_however_they_are_written(tmp_path):
    root = write_table(tmp_path, "File_Name, label, Fold,GROUP,group", "a.wav,x,2,p,q", "b.wav,y,1,p,r")
    _, table, _ = tables.read_table(root)
    assert table["fold"].tolist() == [2, 1] and table["group"].tolist() == ["q", "r"]


def test_a_column_of_ones_own_table_in_two_spellings_is_refused(tmp_path):
    assert "fold" in refused(write_table(tmp_path, "file_name,label,Fold,FOLD", "a.wav,x,2,1", "b.wav,y,1,2"))


@pytest.mark.skipif(sys.platform == "darwin", reason="both spellings are one name there")
def test_names_in_a_table_are_found_in_the_disks_spelling(tmp_path):
    name, on_disk = (unicodedata.normalize(form, "ガラス/ü.wav") for form in ("NFC", "NFD"))  # accents in and beside letters
    write_sounds(tmp_path, [on_disk, "a.wav"])
    _, table, _ = tables.read_table(write_table(tmp_path, "file_name,label,fold", f"{name},x,1", "a.wav,y,2", "ö.wav,y,2"))
    assert table["file"].tolist() == ["a.wav", "ö.wav", on_disk]
    assert "once" in refused(write_table(tmp_path, "file_name,label", f"{name},x", f"{on_disk},x", "a.wav,y"))


@pytest.mark.skipif(sys.platform == "darwin", reason="both spellings are one name there")
def test_a_class_in_two_spellings_is_one(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    table = write_table(tmp_path / "table", "file_name,label", f"a.wav,{composed}", f"b.wav,{decomposed}", "c.wav,x")
    folders = write_sounds(tmp_path / "folders", [f"{composed}/a.wav", f"{decomposed}/b.wav", "x/c.wav"])
    for root in (table, folders):
        assert set(tables.read_table(root, folds=2)[1]["category"]) == {composed, "x"}


def test_columns_that_mean_nothing_are_told(tmp_path):
    rows = [f"{number}.wav,{label},{number % 2 + 1},," for number, label in enumerate("xxyy")]
    for columns, told in (("fold,groups,split", ["groups; split"]), ("fold,group,end", [])):
        _, _, notes = tables.read_table(write_table(tmp_path, f"file_name,label,{columns}", *rows))
        assert [note.rpartition(": ")[2] for note in notes] == told


def test_spaces_around_a_group_or_fold_mean_nothing(tmp_path):
    root = write_table(tmp_path, "file_name,label,fold,group", "a.wav,x,2 ,roof", "b.wav,y, 1,roof ", "c.wav,y,1, ")
    _, table, notes = tables.read_table(root)
    assert table["fold"].tolist() == [2, 1, 1] and table["group"].tolist() == ["roof", "roof", "c.wav"]
    assert "roof" in notes[0], "in two folds"


@pytest.mark.parametrize("line, column, rows", [
    (3, "label", ["a.wav,rain,0,5", "b.wav,,0,5"]),
    (2, "file_name", ["../a.wav,rain,0,5", "b.wav,dog,0,5"]),
    (2, "file_name", [",rain,0,5", "b.wav,dog,0,5"]),
    (2, "file_name", ["/etc/passwd,rain,0,5", "b.wav,dog,0,5"]),
    (4, "file_name", ["a.wav,rain,0,5", "b.wav,dog,0,5", "a.wav,dog,0,7"]),
    (3, "end", ["a.wav,rain,0,5", "b.wav,dog,5,5"]),
    (3, "start", ["a.wav,rain,0,5", "b.wav,dog,x,5"]),
    (3, "start", ["a.wav,rain,0,5", "b.wav,dog,-1,5"]),
    (3, "end", ["a.wav,rain,0,5", "b.wav,dog,0,inf"])])
def test_a_bad_cell_of_ones_own_table_is_refused_by_line_and_column(tmp_path, line, column, rows):
    message = refused(write_table(tmp_path, "file_name,label,start,end", *rows))
    assert re.search(rf"metadata.csv: line {line}: {column} is ", message)


def test_lines_are_counted_past_cells_with_line_breaks_and_blank_lines(tmp_path):
    message = refused(write_table(tmp_path, 'file_name,label,"a\nremark"', 'a.wav,rain,"two\nlines"', "", "b.wav,,", "c.wav,,"))
    assert "metadata.csv: line 6: label is " in message


@pytest.mark.parametrize("column, values, line", [
    ("fold", ["1", "2", "1"], 4), ("fold", ["1", "", "1"], 3), ("fold", ["1", "2.5", "1"], 3), ("group", ["x", "x", "y"], 4)])
def test_folds_and_groups_are_those_of_a_whole_recording(tmp_path, column, values, line):
    rows = [f"{name},{label},{start},{value}" for name, label, start, value in zip(
        ("a.wav", "b.wav", "b.wav"), ("rain", "dog", "dog"), (0, 0, 5), values)]
    root = write_table(tmp_path, f"file_name,label,start,{column}", *rows)
    assert f"line {line}: {column} is " in refused(root)


def test_given_folds_are_kept_and_a_group_in_two_of_them_is_told(tmp_path):
    root = write_table(tmp_path, "file_name,label,fold,group", "a.wav,rain,0,roof", "b.wav,dog,7,roof", "c.wav,dog,0,")
    _, table, notes = tables.read_table(root)
    assert table["fold"].tolist() == [0, 7, 0] and len(notes) == 2 and "roof" in notes[0] and "rain (1)" in notes[1]


def test_classes_that_are_not_in_all_folds_are_told(tmp_path):
    folds = {"everywhere": [1, 2, 3], "alone": [2, 2, 2], "twice": [1, 3, 1]}
    rows = [f"{label}{number}.wav,{label},{fold}" for label in folds for number, fold in enumerate(folds[label])]
    _, _, notes = tables.read_table(write_table(tmp_path, "file_name,label,fold", *rows))
    assert len(notes) == 1 and notes[0].endswith(": alone (1); twice (2)") and "3 folds" in notes[0]
    one_fold = [row.rpartition(",")[0] + ",1" for row in rows]
    assert tables.read_table(write_table(tmp_path, "file_name,label,fold", *one_fold))[2] == []


def test_folders_are_classes_and_what_lies_below_them_counts(tmp_path):
    write_sounds(tmp_path, ["rain/b.wav", "rain/2024/roof/a.WAV", "dog/c.wave", "dog/._c.wave", "雨/d.wav", "loose.wav",
                            "$RECYCLE.BIN/e.wav", "lost+found/f.wav"])
    for name in ("labels.csv", "rain/notes.txt", "empty/readme.txt", "features/logmel-0.npy", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    layout, table, notes = tables.read_table(tmp_path, folds=2)
    assert layout == "folders" and table["file"].tolist() == ["dog/c.wave", "rain/2024/roof/a.WAV", "rain/b.wav", "雨/d.wav"]
    assert table["category"].tolist() == ["dog", "rain", "rain", "雨"]
    assert sum("empty" in note for note in notes) == 1 and not any("features" in note or ".git" in note for note in notes)
    assert sum("labels.csv; loose.wav" in note for note in notes) == 1


def deny(function, locked: str):
    """The function, which may not read what begins with this name."""
    def denied(path, *arguments, **options):
        if str(path).startswith(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *arguments, **options)
    return denied


def test_a_folder_that_may_not_be_read_is_listed_itself(tmp_path, monkeypatch):
    write_sounds(tmp_path, [f"{name}/{number}.wav" for name in ("rain", "dog", "locked") for number in range(2)])
    monkeypatch.setattr(os, "scandir", deny(os.scandir, str(tmp_path / "locked")))
    monkeypatch.setattr(os, "stat", deny(os.stat, str(tmp_path / "locked") + os.sep))
    _, table, _ = tables.read_table(tmp_path, folds=2)
    assert table["file"].tolist() == ["dog/0.wav", "dog/1.wav", "locked", "rain/0.wav", "rain/1.wav"]


def test_a_link_to_itself_is_passed_over_and_told(tmp_path):
    write_sounds(tmp_path, [f"{name}/{i}.wav" for name in ("rain", "dog") for i in range(2)])
    (tmp_path / "loop").symlink_to("loop")
    _, table, notes = tables.read_table(tmp_path, folds=2)
    assert set(table["category"]) == {"dog", "rain"} and notes[0].endswith("passed over: loop")


def test_links_to_one_recording_are_never_divided_and_told(tmp_path):
    write_sounds(tmp_path, [f"{name}/{number}.wav" for name in ("rain", "dog") for number in range(3)])
    (tmp_path / "dog" / "again.wav").symlink_to("../rain/0.wav")
    (tmp_path / "whole").symlink_to(".")
    _, table, notes = tables.read_table(tmp_path, folds=2)
    assert dict(zip(table["file"], table["group"]))["rain/0.wav"] == "dog/again.wav", "by names below the folder alone"
    assert set(table["category"]) == {"rain", "dog"} and len(table) == 7
    assert table[table["file"].isin(["dog/again.wav", "rain/0.wav"])]["fold"].nunique() == 1
    assert sum("1 recording is in several classes, by links (as dog/again.wav)" in note for note in notes) == 1
    rows = [f"{file},{file[:4]},{fold}" for file, fold in zip(table["file"], table["fold"])]
    notes = tables.read_table(write_table(tmp_path, "file_name,label,fold", *rows))[2]
    assert sum("1 recording is in several classes, by links (as dog/again.wav)" in note for note in notes) == 1, "in a table, too"


def test_a_broken_link_to_a_table_is_refused_where_folders_would_be_taken(tmp_path):
    write_sounds(tmp_path, ["rain/a.wav", "dog/b.wav"])
    (tmp_path / "metadata.csv").symlink_to("absent.csv")
    assert f"{tmp_path / 'metadata.csv'}: no such file" in refused(tmp_path)


def test_links_to_one_recording_are_never_divided_in_a_table(tmp_path):
    write_sounds(tmp_path, [f"{name}{number}.wav" for name in "ab" for number in range(5)])
    rows = []
    for name in ("a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", "b3", "b4"):
        (tmp_path / f"link-{name}.wav").symlink_to(f"{name}.wav")
        rows += [f"{name}.wav,{name[0]}", f"link-{name}.wav,{name[0]}"]
    _, table, _ = tables.read_table(write_table(tmp_path, "file_name,label", *rows))
    folds = dict(zip(table["file"], table["fold"]))
    assert all(folds[file] == folds[f"link-{file}"] for file in folds if not file.startswith("link-"))
    for column in ("fold", "group"):
        message = refused(write_table(tmp_path, f"file_name,label,{column}", "a0.wav,x,1", "b0.wav,y,2", "link-a0.wav,x,2"))
        assert f"line 4: {column} is '2'" in message


@pytest.mark.parametrize("names, words", [
    ([], "holds no data set"), (["rain/a.wav", "rain/b.wav"], "one class (rain)"), (["audio/a.wav"], "meta/esc50.csv"),
    (["audio/a.wav", "dog/b.wav"], "meta/esc50.csv"), (["a.wav", "b.wav"], "holds no data set"),
    (["Train/dog/a.wav", "test/dog/b.wav"], "Train, test")])
def test_folders_that_hold_no_data_set_are_refused(tmp_path, names, words):
    assert words in refused(write_sounds(tmp_path, names)) and f"--data {tmp_path}" in refused(tmp_path)


@pytest.mark.parametrize("inner", ["meta/esc50.csv", "metadata/UrbanSound8K.csv"])
def test_a_folder_of_data_folders_is_no_data_folder(tmp_path, inner):
    write_table(write_sounds(tmp_path, ["ESC-50/audio/a.wav", "demo/audio/b.wav"]), "its,columns", name=f"ESC-50/{inner}")
    message = refused(tmp_path)  # else it would have two classes, ESC-50 and demo
    assert f"--data {tmp_path}" in message and "ESC-50" in message and inner in message


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "absent")


def test_a_data_folder_that_may_not_be_listed_is_refused_without_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"--data {tmp_path}: may not be read" in refused(tmp_path)
    assert len(tables.read_table(write_table(tmp_path, "file_name,label,fold", "a.wav,x,1", "b.wav,y,1"))[1]) == 2, "it is found"


def test_of_several_layouts_the_first_is_taken_and_told(own_root, tmp_path):
    write_table(own_root, "file_name,label", "audio/a.wav,x", "audio/b.wav,y")
    layout, _, notes = tables.read_table(own_root)
    assert layout == "ESC-50" and notes == [f"{own_root} holds ESC-50 and a table; ESC-50 is used"]
    write_table(tmp_path / "us", URBANSOUND, "a.wav,1,0,1,1,5,3,dog", "b.wav,1,0,1,1,1,2,child", name="metadata/UrbanSound8K.csv")
    assert tables.read_table(write_table(tmp_path / "us", "file_name,label", "a.wav,x", "b.wav,y"))[0] == "UrbanSound8K"


def test_assigned_folds_are_stratified_whole_in_groups_and_the_same_in_any_order(tmp_path):
    rows = [f"{label}/{number}.wav,{label},{label}-{number // 2}" for label in ("rain", "dog", "cat") for number in range(20)]
    _, table, notes = tables.read_table(write_table(tmp_path / "one", "file_name,label,group", *rows))
    _, other, _ = tables.read_table(write_table(tmp_path / "other", "file_name,label,group", *reversed(rows)))
    assert len(notes) == 1 and "assigned to 5" in notes[0] and sorted(table["fold"].unique()) == [1, 2, 3, 4, 5]
    assert (table.groupby(["fold", "category"]).size() == 4).all() and (table.groupby("group")["fold"].nunique() == 1).all()
    pd.testing.assert_frame_equal(table, other)


def test_more_folds_than_recordings_are_refused(tmp_path):
    write_sounds(tmp_path, ["rain/a.wav", "rain/b.wav", "dog/c.wav"])
    assert "--folds 5" in refused(tmp_path) and "2" in refused(tmp_path)
    assert set(tables.read_table(tmp_path, 2)[1]["fold"]) == {1, 2}


@pytest.mark.parametrize("seconds, spans", [
    (0.5, [(0, 0.5)]), (5.05, [(0, 5)]), (5.9, [(0, 5)]), (6.5, [(0, 5), (5, 6.5)]), (10, [(0, 5), (5, 10)])])
def test_split_long_makes_clips_of_all_but_a_short_rest(tmp_path, seconds, spans):
    for name, length in (("a.wav", seconds), ("b.wav", 5)):
        (tmp_path / name[0]).mkdir()
        soundfile.write(tmp_path / name[0] / name, tone(length, 8000), 8000)
    table = pd.DataFrame({"file": ["a/a.wav", "b/b.wav"], "start": 0.0, "end": [math.nan, math.nan]})
    found, _ = tables.split_long(tmp_path, table)
    mine = found[found["file"] == "a/a.wav"]
    assert list(zip(mine["start"], mine["end"])) == [pytest.approx(span, abs=0.01) for span in spans]
    far, _ = tables.split_long(tmp_path, pd.DataFrame({"file": ["a/a.wav"], "start": [1e14], "end": [math.nan]}))
    assert far["start"].tolist() == [1e14]
    part, _ = tables.split_long(tmp_path, pd.DataFrame({"file": ["a/a.wav"], "start": [0.25], "end": [3.0]}))
    assert part["start"].tolist() == [0.25] and part["end"][0] == pytest.approx(min(3, seconds), abs=0.01)
