"""The recordings in a folder are found by what they are, whatever their names and links."""
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import refused
from util.recordings import find_recordings, spell_as_on_disk

links = pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")


def write_sound(path: Path) -> Path:
    """A second of noise as WAV, whatever the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 44_100), 44_100, format="WAV")
    return path


def found_in(folder: Path) -> list[str]:
    """The recordings found in a folder, relative to it."""
    return [os.path.relpath(path, folder) for path in find_recordings(str(folder))]


def test_a_recording_is_found_by_its_sound_or_its_ending(tmp_path):
    for name in ("b.wav", "A.WAV", "no_ending", "sub/deep/c.m4a", "d.wav.part", ".hidden.wav", ".hidden/e.flac"):
        write_sound(tmp_path / name)
    for name in ("damaged.mp3", "empty.opus", "photo.jpg", "text.txt", "nothing", "sub/weights.pt"):
        (tmp_path / name).write_bytes(b"" if name == "empty.opus" else b"no sound at all " * 100)
    write_sound(tmp_path / "._b.wav")  # left by macOS
    (tmp_path / "folder.wav").mkdir()
    assert found_in(tmp_path) == [".hidden.wav", ".hidden/e.flac", "A.WAV", "b.wav", "d.wav.part", "damaged.mp3", "empty.opus",
                                  "no_ending", "sub/deep/c.m4a"]


def test_a_folder_without_recordings_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a sound")
    assert str(tmp_path) in refused(find_recordings, str(tmp_path))


@pytest.mark.parametrize("name", ["-", "absent", "a" * 300 + ".wav", "nul\0.wav", "ü" * 300, "ü/\0", "", "absent.wav/"])
def test_other_names_stay_as_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recordings(name) == [name]


@links
def test_links_are_followed_and_each_folder_is_listed_once(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for path in (outside / "a.wav", folder / "b.wav", folder / "sub" / "c.wav"):
        write_sound(path)
    (folder / "linked").symlink_to("../outside")
    (folder / "linked_too").symlink_to(outside)
    (folder / "up").symlink_to("..")  # its other folder is "folder" itself
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (outside / "back").symlink_to(folder / "sub")
    (folder / "file.wav").symlink_to(outside / "a.wav")
    assert found_in(folder) == ["b.wav", "file.wav", "linked/a.wav", "linked/back/c.wav"]


@links
def test_what_cannot_be_read_is_listed_not_left_out(tmp_path, monkeypatch):
    write_sound(tmp_path / "a.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait forever
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found_in(tmp_path) == ["a.wav", "gone.wav", "locked"]


@pytest.mark.skipif(sys.platform == "darwin", reason="both spellings are one name there")
@pytest.mark.parametrize("on_disk", [("NFC", "NFC"), ("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_a_name_is_found_in_the_other_spelling(tmp_path, monkeypatch, on_disk, given):
    parts = [unicodedata.normalize(form, name) for form, name in zip(on_disk, ("Vögel", "fenêtre ü.wav"))]
    path = write_sound(tmp_path.joinpath(*parts))
    name = unicodedata.normalize(given, "Vögel/fenêtre ü.wav")
    assert find_recordings(str(tmp_path / name)) == find_recordings(str(tmp_path / Path(name).parent)) == [str(path)]
    monkeypatch.chdir(tmp_path)
    assert find_recordings(name) == [str(Path(*parts))]


@pytest.mark.skipif(sys.platform == "darwin", reason="both spellings are one name there")
def test_a_name_that_is_there_is_not_another_one(tmp_path):
    for form in ("NFC", "NFD"):
        write_sound(tmp_path / unicodedata.normalize(form, "ü.wav"))
    for form in ("NFC", "NFD"):
        name = str(tmp_path / unicodedata.normalize(form, "ü.wav"))
        assert spell_as_on_disk(name) == name
