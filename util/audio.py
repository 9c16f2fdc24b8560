"""Recordings decoded by FFmpeg (PyAV) from start to end, block by block, with notes on what is odd about a file.

What is there is decoded: the length that a header claims only serves to notice what is missing. FFmpeg gets an open file, never
a name, and may take only formats that refer to no other file or address. Imports no torch.
"""
import contextlib
import math
import re
import struct
import sys
from pathlib import Path

import av
from av.audio.plane import AudioPlane
import numpy as np

from util.errors import UserError, check_regular_file

# What is accepted of a recording.
RATE_LIMITS = (1_000, 768_000)  # Hz; from below telephone speech to the fastest audio converters
MAX_CHANNELS = 64  # the largest microphone arrays on sale
FORMATS = ("aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,eac3,flac,flv,iff,ircam,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,"
           "ogg,tak,tta,voc,w64,wav,wv")  # FFmpeg's names: no playlist, script or picture
HEADER_ALONE = {"probesize": "4096", "analyzeduration": "0"}  # opens ten times faster where a header says all
MAX_FAILURES = 100  # give up after so many packets in a row that cannot be read, or at the start decoded
BLOCK_SECONDS = 0.25  # of sound that is gathered into a block; a listener waits so long for the end of a window
PCM_BYTES = 2 ** 17  # a block of plain samples
PCM = {(1, 8): "pcm_u8", (1, 16): "pcm_s16le", (1, 24): "pcm_s24le", (1, 32): "pcm_s32le", (3, 32): "pcm_f32le",
       (3, 64): "pcm_f64le"}  # WAV's format tag and bits of a sample -> FFmpeg's decoder

NOTICED = 0.1  # s; less may be padding
COPY_AGAIN = "copy it again"  # in the notes that tell of missing sound
CLOCKED = ("asf", "matroska")  # containers that say at which time each packet begins, but not for sure how long the sound is
CLOCK_STEP = 0.01  # s; they round to milliseconds
STREAM_BYTES = 2 ** 30  # a size that is further off was written before the size was known (arecord, SoX, ffmpeg to a pipe)
UNKNOWN = b"\xff\xff\xff\xff"  # a size at which FFmpeg does not stop
STREAM_SIZE = 0x7FFF0000  # the smallest size that such programs write (GStreamer)
PADDING_BYTES = 4096  # fewer behind the sound fill a page or a sector, or are a small chunk
MAX_CHUNKS, MAX_HEADER = 1000, 65_536  # chunks before the sound; bytes of them that are kept: others hold pictures and the like
SAMPLES = {  # FFmpeg's sample format -> the samples' type, the value of silence, full scale
    "u8": ("u1", 128, 2 ** 7), "s16": ("i2", 0, 2 ** 15), "s32": ("i4", 0, 2 ** 31), "s64": ("i8", 0, 2 ** 63),
    "flt": ("f4", 0, 1), "dbl": ("f8", 0, 1)}


class Source:
    """The file as FFmpeg reads it. Of WAV and AIFF: a header without sizes, then the sound up to its end.

    received  bytes of sound that were read (WAV, AIFF)
    claimed   bytes of sound up to the end of the sound's chunk; 0: unknown
    promised  bytes of sound up to the end of the file, by its outer size (RIFF, FORM)
    error     what ended the reading: FFmpeg is told that the file ends
    is_first  whether what is read is but the first of several recordings in the file
    """

    def __init__(self, file):
        self.file, self.error, self.notes, self.is_pipe = file, None, [], not file.seekable()
        self.received = self.claimed = self.promised = 0
        self.is_first = False
        self.header, self.format = b"", b""
        self.left = math.inf  # bytes of sound to come; -1: the file has been read to its end
        self.ahead = file.read(12)  # what has been read and not given
        self.is_empty = not self.ahead
        self.is_chunked = bool(re.match(rb"(RIFF|RIFX|RF64|BW64)....WAVE|FORM....AIF[FC]", self.ahead, re.DOTALL))
        if self.is_chunked:
            self.header = self.read_header()
        elif self.seekable():
            file.seek(0)
            self.ahead = b""

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the file."""
        data, self.ahead = self.ahead[:count], self.ahead[count:]
        return data + self.file.read(count - len(data))

    def read_header(self) -> bytes:
        """Read up to the sound; returns the header with sizes at which FFmpeg does not stop."""
        outer = self.take(12)
        order = ">" if outer[:4] in (b"RIFX", b"FORM") else "<"
        self.promised = self.received + struct.unpack(order + "I", outer[4:8])[0] - 4
        header = outer[:4].replace(b"RF64", b"RIFF").replace(b"BW64", b"RIFF") + UNKNOWN + outer[8:]
        long_size = 0  # RF64's and BW64's
        for _ in range(MAX_CHUNKS):
            start = self.take(8)
            if len(start) < 8:
                break
            name, size = start[:4], struct.unpack(order + "I", start[4:])[0]
            self.promised -= 8
            if name in (b"data", b"SSND"):
                self.left = long_size or size or math.inf
                self.claimed = self.received + (long_size or size)
                return header + name + UNKNOWN
            size += size % 2
            self.promised -= size
            body = self.take(min(size, MAX_HEADER))
            for begin in range(MAX_HEADER, size, MAX_HEADER):
                self.take(min(MAX_HEADER, size - begin))
            if len(header) + size <= MAX_HEADER:
                header += start + body
            if name == b"fmt " and order == "<":
                self.format = body
            elif name == b"ds64" and len(body) >= 16:
                outer_size, long_size = struct.unpack("<QQ", body[:16])
                self.promised += outer_size - 0xFFFFFFFF
        self.left = -1
        return header

    def look_behind(self) -> None:
        """At the end of the sound's chunk: does more sound follow?"""
        self.left = -1  # no
        self.ahead = self.take(PADDING_BYTES)
        odd = self.claimed % 2 if self.ahead[:1] == b"\0" else 0  # a chunk of odd size is padded
        behind = self.ahead[odd:]
        if len(self.ahead) < PADDING_BYTES:
            return
        if re.match(rb"(RIFF|RIFX|RF64|BW64)....WAVE", behind, re.DOTALL):  # joined files
            first, self.ahead = self.format, behind
            self.read_header()
            if self.format != first:
                self.notes.append("holds several recordings of different formats; only the first is used, split the file")
                self.left, self.claimed, self.is_first = -1, 0, True
        elif not re.match(rb"[A-Za-z0-9 _-]{4}(...[\0-\x0f]|[\0-\x0f]...)", behind, re.DOTALL):  # no other chunk
            if self.claimed < STREAM_SIZE:
                self.notes.append("holds more sound than its header says; all of it is used")
            self.left, self.claimed = math.inf, 0

    def read(self, count: int) -> bytes:
        if self.error:
            return b""
        try:
            if self.header:
                data, self.header = self.header[:count], self.header[count:]
                return data
            if self.left == 0:
                self.look_behind()
            if self.left < 0:
                return b""
            count = int(min(count, self.left))
            data = self.take(min(count, len(self.ahead))) or self.file.read1(count)
        except BaseException as error:  # an interrupt, too: PyAV would print it and go on
            self.error = error
            return b""
        if self.is_chunked:
            self.received += len(data)
            self.left -= len(data)
        return data

    def seekable(self) -> bool:
        return not self.is_chunked and not self.is_pipe

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):  # where a broken file points to
            return -1

    def tell(self) -> int:
        return self.file.tell()


class Recording:
    """A recording that is decoded once, from start to end (`open_recording`).

    rate      Hz, of the block that `blocks` gave last: in joined files it may change
    notes     what is odd about the file; complete when the blocks are exhausted
    """

    def __init__(self, path: str | Path, source: Source):
        self.path, self.source, self.notes, self.container = path, source, source.notes, None
        self.is_broken = self.is_incomplete = False
        self.codec = pcm_decoder(source.format, path)
        if self.codec:
            source.header = b""
        else:
            self.open_container()
        self.codec.thread_count = 1  # as many recordings as cores are decoded at once
        self.rate = self.codec.sample_rate

    def open_container(self) -> None:
        """Have FFmpeg find the first stream of sound."""
        for options in (HEADER_ALONE, {}):
            self.container = av.open(self.source, mode="r", metadata_errors="replace",
                                     options={"format_whitelist": FORMATS, **options})
            streams = [stream for stream in self.container.streams if stream.type == "audio"]
            self.codec = streams[0].codec_context if streams else None
            if self.codec and self.codec.sample_rate or not self.source.seekable():
                break
            self.source.seek(0)
        if not self.codec:
            raise UserError(f"{self.path}: holds no sound{' that FFmpeg can decode' if streams else ''}")
        if len(streams) > 1:
            self.notes.append(f"holds {len(streams)} streams of sound; only the first is used")
        self.stream = streams[0]

    def promised_seconds(self) -> float:
        """The length by the file's own tables or tags, s; 0 if it has none and FFmpeg but estimates."""
        name = self.container.format.name.split(",")[0] if self.container else "wav"
        if name not in ("flac", "mov", "mp3", "ogg"):
            return 0.0
        duration = float((self.stream.duration or 0) * self.stream.time_base)
        if name == "mp3" and self.rate:  # FFmpeg estimates it where there is no tag, or more sound than the tag says
            duration = min(duration, mp3_frames(self.source) * self.codec.frame_size / self.rate)
        return duration

    def packets(self):
        """The packets of the sound; what the container has lost is passed over."""
        if not self.container:
            channels, bits = struct.unpack("<2x H 10x H", self.source.format[:16])
            frame_bytes, rest = channels * bits // 8, b""
            while data := self.source.read(PCM_BYTES):
                data = rest + data
                whole = len(data) // frame_bytes * frame_bytes
                rest = data[whole:]
                if whole:
                    yield av.Packet(data[:whole])
            return
        failures = 0
        while failures < MAX_FAILURES:
            try:
                for packet in self.container.demux(self.stream):
                    failures = 0
                    yield packet
                return
            except IndexError:  # PyAV's, after the last packet, where streams began after the opening
                return
            except av.FFmpegError:
                failures += 1
        self.is_broken = True

    def blocks(self):
        """The recording in blocks (frames, channels) float32, of BLOCK_SECONDS and what one packet more holds."""
        promised, seconds, damaged, failures, end = self.promised_seconds(), 0.0, 0.0, 0, None
        has_clock = self.container and self.container.format.name.split(",")[0] in CLOCKED
        parts, count, kind = [], 0, None  # the block that grows: its frames' arrays, its length, what they are of
        for packet in self.packets():
            try:
                frames = self.codec.decode(packet)
            except av.FFmpegError:
                failures += 1
                if seconds == 0 and failures == MAX_FAILURES:
                    raise
                if not has_clock and not bytes(packet).startswith((b"ID3", b"TAG")):  # tags between joined files
                    damaged += float((packet.duration or 0) * (packet.time_base or 0))
                continue
            for frame in frames:
                if frame.samples == 0:
                    continue
                found = frame.format.name, frame.sample_rate, frame.layout.nb_channels
                if found != kind:
                    if parts:
                        yield to_float(parts, kind[0])
                    parts, count, kind = [], 0, found
                    _, self.rate, channels = kind
                    if not RATE_LIMITS[0] <= self.rate <= RATE_LIMITS[1] or not 1 <= channels <= MAX_CHANNELS:
                        raise UserError(f"{self.path}: has {self.rate} Hz and {channels} channels, expected {RATE_LIMITS[0]} to "
                                        f"{RATE_LIMITS[1]} Hz and at most {MAX_CHANNELS} channels")
                if has_clock and frame.pts is not None:
                    damaged += frame.time - end if end and frame.time - end > CLOCK_STEP else 0.0
                    end = frame.time + frame.samples / self.rate
                parts.append(frame_samples(frame))
                count += frame.samples
                seconds += frame.samples / self.rate
                if count >= BLOCK_SECONDS * self.rate:
                    yield to_float(parts, kind[0])
                    parts, count = [], 0
        if parts:
            yield to_float(parts, kind[0])
        if self.source.error:
            raise self.source.error
        if seconds == 0 and failures:
            raise UserError(f"{self.path}: cannot be decoded as audio ({failures} packets fail); convert it")
        if seconds == 0 and self.container and self.source.is_pipe:
            raise UserError(f"{self.path}: cannot be decoded from a pipe; save it to a file first")
        self.note_what_is_missing(seconds, max(promised - seconds, damaged))

    def note_what_is_missing(self, seconds: float, missing: float) -> None:
        """Note what is missing of a recording beside the seconds that are there. WAV and AIFF: also what both sizes promise."""
        source = self.source
        missing_bytes = min(source.claimed, source.promised) - source.received if source.claimed else 0
        if source.received and 0 < missing_bytes < STREAM_BYTES:
            missing += missing_bytes / source.received * seconds
        self.is_incomplete = missing > NOTICED or self.is_broken or source.is_first
        if missing > NOTICED:
            self.notes.append(f"lacks {missing:.1f} of its {seconds + missing:.1f} s, cut short or damaged; {COPY_AGAIN}")
        elif self.is_broken:
            self.notes.append(f"cannot be read beyond {seconds:.1f} s; {COPY_AGAIN}, or split it if it was joined")


def pcm_decoder(format_chunk: bytes, path: str | Path) -> av.AudioCodecContext | None:
    """The decoder of a WAV's plain samples, None for others: FFmpeg's own reader would search them for other formats."""
    if len(format_chunk) < 16:
        return None
    tag, channels, rate, frame_bytes, bits = struct.unpack("<H H I 4x H H", format_chunk[:16])
    if tag == 0xFFFE:  # extensible: the tag stands further on
        tag = int.from_bytes(format_chunk[24:26], "little")
    if tag == 1 and bits == 24 and frame_bytes == 4 * channels:  # ALSA's S24_LE fills the lower bytes, Windows the upper ones
        raise UserError(f"{path}: has samples of 24 bits in 4 bytes each, but does not say in which of them; record or convert "
                        f"it to 16 or 32 bits (arecord -f S32_LE)")
    if (tag, bits) not in PCM or not 1 <= channels <= MAX_CHANNELS or not RATE_LIMITS[0] <= rate <= RATE_LIMITS[1]:
        return None
    decoder = av.CodecContext.create(PCM[tag, bits], "r")
    decoder.sample_rate, decoder.layout = rate, f"{channels} channels"
    return decoder


def frame_samples(frame: av.AudioFrame) -> np.ndarray:
    """The samples (frames, channels) of one of FFmpeg's frames, as they are."""
    channels, dtype = frame.layout.nb_channels, SAMPLES[frame.format.name.rstrip("p")][0]
    if frame.format.is_planar:  # a plane for each channel; frame.planes would read on behind the eighth
        planes = [AudioPlane(frame, index) for index in range(channels)]
        return np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in planes], axis=1)
    return np.frombuffer(AudioPlane(frame, 0), dtype, frame.samples * channels).reshape(-1, channels)


def to_float(parts: list[np.ndarray], format_name: str) -> np.ndarray:
    """Arrays (frames, channels) of a sample format, joined: float32, full scale is 1."""
    _, silence, full_scale = SAMPLES[format_name.rstrip("p")]
    samples = np.concatenate(parts)
    with np.errstate(over="ignore", invalid="ignore"):  # what a double loses is refused later
        samples = np.subtract(samples, silence, dtype=np.float32) if silence else samples.astype(np.float32, copy=False)
    return samples if full_scale == 1 else samples * np.float32(1 / full_scale)


def mp3_frames(source: Source) -> int:
    """How many frames an MP3 has by its tag (Xing, Info, VBRI); 0 without one, and for a pipe, where one cannot look back."""
    if not source.seekable():
        return 0
    position, start = source.tell(), 0
    for _ in range(10):  # other tags may come first: ten bytes, then as many as four digits of 7 bits say
        source.seek(start)
        head = source.file.read(4096)
        if head[:3] != b"ID3":
            break
        start += 10 + sum((digit & 127) << shift for digit, shift in zip(head[6:10], (21, 14, 7, 0)))
    source.seek(position)
    found = re.search(rb"(?:(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f]|VBRI.{10})(.{4})", head, re.DOTALL)
    return int.from_bytes(found[1], "big") if found else 0


@contextlib.contextmanager
def open_recording(path: str | Path):
    """The `Recording` of a file, or of standard input, as it comes, for "-".

    Raises UserError if it is no regular file, holds no sound, cannot be decoded (also while it is read), or has a sample
    rate or number of channels beyond RATE_LIMITS and MAX_CHANNELS.
    """
    with contextlib.ExitStack() as stack:
        source = None
        try:
            if path == "-" and sys.stdin:
                file = sys.stdin.buffer
            else:
                check_regular_file(path)
                file = stack.enter_context(open(path, "rb"))
            source = Source(file)
            if source.is_empty:
                raise UserError(f"{path}: is empty; {'nothing was written to it' if path == '-' else 'copy it again'}")
            recording = Recording(path, source)
            if recording.container:
                stack.callback(recording.container.close)
            yield recording
        except (av.FFmpegError, OSError) as error:
            error = source and source.error or error
            if not isinstance(error, (av.FFmpegError, OSError)):  # an interrupt
                raise error from None
            reason = "" if isinstance(error, av.FFmpegError) else f" ({error.strerror})"
            remedy = " from a pipe; save it to a file first, or send it as WAV" if source and source.is_pipe else ""
            raise UserError(f"{path}: cannot be decoded as audio{reason}{remedy}") from error


def holds_sound(path: str | Path) -> bool:
    """Whether a file holds sound that can be decoded, a tenth of a second: some other files look like a single packet."""
    try:
        with open_recording(path) as recording, contextlib.closing(recording.blocks()) as blocks:
            return len(next(blocks, ())) > NOTICED * recording.rate
    except UserError:
        return False
