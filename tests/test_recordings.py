import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

import dsets
from util import cache as recordings
from conftest import write_root

CPU = torch.device("cpu")


# --- waveforms --------------------------------------------------------------------------------------------------------

def tone(seconds: float, rate: int, hertz: float = 1000.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("subtype, step", [("PCM_16", 2 ** -15), ("PCM_24", 2 ** -23), ("PCM_32", 2 ** -24),
                                           ("FLOAT", 2 ** -24)])
def test_waveform_of_every_subtype_keeps_its_samples(tmp_path, subtype, step):
    samples = tone(5, 44_100)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype=subtype)
    waveform = recordings.load_waveform(tmp_path / "a.wav")
    assert waveform.shape == (1, 220_500) and waveform.dtype == torch.float32
    assert np.abs(waveform[0].numpy() - samples).max() <= step


def test_waveform_is_cut_and_padded(tmp_path):
    for seconds in (7, 2):
        soundfile.write(tmp_path / "a.wav", tone(seconds, 44_100), 44_100)
        waveform = recordings.load_waveform(tmp_path / "a.wav")[0]
        kept = min(seconds, 5) * 44_100
        assert torch.equal(waveform[:kept], torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0])[:kept])
        assert not waveform[kept:].any()


def test_waveform_mixes_channels_down_by_their_mean(tmp_path):
    left, right = tone(5, 44_100, 500), tone(5, 44_100, 3000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, left], axis=1), 44_100, subtype="FLOAT")
    expected = torch.from_numpy((2 * left + right) / 3).float()
    torch.testing.assert_close(recordings.load_waveform(tmp_path / "a.wav")[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_101, 48_000, 96_000])
def test_waveform_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(6, rate), rate, subtype="FLOAT")
    waveform = recordings.load_waveform(tmp_path / "a.wav")[0]
    expected = torch.from_numpy(tone(5, 44_100)).float()
    middle = slice(2000, -2000)  # the filter rings where the recording begins
    torch.testing.assert_close(waveform[middle], expected[middle], atol=2e-3, rtol=0)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 250_000), channels=st.integers(1, 3), rate=st.sampled_from([16_000, 44_100, 48_000]),
       subtype=st.sampled_from(["PCM_16", "PCM_24", "FLOAT"]), seed=st.integers(0, 99))
def test_any_recording_gives_one_clip(tmp_path_factory, frames, channels, rate, subtype, seed):
    path = tmp_path_factory.mktemp("any") / "a.wav"
    samples = np.random.default_rng(seed).uniform(-1, 1, (frames, channels))
    soundfile.write(path, samples, rate, subtype=subtype)
    waveform = recordings.load_waveform(path)
    assert waveform.shape == (1, 220_500) and waveform.isfinite().all()
    end = int(np.ceil(frames * 44_100 / rate)) + 1
    assert not waveform[:, end:].any()


def bad_recording(path: Path, kind: str) -> None:
    if kind == "garbage":
        path.write_bytes(b"not a sound" * 100)
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 44_100)
    elif kind in ("nan", "infinite"):
        samples = tone(1, 44_100)
        samples[100] = float(kind[:3])
        soundfile.write(path, samples, 44_100, subtype="FLOAT")
    elif kind == "loud":
        soundfile.write(path, np.stack([tone(1, 44_100)] * 2, axis=1) * 6e38, 44_100, subtype="FLOAT")
    elif kind == "rate":
        soundfile.write(path, tone(1, 44_100), 7)
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


BAD_RECORDINGS = [("garbage", "cannot be decoded as audio"), ("nothing", "cannot be decoded as audio"),
                  ("no samples", "holds no samples"), ("nan", "holds samples that are not finite numbers"),
                  ("infinite", "holds samples that are not finite numbers"),
                  ("rate", "sample rate 7 Hz, expected 1000 to 768000 Hz"), ("missing", "no such file"),
                  ("loud", "holds samples as large as 3e\\+38, expected about 1 at most"),
                  ("directory", "is not a regular file"), ("pipe", "is not a regular file")]


@pytest.mark.parametrize("kind, words", BAD_RECORDINGS)
def test_bad_recordings_are_refused_by_name(own_root, kind, words):
    path = own_root / "audio" / "1-0-A-1.wav"
    path.unlink()
    bad_recording(path, kind)
    with pytest.raises(dsets.UserError, match=re.escape(f"{path}: ") + ".*" + words) as refusal:
        dsets.ESC50(own_root)
    assert "\n" not in str(refusal.value)


def test_all_bad_recordings_are_named_at_once_up_to_ten(tmp_path):
    root = write_root(tmp_path / "root", num_classes=3, folds=2, clips=2)
    names = sorted(os.listdir(root / "audio"))
    for name in names:
        bad_recording(root / "audio" / name, "garbage")
    with pytest.raises(dsets.UserError, match="; and 2 more; mend them, take their rows out") as refusal:
        dsets.ESC50(root)
    assert sum(name in str(refusal.value) for name in names) == 10
    assert not list(root.rglob("logmel-*"))


# --- the mel-spectrogram ----------------------------------------------------------------------------------------------

def hard_waveforms() -> torch.Tensor:
    """(4, 1, 220500): a tone, noise, a click in silence, a chirp with silence behind it."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.zeros(4, 1, recordings.CLIP_SAMPLES)
    clips[0] = torch.from_numpy(tone(5, 44_100)).float()
    clips[1] = 0.2 * torch.randn(1, recordings.CLIP_SAMPLES, generator=generator)
    clips[2, 0, 100_000] = 1.0
    t = torch.arange(100_000) / 44_100
    clips[3, 0, :100_000] = 0.9 * torch.sin(2 * torch.pi * (100 + 1500 * t) * t)
    return clips


def torchaudio_log_mel(waveform: torch.Tensor) -> torch.Tensor:
    mel = torchaudio.transforms.MelSpectrogram(44_100, n_fft=2048, hop_length=512, n_mels=128, f_min=0, f_max=8000)
    return torchaudio.transforms.AmplitudeToDB("power", top_db=80)(mel(waveform)[None])[0]


def librosa_log_mel(waveform: torch.Tensor) -> np.ndarray:
    mel = librosa.feature.melspectrogram(y=waveform[0].numpy(), sr=44_100, n_fft=2048, hop_length=512, n_mels=128, fmin=0,
                                         fmax=8000, htk=True, norm=None, pad_mode="reflect")
    return librosa.power_to_db(mel, top_db=80)[None]


def check_log_mel(waveforms: torch.Tensor) -> None:
    log_mel = recordings.LogMel()
    together = log_mel(waveforms)
    for waveform, feature in zip(waveforms, together):
        assert feature.shape == (1, 128, 431)
        torch.testing.assert_close(feature, torchaudio_log_mel(waveform), atol=1e-4, rtol=0)
        np.testing.assert_allclose(feature.numpy(), librosa_log_mel(waveform), atol=0.01, rtol=0)
        torch.testing.assert_close(log_mel(waveform), feature, atol=1e-4, rtol=0)  # a batch changes nothing


def test_log_mel_equals_torchaudios_and_librosas():
    check_log_mel(hard_waveforms())


def test_log_mel_equals_torchaudios_and_librosas_on_real_clips(real_waveforms):
    check_log_mel(real_waveforms)


def test_log_mel_of_silence_is_the_floor():
    assert torch.equal(recordings.LogMel()(torch.zeros(1, 220_500)), torch.full((1, 128, 431), -100.0))


# --- the cached features ----------------------------------------------------------------------------------------------

def forbid_computing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the features were computed again")
    monkeypatch.setattr(recordings, "compute_features", fail)


def test_features_are_those_of_each_clip_and_computed_once(own_root, monkeypatch):
    dataset = dsets.ESC50(own_root)
    assert dataset.features.shape == (4, 1, 128, 431)
    for index in range(4):
        torch.testing.assert_close(dataset[index][0], recordings.LogMel()(dataset.waveform(index)), atol=1e-4, rtol=0)
    forbid_computing(monkeypatch)
    again = dsets.ESC50(own_root)
    assert torch.equal(again.features, dataset.features) and again.fingerprint() == dataset.fingerprint()


def test_features_follow_files_that_are_swapped(own_root):
    first, second = sorted((own_root / "audio").iterdir())[:2]
    for wav in (first, second):
        os.utime(wav, (1e9, 1e9))  # as data sets are often unpacked: all at one time
    before = dsets.ESC50(own_root)
    first.rename(own_root / "aside")
    second.rename(first)
    (own_root / "aside").rename(second)
    after = dsets.ESC50(own_root)
    assert torch.equal(after[0][0], before[1][0]) and after.fingerprint() != before.fingerprint()


def test_features_follow_the_files(own_root):
    dataset = dsets.ESC50(own_root)
    wav = own_root / "audio" / dataset.table["filename"][2]
    soundfile.write(wav, tone(5, 44_100, 3000), 44_100)
    changed = dsets.ESC50(own_root)
    assert not torch.equal(changed[2][0], dataset[2][0]) and torch.equal(changed[1][0], dataset[1][0])
    assert changed.fingerprint() != dataset.fingerprint()
    assert len(list((own_root / "features").glob("*.npy"))) == 1  # the old ones are gone


@pytest.mark.parametrize("name, value", [("TOP_DB", 60.0), ("CACHE_FORMAT", 99)])
def test_features_follow_the_parameters(own_root, monkeypatch, name, value):
    dsets.ESC50(own_root)
    monkeypatch.setattr(recordings, name, value)
    forbid_computing(monkeypatch)
    with pytest.raises(AssertionError, match="computed again"):
        dsets.ESC50(own_root)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "no digests", "[]", "5"])
def test_damaged_features_are_computed_again(own_root, damage):
    expected = dsets.ESC50(own_root).features.clone()
    path, = (own_root / "features").glob("*.npy")
    if damage == "no digests":
        path.with_suffix(".json").unlink()
    elif damage in ("[]", "5"):
        path.with_suffix(".json").write_text(damage)
    else:
        path.write_bytes({"cut": path.read_bytes()[:1000], "garbage": b"garbage", "empty": b""}[damage])
    assert torch.equal(dsets.ESC50(own_root).features, expected)


def test_a_killed_computation_leaves_nothing_half_made(own_root, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(recordings, "tqdm", killed)
    with pytest.raises(KeyboardInterrupt):
        dsets.ESC50(own_root)
    assert [path.name for path in (own_root / "features").iterdir()] == ["lock"]


def test_a_full_disk_is_said_in_one_line(own_root):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # four clips take 0.9 MB
    try:
        with pytest.raises(recordings.UserError, match=r"logmel-\w+\.npy: cannot be written \(File too large\); make room"):
            dsets.ESC50(own_root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (own_root / "features").iterdir()] == ["lock"]


def test_what_a_killed_computation_left_is_cleared(own_root):
    left = own_root / "features" / ".logmel-0123456789abcdef.npy.99999.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    dsets.ESC50(own_root)
    assert not left.exists()


def test_a_read_only_root_is_served_from_the_users_cache(own_root, tmp_path, monkeypatch):
    (own_root / "features").write_text("a file where the folder would be: nobody, not even root, can write into it")
    dataset = dsets.ESC50(own_root)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    forbid_computing(monkeypatch)
    assert torch.equal(dsets.ESC50(own_root).features, dataset.features)


def test_nowhere_to_write_is_refused(own_root, monkeypatch):
    (own_root / "features").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_root / "features"))
    with pytest.raises(dsets.UserError, match="cannot write to .*features or .*make one of them writable"):
        dsets.ESC50(own_root)


def test_two_processes_computing_at_once_both_end_well(own_root):
    code = f"import dsets; print(dsets.ESC50({str(own_root)!r}).features.sum().item())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                                  cwd=Path(dsets.__file__).parent) for _ in range(2)]
    sums = {process.communicate()[0] for process in processes}
    assert sums == {f"{dsets.ESC50(own_root).features.sum().item()}\n"}


def test_the_fingerprint_does_not_depend_on_where_the_root_lies(own_root, tmp_path):
    shutil.copytree(own_root, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    assert dsets.ESC50(tmp_path / "copy").fingerprint() == dsets.ESC50(own_root).fingerprint()


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    recordings.write_whole(path, lambda part: part.write_text("before"))

    def fails(part):
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        recordings.write_whole(path, fails)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_a_message_is_one_line_without_control_characters():
    assert recordings.one_line("a\n\x1b[31mb\u202e.wav: no such file") == r"a\n\x1b[31mb\u202e.wav: no such file"
    assert recordings.one_line("été 音.wav") == "été 音.wav"
    long = recordings.one_line("x" * 9000 + ": no such file")
    assert len(long) == 2000 and long.endswith(": no such file")
