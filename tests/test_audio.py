"""Recordings as people have them: decoded from start to end, with notes on what is odd about a file."""
import contextlib
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile

from conftest import PROJECT, refused
from util import audio, waveforms

RATE = 44_100
MAKE_CASES = PROJECT.parent / "shared" / "cases" / "make_cases.py"  # recordings as people have them, where it lies there
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


def noise(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Samples (frames, channels), smooth enough for lossy formats."""
    t = np.arange(round(seconds * rate))[:, None] / rate
    return 0.3 * np.sin(2 * np.pi * (200 + 300 * np.arange(channels)) * t * (1 + 0.1 * t)) + 0.01


def decode(path) -> tuple[np.ndarray, list[str]]:
    """The samples (frames, channels) of a recording, and its notes."""
    with audio.open_recording(path) as recording:
        return np.concatenate(list(recording.blocks())), recording.notes


def wav_bytes(samples: np.ndarray, subtype: str = "PCM_16", form: str = "WAV", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=form)
    return buffer.getvalue()


def encode(form: str, codec: str, samples: np.ndarray, streams: int = 1) -> bytes:
    """Samples (frames, 1) at 44 100 Hz as FFmpeg writes them."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        rate = 48_000 if codec == "libopus" else RATE
        made = [container.add_stream(codec, rate=rate, layout="mono", bit_rate=96_000) for _ in range(streams)]
        for stream in made:
            stream.codec_context.open()
        for stream in made:
            frame = av.AudioFrame.from_ndarray(np.int16(samples.T * 32_767), "s16", "mono")
            frame.sample_rate = RATE
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
    return buffer.getvalue()


def str_of(value) -> str:
    """What names a test's case: not a whole file."""
    return "" if isinstance(value, bytes) else str(value)


def said(content: bytes, name: bytes, size: int, order: str = "little") -> bytes:
    """A WAV or AIFF whose chunk `name` claims another size."""
    at = content.index(name) + 4
    return content[:at] + size.to_bytes(4, order) + content[at + 4:]


# --- samples ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form, subtypes", [
    ("WAV", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"]),
    ("WAVEX", ["PCM_16", "PCM_24", "FLOAT"]), ("AIFF", ["PCM_S8", "PCM_16", "PCM_24", "FLOAT"]),
    ("FLAC", ["PCM_16", "PCM_24"]), ("RF64", ["PCM_16"]), ("W64", ["PCM_16"]), ("AU", ["PCM_16"]), ("CAF", ["PCM_16"])])
def test_lossless_samples_are_libsndfiles_to_the_bit(tmp_path, form, subtypes):
    for subtype in subtypes:
        for channels in (1, 2, 5):
            (tmp_path / "a").write_bytes(wav_bytes(noise(1.3, channels=channels), subtype, form))
            samples, notes = decode(tmp_path / "a")
            expected, _ = soundfile.read(tmp_path / "a", dtype="float32", always_2d=True)
            assert np.array_equal(samples, expected) and notes == [], (subtype, channels)


@pytest.mark.parametrize("form, codec, layout", [("ipod", "alac", "7.1(wide)"), ("wv", "wavpack", "hexadecagonal")])
def test_many_channels_in_planes_of_their_own_are_decoded(tmp_path, form, codec, layout):
    expected = np.int16(np.linspace(-20_000, 20_000, av.AudioLayout(layout).nb_channels * 9600)).reshape(9600, -1)
    with av.open(tmp_path / "a", "w", format=form) as container:
        stream = container.add_stream(codec, rate=48_000, layout=layout)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(expected.reshape(1, -1), "s16", layout)
        frame.sample_rate = 48_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    samples, notes = decode(tmp_path / "a")
    assert notes == [] and samples.shape == expected.shape
    assert np.abs(samples - expected / 32_768).max() <= (0 if codec == "alac" else 512 / 32_768)  # this encoder rounds


@needs_ffmpeg
@pytest.mark.parametrize("name, options, tolerance", [
    ("a.mp3", ["-q:a", "9"], 2e-3), ("a.mp3", ["-b:a", "128k"], 2e-3), ("a.m4a", [], 1e-5), ("a.3gp", ["-c:a", "aac"], 1e-5),
    ("a.ogg", ["-c:a", "libvorbis"], 1e-5), ("a.opus", [], 1e-5), ("a.webm", ["-c:a", "libopus"], 1e-5), ("a.wma", [], 1e-5),
    ("a.mp2", [], 1e-5), ("a.aac", [], 1e-5), ("a.ac3", [], 1e-5), ("a.mkv", ["-c:a", "flac"], 0),
    ("a.wav", ["-c:a", "mp3"], 1e-5), ("a.wav", ["-rf64", "always"], 0), ("a.avi", ["-c:a", "mp2"], 1e-5),
    ("a.ts", ["-c:a", "mp2"], 1e-5), ("a.wv", [], 0)])
def test_samples_are_those_of_ffmpeg_from_the_first_to_the_last(tmp_path, capfd, name, options, tolerance):
    plain, path = noise(7.3), tmp_path / name
    (tmp_path / "plain.wav").write_bytes(wav_bytes(plain))
    ffmpeg = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i"]
    subprocess.run([*ffmpeg, tmp_path / "plain.wav", *options, path], check=True)
    expected = np.frombuffer(subprocess.check_output([*ffmpeg, path, "-f", "f32le", "-"]), np.float32)[:, None]
    samples, notes = decode(path)
    if name in ("a.m4a", "a.3gp") and len(expected) == len(plain):  # FFmpeg 9 leaves out what fills AAC's last frame of 1024
        assert len(samples) - len(plain) < 1024
        samples = samples[:len(plain)]
    assert samples.shape == expected.shape and np.abs(samples - expected).max() <= tolerance
    assert notes == [] and capfd.readouterr().err == ""


@needs_ffmpeg
def test_a_picture_that_begins_after_the_sound_is_passed_over(tmp_path):
    (tmp_path / "plain.wav").write_bytes(wav_bytes(noise(6)))
    picture = ["-itsoffset", "4", "-f", "lavfi", "-i", "testsrc=s=320x240:r=25:d=3", "-map", "0:a", "-map", "1:v"]
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-i", tmp_path / "plain.wav", *picture, "-c:a", "aac",
                    "-c:v", "flv", tmp_path / "a.flv"], check=True)
    samples, notes = decode(tmp_path / "a.flv")
    assert len(samples) / RATE == pytest.approx(6, abs=0.1) and notes == []


@needs_ffmpeg
def test_the_sound_of_a_broadcast_recorded_from_its_middle_is_found(tmp_path):
    (tmp_path / "plain.wav").write_bytes(wav_bytes(noise(3)))
    film = ["-f", "lavfi", "-i", "testsrc=s=640x480:r=25:d=3", "-map", "1", "-map", "0", "-c:v", "mpeg2video", "-b:v", "8M"]
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-i", tmp_path / "plain.wav", *film, "-c:a", "aac",
                    tmp_path / "a.ts"], check=True)
    packets = (tmp_path / "a.ts").read_bytes()[10 * 188:]  # the tables at its start are lost; the next ones come 0.1 s later
    samples, notes = decode_bytes(tmp_path, packets)
    assert len(samples) / RATE == pytest.approx(3, abs=0.1) and notes == []


@needs_ffmpeg
def test_an_m4a_cut_short_whose_table_comes_first_is_told(tmp_path):
    (tmp_path / "plain.wav").write_bytes(wav_bytes(noise(6)))
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-i", tmp_path / "plain.wav", "-movflags", "+faststart",
                    tmp_path / "a.m4a"], check=True)
    content = (tmp_path / "a.m4a").read_bytes()
    samples, notes = decode_bytes(tmp_path, content[:len(content) // 2])
    assert len(samples) == pytest.approx(3 * RATE, abs=0.3 * RATE) and len(notes) == 1 and "of its 6.0 s" in notes[0]


def test_a_large_tag_without_sound_behind_it_is_refused(tmp_path):
    size = bytes(1_500_000 >> shift & 127 for shift in (21, 14, 7, 0))  # of ID3v2: seven bits a byte
    (tmp_path / "a.mp3").write_bytes(b"ID3\x04\0\0" + size + bytes(1_500_000 + 100_000))
    assert str(tmp_path / "a.mp3") in refused(decode, tmp_path / "a.mp3")


def test_joined_files_are_heard_whole(tmp_path):
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        one = wav_bytes(noise(3), subtype, form)
        (tmp_path / "a").write_bytes(6 * one)
        samples, notes = decode(tmp_path / "a")
        assert len(samples) / RATE == pytest.approx(18, abs=0.4) and notes == [], form  # each MP3 is padded


def test_joined_files_may_change_their_rate_and_channels(tmp_path):
    kinds = [(22_050, 1), (48_000, 1), (44_100, 2)]
    (tmp_path / "a.mp3").write_bytes(b"".join(wav_bytes(noise(3, *kind), "MPEG_LAYER_III", "MP3", kind[0]) for kind in kinds))
    with audio.open_recording(tmp_path / "a.mp3") as recording:
        found = [(recording.rate, block.shape) for block in recording.blocks()]
    assert recording.notes == []
    for rate, channels in kinds:
        heard = sum(shape[0] for other, shape in found if (other, shape[1]) == (rate, channels))
        assert heard == pytest.approx(3 * rate, abs=3000)
    *_, (start, length, _) = waveforms.windows(tmp_path / "a.mp3")
    assert start + length == pytest.approx(9 * RATE, abs=9000)
    (tmp_path / "a.wav").write_bytes(wav_bytes(noise(3)) + wav_bytes(noise(3, 22_050), rate=22_050))
    note, = decode(tmp_path / "a.wav")[1]
    assert note == "holds several recordings of different formats; only the first is used, split the file"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file can have such names")
def test_any_name_is_a_name(tmp_path):
    for name in (b"\xe9.wav", b"file:a.wav", b"concat:a.wav|b.wav", b"a%03d.wav", b"pipe:0"):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(wav_bytes(noise(1)))
        assert len(decode(path)[0]) == RATE and audio.holds_sound(str(path))


# --- what a header says ------------------------------------------------------------------------------------------------

PLAIN = wav_bytes(noise(6))
SIZE = len(PLAIN) - 44
JUNK = bytes(range(256)) * 40  # behind the sound: ten thousand bytes


@pytest.mark.parametrize("content, seconds, note", [
    *[(said(PLAIN, b"data", size), 6, None)
      for size in (0, 0x7FFFFFFF, 0x7FFF0000, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 2_000_000_000, 2 * SIZE, SIZE + 44, SIZE + 1)],
    *[(said(said(PLAIN, b"data", size), b"RIFF", outer), 6, None)
      for size, outer in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 0x80000024), (SIZE, 0), (SIZE, 0xFFFFFFFF))],
    (said(PLAIN, b"data", 2 * RATE), 6, "holds more sound than its header says; all of it is used"),
    (said(said(PLAIN, b"data", 2 * RATE), b"RIFF", 2 * RATE + 36), 6, "holds more sound than its header says; all of it is used"),
    (PLAIN[:-3 * 2 * RATE], 3, "lacks 3.0 of its 6.0 s, cut short or damaged; copy it again"),
    (PLAIN[:-9000], 6 - 4500 / RATE, "lacks 0.1 of its 6.0 s, cut short or damaged; copy it again"),
    (PLAIN[:-8000], 6 - 4000 / RATE, None),
    (PLAIN + b"LIST" + struct.pack("<I", len(JUNK)) + JUNK, 6, None),
    (PLAIN + b"LIST" + struct.pack("<I", len(JUNK)) + JUNK[:5000], 6, None),  # the sound is whole
    (said(PLAIN, b"data", SIZE - 1)[:-1] + b"\0id3 " + struct.pack("<I", len(JUNK)) + JUNK, 6, None),  # odd, padded
    (PLAIN[:12] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + PLAIN[12:], 6, None),  # odd, padded
    (PLAIN[:12] + b"LIST" + struct.pack("<I", 200_000) + bytes(200_000) + PLAIN[12:], 6, None),
    (PLAIN + bytes(100), 6, None)], ids=str_of)
def test_the_size_in_a_wav_header_neither_stops_nor_refuses(tmp_path, capfd, content, seconds, note):
    (tmp_path / "a.wav").write_bytes(content)
    samples, notes = decode(tmp_path / "a.wav")
    assert abs(len(samples) - seconds * RATE) <= 1 and notes == ([note] if note else [])
    assert np.array_equal(samples[:, 0], soundfile.read(io.BytesIO(PLAIN), dtype="float32")[0][:len(samples)])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form, subtype", [("WAV", "PCM_24"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_16"), ("AIFF", "PCM_16")])
def test_wav_and_aiff_of_other_sample_formats_cut_short_are_told(tmp_path, form, subtype):
    content = wav_bytes(noise(6), subtype, form)
    (tmp_path / "a").write_bytes(content[:len(content) // 2])
    samples, notes = decode(tmp_path / "a")
    assert len(samples) == pytest.approx(3 * RATE, abs=1100)  # a block of ADPCM
    assert notes == ["lacks 3.0 of its 6.0 s, cut short or damaged; copy it again"]


def test_chunks_behind_the_sound_of_an_rf64_and_an_aiff_are_no_sound(tmp_path):
    for form, order in (("RF64", "<"), ("AIFF", ">")):
        content = wav_bytes(noise(6), "PCM_16", form)
        samples, notes = decode_bytes(tmp_path, content + b"TEXT" + struct.pack(order + "I", len(JUNK)) + JUNK)
        assert len(samples) == 6 * RATE and notes == []


def test_an_aiff_with_the_sizes_of_a_stream_is_decoded_whole(tmp_path):
    content = wav_bytes(noise(6), "PCM_16", "AIFF")
    expected = decode_bytes(tmp_path, content)[0]
    for outer, size in ((0, 0), (0x7F000050, 0x7F000008), (0xFFFFFFFF, 0xFFFFFFFF)):
        samples, notes = decode_bytes(tmp_path, said(said(content, b"FORM", outer, "big"), b"SSND", size, "big"))
        assert np.array_equal(samples, expected) and notes == []


def test_a_title_in_another_encoding_stops_nothing(tmp_path):
    content = wav_bytes(noise(1), "PCM_16", "AIFF")
    assert len(decode_bytes(tmp_path, content[:12] + b"NAME\0\0\0\4\xe9t\xe9 " + content[12:])[0]) == RATE


def decode_bytes(tmp_path: Path, content: bytes) -> tuple[np.ndarray, list[str]]:
    (tmp_path / "recording").write_bytes(content)
    return decode(tmp_path / "recording")


@pytest.mark.parametrize("form, codec", [("mp3", "mp3"), ("ogg", "libopus"), ("flac", "flac"), ("ipod", "aac"),
                                         ("matroska", "aac"), ("asf", "wmav2")])
def test_damage_in_the_middle_is_passed_over_and_told(tmp_path, capfd, form, codec):
    content = bytearray(encode(form, codec, np.random.default_rng(0).uniform(-0.5, 0.5, (15 * RATE, 1))))
    whole, notes = decode_bytes(tmp_path, bytes(content))
    assert len(whole) / audio_rate(tmp_path) == pytest.approx(15, abs=0.1) and notes == []
    middle = len(content) // 2
    content[middle:middle + len(content) // 10] = np.random.default_rng(1).bytes(len(content) // 10)
    samples, notes = decode_bytes(tmp_path, bytes(content))
    assert 10 < len(samples) / audio_rate(tmp_path) < 14.9 and len(notes) == 1 and notes[0].startswith("lacks ")
    assert capfd.readouterr().err == ""


def audio_rate(tmp_path: Path) -> int:
    with audio.open_recording(tmp_path / "recording") as recording:
        return recording.rate


@pytest.mark.parametrize("tag", [True, False])
def test_an_mp3_cut_short_is_told_where_a_tag_says_its_length(tmp_path, tag):
    content = wav_bytes(noise(6), "MPEG_LAYER_III", "MP3")
    frame = content.find(b"Xing")
    assert frame > 0
    if not tag:
        content = content.replace(b"Xing", b"\0\0\0\0")
    cover = b"ID3\x04\0\0" + bytes([0, 8, 0, 0]) + bytes(8 << 14)  # a picture of 128 kB
    for before in (b"", cover):
        assert decode_bytes(tmp_path, before + content)[1] == []
        samples, notes = decode_bytes(tmp_path, before + content[:len(content) // 2])
        assert len(samples) == pytest.approx(3 * RATE, abs=0.3 * RATE)
        assert bool(notes) == tag and all("of its 6.0 s" in note for note in notes)


def test_several_streams_of_sound_are_told(tmp_path):
    samples, notes = decode_bytes(tmp_path, encode("matroska", "aac", noise(3), streams=2))
    assert len(samples) == pytest.approx(3 * RATE, abs=2048) and notes == ["holds 2 streams of sound; only the first is used"]


# --- what is refused ---------------------------------------------------------------------------------------------------

def picture() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for packet in (*stream.encode(av.VideoFrame(64, 64, "yuv420p")), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("name, content", [
    ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nneighbor.wav\n#EXT-X-ENDLIST\n"),
    ("a.ffconcat", b"ffconcat version 1.0\nfile neighbor.wav\n"),
    ("a.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"),
    ("a.mpd", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
              b'<Representation><BaseURL>neighbor.wav</BaseURL></Representation></AdaptationSet></Period></MPD>'),
    ("a.cue", b'FILE "neighbor.wav" WAVE\n  TRACK 01 AUDIO\n'), ("a.txt", b"filename,fold\nneighbor.wav,1\n" * 99),
    ("a.wav", b""), ("a.wav", PLAIN[:12]), ("a.wav", PLAIN[:40]), ("video.mp4", picture())], ids=str_of)
def test_what_holds_no_sound_of_its_own_is_refused(tmp_path, monkeypatch, capfd, name, content):
    (tmp_path / "neighbor.wav").write_bytes(PLAIN)
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert refused(list, waveforms.windows(tmp_path / name)).startswith(f"{tmp_path / name}: ")
    assert not audio.holds_sound(tmp_path / name)
    assert capfd.readouterr().err == ""


def test_a_recording_that_ffmpeg_gives_up_is_used_up_to_there(tmp_path):
    (tmp_path / "a").write_bytes(encode("adts", "aac", noise(6)))  # states no length
    with audio.open_recording(tmp_path / "a") as recording:
        container, calls = recording.container, []

        def demux(stream):
            calls.append(1)
            if len(calls) == 1:
                yield from itertools.takewhile(lambda packet: packet.pts * packet.time_base <= 3, container.demux(stream))
            raise av.InvalidDataError(1, "")
        recording.container = SimpleNamespace(format=container.format, demux=demux)
        samples = np.concatenate(list(recording.blocks()))
    assert len(samples) == pytest.approx(3 * RATE, abs=2048) and len(calls) == audio.MAX_FAILURES and recording.is_incomplete
    assert recording.notes == ["cannot be read beyond 3.0 s; copy it again, or split it if it was joined"]


def test_a_recording_none_of_which_can_be_decoded_is_called_so(tmp_path):
    whole = encode("ipod", "alac", noise(2))
    at, size = whole.index(b"mdat"), int.from_bytes(whole[whole.index(b"mdat") - 4:whole.index(b"mdat")], "big")
    (tmp_path / "a.m4a").write_bytes(whole[:at + 4] + b"\x40" * (size - 8) + whole[at + size - 4:])
    assert "cannot be decoded" in refused(list, waveforms.windows(tmp_path / "a.m4a"))


def test_the_formats_taken_are_known_and_refer_to_nothing():
    known = {name for names in av.formats_available for name in names.split(",")}
    taken = set(audio.FORMATS.split(","))
    assert taken <= known
    assert not taken & {"hls", "concat", "concatf", "dash", "sdp", "rtsp", "image2", "imf", "vobsub", "lavfi", "tty"}


@pytest.mark.parametrize("rate, channels", [(7, 1), (999, 2), (800_000, 1), (4_000_000_000, 1), (0, 1), (RATE, 65),
                                            (RATE, 60_000), (RATE, 0)])
def test_absurd_rates_and_channels_are_refused(tmp_path, rate, channels):
    header = struct.pack("<HHIIHH", 1, channels, rate, 0, channels * 2 % 65_536, 16)
    (tmp_path / "a.wav").write_bytes(PLAIN[:20] + header + PLAIN[36:])
    message = refused(list, waveforms.windows(tmp_path / "a.wav"))
    assert message.startswith(f"{tmp_path / 'a.wav'}: ") and (channels != 65 or "65 channels" in message)


def test_24_bits_in_4_bytes_are_refused(tmp_path):
    content = wav_bytes(noise(2, channels=2), "PCM_24")
    (tmp_path / "a.wav").write_bytes(content[:32] + (8).to_bytes(2, "little") + content[34:])
    message = refused(decode, tmp_path / "a.wav")
    assert str(tmp_path / "a.wav") in message and "24 bits" in message


def test_a_file_holds_sound_if_a_tenth_of_a_second_can_be_decoded(tmp_path):
    for form, codec in (("ipod", "aac"), ("webm", "libopus"), ("mp2", "mp2"), ("mpegts", "mp2")):
        (tmp_path / "a").write_bytes(encode(form, codec, noise(1)))
        assert audio.holds_sound(tmp_path / "a"), form
    (tmp_path / "a").write_bytes(wav_bytes(noise(0.05)))  # files of other kinds can look like a packet or two
    assert len(decode(tmp_path / "a")[0]) > 0 and not audio.holds_sound(tmp_path / "a")
    assert not audio.holds_sound(tmp_path) and not audio.holds_sound(tmp_path / "absent")


# --- standard input ----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def standard_input(monkeypatch, *parts: bytes):
    """Standard input is a pipe that gets the first part, and each other one when the function that is given is called."""
    read_end, write_end = os.pipe()
    go_on = threading.Semaphore()

    def write() -> None:
        with open(write_end, "wb", buffering=0) as writer, contextlib.suppress(BrokenPipeError):
            for part in parts:
                go_on.acquire(timeout=20)  # s; a reader that waits for the end fails its test then
                writer.write(part)
    with open(read_end, "rb") as reader:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
        thread = threading.Thread(target=write)
        thread.start()
        yield go_on.release
    thread.join()


@pytest.mark.parametrize("content", [
    PLAIN, said(said(PLAIN, b"data", 0xFFFFFFFF), b"RIFF", 0xFFFFFFFF), said(PLAIN, b"data", 2 * RATE),
    wav_bytes(noise(6), "PCM_16", "AIFF"), wav_bytes(noise(6), "ULAW", "WAV"), wav_bytes(noise(6), "PCM_16", "FLAC"),
    wav_bytes(noise(6), "MPEG_LAYER_III", "MP3"), encode("webm", "libopus", noise(6)), encode("ogg", "libopus", noise(6)),
    encode("adts", "aac", noise(6))],
    ids=["wav", "wav stream", "wav early", "aiff", "wav mulaw", "flac", "mp3", "webm", "ogg", "aac"])
def test_standard_input_is_heard_as_it_comes(monkeypatch, content):
    half = len(content) // 2
    with standard_input(monkeypatch, content[:half], content[half:]) as send, audio.open_recording("-") as recording:
        blocks, first = recording.blocks(), 0
        while first < 2 * recording.rate:  # of the three seconds that are there
            block = next(blocks)
            assert len(block) <= 1.5 * recording.rate
            first += len(block)
        send()
        rest = sum(map(len, blocks))
    assert (first + rest) / recording.rate == pytest.approx(6, abs=0.1)
    early = int.from_bytes(content[40:44], "little") == 2 * RATE
    assert recording.notes == (["holds more sound than its header says; all of it is used"] if early else [])


def test_a_window_of_standard_input_comes_soon_after_its_last_sample(monkeypatch):
    end = 44 + 2 * round(5.3 * RATE)
    with standard_input(monkeypatch, PLAIN[:end], PLAIN[end:]) as send:
        found = waveforms.windows("-")
        assert next(found)[:2] == (0, 5 * RATE)
        send()
        assert [window[:2] for window in found] == [(5 * RATE, RATE)]


def test_a_stream_that_cannot_be_read_in_order_names_the_remedy(tmp_path, monkeypatch):
    content = encode("ipod", "aac", noise(3))  # its index comes last
    (tmp_path / "a.m4a").write_bytes(content)
    assert len(decode(tmp_path / "a.m4a")[0]) == pytest.approx(3 * RATE, abs=2048)
    with standard_input(monkeypatch, content):
        assert "save it to a file first" in refused(decode, "-")
    with standard_input(monkeypatch, b"not a sound" * 1000):
        assert refused(decode, "-").startswith("-: cannot be decoded")


@pytest.mark.parametrize("content", [PLAIN, wav_bytes(noise(6), "MPEG_LAYER_III", "MP3")], ids=["wav", "mp3"])
def test_an_interrupt_while_standard_input_is_read_passes_through(monkeypatch, capfd, content):
    buffer = io.BytesIO(content)

    def read1(count: int) -> bytes:
        if buffer.tell() > len(content) // 2:
            raise KeyboardInterrupt
        return buffer.read(min(count, 4096))
    file = SimpleNamespace(read=buffer.read, read1=read1, seekable=lambda: False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
    heard = 0
    with pytest.raises(KeyboardInterrupt), audio.open_recording("-") as recording:
        for block in recording.blocks():
            heard += len(block)
    assert heard > 2 * RATE and capfd.readouterr().err == ""


def test_a_disk_error_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.mp3").write_bytes(wav_bytes(noise(6), "MPEG_LAYER_III", "MP3"))
    read = audio.Source.take

    def take(self, count: int) -> bytes:
        if self.file.tell() > 20_000:
            raise OSError(5, "Input/output error")
        return read(self, count)
    monkeypatch.setattr(audio.Source, "take", take)
    assert "Input/output error" in refused(decode, tmp_path / "a.mp3")


# --- recordings as people have them -------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not (MAKE_CASES.is_file() and all(map(shutil.which, ("ffmpeg", "sox", "lame")))),
                    reason="needs the cases beside the project, ffmpeg, sox and lame")
def test_recordings_as_people_have_them(tmp_path, capfd):
    subprocess.run([sys.executable, MAKE_CASES, tmp_path / "cases"], check=True, capture_output=True)
    expected = json.loads((tmp_path / "cases" / "expected.json").read_text())
    expected.pop("folder")
    assert len(expected) > 30
    for name, right in expected.items():
        notes = []
        *_, (start, length, _) = waveforms.windows(tmp_path / "cases" / name, notes=notes)
        assert (start + length) / RATE == pytest.approx(right["seconds"], abs=0.1), name
        assert bool(notes) == right.get("note", False), (name, notes)
        if "same_as" in right:
            difference = decode(tmp_path / "cases" / name)[0] - decode(tmp_path / "cases" / right["same_as"])[0]
            assert np.abs(difference).max() <= 2e-3
    assert capfd.readouterr().err == ""
