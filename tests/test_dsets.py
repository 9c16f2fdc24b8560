"""Recordings as mel-spectrograms, folds and batches."""
import copy
import re
import shutil

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsets
from conftest import CPU, OTHER_PARAMS, change_table, tone, write_root
from dsets import FeatureParams
from util.errors import UserError

PARAMS = FeatureParams()


# --- clips -----------------------------------------------------------------------------------------------------------

def test_clips_that_a_network_cannot_judge_are_named_and_trained_on(own_root):
    soundfile.write(own_root / "audio" / "1-0-A-0.wav", np.zeros(220_500), 44_100)
    soundfile.write(own_root / "audio" / "1-0-A-1.wav", np.zeros(220_500), 44_100)
    soundfile.write(own_root / "audio" / "2-0-A-1.wav", tone(5, 44_100)[:, None] * [1, -1], 44_100)
    for _ in range(2):  # the second time from the cache
        assert sorted(dsets.ESC50(own_root).notes) == [
            "1 recording has channels that cancel each other, their mean is silent: audio/2-0-A-1.wav",
            "2 recordings are silent: audio/1-0-A-0.wav, audio/1-0-A-1.wav"]


def test_copies_of_a_recording_in_several_folds_are_told(tmp_path):
    for name, hertz in (("a", 300), ("b", 300), ("c", 600), ("d", 600), ("e", 900)):
        soundfile.write(tmp_path / f"{name}.wav", tone(5 if name > "b" else 10, 8000, hertz), 8000)
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\na.wav,x,1\nb.wav,x,2\nc.wav,y,1\nd.wav,y,1\ne.wav,y,2\n")
    for split_long in (False, True):
        *others, note = dsets.ESC50(tmp_path, split_long=split_long).notes
        assert note.startswith("2 recordings have copies") and note.endswith(": a.wav, b.wav")
        assert len(others) == (not split_long), "that two are longer than 5 s"


def test_split_long_names_what_is_cut_short_and_takes_the_rest(tmp_path):
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, tone(15, 8000), 8000, subtype="PCM_16")
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:44 + 2 * 8000 * 8])
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\na.wav,dog,1\nb.wav,bird,1\n")
    ds = dsets.ESC50(tmp_path, split_long=True)
    assert ds.table["file"].tolist() == ["a.wav"] * 2 + ["b.wav"] * 3 and ds.table["end"][1] == pytest.approx(8, abs=0.01)
    assert ds.notes == ["1 recording lacks some of its sound, cut short or damaged: a.wav"]


@pytest.mark.parametrize("split_long", [False, True])
def test_a_part_that_begins_after_its_recording_ends_is_refused_as_such(tmp_path, split_long):
    soundfile.write(tmp_path / "a.wav", tone(3, 8000), 8000)
    (tmp_path / "metadata.csv").write_text("file_name,label,start,fold\na.wav,dog,0,1\na.wav,bird,3.5,1\n")
    with pytest.raises(UserError, match="a.wav: ends at 3.00 s, before a clip's start of 3.5 s"):
        dsets.ESC50(tmp_path, split_long=split_long)


@pytest.mark.parametrize("begin, end, is_told", [(4, 11, True), (0, 6, True), (6, 11, False), (0, 0, False)])
def test_silent_clips_of_a_longer_recording_are_told(tmp_path, begin, end, is_told):
    sound = tone(15, 8000)
    sound[begin * 8000:end * 8000] = 0
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    soundfile.write(tmp_path / "b.wav", tone(5, 8000), 8000)
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\na.wav,dog,1\nb.wav,bird,1\n")
    ds = dsets.ESC50(tmp_path, split_long=True)
    assert len(ds) == 4 and ds.notes == ["1 recording has silent clips: a.wav"] * is_told


def test_features_with_and_without_split_long_are_kept_side_by_side(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(10, 8000), 8000)
    soundfile.write(tmp_path / "b.wav", tone(5, 8000), 8000)
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\na.wav,dog,1\nb.wav,bird,2\n")
    kept = []
    for split_long in (False, True, False):
        dsets.ESC50(tmp_path, split_long=split_long)
        kept.append({path.name for path in (tmp_path / "features").glob("logmel*.npy")})
    assert [len(names) for names in kept] == [1, 2, 2]


@pytest.mark.parametrize("end, is_told", [("", True), ("12.25", True), ("8.05", False), ("7", False)])
def test_parts_of_more_than_5_s_are_told(tmp_path, end, is_told):
    soundfile.write(tmp_path / "a.wav", tone(15, 8000), 8000)
    (tmp_path / "metadata.csv").write_text(f"file_name,label,fold,start,end\na.wav,dog,1,0,1\na.wav,bird,1,3,{end}\n")
    assert [note[:11] for note in dsets.ESC50(tmp_path).notes] == ["1 recording"] * is_told


@pytest.mark.parametrize("split_long", [False, True])
@pytest.mark.parametrize("seconds, end, is_told", [
    (3, 3.2, True), (3, 3.05, False), (5, 2500, True), (3, "", False), (4, 3, False)])
def test_a_recording_that_ends_before_its_part_is_told(tmp_path, seconds, end, is_told, split_long):
    soundfile.write(tmp_path / "a.wav", tone(seconds, 8000), 8000)
    (tmp_path / "metadata.csv").write_text(f"file_name,label,fold,start,end\na.wav,dog,1,0,1\na.wav,bird,1,2,{end}\n")
    notes = dsets.ESC50(tmp_path, split_long=split_long).notes
    assert notes == ["1 recording ends earlier than its table says: a.wav"] * is_told


def test_long_parts_that_overlap_have_their_own_sound(tmp_path):
    rising = np.sin(2 * np.pi * 50 * np.arange(16 * 8000) ** 2 / 8000 ** 2) / 2  # a chirp: each moment has its pitch
    soundfile.write(tmp_path / "a.wav", rising, 8000)
    (tmp_path / "metadata.csv").write_text("file_name,label,fold,start,end\na.wav,dog,1,0,12\na.wav,bird,1,6,16\n")
    ds = dsets.ESC50(tmp_path, split_long=True)
    assert ds.table["start"].tolist() == [0, 5, 6, 10, 11] and "".join(ds.table["category"]) == "dogdogbirddogbird"
    log_mel = dsets.LogMel()
    assert all(torch.equal(ds[index][0], log_mel(ds.waveform(index))) for index in range(5))


def test_a_clip_is_refused_only_where_less_than_5_s_are_there_and_more_is_promised(own_root, capsys):
    path = own_root / "audio" / "1-0-A-0.wav"
    for seconds, there, is_refused in ((7, 5.5, False), (7, 5, False), (5, 5, False), (3, 3, False), (5, 4.95, False),
                                       (5, 4.8, True), (7, 4.8, True)):
        soundfile.write(path, tone(seconds, 44_100), 44_100, subtype="PCM_16")
        path.write_bytes(path.read_bytes()[:44 + 2 * round(there * 44_100)])
        if is_refused:
            with pytest.raises(UserError, match=re.escape(f"{path}: lacks {seconds - there:.1f} of its {seconds:.1f} s")):
                dsets.ESC50(own_root)
        else:
            kept = min(round(there * 44_100), dsets.CLIP_SAMPLES)
            assert np.allclose(dsets.ESC50(own_root).waveform(0)[0, :kept], tone(seconds, 44_100)[:kept], atol=1e-4)
        assert capsys.readouterr().err == ""
    soundfile.write(path, tone(3, 44_100), 44_100, subtype="PCM_16")
    path.write_bytes(path.read_bytes() + bytes(8192))  # odd, but nothing is missing
    assert np.allclose(dsets.ESC50(own_root).waveform(0)[0, :3 * 44_100], tone(3, 44_100), atol=1e-4)


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


def torchaudio_log_mel(waveform: torch.Tensor, params: FeatureParams) -> torch.Tensor:
    mel = torchaudio.transforms.MelSpectrogram(44_100, n_fft=params.n_fft, hop_length=params.hop_length, n_mels=params.n_mels,
                                               f_min=params.f_min, f_max=params.f_max)
    return torchaudio.functional.amplitude_to_DB(mel(waveform)[None], 10, params.amin, 0, params.top_db)[0]


def librosa_log_mel(waveform: torch.Tensor, params: FeatureParams) -> np.ndarray:
    mel = librosa.feature.melspectrogram(y=waveform[0].numpy(), sr=44_100, n_fft=params.n_fft, hop_length=params.hop_length,
                                         n_mels=params.n_mels, fmin=params.f_min, fmax=params.f_max, htk=True, norm=None,
                                         pad_mode="reflect")
    return librosa.power_to_db(mel, amin=params.amin, top_db=params.top_db)[None]


def check_log_mel(waveforms: torch.Tensor, params: FeatureParams) -> None:
    log_mel = dsets.LogMel(params)
    together = log_mel(waveforms)
    for waveform, feature in zip(waveforms, together, strict=True):
        assert feature.shape == (1, params.n_mels, params.num_frames)
        torch.testing.assert_close(feature, torchaudio_log_mel(waveform, params), atol=1e-4, rtol=0)
        np.testing.assert_allclose(feature.numpy(), librosa_log_mel(waveform, params), atol=0.01, rtol=0)
        torch.testing.assert_close(log_mel(waveform), feature, atol=1e-4, rtol=0)  # a batch changes nothing


@pytest.mark.parametrize("params", [
    PARAMS, OTHER_PARAMS, FeatureParams(n_fft=1024, hop_length=300, n_mels=40, f_min=60.0, f_max=22_050.0, top_db=60.0, amin=1e-6,
                                        crop_mels=40)])
def test_log_mel_equals_torchaudios_and_librosas(params):
    check_log_mel(hard_waveforms(), params)


@pytest.mark.slow
def test_log_mel_equals_torchaudios_and_librosas_on_real_clips(real_waveforms):
    check_log_mel(real_waveforms, PARAMS)


def test_log_mel_of_silence_is_the_floor():
    assert torch.equal(dsets.LogMel()(torch.zeros(1, 220_500)), torch.full((1, 128, 431), -100.0))


def test_the_parameters_are_the_write_ups():
    assert vars(PARAMS) == {"n_fft": 2048, "hop_length": 512, "n_mels": 128, "f_min": 0.0, "f_max": 8000.0, "top_db": 80.0,
                            "amin": 1e-10, "crop_mels": 100, "crop_frames": 384}
    assert PARAMS.num_frames == 431 and PARAMS.input_shape == (1, 100, 384)
    assert OTHER_PARAMS.num_frames == 216 and OTHER_PARAMS.input_shape == (1, 60, 200)


@pytest.mark.parametrize("change, named", [
    ({"crop_mels": 129}, "crop"), ({"crop_frames": 432}, "crop"), ({"n_mels": 64}, "crop"), ({"hop_length": 1024}, "crop"),
    ({"crop_frames": 0}, "crop"), ({"hop_length": 0}, "hop_length"), ({"hop_length": 4096}, "hop_length"),
    ({"n_fft": 8}, "n_fft"),
    ({"n_mels": 0}, "n_mels"), ({"f_max": 30_000.0}, "f_max"), ({"f_min": 8000.0}, "f_min"), ({"f_max": float("nan")}, "f_max"),
    ({"top_db": -80.0}, "top_db"), ({"amin": 0.0}, "amin"), ({"n_mels": 64.0}, "n_mels"), ({"n_mels": True}, "n_mels"),
    ({"f_max": "8000"}, "f_max"), ({"n_fft": None}, "n_fft")])
def test_parameters_that_cannot_work_are_refused_in_one_line(change, named):
    with pytest.raises(UserError, match=named) as refusal:
        FeatureParams(**change)
    assert "\n" not in str(refusal.value)


# --- the data set -----------------------------------------------------------------------------------------------------

def test_the_data_set_in_a_notebook(dataset, shared_root):
    assert len(dataset) == 24
    assert repr(dataset) == (f"ESC-50 {str(shared_root)!r}: 24 clips, 4 classes, folds 1, 2, 3; "
                             f"features (1, 128, 431) in dB")
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


def forbid_computing(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the features were computed again")
    monkeypatch.setattr(dsets.cache, "compute_features", fail)


def test_features_are_those_of_each_clip_and_computed_once(own_root, monkeypatch):
    dataset = dsets.ESC50(own_root)
    assert dataset.features.shape == (4, 1, 128, 431)
    for index in range(4):
        torch.testing.assert_close(dataset[index][0], dsets.LogMel()(dataset.waveform(index)), atol=1e-4, rtol=0)
    forbid_computing(monkeypatch)
    again = dsets.ESC50(own_root)
    assert torch.equal(again.features, dataset.features) and again.fingerprint() == dataset.fingerprint()


def test_features_of_several_parameters_stay_in_one_data_folder(own_root, monkeypatch):
    dataset, other = dsets.ESC50(own_root), dsets.ESC50(own_root, params=OTHER_PARAMS)
    assert other.features.shape == (4, 1, 64, 216)
    torch.testing.assert_close(other[3][0], dsets.LogMel(OTHER_PARAMS)(other.waveform(3)), atol=1e-4, rtol=0)
    assert other.fingerprint() == dataset.fingerprint()  # of the data alone
    forbid_computing(monkeypatch)
    for params, expected in ((PARAMS, dataset), (OTHER_PARAMS, other), (FeatureParams(crop_mels=64, crop_frames=64), dataset)):
        assert torch.equal(dsets.ESC50(own_root, params=params).features, expected.features)  # crops do not change them
    for change in ({"n_mels": 127}, {"top_db": 60.0}, {"amin": 1e-9}, {"f_min": 1.0}):
        with pytest.raises(AssertionError, match="computed again"):
            dsets.ESC50(own_root, params=FeatureParams(**change))


def test_the_fingerprint_follows_the_files_and_not_where_they_lie(own_root, tmp_path):
    before = dsets.ESC50(own_root)
    copy = shutil.copytree(own_root, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    assert dsets.ESC50(copy).fingerprint() == before.fingerprint()
    soundfile.write(copy / "audio" / before.table["filename"][2], tone(5, 44_100, 3000), 44_100)
    changed = dsets.ESC50(copy)
    assert not torch.equal(changed[2][0], before[2][0]) and torch.equal(changed[1][0], before[1][0])
    assert changed.fingerprint() != before.fingerprint()
    change_table(own_root, lambda table: table.assign(fold=table["fold"].map({"1": "2", "2": "1"})))
    assert dsets.ESC50(own_root).fingerprint() != before.fingerprint()


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
    with pytest.raises(UserError, match="^--esc10: "):
        dsets.ESC50(own_root, esc10=True)


def test_esc10_is_only_for_esc50s_own_table(own_root):
    (own_root / "meta").rename(own_root / "elsewhere")
    (own_root / "metadata.csv").write_text("file_name,label,fold,esc10\naudio/1-0-A-0.wav,a,1,True\naudio/2-0-A-1.wav,b,2,True\n")
    with pytest.raises(UserError, match="^--esc10: "):
        dsets.ESC50(own_root, esc10=True)


def test_an_empty_side_of_the_split_is_refused(tmp_path):
    dataset = dsets.ESC50(write_root(tmp_path / "root", num_classes=2, folds=1))
    for fold in (1, 3):
        with pytest.raises(UserError, match=f"^--fold {fold}: ") as refusal:
            dataset.split(fold)
        assert "\n" not in str(refusal.value)


def test_the_split_holds_out_one_fold(dataset):
    training, validation = dataset.split(2)
    assert set(dataset.table["fold"][validation.numpy()]) == {2}
    assert set(dataset.table["fold"][training.numpy()]) == {1, 3}
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(24))


def test_mean_and_std_are_those_of_the_given_clips(dataset):
    training, _ = dataset.split(1)
    values = dataset.features[training].double()
    mean, std = dataset.mean_std(training)
    assert mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert std == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    assert dataset.mean_std(torch.isin(torch.arange(24), training)) == (mean, std), "a mask of all clips"
    normalized = dsets.normalize(dataset.features[training], mean, std)
    assert normalized.mean().abs() < 1e-3 and abs(normalized.std() - 1) < 1e-3


def with_features(dataset: dsets.ESC50, features) -> dsets.ESC50:
    """The same clips with other features."""
    other = copy.copy(dataset)
    other.__dict__.pop("clip_sums", None)
    other.features = features
    return other


def test_clips_that_are_all_the_same_are_not_scaled(dataset):
    dataset = with_features(dataset, torch.full((24, 1, 128, 431), -100.0))
    assert dataset.mean_std(torch.arange(24)) == (-100.0, 1.0)


# --- augmentation -----------------------------------------------------------------------------------------------------

def test_generators_differ_in_every_part_and_repeat():
    def draw(*parts):
        return torch.rand(4, generator=dsets.generator_for(*parts)).tolist()
    parts = [(1, 1, 1, "a"), (2, 1, 1, "a"), (1, 2, 1, "a"), (1, 1, 2, "a"), (1, 1, 1, "b"), (11, 1, 1, "a")]
    assert len({tuple(draw(*part)) for part in parts}) == len(parts)
    assert draw(*parts[0]) == draw(*parts[0])


@pytest.mark.parametrize("params, mels, frames", [(PARAMS, 29, 48), (OTHER_PARAMS, 5, 17)])
def test_crops_reach_every_corner_and_stay_inside(params, mels, frames):
    corners = dsets.draw_corners(20_000, dsets.generator_for(0, 0, 0, "test"), params)
    assert [sorted(set(column.tolist())) for column in corners.T] == [list(range(mels)), list(range(frames))]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 28), st.integers(0, 47)), min_size=1, max_size=5))
def test_a_crop_is_a_slice(dataset, cuts):
    rows, mels, frames = (torch.tensor(column) for column in zip(*cuts))
    crops = dsets.crop(dataset.features, rows, torch.stack([mels, frames], dim=1), PARAMS)
    expected = [dataset.features[row, :, mel:mel + 100, frame:frame + 384] for row, mel, frame in cuts]
    assert torch.equal(crops, torch.stack(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 ** 32), st.integers(1, 6), st.sampled_from([PARAMS, OTHER_PARAMS]), st.integers(0, 150),
       st.integers(0, 500))
def test_masks_set_their_bands_to_the_mean_and_nothing_else(seed, count, params, freq_mask, time_mask):
    masks = dsets.draw_masks(count, torch.Generator().manual_seed(seed), params, freq_mask, time_mask)
    masked = dsets.spec_augment(torch.ones(count, *params.input_shape), masks)
    for bands, example in zip(masks.tolist(), masked, strict=True):
        expected = torch.ones(params.input_shape)
        for start, end in bands[:2]:
            assert 0 <= start <= end <= params.crop_mels and end - start <= freq_mask
            expected[:, start:end] = 0
        for start, end in bands[2:]:
            assert 0 <= start <= end <= params.crop_frames and end - start <= time_mask
            expected[:, :, start:end] = 0
        assert torch.equal(example, expected)


@pytest.mark.parametrize("freq_mask, time_mask", [(27, 100), (5, 0), (0, 7)])
def test_every_example_has_its_own_masks_of_every_width(freq_mask, time_mask):
    masks = dsets.draw_masks(20_000, dsets.generator_for(0, 0, 0, "test"), PARAMS, freq_mask, time_mask)
    widths = masks[..., 1] - masks[..., 0]
    assert set(widths[:, :2].flatten().tolist()) == set(range(freq_mask + 1))
    assert set(widths[:, 2:].flatten().tolist()) == set(range(time_mask + 1))
    assert len({tuple(row) for row in masks.flatten(1).tolist()}) > 19_900


def epoch_of(dataset, **changes):
    training, _ = dataset.split(1)
    arguments = {"views": 5, "batch_size": 16, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, **changes}
    batches = list(dsets.training_batches(dataset, training, dataset.mean_std(training), **arguments))
    return torch.cat([examples for examples, *_ in batches]), torch.cat([targets for _, targets, *_ in batches])


@pytest.fixture
def marked(dataset, monkeypatch) -> dsets.ESC50:
    """The data set with clip i all i + 1, also when it is normalized: a 0 is a mask's."""
    marks = torch.arange(1.0, 25.0).reshape(24, 1, 1, 1).expand(24, 1, 128, 431)
    monkeypatch.setattr(dataset, "features", marks)
    monkeypatch.setattr(dsets, "normalize", lambda examples, mean, std: examples)
    return dataset


def test_an_epoch_has_five_views_of_every_training_clip_one_of_them_unmasked(marked):
    training, _ = marked.split(1)
    examples, targets = epoch_of(marked)
    assert examples.shape == (80, 1, 100, 384)
    clips = examples.amax(dim=(1, 2, 3)).long() - 1
    assert sorted(clips.tolist()) == sorted(training.tolist() * 5)
    assert torch.equal(targets, marked.targets[clips])
    unmasked = (examples != 0).all(dim=3).all(dim=2).flatten()
    assert sorted(clips[unmasked].tolist()) == training.tolist()
    assert clips.tolist() != sorted(clips.tolist())  # shuffled


@pytest.mark.parametrize("freq_mask, time_mask", [(0, 0), (4, 0), (0, 9), (4, 9)])
def test_masks_of_an_epoch_are_as_wide_as_they_may_be(marked, freq_mask, time_mask):
    examples, _ = epoch_of(marked, freq_mask=freq_mask, time_mask=time_mask)
    masked = examples[:, 0] == 0
    mels, frames = masked.all(dim=2).sum(dim=1), masked.all(dim=1).sum(dim=1)  # (80,) each: two bands of each
    assert mels.max() <= 2 * freq_mask and frames.max() <= 2 * time_mask
    assert bool(mels.any()) == (freq_mask > 0) and bool(frames.any()) == (time_mask > 0)
    assert masked.any() == (freq_mask + time_mask > 0)


def test_an_epoch_does_not_depend_on_the_batch_size_or_the_global_generators(dataset):
    torch.manual_seed(1)
    first = epoch_of(dataset, batch_size=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = epoch_of(dataset, batch_size=80)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(torch.get_rng_state(), state)


class BetweenDevices(TorchDispatchMode):
    """Notes every operation that has tensors of more than one kind of device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_with_features_on_a_gpu_no_batch_after_the_first_waits_for_the_cpu(dataset, monkeypatch, mixup):
    """On tensors that have no data, only shapes and a device: no GPU is needed."""
    training, _ = dataset.split(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(dataset, "features", torch.empty(dataset.features.shape, device="cuda"))
        batches = dsets.training_batches(
            dataset, training, (0.0, 1.0), views=5, batch_size=16, seed=1, fold=1, epoch=1, device=torch.device("cuda"),
            time_shift=5.0, time_stretch=0.25, freq_shift=14, gain=6.0, filter_augment=6.0, mixup=mixup)
        first = next(batches)  # before it, the epoch's draws are copied to the device
        with BetweenDevices() as between:
            rest = list(batches)
    assert between.seen == [] and len(rest) == 4
    for batch in [first, *rest]:
        assert batch.examples.shape == (16, 1, 100, 384) and batch.examples.device.type == batch.targets.device.type == "cuda"


def test_mean_and_std_take_features_that_are_on_a_gpu(dataset):
    with FakeTensorMode(allow_non_fake_inputs=True):
        feature = torch.empty(dataset.features.shape[1:], device="cuda")
    on_gpu = with_features(dataset, [feature] * len(dataset))
    on_gpu.mean_std(dataset.split(1)[0])  # operations on two devices would be refused


def test_validation_takes_features_that_are_on_a_gpu(dataset, monkeypatch):
    _, validation = dataset.split(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(dataset, "features", torch.empty(dataset.features.shape, device="cuda"))
        examples, targets, _ = next(dsets.validation_batches(dataset, validation, (0.0, 1.0), batch_size=4,
                                                             device=torch.device("cuda"), tta_crops=9))
    assert examples.shape == (36, 1, 100, 384) and examples.device.type == targets.device.type == "cuda"


@pytest.mark.parametrize("change", [{"seed": 2}, {"fold": 2}, {"epoch": 2}])
def test_another_seed_fold_or_epoch_gives_other_examples(dataset, change):
    assert not torch.equal(epoch_of(dataset)[0], epoch_of(dataset, **change)[0])


def test_every_draw_of_an_epoch_follows_seed_fold_and_epoch(dataset, monkeypatch):
    asked, generator_for = [], dsets.generator_for

    def recording(*parts):
        asked.append(parts)
        return generator_for(*parts)
    monkeypatch.setattr(dsets, "generator_for", recording)
    epoch_of(dataset, seed=7, fold=2, epoch=3, mixup=1.0, filter_augment=6.0, time_stretch=0.25)
    purposes = [purpose for *_, purpose in asked]
    assert {parts[:3] for parts in asked} == {(7, 2, 3)} and len(purposes) == len(set(purposes)) == 7


def test_a_shifted_crop_goes_on_at_the_beginning(dataset):
    found = dsets.crop(dataset.features, torch.tensor([3]), torch.tensor([[10, 400]]), PARAMS)
    expected = torch.cat([dataset.features[3], dataset.features[3]], dim=-1)[:, 10:110, 400:784]
    assert torch.equal(found[0], expected)
    frames = dsets.draw_corners(20_000, dsets.generator_for(1, 1, 1, "test"), PARAMS, shift_frames=431)[:, 1]
    assert set(frames.tolist()) == set(range(431)), "5 s of shift reach everywhere"
    frames = dsets.draw_corners(20_000, dsets.generator_for(1, 1, 1, "test"), PARAMS, shift_frames=10)[:, 1]
    assert set(frames.tolist()) == set(range(58))


def test_beyond_the_first_and_last_mel_a_crop_repeats_them(dataset):
    low, high = dsets.crop(dataset.features, torch.tensor([3, 3]), torch.tensor([[-5, 7], [40, 7]]), PARAMS)[:, 0]
    feature = dataset.features[3, 0, :, 7:391]
    assert torch.equal(low[5:], feature[:95]) and torch.equal(low[:5], feature[:1].expand(5, -1))
    assert torch.equal(high[:88], feature[40:]) and torch.equal(high[88:], feature[127:].expand(12, -1))


@pytest.mark.parametrize("params, shift_mels, lowest", [
    (PARAMS, 14, range(-14, 43)), (FeatureParams(crop_mels=128), 3, range(-3, 4)), (OTHER_PARAMS, 100, range(-63, 68))])
def test_a_frequency_shift_goes_as_far_up_as_down(params, shift_mels, lowest):
    mels = dsets.draw_corners(20_000, dsets.generator_for(1, 1, 1, "test"), params, shift_mels=shift_mels)[:, 0]
    assert sorted(set(mels.tolist())) == list(lowest)


def test_a_stretched_crop_reads_the_frame_before_each_multiple_of_its_rate(dataset):
    corners, rates = torch.tensor([[10, 20], [10, 20], [10, 20]]), torch.tensor([0.75, 1.0, 1.5])
    slow, same, fast = dsets.crop(dataset.features, torch.tensor([3, 3, 3]), corners, PARAMS, rates)[:, 0]
    feature = dataset.features[3, 0, 10:110].roll(-20, dims=-1)  # (100, 431), from the crop's first frame on
    assert torch.equal(slow[:, :8], feature[:, [0, 0, 1, 2, 3, 3, 4, 5]])
    assert torch.equal(same, feature[:, :384])
    assert torch.equal(fast[:, :6], feature[:, [0, 1, 3, 4, 6, 7]])
    assert torch.equal(fast[:, 288], feature[:, 1]), "frame 432 of 431: the clip begins again"


def test_stretches_are_as_often_faster_as_slower():
    rates = dsets.draw_stretches(20_000, 0.25, dsets.generator_for(1, 1, 1, "test"))
    assert rates.min() >= 0.8 and rates.max() <= 1.25 and rates.dtype == torch.float32
    assert rates.log().mean().abs() < 0.005 and rates.min() < 0.801 and rates.max() > 1.249


@pytest.mark.parametrize("flags", [{"time_stretch": 0.25}, {"freq_shift": 14}], ids=str)
def test_stretch_and_shift_leave_all_other_draws_as_they_are(dataset, flags):
    training, _ = dataset.split(1)
    options = {"views": 5, "batch_size": 5, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, "mixup": 1.0}
    plain = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options))
    changed = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options, **flags))
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one.targets, other.targets) and torch.equal(one.lam, other.lam)
        assert not torch.equal(one.examples, other.examples)


def test_gain_is_what_a_louder_recording_would_be(dataset):
    plain, _ = epoch_of(dataset, views=1)
    louder, _ = epoch_of(dataset, views=1, gain=6.0)
    _, std = dataset.mean_std(dataset.split(1)[0])
    difference = (louder - plain) * std  # dB
    each = difference.flatten(1)
    assert torch.allclose(each, each[:, :1].expand_as(each), atol=1e-3), "one gain an example"
    assert each[:, 0].abs().max() <= 6 and each[:, 0].min() < -2 and each[:, 0].max() > 2


def test_filter_augment_adds_straight_lines_over_the_mels(dataset):
    plain, _ = epoch_of(dataset, views=1)
    filtered, _ = epoch_of(dataset, views=1, filter_augment=6.0)
    _, std = dataset.mean_std(dataset.split(1)[0])
    response = (filtered - plain) * std  # dB, (16, 1, 100, 384)
    assert torch.allclose(response, response[..., :1].expand_as(response), atol=1e-3), "the same in all frames"
    response = response[:, 0, :, 0]
    assert response.abs().max() <= 6.001 and response.min() < -4 and response.max() > 4
    assert response.std(dim=0).min() > 1, "each example its own, at each mel"
    bend = response.diff(dim=1).diff(dim=1).abs().amax(dim=0)  # at mels 1 to 98; points at 0, 24.75, 49.5, 74.25, 99
    straight = [mel for mel in range(98) if mel + 1 not in {24, 25, 49, 50, 74, 75}]
    assert bend[straight].max() < 1e-3 < 0.05 < bend.max()


def test_lam_is_the_larger_part_of_a_beta_distribution():
    lam = dsets.draw_lam(20_000, 1.0, dsets.generator_for(1, 1, 1, "test"))
    assert lam.min() >= 0.5 and lam.max() <= 1 and lam.dtype == torch.float32
    assert lam.mean() == pytest.approx(0.75, abs=0.01)  # Beta(1, 1) is uniform
    assert dsets.draw_lam(20_000, 0.1, dsets.generator_for(1, 1, 1, "test")).mean() > 0.9
    assert torch.equal(lam, dsets.draw_lam(20_000, 1.0, dsets.generator_for(1, 1, 1, "test")))


def test_mixup_adds_neighbors(dataset):
    training, _ = dataset.split(1)
    options = {"views": 2, "batch_size": 5, "seed": 1, "fold": 1, "epoch": 1, "device": CPU}
    plain = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options))
    mixed = list(dsets.training_batches(dataset, training, (-40.0, 20.0), mixup=1.0, **options))
    for alone, sums in zip(plain, mixed, strict=True):
        assert alone.lam is None and alone.other_targets is None and torch.equal(alone.targets, sums.targets)
        for i in range(len(sums.targets)):
            expected = sums.lam[i] * alone.examples[i] + (1 - sums.lam[i]) * alone.examples[i - 1]
            torch.testing.assert_close(sums.examples[i], expected)
            assert sums.other_targets[i] == alone.targets[i - 1]


@pytest.mark.parametrize("mixup", [0.0, 1.0])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_parts_of_all_ranks_in_a_row_are_the_batch_of_one(dataset, mixup, world_size):
    training, _ = dataset.split(1)
    options = {"views": 1, "batch_size": 5, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, "mixup": mixup, "time_shift": 5.0,
               "time_stretch": 0.25, "freq_shift": 14, "gain": 6.0, "filter_augment": 6.0}  # 16 examples: 5, 5, 5, 1
    whole = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options))
    parts = [list(dsets.training_batches(dataset, training, (-40.0, 20.0), rank=rank, world_size=world_size, **options))
             for rank in range(world_size)]
    names = ["examples", "targets", "positions"] + (["lam", "other_targets"] if mixup else [])
    for batch, *shared in zip(whole, *parts, strict=True):
        counts = [len(part.positions) for part in shared]
        assert max(counts) - min(counts) <= 1 and all(part.size == len(batch.targets) for part in shared)
        assert all(len(part.examples) == len(part.targets) == max(1, count) for part, count in zip(shared, counts))
        for name in names:
            in_a_row = [getattr(part, name)[:count] for part, count in zip(shared, counts)]
            assert torch.equal(torch.cat(in_a_row), getattr(batch, name))
    assert torch.cat([batch.positions for batch in whole]).tolist() == list(range(16))


# --- validation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_validate_each_clip_once_in_the_batches_of_one(dataset, world_size):
    options = {"batch_size": 3, "device": CPU, "tta_crops": 9}
    whole = list(dsets.validation_batches(dataset, torch.arange(8, 16), (0.0, 1.0), **options))
    parts = [list(dsets.validation_batches(dataset, torch.arange(8, 16), (0.0, 1.0), rank=rank, world_size=world_size, **options))
             for rank in range(world_size)]
    assert sum(map(len, parts)) == len(whole) == 3
    for i, batch in enumerate(whole):
        assert all(torch.equal(a, b) for a, b in zip(batch, parts[i % world_size][i // world_size], strict=True))


def test_the_center_crop_is_in_the_middle():
    assert dsets.validation_corners(PARAMS).tolist() == [[14, 23]]
    assert dsets.validation_corners(OTHER_PARAMS).tolist() == [[2, 8]]


def test_nine_crops_are_a_grid_from_corner_to_corner(dataset):
    assert dsets.validation_corners(PARAMS, 9).tolist() == [[mel, frame] for mel in (0, 14, 28) for frame in (0, 23, 46)]
    assert dsets.validation_corners(FeatureParams(crop_frames=431), 9).tolist() == [[0, 0], [14, 0], [28, 0]]  # none twice
    batch, = dsets.validation_batches(dataset, torch.arange(2), (0.0, 1.0), batch_size=2, device=CPU, tta_crops=9)
    assert batch[0].shape == (18, 1, 100, 384) and len(batch[1]) == 2
    assert torch.equal(batch[0][17], dataset.features[1][:, 28:128, 46:430])


def test_three_crops_start_a_third_of_the_clip_apart_and_five_mels_apart(dataset):
    assert dsets.validation_corners(PARAMS, 3).tolist() == [[14, 23], [9, 23 + 144], [19, 23 + 288]]
    whole = FeatureParams(crop_mels=128, crop_frames=431)
    corners = dsets.validation_corners(whole, 3)
    assert corners.tolist() == [[0, 0], [-5, 144], [5, 288]]
    _, lower, higher = dsets.crop(dataset.features, torch.zeros(3, dtype=torch.int64), corners, whole)
    first = dataset.features[0]
    expected = torch.cat([first[:, :1].expand(1, 5, 431), first[:, :123]], dim=1)  # the lowest mel repeats
    assert torch.equal(lower, expected.roll(-144, dims=2))  # the clip's start follows its end
    expected = torch.cat([first[:, 5:], first[:, 127:].expand(1, 5, 431)], dim=1)
    assert torch.equal(higher, expected.roll(-288, dims=2))


def test_validation_is_each_clip_once_cropped_in_the_middle(dataset):
    _, validation = dataset.split(3)
    batches = list(dsets.validation_batches(dataset, validation, (2.0, 3.0), batch_size=3, device=CPU))
    examples = torch.cat([examples for examples, *_ in batches])
    expected = (dataset.features[validation][:, :, 14:114, 23:407] - 2.0) / 3.0
    assert torch.equal(examples, expected)
    assert torch.equal(torch.cat([targets for _, targets, _ in batches]), dataset.targets[validation])


def test_batches_of_other_features_have_their_shape(other_dataset):
    training, validation = other_dataset.split(1)
    examples, _ = epoch_of(other_dataset, time_shift=5.0, time_stretch=0.25, freq_shift=14, gain=6.0, filter_augment=6.0,
                           mixup=0.3)
    assert other_dataset[0][0].shape == (1, 64, 216) and examples.shape == (80, 1, 60, 200) and examples.isfinite().all()
    for tta_crops in (1, 3, 9):
        examples, targets, _ = next(dsets.validation_batches(other_dataset, validation, (0.0, 1.0), batch_size=4, device=CPU,
                                                             tta_crops=tta_crops))
        assert examples.shape == (4 * tta_crops, 1, 60, 200) and len(targets) == 4
