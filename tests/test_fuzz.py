"""Hostile input: a few hundred of the cases of benchmarks/fuzz.py, and those that hypothesis would not find."""
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import dsets
import models
from util import cache as recordings
from util import rundir as runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's of sparse tensors
@pytest.mark.parametrize("function, cases", [(fuzz.recording, 150), (fuzz.cut_short, 30), (fuzz.table, 100), (fuzz.archive, 60),
                                             (fuzz.checkpoint, 60), (fuzz.weights, 4), (fuzz.record, 60)])
def test_mutated_input_is_refused_in_one_line_or_taken_rightly(monkeypatch, function, cases):
    monkeypatch.setitem(models.MODELS, "cnn8", fuzz.Small)
    fuzz.counts.clear()
    fuzz.run_cases(function, cases, seed_number=1)
    assert sum(fuzz.counts.values()) >= cases // 2  # hypothesis may draw a case twice, and counts it once


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_what_is_no_regular_file_is_refused_and_not_waited_on(own_root, tmp_path):
    places = {"table": own_root / "meta" / "esc50.csv", "audio": own_root / "audio" / "1-0-A-0.wav", "checkpoint": tmp_path / "last.pt",
              "record": tmp_path / "run.json", "metrics": tmp_path / "metrics.jsonl", "weights": tmp_path / "weights.pth"}
    readers = {"table": lambda: dsets.ESC50(own_root), "audio": lambda: recordings.load_waveform(places["audio"]),
               "checkpoint": lambda: runs.load_checkpoint(places["checkpoint"]), "record": lambda: runs.read_run(tmp_path),
               "weights": lambda: models.load_pretrained(models.ResNet18(2), str(places["weights"]))}
    for name, path in places.items():
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "nowhere", path)):
            path.unlink(missing_ok=True)
            make(path)
            if name == "metrics":
                assert runs.read_metrics(tmp_path) == []
            else:
                with pytest.raises(ValueError, match="not a regular file|no such|has no meta/esc50.csv"):
                    readers[name]()
            os.rmdir(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("length, words", [(4 * 10 ** 9, "is cut short: it says 4000000000 bytes of sound and has 2000"),
                                           (2002, "is cut short: it says 2002 bytes of sound and has 2000"),
                                           (0xFFFFFFFF, None), (0x7FFFF000, None), (100, None)])
def test_a_wav_that_lies_about_its_length(tmp_path, length, words):
    """Longer than it is: refused, unless it says it was a stream; shorter: what follows is not sound."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(1000, 0.5), 44_100, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[40:44] = length.to_bytes(4, "little")
    path.write_bytes(content)
    if words:
        with pytest.raises(recordings.UserError, match=words):
            recordings.load_waveform(path)
    else:
        assert (recordings.load_waveform(path) != 0).sum() == min(length // 2, 1000)


def test_more_channels_than_there_are_microphones_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((10, 65)), 44_100)
    with pytest.raises(recordings.UserError, match="has 65 channels, expected 64 at most"):
        recordings.load_waveform(tmp_path / "a.wav")


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    """A megabyte of file that would become a gigabyte of weights."""
    torch.save({"model": torch.zeros(10)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, b"\0" * 10 ** 8 if member.filename.endswith("/0") else source.read(member))
    with pytest.raises(recordings.UserError, match="it unpacks to more than it is"):
        runs.load_checkpoint(tmp_path / "last.pt")
