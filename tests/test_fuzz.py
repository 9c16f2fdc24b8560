"""Hostile input: a few hundred of the cases of benchmarks/fuzz.py, and those that hypothesis would not find."""
import os
import sys

import pytest

import dsets
import models
from conftest import PROJECT
from util import checkpoint as checkpoints
from util import rundir
from util.errors import UserError

sys.path.insert(0, str(PROJECT / "benchmarks"))
import fuzz


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's of sparse tensors
@pytest.mark.parametrize("function, cases", [(fuzz.recording, 150), (fuzz.cut_short, 30), (fuzz.table, 100), (fuzz.archive, 60),
                                             (fuzz.checkpoint, 60), (fuzz.weights, 4), (fuzz.record, 60)])
def test_mutated_input_is_refused_in_one_line_or_taken_rightly(function, cases):
    fuzz.counts.clear()
    fuzz.run_cases(function, cases, seed_number=1)
    assert sum(fuzz.counts.values()) >= cases // 2  # hypothesis may draw a case twice, and counts it once


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_what_is_no_regular_file_is_refused_and_not_waited_on(own_root, tmp_path):
    readers = {
        own_root / "meta" / "esc50.csv": lambda: dsets.ESC50(own_root),
        own_root / "audio" / "1-0-A-0.wav": lambda: dsets.load_waveform(own_root / "audio" / "1-0-A-0.wav"),
        tmp_path / "last.pt": lambda: checkpoints.load_checkpoint(tmp_path / "last.pt"),
        tmp_path / "run.json": lambda: rundir.read_run_config(tmp_path),
        tmp_path / "metrics.jsonl": lambda: rundir.read_metrics(tmp_path),
        tmp_path / "weights.pth": lambda: checkpoints.load_pretrained(
            models.ResNet18(2), str(tmp_path / "weights.pth"), vars(dsets.FeatureParams()))}
    for path, read in readers.items():
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "nowhere", path)):
            path.unlink(missing_ok=True)
            make(path)
            if path.name == "metrics.jsonl" and not path.exists():  # a training that has not had an epoch
                assert read() == []
            else:
                with pytest.raises(UserError, match="not a regular file|no such|no meta/esc50.csv"):
                    read()
            os.rmdir(path) if path.is_dir() else path.unlink()
