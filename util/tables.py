"""Which clips there are: the layouts of data folders -> one table, checked.

    ESC-50         meta/esc50.csv and audio/
    UrbanSound8K   metadata/UrbanSound8K.csv and audio/fold1 ... fold10
    a table        metadata.csv with file_name and label; perhaps fold, group, start and end (s)
    folders        a folder of recordings for each class
"""
import contextlib
import csv
import math
import os
import re
import reprlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from util import cache
from util.errors import UserError, check_regular_file, first_ten, reason
from util.recordings import ENDINGS, find_recordings, spell_all_as_on_disk
from util.waveforms import CLIP_SAMPLES, ENDS_EARLY, LONGER_SAMPLES, SAMPLE_RATE, count_seconds

# ESC-50 (Piczak, ACM MM 2015): 2000 clips, 50 classes, 5 folds.
NUM_CLASSES = 50
NUM_FOLDS = 5
COLUMNS = ["filename", "fold", "target", "category", "esc10"]
OPTIONAL = ["fold", "group", "start", "end"]  # columns of a table of one's own
URBANSOUND_COLUMNS = ["slice_file_name", "fold", "class"]  # of UrbanSound8K (Salamon et al., ACM MM 2014)
MAX_TABLE_BYTES = 16 * 10 ** 6  # of some 350 000 clips; ESC-50's table has 0.1 MB
MIN_REST_S = 1.0  # the rest of a longer recording that still makes a clip; chosen, not tuned
FOLDS_SEED = 0  # of its own: the folds of a data set do not change with --seed
SPLIT_FOLDERS = set("train training test testing val valid validation dev eval".split())  # of data sets, no classes
SYSTEM_FOLDERS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # of disks and ZIP files, no classes

ESC50_TABLE, URBANSOUND_TABLE, OWN_TABLE = Path("meta/esc50.csv"), Path("metadata/UrbanSound8K.csv"), Path("metadata.csv")


def read_table(root: Path, folds: int | None = None) -> tuple[str, pd.DataFrame, list[str]]:
    """The layout of a data folder, its table, and notes on what is odd about it.

    The table has a row a clip: file (path below root), category (class), fold, start and end (s; nan: of the recording), group
    (clips of one group are never divided between assigned folds), and the other columns of the folder's own table.
    folds: assign the clips to so many folds (default 5), where the folder has none; refused where it has.
    Raises UserError naming the file and line if the folder cannot be used.
    """
    readers = {"ESC-50": (ESC50_TABLE, read_esc50), "UrbanSound8K": (URBANSOUND_TABLE, read_urbansound8k),
               "a table": (OWN_TABLE, read_own_table)}
    if not root.is_dir():
        raise UserError(f"--data {root}: {'is a file' if root.exists() else 'no such folder'}; name a data folder, fetch ESC-50 "
                        f"with --download, or try --demo")
    found = [name for name, (table, _) in readers.items() if os.path.lexists(root / table)]  # a broken link is refused
    if not found and not os.access(root, os.R_OK | os.X_OK):  # what has a table need not be listed
        raise UserError(f"--data {root}: may not be read; change its permissions")
    notes = [f"{root} holds {' and '.join(found)}; {found[0]} is used"] if len(found) > 1 else []
    if not found and (root / "audio").is_dir():
        raise UserError(f"--data {root}: has audio/, but no {ESC50_TABLE}; fetch ESC-50 with --download, or add a table "
                        f"{OWN_TABLE} (file_name, label)")
    layout = found[0] if found else "folders"
    table = readers[layout][1](root) if found else read_folders(root, notes)
    table["category"] = table["category"].str.normalize("NFC")  # one class, whether é is one character or two, as on macOS
    table = table.assign(**{column: value for column, value in {"start": 0.0, "end": np.nan, "group": table["file"]}.items()
                            if column not in table})
    if layout != "ESC-50":
        table = table.sort_values(["file", "start"], kind="stable").reset_index(drop=True)  # a disk's own order does not count
    if table["category"].nunique() < 2 and layout != "ESC-50":
        raise UserError(f"--data {root}: has one class ({table['category'].iloc[0]}), taken as {layout}; expected two at least")
    if layout == "a table" and (others := [name for name in table if name not in
                                           ("file_name", "label", "file", "category", *OPTIONAL)]):
        notes.append(f"columns of {OWN_TABLE} that mean nothing here ({', '.join(OPTIONAL)} would): {first_ten(others)}")
    if layout in ("a table", "folders"):
        classes = table.groupby([recordings_of(root, table), "start"])["category"].nunique()
        if (classes > 1).any():
            said = "1 recording is" if (classes > 1).sum() == 1 else f"{(classes > 1).sum()} recordings are"
            notes.append(f"{said} in several classes, by links (as {classes.idxmax()[0]})")
    if "fold" in table:
        if folds:
            own = ", ".join(map(str, sorted(table["fold"].unique())))
            raise UserError(f"--folds {folds}: {root} has folds of its own ({own}); leave the flag out")
        split = table.groupby("group")["fold"].nunique()
        if (split > 1).any():
            groups = "1 group lies" if (split > 1).sum() == 1 else f"{(split > 1).sum()} groups lie"
            notes.append(f"{groups} in several folds (as {split.idxmax()}): accuracy is optimistic, as clips of one source are on"
                         f" both sides")
    else:
        folds = NUM_FOLDS if folds is None else folds
        table = assign_folds(root, table, folds)
        notes.append(f"there are no folds: the clips are assigned to {folds} (--folds)")
    counts, num_folds = table.groupby("category")["fold"].nunique(), table["fold"].nunique()
    if num_folds > 1 and (counts < num_folds).any():
        few = [f"{name} ({count})" for name, count in counts[counts < num_folds].items()]
        notes.append(f"classes missing in some of the {num_folds} folds, and how many have them (one in a single fold is never "
                     f"learned where it is validated): {first_ten(few)}")
    return layout, table.reset_index(drop=True), notes


def check_free(root: Path, flag: str, clips: set[str] | None = None) -> None:
    """Raise UserError unless clips may be written into this ESC-50 folder: it is empty, or has no others than these.

    clips: the names of their files; None: all that look like ESC-50's (1-100032-A-0.wav).
    """
    def listed(folder: Path) -> list[str]:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []

    others, names = [], listed(root / "audio")
    if (root / ESC50_TABLE).is_file():
        with contextlib.suppress(UserError):  # a damaged table is replaced
            names += list(read_esc50(root)["filename"])
    else:
        others = [name for name in listed(root) if name not in ("audio", "meta", "features")]
    others += [name for name in names if not (name in clips if clips else re.fullmatch(r"[1-5]-\d+-[A-Z]-\d+\.wav", name))]
    if others:
        raise UserError(f"{flag}: --data {root} holds other files ({'; '.join(others[:3])}); name a new folder, or an empty one")


def read_csv(path: Path, columns: list[str], remedy: str, optional: list[str] = ()) -> pd.DataFrame:
    """A table of text, its index the lines in the file. UserError if it is none, is empty, or lacks one of the columns.

    The named columns may be written with capitals and spaces: "Fold " is meant as fold; unread, it would let a source leak.
    """
    check_regular_file(path)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, expected {MAX_TABLE_BYTES / 1e6:.0f} at most; divide "
                        f"the clips between several data folders")
    try:
        (_, header), *rows = list(csv_rows(path)) or [(1, [])]
        for line, row in rows:
            if len(row) > len(header):
                raise UserError(f"line {line} has {len(row)} cells, and the first line has {len(header)}")
            row += [""] * (len(header) - len(row))  # blank lines have none, and are taken out below
        table = pd.DataFrame([row for _, row in rows], [line for line, _ in rows], header, dtype=str)
        plain = {name: name.strip().lower() for name in table}
        table = table.rename(columns={name: meant for name, meant in plain.items()
                                      if meant in (*columns, *optional) and meant not in table})
        if missing := [name for name in columns if name not in table]:
            raise UserError(f"it lacks {', '.join(missing)}; its first line is {reprlib.repr(','.join(header))}")
        twice = table.columns.duplicated()
        if several := [name for name in table.columns[twice] if name in (*columns, *optional)]:
            raise UserError(f"it has {several[0]} twice; remove one")
        table = table.loc[:, ~twice]  # of other columns the first
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; change its permissions") from error
    except (OSError, ValueError) as error:  # UserError is a ValueError
        why = reason(error)
        if isinstance(error, UnicodeDecodeError):
            why, remedy = "it is in another encoding", "save it as CSV in UTF-8"
        elif not isinstance(error, OSError) and b";" in path.read_bytes().split(b"\n")[0]:  # spreadsheets, where 0,5 is a half
            why, remedy = "it has semicolons", "save it with commas between columns, and points in numbers"
        raise UserError(f"{path}: is not a comma-separated table in UTF-8 with the columns {', '.join(columns)} ({why}); "
                        f"{remedy}") from error
    table = table[(table[columns] != "").any(axis=1)]  # no blank lines
    if table.empty:
        raise UserError(f"{path}: lists no clips, expected a row for each; {remedy}")
    return table


def csv_rows(path: Path):
    """Yield the first line in the file and the cells of each row. UserError naming the line if it is no CSV."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        line, reader = 1, csv.reader(file, strict=True, skipinitialspace=True)
        try:
            for row in reader:
                yield line, row
                line = reader.line_num + 1  # a cell in quotes may hold line breaks
        except csv.Error as error:
            raise UserError(f"line {line}: {error}") from error


def checker(path: Path, table: pd.DataFrame):
    """A function that raises UserError naming the first line whose value in a column is not valid."""
    def check(valid, column: str, expected: str) -> None:
        valid = np.asarray(valid, bool)
        if not valid.all():
            row = table.index[np.flatnonzero(~valid)[0]]
            raise UserError(f"{path}: line {row}: {column} is {reprlib.repr(table[column][row])}, expected {expected}")
    return check


def is_printable(names: pd.Series) -> pd.Series:
    return names.map(lambda name: name.isprintable() and name.strip() != "").astype(bool)


def read_esc50(root: str | Path) -> pd.DataFrame:
    """meta/esc50.csv of a folder, checked: columns file, filename, fold, target, category, esc10, one row a clip.

    Raises UserError naming the line if a value is not what ESC-50's table may hold.
    """
    path = Path(root) / ESC50_TABLE
    if not path.is_file():
        raise UserError(f"--data {root}: has no {ESC50_TABLE}; name an ESC-50 folder, fetch it with --download, or try --demo")
    table = read_csv(path, COLUMNS, "fix it, or fetch it again (--download)")[COLUMNS]
    check, names = checker(path, table), table["filename"]
    check(~((names == "") | names.str.contains(r"[/\\\x00]") | names.isin([".", ".."])), "filename",
          "the name of a file in audio/, without a folder")
    check(~names.duplicated(), "filename", "each file once")
    for column, low, high in (("fold", 1, NUM_FOLDS), ("target", 0, NUM_CLASSES - 1)):
        check(table[column].isin([str(value) for value in range(low, high + 1)]), column, f"a whole number from {low} to {high}")
    check(table["esc10"].str.lower().isin(["true", "false"]), "esc10", "True or False")
    check(is_printable(table["category"]), "category", "a printable name")
    for column, other in (("target", "category"), ("category", "target")):
        check(table[other] == table.groupby(column)[other].transform("first"), other, f"the same for every clip of one {column}")
    esc10 = table["esc10"].str.lower() == "true"
    return table.assign(fold=table["fold"].astype(int), target=table["target"].astype(int), esc10=esc10,
                        file="audio/" + names).reset_index(drop=True)


def read_urbansound8k(root: Path) -> pd.DataFrame:
    """metadata/UrbanSound8K.csv; its start and end are those of the clip in its source, and stay text in other columns."""
    path = root / URBANSOUND_TABLE
    table = read_csv(path, URBANSOUND_COLUMNS, "fetch it again")
    check = checker(path, table)
    check(~table["slice_file_name"].str.contains(r"^$|[/\\\x00]"), "slice_file_name", "the name of a file, without a folder")
    check(~table["slice_file_name"].duplicated(), "slice_file_name", "each file once")
    check(table["fold"].str.fullmatch(r"[0-9]{1,4}"), "fold", "a whole number")
    check(is_printable(table["class"]), "class", "a printable name")
    table = table.rename(columns={"start": "source_start", "end": "source_end"})
    return table.assign(file="audio/fold" + table["fold"] + "/" + table["slice_file_name"], fold=table["fold"].astype(int),
                        category=table["class"])


def recordings_of(root: Path, table: pd.DataFrame) -> pd.Series:
    """The recording of each row: its file, or of several links to one file the first by name."""
    targets = {name: os.path.realpath(root / name) for name in table["file"].unique()}
    return table.groupby(table["file"].map(targets))["file"].transform("min")


def read_own_table(root: Path) -> pd.DataFrame:
    """metadata.csv, as Hugging Face's AudioFolder has it: file_name, label; perhaps fold, group, start and end (s)."""
    path = root / OWN_TABLE
    table = read_csv(path, ["file_name", "label"], "fix it", OPTIONAL)
    check, names = checker(path, table), table["file_name"]
    inside = [not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name for name in names]
    check((names != "") & np.array(inside), "file_name", f"the path of a recording below {root}")
    check(is_printable(table["label"]), "label", "a printable name")
    table = table.assign(file=spell_all_as_on_disk(root, [Path(name).as_posix() for name in names]),
                         category=table["label"].str.strip())
    for column in ("start", "end"):
        if column in table:
            seconds = pd.to_numeric(table[column].replace("", "0" if column == "start" else "nan"), errors="coerce")
            check((table[column] == "") | (seconds >= 0) & (seconds < np.inf), column, "seconds, or nothing")
            table[column] = seconds
    if "end" in table:
        start = table["start"] if "start" in table else 0.0
        check(table["end"].isna() | (table["end"] > start), "end", "more seconds than its start")
    parts = table[["file", "start"]] if "start" in table else table[["file"]]
    check(~parts.duplicated(), "file_name", "each recording, or each start in it, once")
    for column in [name for name in ("fold", "group") if name in table]:
        table[column] = table[column].str.strip()
        if (table[column] == "").all():
            table = table.drop(columns=column)
    recordings = recordings_of(root, table)
    same = "the same for all parts of one recording, and links to it"
    if "fold" in table:
        check(table["fold"].str.fullmatch(r"[0-9]{1,4}(\.0)?"), "fold", "a whole number for every clip, or for none")
        table["fold"] = table["fold"].astype(float).astype(int)
        check(table["fold"] == table.groupby(recordings)["fold"].transform("first"), "fold", same)
    table["group"] = table["group"].where(table["group"] != "", recordings) if "group" in table else recordings
    check(table["group"] == table.groupby(recordings)["group"].transform("first"), "group", same)
    return table


def read_folders(root: Path, notes: list[str]) -> pd.DataFrame:
    """A row for each recording in and below each of the folders in `root`, whose names are the classes."""
    rows, empty, entries = [], [], sorted(root.iterdir())
    loose = [path.name for path in entries if path.suffix.lower() in {".csv", *ENDINGS} and not os.path.isdir(path)]
    for folder in entries:
        if folder.name.startswith((".", *SYSTEM_FOLDERS)):
            continue
        if not os.path.isdir(folder):
            empty += [] if os.path.exists(folder) or folder.name in loose else [folder.name]  # a broken link
            continue
        if root.resolve().is_relative_to(folder.resolve()):  # a link to the data folder itself
            continue
        if inner := [table for table in (ESC50_TABLE, URBANSOUND_TABLE) if os.path.exists(folder / table)]:  # no class has one
            raise UserError(f"--data {root}: its folder {folder.name} is a data folder, not a class (it has {inner[0]}); name "
                            f"that one, or one without it")
        try:
            found = find_recordings(str(folder))
        except UserError:
            empty += [] if folder.name == "features" else [folder.name]  # the program's own folder
            continue
        rows += [(Path(os.path.relpath(name, root)).as_posix(), folder.name) for name in found]
    classes = {name for _, name in rows}
    if not rows:
        raise UserError(f"--data {root}: holds no data set; expected {ESC50_TABLE}, {URBANSOUND_TABLE}, {OWN_TABLE}, or a folder "
                        f"of recordings for each class; fetch ESC-50 with --download, or try --demo")
    if {name.lower() for name in classes} <= SPLIT_FOLDERS:
        raise UserError(f"--data {root}: its folders are parts of a data set, not classes ({', '.join(sorted(classes))}); name "
                        f"one that has a folder for each class")
    if empty:
        notes.append(f"folders without recordings and broken links are passed over: {first_ten(empty)}")
    if loose:
        notes.append(f"recordings and tables beside the class folders are passed over (one named {OWN_TABLE} is used): "
                     f"{first_ten(loose)}")
    table = pd.DataFrame(rows, columns=["file", "category"])
    table["group"] = recordings_of(root, table)
    return table


def assign_folds(root: Path, table: pd.DataFrame, folds: int) -> pd.DataFrame:
    """The table with a column fold, 1 to `folds`: stratified by class, groups whole, the same on every machine."""
    from sklearn.model_selection import StratifiedGroupKFold  # here: it takes a second to import
    fold = np.zeros(len(table), int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=FOLDS_SEED)
    # a ValueError: fewer clips of every class than folds; warnings of small classes, which read_table tells
    with contextlib.suppress(ValueError), warnings.catch_warnings(action="ignore"):
        for number, (_, held_out) in enumerate(splitter.split(fold, table["category"], table["group"]), start=1):
            fold[held_out] = number
    if set(fold) != set(range(1, folds + 1)):
        most = table.groupby("category")["group"].nunique().max()
        remedy = f"add --folds {most}, or recordings" if most > 1 else "add recordings, of further groups if the table has groups"
        raise UserError(f"--folds {folds}: {root} has at most {most} recordings or groups of a class, expected one for each "
                        f"fold; {remedy}")
    return table.assign(fold=fold)


def split_long(root: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The table with a row for each 5 s of recordings and parts, a rest of less than 1 s left out; and remarks on recordings.

    Remarks are as `cache.load_features` gives them, which keeps the recordings' lengths.
    """
    def measure(path: Path, spans: list, remarks: list[str]):
        yield np.float32([count_seconds(path, remarks)])

    files, clip_s = list(table["file"].unique()), CLIP_SAMPLES / SAMPLE_RATE
    lengths, _, remarks = cache.load_features(root, [(name, 0.0, 0.0) for name in files], measure, (1,), {}, kind="seconds")
    seconds, rows = dict(zip(files, lengths[:, 0].tolist())), []
    for row in table.to_dict("records"):
        end = float(np.fmin(row["end"], seconds[row["file"]]))  # an end of nan is that of the recording
        if end <= row["start"]:  # beyond the recording's end: refused where it is read
            rows.append(row)
            continue
        if row["end"] - end >= LONGER_SAMPLES / SAMPLE_RATE:
            remarks.setdefault(ENDS_EARLY, []).append(row["file"])
        count = math.ceil((end - row["start"] - MIN_REST_S + 1e-3) / clip_s)
        starts = [row["start"] + clip_s * index for index in range(max(1, count))]
        rows += [row | {"start": start, "end": min(start + clip_s, end)} for start in starts]
    parts = pd.DataFrame(rows).sort_values(["file", "start"], kind="stable").reset_index(drop=True)  # parts may overlap
    return parts, remarks
