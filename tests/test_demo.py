import numpy as np
import pytest
import soundfile

from conftest import run
from test_download import files_of
from util import demo, download, tables
from util.errors import UserError


@pytest.mark.slow
def test_the_demo_is_an_esc50_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CLIPS_PER_CLASS", 1)
    root = tmp_path / "demo"
    demo.write_demo(root)
    table = tables.read_esc50(root)
    assert len(table) == 50 and table["target"].nunique() == 50
    assert table["category"].nunique() == 50
    assert download.problems(root) == []
    for name in table["filename"][::10]:
        info = soundfile.info(root / "audio" / name)
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (44_100, 220_500, 1, "PCM_16")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    demo.write_demo(root)  # once
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (root / "audio" / table["filename"][3]).unlink()
    demo.write_demo(root)  # restores it
    demo.write_demo(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(root)


def test_the_whole_demo_has_every_class_in_every_fold(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "demo_clip", lambda target, rng: [0.0])
    demo.write_demo(tmp_path)
    table = tables.read_esc50(tmp_path)
    assert table.groupby(["fold", "target"]).size().tolist() == [2] * 250


def test_demo_sounds_are_loud_enough_and_differ():
    clips = [demo.demo_clip(target, np.random.default_rng([target, take])) for target in (0, 27, 49) for take in (0, 1)]
    for clip in clips:
        assert clip.shape == (220_500,) and 0.1 <= np.abs(clip).max() <= 0.9
    assert len({clip.tobytes() for clip in clips}) == 6


def test_a_sound_is_the_same_whatever_was_drawn_before():
    first = [demo.demo_clip(target, np.random.default_rng([target, 0])) for target in (0, 27)]
    second = [demo.demo_clip(target, np.random.default_rng([target, 0])) for target in (27, 0)]
    assert np.array_equal(first[0], second[1]) and np.array_equal(first[1], second[0])


@pytest.mark.parametrize("has_table", [True, False])
def test_the_demo_does_not_enter_the_folder_of_another_data_set(own_root, has_table):
    if not has_table:
        (own_root / "meta" / "esc50.csv").rename(own_root / "metadata.csv")
    before = files_of(own_root)
    with pytest.raises(UserError, match="--demo") as refusal:
        demo.write_demo(own_root)
    assert str(own_root) in str(refusal.value) and files_of(own_root) == before


def test_the_demo_does_not_enter_somebodys_audio_folder(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "song.wav").write_bytes(b"mine")
    with pytest.raises(UserError, match="--demo.*song.wav"):
        demo.write_demo(tmp_path)
    assert files_of(tmp_path) == {"audio/song.wav": b"mine"}


def test_a_demo_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    run("--demo", "--data", tmp_path / "file" / "demo", status=2)
    line, = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file" / "demo") in line
