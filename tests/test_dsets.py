import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

import dsets
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
    waveform = dsets.load_waveform(tmp_path / "a.wav")
    assert waveform.shape == (1, 220_500) and waveform.dtype == torch.float32
    assert np.abs(waveform[0].numpy() - samples).max() <= step


def test_waveform_is_cut_and_padded(tmp_path):
    for seconds in (7, 2):
        soundfile.write(tmp_path / "a.wav", tone(seconds, 44_100), 44_100)
        waveform = dsets.load_waveform(tmp_path / "a.wav")[0]
        kept = min(seconds, 5) * 44_100
        assert torch.equal(waveform[:kept], torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0])[:kept])
        assert not waveform[kept:].any()


def test_waveform_mixes_channels_down_by_their_mean(tmp_path):
    left, right = tone(5, 44_100, 500), tone(5, 44_100, 3000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, left], axis=1), 44_100, subtype="FLOAT")
    expected = torch.from_numpy((2 * left + right) / 3).float()
    torch.testing.assert_close(dsets.load_waveform(tmp_path / "a.wav")[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_101, 48_000, 96_000])
def test_waveform_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(6, rate), rate, subtype="FLOAT")
    waveform = dsets.load_waveform(tmp_path / "a.wav")[0]
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
    waveform = dsets.load_waveform(path)
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
    with pytest.raises(dsets.UserError, match="; and 2 more; mend or remove them") as refusal:
        dsets.ESC50(root)
    assert sum(name in str(refusal.value) for name in names) == 10
    assert not list(root.rglob("logmel-*"))


# --- the table --------------------------------------------------------------------------------------------------------

def change_table(root: Path, change) -> Path:
    path = root / "meta" / "esc50.csv"
    table = pd.read_csv(path, dtype=str)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)
    return path


def set_value(column, value, row=1):
    def change(table):
        table.loc[row, column] = value
    return change


@pytest.mark.parametrize("change, words", [
    (lambda table: table.drop(columns=["fold", "esc10"]), "has no column fold, esc10; expected filename, fold"),
    (set_value("fold", "2.5"), "line 3: fold is '2.5', expected a whole number from 1 to 5"),
    (set_value("fold", "0"), "line 3: fold is '0', expected a whole number from 1 to 5"),
    (set_value("fold", "6"), "line 3: fold is '6', expected"),
    (set_value("fold", ""), "line 3: fold is '', expected"),
    (set_value("target", "50"), "line 3: target is '50', expected a whole number from 0 to 49"),
    (set_value("target", "-1"), "line 3: target is '-1', expected"),
    (set_value("target", "dog"), "line 3: target is 'dog', expected"),
    (set_value("esc10", "maybe"), "line 3: esc10 is 'maybe', expected True or False"),
    (set_value("filename", "1-0-A-0.wav"), "line 3: filename is '1-0-A-0.wav', expected each file once"),
    (set_value("filename", "../../etc/passwd"), "line 3: filename is .*, expected the name of a file in audio/"),
    (set_value("filename", "C:\\a.wav"), "line 3: filename is .*, expected the name of a file in audio/"),
    (set_value("filename", ".."), "line 3: filename is '..', expected the name of a file"),
    (set_value("filename", ""), "line 3: filename is '', expected the name of a file"),
    (set_value("category", "other", row=3), "line 5: category is 'other', expected the same for every clip of one target"),
    (set_value("target", "7", row=3), "line 5: target is '7', expected the same for every clip of one category"),
    (lambda table: table.iloc[:0], "lists no clips"),
])
def test_bad_tables_are_refused(own_root, change, words):
    path = change_table(own_root, change)
    with pytest.raises(dsets.UserError, match=re.escape(str(path)) + ".*" + words):
        dsets.read_table(own_root)


@pytest.mark.parametrize("content, words", [(b"\xff\xfe\x00", "cannot be read as a comma-separated table"),
                                            (b"", "cannot be read as a comma-separated table"),
                                            (b'filename,fold\n"a,1\n', "cannot be read as a comma-separated table")])
def test_files_that_are_no_table_are_refused(own_root, content, words):
    (own_root / "meta" / "esc50.csv").write_bytes(content)
    with pytest.raises(dsets.UserError, match=words):
        dsets.read_table(own_root)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(dsets.UserError, match=f"--data {tmp_path}: has no meta/esc50.csv; .*--download.*--demo"):
        dsets.read_table(tmp_path)


def test_byte_order_mark_crlf_and_quotes_are_read(own_root):
    expected = dsets.read_table(own_root)
    path = own_root / "meta" / "esc50.csv"
    lines = path.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode())
    pd.testing.assert_frame_equal(dsets.read_table(own_root), expected)


def test_rows_with_more_cells_than_the_header_are_refused(own_root):
    path = own_root / "meta" / "esc50.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row + "," for row in rows)]))
    with pytest.raises(dsets.UserError, match="its rows have more cells than its header has"):
        dsets.read_table(own_root)


def test_an_empty_side_of_the_split_is_refused(tmp_path):
    root = write_root(tmp_path / "root", num_classes=2, folds=1)
    with pytest.raises(dsets.UserError, match="--fold 1: every clip .* is in it, none is left to train on"):
        dsets.ESC50(root).split(1)
    with pytest.raises(dsets.UserError, match="--fold 3: no clip .* is in it; expected one of 1"):
        dsets.ESC50(root).split(3)


# --- the mel-spectrogram ----------------------------------------------------------------------------------------------

def hard_waveforms() -> torch.Tensor:
    """(4, 1, 220500): a tone, noise, a click in silence, a chirp with silence behind it."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.zeros(4, 1, dsets.CLIP_SAMPLES)
    clips[0] = torch.from_numpy(tone(5, 44_100)).float()
    clips[1] = 0.2 * torch.randn(1, dsets.CLIP_SAMPLES, generator=generator)
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
    log_mel = dsets.LogMel()
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
    assert torch.equal(dsets.LogMel()(torch.zeros(1, 220_500)), torch.full((1, 128, 431), -100.0))


# --- the cached features ----------------------------------------------------------------------------------------------

def forbid_computing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the features were computed again")
    monkeypatch.setattr(dsets, "compute_features", fail)


def test_features_are_those_of_each_clip_and_computed_once(own_root, monkeypatch):
    dataset = dsets.ESC50(own_root)
    assert dataset.features.shape == (4, 1, 128, 431)
    for index in range(4):
        torch.testing.assert_close(dataset[index][0], dsets.LogMel()(dataset.waveform(index)), atol=1e-4, rtol=0)
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
    monkeypatch.setattr(dsets, name, value)
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
    monkeypatch.setattr(dsets, "tqdm", killed)
    with pytest.raises(KeyboardInterrupt):
        dsets.ESC50(own_root)
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


# --- the data set -----------------------------------------------------------------------------------------------------

def test_the_data_set_in_a_notebook(dataset, shared_root):
    assert len(dataset) == 24
    assert repr(dataset) == (f"ESC50({str(shared_root)!r}: 24 clips, 4 classes, folds 1, 2, 3; "
                             f"features (1, 128, 431) in dB)")
    assert dataset.classes == ["sound_0", "sound_1", "sound_2", "sound_3"]
    feature, target = dataset[5]
    assert feature.shape == (1, 128, 431) and feature.dtype == torch.float32
    assert dataset.classes[target] == dataset.table["category"][5]
    assert torch.equal(dataset[-1][0], dataset[23][0])
    assert dataset.waveform(-1).shape == (1, 220_500)
    assert len(list(dataset)) == 24
    for index in (24, -25):
        with pytest.raises(IndexError):
            dataset[index]
    batch, targets = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
    assert batch.shape == (5, 1, 128, 431) and targets.tolist() == dataset.targets[:5].tolist()


def test_nothing_done_to_features_reaches_the_file(own_root):
    dsets.ESC50(own_root).features.zero_()
    assert dsets.ESC50(own_root).features.any()


def test_esc10_keeps_its_clips_and_counts_classes_from_0(own_root):
    change_table(own_root, lambda table: table.assign(target=table["target"].map({"0": "38", "1": "11"}),
                                                      esc10=table["target"] == "0"))
    dataset = dsets.ESC50(own_root, esc10=True)
    assert dataset.classes == ["sound_0"] and dataset.targets.tolist() == [0, 0]
    everything = dsets.ESC50(own_root)
    assert everything.classes == ["sound_1", "sound_0"]  # by target: 11, 38
    kept = everything.targets == 1
    assert torch.equal(torch.stack([feature for feature, _ in dataset]), everything.features[kept])
    change_table(own_root, lambda table: table.assign(esc10="False"))
    with pytest.raises(dsets.UserError, match="--esc10: no clip"):
        dsets.ESC50(own_root, esc10=True)


def test_the_split_holds_out_one_fold(dataset):
    training, validation = dataset.split(2)
    assert set(dataset.table["fold"][validation.numpy()]) == {2}
    assert set(dataset.table["fold"][training.numpy()]) == {1, 3}
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(24))


def test_statistics_are_those_of_the_given_clips(dataset):
    training, _ = dataset.split(1)
    values = dataset.features[training].double()
    mean, std = dataset.statistics(training)
    assert mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert std == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    normalised = dsets.normalise(dataset.features[training], mean, std)
    assert normalised.mean().abs() < 1e-3 and abs(normalised.std() - 1) < 1e-3


# --- augmentation -----------------------------------------------------------------------------------------------------

def test_generators_differ_in_every_part_and_repeat():
    def draw(*parts):
        return torch.rand(4, generator=dsets.generator_for(*parts)).tolist()
    parts = [(1, 1, 1, "a"), (2, 1, 1, "a"), (1, 2, 1, "a"), (1, 1, 2, "a"), (1, 1, 1, "b"), (11, 1, 1, "a")]
    assert len({tuple(draw(*part)) for part in parts}) == len(parts)
    assert draw(*parts[0]) == draw(*parts[0])


def test_crops_reach_every_corner_and_stay_inside():
    corners = dsets.draw_crops(20_000, dsets.generator_for(0, 0, 0, "test"))
    assert [sorted(set(column.tolist())) for column in corners.T] == [list(range(29)), list(range(48))]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 28), st.integers(0, 47)), min_size=1, max_size=5))
def test_a_crop_is_a_slice(dataset, cuts):
    rows, mels, frames = (torch.tensor(column) for column in zip(*cuts))
    crops = dsets.crop(dataset.features, rows, torch.stack([mels, frames], dim=1))
    expected = [dataset.features[row, :, mel:mel + 100, frame:frame + 384] for row, mel, frame in cuts]
    assert torch.equal(crops, torch.stack(expected))


def test_the_centre_crop_is_in_the_middle():
    assert dsets.centre_crops(2).tolist() == [[14, 23], [14, 23]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 ** 32), st.integers(1, 6))
def test_masks_set_their_bands_to_the_mean_and_nothing_else(seed, count):
    masks = dsets.draw_masks(count, torch.Generator().manual_seed(seed))
    masked = dsets.apply_masks(torch.ones(count, 1, 100, 384), masks)
    for bands, example in zip(masks.tolist(), masked):
        expected = torch.ones(1, 100, 384)
        for start, end in bands[:2]:
            assert 0 <= start <= end <= 100 and end - start <= 27
            expected[:, start:end] = 0
        for start, end in bands[2:]:
            assert 0 <= start <= end <= 384 and end - start <= 100
            expected[:, :, start:end] = 0
        assert torch.equal(example, expected)


def test_every_example_has_its_own_masks_of_every_width():
    masks = dsets.draw_masks(20_000, dsets.generator_for(0, 0, 0, "test"))
    widths = masks[..., 1] - masks[..., 0]
    assert set(widths[:, :2].flatten().tolist()) == set(range(28))
    assert set(widths[:, 2:].flatten().tolist()) == set(range(101))
    assert len({tuple(row) for row in masks.flatten(1).tolist()}) > 19_900


def epoch_of(dataset, **changes):
    training, _ = dataset.split(1)
    arguments = {"views": 5, "batch_size": 16, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, **changes}
    batches = list(dsets.training_batches(dataset, training, dataset.statistics(training), **arguments))
    return torch.cat([examples for examples, _ in batches]), torch.cat([targets for _, targets in batches])


def test_an_epoch_has_five_views_of_every_training_clip_one_of_them_unmasked(dataset, monkeypatch):
    training, _ = dataset.split(1)
    marks = torch.arange(1.0, 25.0).reshape(24, 1, 1, 1).expand(24, 1, 128, 431)  # clip i is all i + 1
    monkeypatch.setattr(dataset, "features", marks)
    monkeypatch.setattr(dsets, "normalise", lambda examples, mean, std: examples)
    examples, targets = epoch_of(dataset)
    assert examples.shape == (80, 1, 100, 384)
    clips = examples.amax(dim=(1, 2, 3)).long() - 1
    assert sorted(clips.tolist()) == sorted(training.tolist() * 5)
    assert torch.equal(targets, dataset.targets[clips])
    unmasked = (examples != 0).all(dim=3).all(dim=2).flatten()
    assert sorted(clips[unmasked].tolist()) == training.tolist()
    assert clips.tolist() != sorted(clips.tolist())  # shuffled


def test_an_epoch_does_not_depend_on_the_batch_size_or_the_global_generators(dataset):
    torch.manual_seed(1)
    first = epoch_of(dataset, batch_size=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = epoch_of(dataset, batch_size=80)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [{"seed": 2}, {"fold": 2}, {"epoch": 2}])
def test_another_seed_fold_or_epoch_gives_other_examples(dataset, change):
    assert not torch.equal(epoch_of(dataset)[0], epoch_of(dataset, **change)[0])


def test_every_draw_of_an_epoch_follows_seed_fold_and_epoch(dataset, monkeypatch):
    asked, generator_for = [], dsets.generator_for

    def recording(*parts):
        asked.append(parts)
        return generator_for(*parts)
    monkeypatch.setattr(dsets, "generator_for", recording)
    epoch_of(dataset, seed=7, fold=2, epoch=3)
    assert sorted(asked) == [(7, 2, 3, "crops"), (7, 2, 3, "masks"), (7, 2, 3, "order")]


def test_validation_is_each_clip_once_cropped_in_the_middle(dataset):
    _, validation = dataset.split(3)
    batches = list(dsets.validation_batches(dataset, validation, (2.0, 3.0), batch_size=3, device=CPU))
    examples = torch.cat([examples for examples, _ in batches])
    expected = (dataset.features[validation][:, :, 14:114, 23:407] - 2.0) / 3.0
    assert torch.equal(examples, expected)
    assert torch.equal(torch.cat([targets for _, targets in batches]), dataset.targets[validation])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    dsets.write_whole(path, lambda part: part.write_text("before"))

    def fails(part):
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        dsets.write_whole(path, fails)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
