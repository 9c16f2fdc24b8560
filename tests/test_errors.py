"""Errors of one line, and files that are there whole or not at all."""
import os
import re
from pathlib import Path

import pytest

from util import errors
from util.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    errors.write_atomically(path, lambda part: part.write_text("before"))

    def fails(part):
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        errors.write_atomically(path, fails)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["no folder", "a file for a folder", "write fails"])
def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = tmp_path / {"no folder": "none", "a file for a folder": "file", "write fails": "."}[kind] / "a.txt"

    def write(part: Path) -> None:
        part.write_text("half")
        if kind == "write fails":
            raise OSError(28, "No space left on device")
    with pytest.raises(UserError) as refusal:
        errors.write_atomically(path, write)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    assert os.listdir(tmp_path) == ["file"]


def printed(capsys, message: str) -> str:
    errors.print_error("training.py", message)
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("training.py: ") and error.endswith("\n") and error.count("\n") == 1
    return error.removeprefix("training.py: ").removesuffix("\n")


def test_an_error_is_printed_in_one_line_without_control_characters(capsys):
    assert printed(capsys, "a\n\x1b[31mb\u202e.wav: no such file") == r"a\n\x1b[31mb\u202e.wav: no such file"
    assert printed(capsys, "caf\udce9.wav: no such file") == r"caf\udce9.wav: no such file"  # a name that is not UTF-8
    assert printed(capsys, "été 音.wav") == "été 音.wav"
    long = printed(capsys, "x" * 9000 + ": no such file")
    assert len(long) == 2000 and long.endswith(": no such file")


def test_an_error_of_the_user_ends_with_status_2_and_others_are_loud(capsys):
    def fails(error):
        raise error
    with pytest.raises(SystemExit) as end:
        errors.exit_on_error("predict.py", fails, UserError("--top 0: expected 1 or more"))
    assert end.value.code == 2 and capsys.readouterr().err == "predict.py: --top 0: expected 1 or more\n"
    with pytest.raises(ZeroDivisionError):
        errors.exit_on_error("predict.py", fails, ZeroDivisionError())
    errors.exit_on_error("predict.py", str, 1)


def test_the_reason_of_an_error_is_one_line_and_short():
    assert errors.reason(KeyError("flags")) == "KeyError: 'flags'"
    assert errors.reason(UserError("a.pt: no such file")) == "a.pt: no such file"
    assert errors.reason(RuntimeError("\nfirst\nsecond")) == "RuntimeError: first"
    assert errors.reason(ValueError()).startswith("ValueError") and len(errors.reason(ValueError("x" * 9000))) < 400


def test_ten_errors_are_named_and_the_others_counted():
    assert errors.first_ten(["a", "b"]) == "a; b"
    assert errors.first_ten([str(number) for number in range(12)]) == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9; and 2 more"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "null character", "too long"])
def test_what_is_no_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / {"null character": "a\0b", "too long": "x" * 5000}.get(kind, "a")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError) as refusal:
        errors.check_regular_file(path)
    assert str(refusal.value).startswith(f"{path}: ")
    (tmp_path / "file").write_text("")
    errors.check_regular_file(tmp_path / "file")


def test_a_file_that_may_not_be_looked_at_is_not_said_to_be_missing(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a'}: may not be read")):
        errors.check_regular_file(tmp_path / "a")


def test_a_folder_that_may_not_be_read_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: may not be read")):
        errors.check_regular_file(tmp_path)


def test_types_are_checked_by_name():
    content = {"a": 1, "b": {"c": "text", "d": {"e": [1]}}}
    errors.check_types(content, {"a": int, "b": dict, "b.c": str, "b.d.e": list})
    for types, named in (({"a": str}, "a is 1"), ({"b.c": int}, "b.c is 'text'")):
        with pytest.raises(TypeError, match=named):
            errors.check_types(content, types)
    with pytest.raises(KeyError, match="x"):
        errors.check_types(content, {"b.x": int})
    for damaged in ([], 5, None, "text"):
        with pytest.raises((KeyError, TypeError)):
            errors.check_types(damaged, {"a": int})
