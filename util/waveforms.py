"""Recordings as waveforms (1, 220500): mono, at 44 100 Hz, in parts of 5 s; and what is odd about their sound. util/audio.py
decodes them.
"""
import contextlib
import math
from pathlib import Path

import numpy as np
import soxr
import torch

from util import audio
from util.errors import UserError

SAMPLE_RATE = 44_100  # Hz, ESC-50's
CLIP_SAMPLES = 5 * SAMPLE_RATE  # 220 500: ESC-50's clips have 5 s

MAX_AMPLITUDE = 2.0 ** 31  # 32-bit integers kept as floats; squares of much larger samples are not finite
SILENCE = 2.0 ** -16  # half a step of 16 bits
CANCELED = 1e-3  # the mean of the channels has -30 dB of their power; that of unlike channels has 1/64 or more
INTEGERS = 4.0  # 12 dB above full scale: lossy formats overshoot by less than half of that
LONGER_SAMPLES = SAMPLE_RATE // 10  # so much more, or less, than 5 s is noticed
SILENT, CANCELING, SILENT_CLIPS = "is silent", "has channels that cancel each other, their mean is silent", "has silent clips"
LONGER = "is longer than 5 s, and its first 5 s are used (--split-long uses all)"
INCOMPLETE = "lacks some of its sound, cut short or damaged"
ENDS_EARLY = "ends earlier than its table says"
SOUND_NOTES = {  # what a network cannot judge, or does not hear, said of one recording and of several
    SILENT: "are silent",
    CANCELING: "have channels that cancel each other, their mean is silent",
    "has samples far beyond 1, as if they were integers": "have samples far beyond 1, as if they were integers",
    SILENT_CLIPS: "have silent clips",
    LONGER: "are longer than 5 s, and their first 5 s are used (--split-long uses all)",
    INCOMPLETE: "lack some of their sound, cut short or damaged",
    ENDS_EARLY: "end earlier than their table says"}


def mono_blocks(recording: audio.Recording, notes: list[str]):
    """A recording in blocks (samples,) float32 at 44 100 Hz: channels averaged, resampled (soxr, high quality).

    At the end, `notes` gets what is odd about the file (util/audio.py) and about its sound (SOUND_NOTES).
    Raises UserError for a sample that is not a finite number.
    """
    rate, resampler, nothing = SAMPLE_RATE, None, np.zeros(0, np.float32)
    loudest, power, mono_power = 0.0, 0.0, 0.0
    try:
        for samples in recording.blocks():  # (frames, channels)
            peak = np.maximum(samples.max(), -samples.min())  # NaN if a sample is
            if not peak <= MAX_AMPLITUDE:
                raise UserError(f"{recording.path}: holds samples as large as {peak:.3g}, or not a number; expected about 1 at "
                                f"most")
            loudest = max(loudest, peak)
            mono = samples[:, 0]
            if samples.shape[1] > 1:
                mono = samples.mean(axis=1)  # (frames, channels) -> (frames,)
                power += np.square(samples).mean(axis=1).sum()
                mono_power += np.square(mono).sum()
            if recording.rate != rate:  # joined files may change it
                if resampler:
                    yield resampler.resample_chunk(nothing, last=True)
                rate = recording.rate
                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
            yield resampler.resample_chunk(mono) if resampler else mono
        if resampler:
            yield resampler.resample_chunk(nothing, last=True)
    finally:  # also where no more is asked for
        odd = (loudest < SILENCE, loudest >= SILENCE and mono_power < CANCELED * power, loudest > INTEGERS)
        notes += recording.notes + [note for note, holds in zip(SOUND_NOTES, odd) if holds]


def windows(path: str | Path, hop: int = CLIP_SAMPLES, notes: list[str] | None = None):
    """Windows of a recording: first sample, samples in it and waveform (1, 220500) float32, read as they are asked for.

    A window begins every `hop` samples at 44 100 Hz until one ends less than 0.1 s before the recording: a clip of 5 s has
    one window, even where its format adds some milliseconds. The last is padded with zeros. "-" is standard input, read as it
    comes. `notes` gets the notes of `mono_blocks`, before the last window.
    Raises UserError if the recording cannot be decoded, is empty, or holds a sample that is not a finite number.
    """
    start, parts, length = 0, [], 0  # the samples from `start` on that have been read, in parts, and how many they are
    with audio.open_recording(path) as recording:
        for mono in mono_blocks(recording, [] if notes is None else notes):
            parts.append(mono)
            length += len(mono)
            while length > CLIP_SAMPLES:  # a window that ends where the recording does is the last: it waits
                pending = np.concatenate(parts)
                yield start, CLIP_SAMPLES, torch.from_numpy(pending[:CLIP_SAMPLES].copy())[None]  # (220500,) -> (1, 220500)
                start, parts, length = start + hop, [pending[hop:]], length - hop
    if length == 0:
        raise UserError(f"{path}: holds no samples, or too few to resample")
    if start > 0 and length - (CLIP_SAMPLES - hop) < LONGER_SAMPLES:  # what the window before did not hold
        return
    padded = np.zeros(CLIP_SAMPLES, np.float32)
    np.concatenate(parts, out=padded[:length])
    yield start, length, torch.from_numpy(padded)[None]  # (220500,) -> (1, 220500)


def load_clips(path: str | Path, spans: list[tuple], notes: list[str] | None = None):
    """Waveforms (1, 220500) float32 at 44 100 Hz of parts of a recording, which is decoded once.

    spans: (start, end) in s of each, the starts rising; of a longer one its first 5 s, a shorter one is padded with zeros; an
    end of nan or inf is that of the recording. `notes` gets those of `mono_blocks`, one if more than 5 s are there, one if the
    recording ends before a part's end, and one if a part is silent, but not the whole.
    Raises UserError also for a part without a sample, one that lacks sound that the file promises, and one that begins after the
    end.
    """
    notes, has_silence = [] if notes is None else notes, False
    with audio.open_recording(path) as recording, contextlib.closing(mono_blocks(recording, notes)) as blocks:
        offset, pending = 0, np.zeros(0, np.float32)  # the samples from `offset` on that have been read
        for start, end in spans:
            first, parts, length = round(start * SAMPLE_RATE) if 0 <= start < math.inf else -1, [pending], len(pending)
            end_sample = round(end * SAMPLE_RATE) if end < math.inf else math.inf  # of inf and nan
            if not 0 <= first < end_sample:
                raise UserError(f"{path}: holds nothing from {start:g} to {end:g} s; expected a later end, a start from 0")
            last = min(first + CLIP_SAMPLES, end_sample)
            wanted = min(last + LONGER_SAMPLES, end_sample)
            while offset + length < wanted and (block := next(blocks, None)) is not None:
                parts.append(block)
                length += len(block)
                if offset + length < first:  # all of it lies before the part
                    parts, offset, length = [pending[:0]], offset + length, 0
            before = min(max(first - offset, 0), length)
            pending, offset = np.concatenate(parts)[before:], offset + before
            found = pending[:last - first]
            if len(found) == 0:
                raise UserError(f"{path}: holds no samples, or too few to resample" if first == 0 else
                                f"{path}: ends at {offset / SAMPLE_RATE:.2f} s, before a clip's start of {start:g} s")
            if len(found) < last - first - LONGER_SAMPLES and recording.is_incomplete:
                raise UserError(f"{path}: {recording.notes[-1]}")
            if offset + len(pending) >= last + LONGER_SAMPLES <= end_sample:
                notes.append(LONGER)
            if offset + len(pending) < wanted and offset + len(pending) <= end_sample - LONGER_SAMPLES < math.inf:
                notes.append(ENDS_EARLY)
            has_silence |= max(found.max(), -found.min()) < SILENCE
            waveform = np.zeros(CLIP_SAMPLES, np.float32)
            waveform[:len(found)] = found
            yield torch.from_numpy(waveform)[None]  # (220500,) -> (1, 220500)
    if has_silence and SILENT not in notes and CANCELING not in notes:
        notes.append(SILENT_CLIPS)


def load_waveform(path: str | Path, start: float = 0.0, end: float = math.nan) -> torch.Tensor:
    """The first 5 s of a recording, or of a part of it (s): (1, 220500) float32, nominally in [-1, 1] (see `load_clips`)."""
    with contextlib.closing(load_clips(path, [(start, end)])) as clips:
        return next(clips)


def count_seconds(path: str | Path, notes: list[str]) -> float:
    """The length of a recording in s, decoded to its end; `notes` gets INCOMPLETE where more is promised than is there."""
    with audio.open_recording(path) as recording:
        seconds = sum(map(len, mono_blocks(recording, []))) / SAMPLE_RATE
        notes += [INCOMPLETE] if recording.is_incomplete else []
    return seconds
