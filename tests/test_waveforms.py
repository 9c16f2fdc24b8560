import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dsets
from conftest import tone
from util import audio, waveforms
from util.errors import UserError


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
    elif kind == "channels":
        soundfile.write(path, np.zeros((10, audio.MAX_CHANNELS + 1)), 44_100)
    elif kind == "cut":
        soundfile.write(path, tone(1, 44_100), 44_100)
        path.write_bytes(path.read_bytes()[:50_000])
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["garbage", "nothing", "no samples", "nan", "infinite", "loud", "rate", "channels", "cut",
                                  "directory", "pipe", "missing"])
def test_bad_recordings_are_refused_by_name(own_root, kind):
    path = own_root / "audio" / "1-0-A-1.wav"
    path.unlink()
    bad_recording(path, kind)
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as refusal:
        dsets.load_waveform(path)
    with pytest.raises(UserError, match=re.escape(f"{path}: ")) as refusal_of_all:
        dsets.ESC50(own_root)
    assert "\n" not in str(refusal.value) + str(refusal_of_all.value)


def silence(channels: int = 1) -> np.ndarray:
    return np.zeros((6 * 44_100, channels))


@pytest.mark.parametrize("samples, note", [
    (silence(), "is silent"), (silence(2), "is silent"), (silence() + 1e-6, "is silent"), (tone(6, 44_100)[:, None] * 1e-4, None),
    (tone(6, 44_100)[:, None] * [1, -1], "has channels that cancel each other, their mean is silent"),
    (tone(6, 44_100)[:, None] * [1, -0.99], "has channels that cancel each other, their mean is silent"),
    (tone(6, 44_100)[:, None] * [1, 0], None), (tone(6, 44_100)[:, None] * [1, -0.8], None),
    (np.random.default_rng(0).uniform(-1, 1, (6 * 44_100, 64)), None),
    (tone(6, 44_100)[:, None] * 1000, "has samples far beyond 1, as if they were integers"),
    (tone(6, 44_100)[:, None] * 4, None)], ids=range(11))
def test_sounds_that_a_network_cannot_judge_are_told(tmp_path, samples, note):
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    for listen in (lambda notes: list(waveforms.windows(tmp_path / "a.wav", notes=notes)),
                   lambda notes: list(waveforms.load_clips(tmp_path / "a.wav", [(0.0, math.nan)], notes))):  # the first 5 s
        notes = []
        listen(notes)
        assert [found for found in notes if found != waveforms.LONGER] == ([note] if note else [])


@pytest.mark.parametrize("end, note", [(5, "is silent"), (11, "has silent clips"), (16, None)])
def test_a_silent_clip_is_told_where_it_is_the_only_one_of_its_recording(tmp_path, end, note):
    sound = tone(20, 8000)
    sound[(0 if end == 5 else 5) * 8000:15 * 8000] = 0
    soundfile.write(tmp_path / "a.wav", sound, 8000)
    notes = []
    clip, = waveforms.load_clips(tmp_path / "a.wav", [(end - 3, end)], notes)
    assert (clip.abs().max() > 0.1) == (note is None) and notes == [note] * (note is not None)


@pytest.mark.parametrize("start, end", [
    (0.5, 0.2), (0.5, 0.500005), (-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, math.inf)])
def test_a_part_without_a_sample_is_refused(tmp_path, start, end):
    soundfile.write(tmp_path / "a.wav", tone(1, 44_100), 44_100)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a.wav'}: holds nothing from {start:g} to {end:g} s")):
        waveforms.load_waveform(tmp_path / "a.wav", start, end)


SPANS = [(0.0, math.nan), (0.5, 3.0), (0.5, 5.25), (2.0, 20.0), (7.25, 8.0), (11.0, math.nan)]


@pytest.mark.parametrize("rate", [44_100, 22_050])
def test_parts_of_a_recording_are_those_of_the_whole(tmp_path, rate):
    """Parts that overlap, leave gaps and reach beyond the end; the recording is decoded once for all of them."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 12 * rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    whole = torch.cat([waveform[0, :length] for _, length, waveform in waveforms.windows(tmp_path / "a.wav")])
    notes = []
    for (start, end), waveform in zip(SPANS, waveforms.load_clips(tmp_path / "a.wav", SPANS, notes), strict=True):
        last = start + 5 if math.isnan(end) else min(end, start + 5)
        part = whole[round(start * 44_100):round(last * 44_100)]
        assert torch.equal(waveform, F.pad(part, (0, dsets.CLIP_SAMPLES - len(part)))[None])
        assert torch.equal(dsets.load_waveform(tmp_path / "a.wav", start, end), waveform)
        assert not math.isnan(end) or torch.equal(dsets.load_waveform(tmp_path / "a.wav", start, math.inf), waveform)
    assert notes == [waveforms.LONGER] * 2  # the first span and the fourth
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'a.wav'}: ends at 12.00 s")):
        list(waveforms.load_clips(tmp_path / "a.wav", [(0.0, 5.0), (13.0, 18.0)]))


def test_parts_far_into_a_recording_take_no_more_memory(tmp_path, monkeypatch):
    longest, concatenate = [], np.concatenate

    def watched(parts, *arguments, **keywords):
        result = concatenate(parts, *arguments, **keywords)
        longest.append(len(result))
        return result
    soundfile.write(tmp_path / "a.wav", np.zeros(120 * 44_100), 44_100)
    monkeypatch.setattr(np, "concatenate", watched)
    assert len(list(waveforms.load_clips(tmp_path / "a.wav", [(0.0, 5.0), (100.0, 105.0)]))) == 2
    assert max(longest) < 8 * 44_100
