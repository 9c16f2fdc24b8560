"""The recordings in a folder, found by what they are. Imports no torch."""
import os
import unicodedata
from pathlib import Path

from util import audio
from util.errors import UserError

# Files with one of these endings are meant as recordings: one that cannot be decoded is reported, not passed over.
ENDINGS = set(".3ga .3gp .aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .dsf .eac3 .flac .m4a .m4b .mka .mp2 .mp3 .mpc .oga .ogg "
              ".opus .rf64 .snd .spx .tak .tta .voc .w64 .wav .wave .weba .webm .wma .wv".split())


def find_recordings(name: str) -> list[str]:
    """A file as it is given; for a folder the files in and below it that hold sound or have a recording's ending, by name.

    Links to folders are followed; a folder that several names lead to is listed once. Hidden files count, but for those
    that macOS leaves beside each file (._*). A folder that cannot be read is in the list itself. "-" is standard input.
    Raises UserError if there are none.
    """
    name = spell_as_on_disk(name)
    if name == "-" or not os.path.isdir(name):  # also for names that no file can have
        return [name]
    found, seen = [], set()
    for folder, folders, files in os.walk(name, followlinks=True, onerror=lambda error: found.append(error.filename)):
        if (target := os.path.realpath(folder)) in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add(target)
        folders.sort()
        paths = [os.path.join(folder, file) for file in files if not file.startswith("._")]
        found += [path for path in paths if Path(path).suffix.lower() in ENDINGS or audio.holds_sound(path)]
    if not found:
        raise UserError(f"{name}: holds no recordings; name a file or another folder")
    return sorted(found)


def spell_all_as_on_disk(folder: Path, names: list[str]) -> list[str]:
    """The paths of files below a folder, each as the disk has it (`spell_as_on_disk`), for which the folder is read but once."""
    on_disk, absent = {}, [not name.isascii() and not os.path.lexists(folder / name) for name in names]
    if any(absent):
        found = [Path(os.path.relpath(parent, folder), file).as_posix() for parent, _, files in os.walk(folder) for file in files]
        on_disk = {unicodedata.normalize("NFC", path): path for path in found}
    return [on_disk.get(unicodedata.normalize("NFC", name), name) if missing else name for name, missing in zip(names, absent)]


def spell_as_on_disk(name: str) -> str:
    """A file's name as the disk has it, which may write an accent as a character of its own (NFD) where `name` does not (NFC).

    Returns `name` itself if there is no such file.
    """
    if name.isascii() or os.path.lexists(name):
        return name
    found = Path()
    try:
        for part in Path(name).parts:
            if not os.path.lexists(found / part):
                part = next(entry for entry in os.listdir(found)
                            if unicodedata.normalize("NFC", entry) == unicodedata.normalize("NFC", part))
            found /= part
    except (OSError, StopIteration):
        return name
    return str(found)
