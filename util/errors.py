"""Errors that the user can fix, in one line; and files that are there whole or not at all. Imports no torch."""
import contextlib
import os
import reprlib
import shlex
import stat
import sys
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix: one line that names the file or flag, what was found and what to do."""


def reason(error: BaseException) -> str:
    """An error in 300 characters at most, to be quoted in the message of another: its type and its message's first line."""
    line = (str(error).strip() or "no message").splitlines()[0][:300]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def printable(text: str) -> str:
    """Text with its control characters, which a terminal would obey, written as escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def as_argument(path: Path) -> str:
    """A path as it is typed in a command, quoted where it must be; with slashes, which need no quotes on Windows."""
    return shlex.quote(path.as_posix())


def flag_name(name: str) -> str:
    """A flag as it is typed, from the name of its value: tb_prefix -> --tb-prefix."""
    return name if name == "comment" else "--" + name.replace("_", "-")


def refuse_flags(message: str):
    """For an argparse parser's `error`, which would print its usage and exit."""
    raise UserError(f"{message}; --help lists the flags")


def print_error(program: str, message: str) -> None:
    """Print one line on stderr, of 2000 characters at most and without control characters, whatever names are in it."""
    line = printable(message)
    line = line if len(line) <= 2000 else line[:1500] + " ... " + line[-495:]
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def exit_on_error(program: str, function, *arguments) -> None:
    """Call function(*arguments); a UserError ends the process with one line and status 2."""
    try:
        function(*arguments)
    except UserError as error:
        print_error(program, str(error))
        sys.exit(2)


def first_ten(errors: list[str]) -> str:
    """The first ten of the errors that are not empty, and how many more there are, in one line."""
    errors = [error for error in errors if error]
    return "; ".join(errors[:10]) + (f"; and {len(errors) - 10} more" if len(errors) > 10 else "")


def check_regular_file(path: str | Path) -> None:
    """Raise UserError unless there is a regular file: reading a named pipe would wait forever."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; change the permissions of its folder") from error
    except (OSError, ValueError) as error:  # ValueError: names that no file can have
        raise UserError(f"{path}: no such file") from error
    if stat.S_ISDIR(mode) and not os.access(path, os.R_OK | os.X_OK):  # find_recordings lists such a folder itself
        raise UserError(f"{path}: may not be read; change its permissions")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file")


def check_types(content, types: dict[str, type]) -> None:
    """Raise KeyError or TypeError unless `content` has each name ("a.b": b in a) with a value of that type."""
    for names, kind in types.items():
        value = content
        for name in names.split("."):
            if not isinstance(value, dict):
                raise TypeError(f"has no {names}")
            value = value[name]
        if not isinstance(value, kind):
            raise TypeError(f"{names} is {reprlib.repr(value)}, expected {getattr(kind, '__name__', kind)}")


def write_atomically(path: Path, write) -> None:
    """Let write(temporary path) make a file, then rename it to `path`; UserError if it cannot be written, as on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); check that its folder is there and writable, "
                        f"and that the disk has room; no file is left half-written") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
