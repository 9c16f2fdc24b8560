"""Which clips there are: the table of a data set, checked."""
import reprlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from util.errors import UserError, reason

# ESC-50 (Piczak, ACM MM 2015): 2000 clips, 50 classes, 5 folds.
NUM_CLASSES = 50
NUM_FOLDS = 5
COLUMNS = ["filename", "fold", "target", "category", "esc10"]
MAX_TABLE_BYTES = 16 * 10 ** 6  # of some 350 000 clips; the published table has 0.1 MB


def read_esc50(root: str | Path) -> pd.DataFrame:
    """meta/esc50.csv of a folder, checked: columns filename, fold, target, category, esc10, one row a clip.

    Raises UserError naming the line if a value is not what ESC-50's table may hold.
    """
    path = Path(root) / "meta" / "esc50.csv"
    if not path.is_file():
        raise UserError(f"--data {root}: has no meta/esc50.csv; name an ESC-50 folder, fetch it with --download, or try --demo")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, expected {MAX_TABLE_BYTES / 1e6:.0f} at most; divide "
                        f"the clips between several data folders")
    try:
        # blank lines are kept, so that a row's place is its line; a row with too few cells is filled up with empty ones
        with warnings.catch_warnings(action="error"):  # of rows with too many cells
            table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", skip_blank_lines=False, keep_default_na=False,
                                index_col=False)
        table = table[COLUMNS].fillna("")
    except (OSError, ValueError, KeyError, pd.errors.ParserWarning) as error:  # pandas names the line or the columns
        raise UserError(f"{path}: is no comma-separated table in UTF-8 with the columns {', '.join(COLUMNS)} ({reason(error)}); "
                        f"fix it, or fetch it again (--download)") from error
    table = table[(table != "").any(axis=1)]  # no blank lines
    if table.empty:
        raise UserError(f"{path}: lists no clips, expected a row for each; fetch it again (--download)")

    def check(valid: pd.Series, column: str, expected: str) -> None:
        if not valid.all():
            row = table.index[np.flatnonzero(~valid)[0]]
            raise UserError(f"{path}: line {row + 2}: {column} is {reprlib.repr(table[column][row])}, expected {expected}")

    names = table["filename"]
    check(~((names == "") | names.str.contains(r"[/\\:\x00]") | names.isin([".", ".."])), "filename",
          "the name of a file in audio/, without a folder")
    check(~names.duplicated(), "filename", "each file once")
    for column, low, high in (("fold", 1, NUM_FOLDS), ("target", 0, NUM_CLASSES - 1)):
        check(table[column].isin([str(value) for value in range(low, high + 1)]), column, f"a whole number from {low} to {high}")
    check(table["esc10"].str.lower().isin(["true", "false"]), "esc10", "True or False")
    printable = table["category"].map(lambda name: name.isprintable() and name.strip() != "").astype(bool)
    check(printable, "category", "a printable name")
    for column, other in (("target", "category"), ("category", "target")):
        check(table[other] == table.groupby(column)[other].transform("first"), other, f"the same for every clip of one {column}")
    table = table.reset_index(drop=True)
    esc10 = table["esc10"].str.lower() == "true"
    return table.assign(fold=table["fold"].astype(int), target=table["target"].astype(int), esc10=esc10)
