"""Does anything read from outside bring the program down? Mutated recordings, tables, archives, checkpoints, records.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0]

Every case is one that hypothesis draws (seeded) and must end in right features or a message of one line. Any other
exception, a case of more than 10 s, a file outside the case's own folder or a pickle that was executed ends the run with
status 1 and the smallest such case. More than half a GB of memory beside what the program has before the first case (Linux)
gives status 1 too. Recordings, tables, archives and checkpoints are hostile; run.json and metrics.jsonl are damaged.
tests/test_fuzz.py runs a few hundred of the same cases.
"""
import argparse
import collections
import copy
import faulthandler
import io
import json
import os
import re
import struct
import sys
import tempfile
import time
import warnings
import wave
import zipfile
from pathlib import Path
from unittest import mock

import av
import numpy as np
import soundfile
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dsets
import models
import predict
from util import checkpoint as checkpoints
from util import audio, download, report, waveforms
from util.config import Config, parse_args
from util.errors import UserError
from util.tables import read_esc50

SECONDS = 10
counts = collections.Counter()  # of each kind's outcomes


class Case:
    """A folder for one case; leaving it checks what was left in the folder and how long it took."""

    def __init__(self, kind: str):
        self.kind = kind

    def __enter__(self) -> Path:
        self.parent = tempfile.TemporaryDirectory()
        self.folder = Path(self.parent.name) / "case"
        self.folder.mkdir()
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # a hang in C, which no exception ends
        self.begin = time.perf_counter()
        return self.folder

    def __exit__(self, kind, error, traceback) -> bool:
        seconds = time.perf_counter() - self.begin
        faulthandler.cancel_dump_traceback_later()
        left = os.listdir(self.parent.name)
        self.parent.cleanup()
        assert seconds < SECONDS, f"{self.kind}: took {seconds:.1f} s"
        assert left == ["case"], f"{self.kind}: left {left} beside its folder"
        if isinstance(error, UserError):
            assert str(error).strip() and len(str(error).splitlines()) == 1, f"{self.kind}: {error!r} is not one line"
            assert len(str(error)) < 2000, f"{self.kind}: a message of {len(str(error))} characters"
            counts[self.kind, "refused"] += 1
            return True
        if error is None:
            counts[self.kind, "taken"] += 1
        return False


# --- what mutates -----------------------------------------------------------------------------------------------------

@st.composite
def mutated(draw, contents: list[bytes], header: int = 80):
    """One of the contents, cut short, or with some bytes or 32-bit numbers changed, mostly among the first `header`."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        place = draw(st.integers(0, min(header, len(content)) - 1) | st.integers(0, len(content) - 1))
        change = draw(st.sampled_from(["byte", "number", "cut out", "repeat"]))
        if change == "byte":
            content[place] = draw(st.integers(0, 255))
        elif change == "number":
            extremes = st.sampled_from([0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 10 ** 9, 4 * 10 ** 9])
            number = draw(extremes | st.integers(0, 2 ** 32 - 1))
            content[place:place + 4] = struct.pack(draw(st.sampled_from("<>")) + "I", number)
        else:
            end = place + draw(st.integers(1, 64))
            content[place:end] = b"" if change == "cut out" else content[place:end] * 2
        if not content:
            break
    if draw(st.integers(0, 3)) == 0:
        content = content[:draw(st.integers(0, min(header, len(content))) | st.integers(0, len(content)))]
    return bytes(content)


def sounds() -> list[bytes]:
    """Short recordings in every way that is likely to be met."""
    rng = np.random.default_rng(0)
    made = []
    for kind, subtype, channels, rate in [
            ("WAV", "PCM_16", 1, 44_100), ("WAV", "PCM_16", 2, 44_100), ("WAV", "PCM_U8", 1, 44_100),
            ("WAV", "PCM_24", 1, 48_000), ("WAV", "FLOAT", 1, 44_100), ("WAV", "DOUBLE", 2, 22_050),
            ("WAV", "ULAW", 1, 8_000), ("WAV", "IMA_ADPCM", 1, 44_100),
            ("WAVEX", "PCM_16", 2, 44_100), ("FLAC", "PCM_16", 1, 44_100), ("OGG", "VORBIS", 1, 44_100),
            ("AIFF", "PCM_16", 1, 44_100), ("MP3", "MPEG_LAYER_III", 1, 44_100), ("W64", "PCM_16", 1, 44_100),
            ("RF64", "PCM_16", 1, 44_100), ("AU", "PCM_16", 1, 44_100), ("CAF", "PCM_16", 1, 44_100)]:
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.uniform(-0.5, 0.5, (2000, channels)), rate, format=kind, subtype=subtype)
        made.append(buffer.getvalue())
    for kind, codec in [("mp4", "aac"), ("3gp", "aac"), ("adts", "aac"), ("webm", "libopus"), ("ogg", "libopus"),
                        ("asf", "wmav2"), ("ipod", "alac"), ("avi", "mp2"), ("mpegts", "mp2"), ("wv", "wavpack"), ("tta", "tta"),
                        ("ac3", "ac3")]:
        made.append(encoded(kind, codec, rng.uniform(-0.5, 0.5, 4800)))
    for value in (np.nan, np.inf, 1e-40, 0.0, 1e38):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(1000, value, np.float32), 44_100, format="WAV", subtype="FLOAT")
        made.append(buffer.getvalue())
    return made


def encoded(kind: str, codec: str, samples: np.ndarray) -> bytes:
    """Samples (n,) at 48 000 Hz as FFmpeg writes them."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono", bit_rate=96_000)
        frame = av.AudioFrame.from_ndarray(np.int16(samples[None] * 32_767), "s16", "mono")
        frame.sample_rate = 48_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


SOUNDS = sounds()
LOG_MEL = dsets.LogMel()


def plain_pcm(content: bytes) -> np.ndarray | None:
    """The samples (frames, channels) of a whole 16-bit WAV at 44 100 Hz as Python's own reader has them, else None."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if (file.getsampwidth(), file.getframerate()) != (2, 44_100):
                return None
            data = file.readframes(file.getnframes())
            if len(data) != file.getnframes() * 2 * file.getnchannels():
                return None
            return np.frombuffer(data, "<i2").reshape(-1, file.getnchannels()) / np.float32(2 ** 15)
    except (wave.Error, EOFError, RuntimeError, struct.error):
        return None


@given(st.data())
def recording(data):
    """A mutated recording: refused, or a finite waveform that is Python's own reader's where that reads it."""
    content = data.draw(mutated(SOUNDS))
    with Case("recording") as folder:
        path = folder / "a.wav"
        path.write_bytes(content)
        for _, _, waveform in waveforms.windows(path):
            assert waveform.shape == (1, 220_500) and waveform.dtype == torch.float32 and waveform.isfinite().all()
        waveform = dsets.load_waveform(path)
        feature = LOG_MEL(waveform)
        assert feature.shape == (1, 128, 431) and feature.isfinite().all()
        assert feature.max() - feature.min() <= LOG_MEL.params.top_db + 1e-3
        expected = plain_pcm(content)
        if expected is not None:
            mono = expected[:220_500].mean(axis=1)
            np.testing.assert_allclose(waveform[0, :len(mono)].numpy(), mono, atol=1e-6)
            assert len(content) > 2 * expected.size + audio.PADDING_BYTES or not waveform[0, len(mono):].any(), "invented sound"


@given(st.integers(0, 44 + 44_100))
def cut_short(length):
    """A clip that lacks more than 0.1 s is refused: its missing end must not become silence."""
    with Case("cut short") as folder:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(22_050, 0.5), 44_100, format="WAV", subtype="PCM_16")
        path = folder / "a.wav"
        path.write_bytes(buffer.getvalue()[:length])
        waveform = dsets.load_waveform(path)
        assert (waveform != 0).sum() == (length - 44) // 2 >= 22_050 - 0.1 * 44_100


CELLS = st.text(max_size=5) | st.sampled_from(
    ["-1", "0", "1", "3.5", "5", "6", "50", "dog", "", " ", "True", "false", "nan", "1e3", "１", "été 1.wav", "a b.wav",
     "/etc/passwd", "../../secret.wav", "..\\secret.wav", "C:a.wav", "x" * 300, '"', ",", "\n", "\0", "\r\n", "\ufeff"])
HEADER = "filename,fold,target,category,esc10"
ROW = st.tuples(st.sampled_from(["a.wav", "b.wav"]), st.sampled_from("12"), *map(st.just, ("0", "dog", "True"))).map(list)


@st.composite
def tables(draw) -> bytes:
    """A table with odd cells, separators, endings, encodings."""
    rows = draw(st.lists(ROW | st.lists(CELLS, min_size=0, max_size=7), max_size=4))
    header = draw(st.sampled_from([HEADER, HEADER.replace("fold,", ""), HEADER + ",fold", HEADER.upper(), ""]))
    ending = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quote = draw(st.sampled_from([lambda cell: cell, lambda cell: '"' + cell.replace('"', '""') + '"']))
    text = ending.join([header, *(",".join(map(quote, row)) for row in rows)])
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), errors="surrogatepass")
    return draw(st.just(content) | mutated([content or b"\n"]))


@given(tables())
def table(content):
    """A table: refused, or rows within the limits that name files of the folder's own."""
    with Case("table") as folder:
        (folder / "meta").mkdir()
        (folder / "meta" / "esc50.csv").write_bytes(content)
        rows = read_esc50(folder)
        assert rows["fold"].between(1, 5).all() and rows["target"].between(0, 49).all() and rows["filename"].is_unique
        for name in rows["filename"]:
            assert (folder / "audio" / name).resolve().parent == (folder / "audio").resolve()


@st.composite
def archives(draw) -> bytes:
    """A zip of a data folder with hostile names, links, lies about sizes, and mutated bytes."""
    buffer = io.BytesIO()
    good = {"ESC-50-master/audio/a.wav": SOUNDS[0], "ESC-50-master/meta/esc50.csv": f"{HEADER}\na.wav,1,0,dog,True\n".encode()}
    names = st.sampled_from(
        [*good, "ESC-50-master/audio", "ESC-50-master/audio/a.wav/b", "ESC-50-master/audio/b.wav", "ESC-50-master/" + "x" * 300,
         "ESC-50-master/README.md/", "../../evil", "/evil", "ESC-50-master/../../evil", "C:\\evil", "top\\..\\..\\evil", "file",
         "", "a/b\0c", "é/ü"])
    contents = st.sampled_from([b"", b"../../../evil", HEADER.encode(), b"0" * 100_000])
    ways = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    members = list(good.items()) if draw(st.booleans()) else []
    members += [(name, draw(contents)) for name in draw(st.lists(names, max_size=5))]
    with zipfile.ZipFile(buffer, "w") as zipped, warnings.catch_warnings(action="ignore"):  # of names written twice
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = draw(ways)
            if draw(st.integers(0, 3)) == 0:
                info.external_attr = 0o120777 << 16  # a link
            zipped.writestr(info, content)
    content = buffer.getvalue()
    return draw(st.just(content) | mutated([content], header=len(content)))


@given(archives())
def archive(content):
    """An archive: refused, or a data folder of plain files; nothing beside it."""
    def fetch(url: str, path: Path) -> None:
        path.write_bytes(content)

    def one_by_one(function, items, title: str) -> list:  # without a bar
        return [function(item) for item in items]

    with Case("archive") as folder, mock.patch.multiple(download, fetch=fetch, in_threads=one_by_one):
        try:
            download.download(folder / "root")
            assert download.problems(folder / "root") == []
        finally:
            assert set(os.listdir(folder)) <= {"root"} and not any(path.is_symlink() for path in folder.rglob("*"))
            assert not Path("/evil").exists()


# --- checkpoints and records ------------------------------------------------------------------------------------------

EXECUTED = Path(tempfile.gettempdir()) / f"esc50-fuzz-executed-{os.getpid()}"


class Hostile:
    """What a pickle that runs code when it is read holds."""

    def __reduce__(self):
        return (os.system, (f"touch {EXECUTED}",))


class Small(torch.nn.Module):
    """A network of few weights for examples of any size."""

    def __init__(self, num_classes: int = 2, input_shape: tuple[int, int, int] = (1, 100, 384)):
        super().__init__()
        self.fc = torch.nn.Linear(1, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(2, 3)))  # (B, 1, mels, frames) -> (B, num_classes)


def row(epoch: int, phase: str) -> dict:
    return {"seed": 42, "fold": 1, "epoch": epoch, "phase": phase, "seconds": 0.5, "lr": 3e-4,
            **{metric: 0.5 for metric in report.METRICS}}


def good_checkpoint() -> dict:
    history = [row(1, "training"), row(1, "validation")]
    return {"model": Small().state_dict(), "model_name": "cnn8", "classes": ["cat", "dog"],
            "features": vars(dsets.FeatureParams()).copy(), "mean_std": [-20.0, 10.0], "flags": vars(Config()),
            "seed": 42, "fold": 1, "precision": "fp32", "epoch": 1,
            "history": history, "best": history[1], "predictions": torch.tensor([0, 1])}


def packed(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


deep: list = []
for _ in range(200):
    deep = [deep]
PLAIN = [None, True, -1, 0, 3, 0.5, float("nan"), float("inf"), "", "text", "x" * 5000, "two\nlines", [], {}, {"a": 1}, deep]
VALUES = st.sampled_from(PLAIN + [10 ** 30, ["cat"], ["cat", "cat"], ["a", "b", "c"], torch.zeros(2), torch.tensor([0, 7]),
                                  torch.full((2, 2), torch.nan), torch.zeros(1).expand(10 ** 12), torch.zeros(2, 2).to_sparse()])


@st.composite
def edited(draw, content, values, hostile=None):
    """The content with up to two of its values, at any depth, replaced, removed, or joined by others."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] is not deep and draw(st.booleans()):
                place = place[key]
                continue
            change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if change == "remove":
                del place[key]
            elif change == "add" and isinstance(place, dict):
                place[draw(st.sampled_from(["", "other", "fc.weight", "resume"]))] = copy.deepcopy(draw(values))
            else:
                place[key] = hostile if hostile and draw(st.integers(0, 9)) == 0 else copy.deepcopy(draw(values))
            break
    return content


@st.composite
def features(draw) -> dict:
    """Parameters of features, most of them possible; some of their filters are empty."""
    n_fft = draw(st.sampled_from([16, 512, 1024, 2048, 8192]))
    hop_length, n_mels = draw(st.integers(max(1, n_fft // 32), n_fft)), draw(st.integers(1, min(512, n_fft // 2)))
    return {"n_fft": n_fft, "hop_length": hop_length, "n_mels": n_mels, "f_min": draw(st.sampled_from([0.0, 0, 50.0, 4000.0])),
            "f_max": draw(st.sampled_from([1.0, 8000.0, 22_050.0])), "top_db": draw(st.sampled_from([1e-3, 80.0, 999.0])),
            "amin": draw(st.sampled_from([5e-324, 1e-10, 0.9])), "crop_mels": draw(st.integers(1, min(128, n_mels))),
            "crop_frames": draw(st.integers(1, 220_500 // hop_length + 1))}


@given(st.data())
def checkpoint(data):
    """A checkpoint with values changed, or its bytes: refused, or a network of finite weights; nothing in it executed."""
    content = good_checkpoint()
    if data.draw(st.booleans()):
        content["features"], content["flags"]["tta_crops"] = data.draw(features()), data.draw(st.sampled_from([1, 3, 9]))
    content = packed(data.draw(edited(content, VALUES, Hostile())))
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(mutated([content, packed([1, 2]), SOUNDS[0]], header=len(content)))
    with Case("checkpoint") as folder, mock.patch.dict(models.MODELS, cnn8=Small), warnings.catch_warnings(action="ignore"):
        (folder / "last.pt").write_bytes(content)
        try:
            network = predict.Network(folder / "last.pt")
            assert all(tensor.isfinite().all() for tensor in network.model.state_dict().values())
            assert network(torch.zeros(1, 1, 220_500)).shape == (1, len(network.classes))
        finally:
            assert not EXECUTED.exists(), "a pickle was executed"


RESNET = {name: torch.zeros_like(tensor) for name, tensor in models.ResNet18(2).state_dict().items()}


@given(st.data())
def weights(data):
    """Pretrained weights that are not: refused, or finite weights."""
    content = data.draw(edited(dict(RESNET), VALUES, Hostile()))
    with Case("weights") as folder:
        torch.save(content, folder / "weights.pth")  # 45 MB
        model = models.ResNet18(2)
        checkpoints.load_pretrained(model, str(folder / "weights.pth"), vars(dsets.FeatureParams()))
        assert not EXECUTED.exists() and all(tensor.isfinite().all() for tensor in model.state_dict().values())


def good_run_config() -> dict:
    return {"command": ["training.py"], "started": "", "flags": vars(Config()), "features": vars(dsets.FeatureParams()).copy(),
            "versions": {"torch": "2"}, "hardware": {"threads": 2, "world_size": 1}, "git": {"commit": None, "dirty": None},
            "data": {"clips": 4, "classes": ["cat"], "fingerprint": "0"}, "sessions": []}


JSON_VALUES = [None, True, 3, 0.5, float("nan"), "text", [], [1], {}, {"a": 1}]


@st.composite
def damaged(draw, content: dict) -> dict:
    """The content with up to two of its entries, at any depth, missing, or with a value of another type."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        place = content
        while place:
            key = draw(st.sampled_from(list(place)))
            if isinstance(place[key], dict) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                del place[key]
            else:
                others = [value for value in JSON_VALUES if type(value) is not type(place[key])]
                place[key] = copy.deepcopy(draw(st.sampled_from(others)))
            break
    return content


@given(st.data())
def record(data):
    """run.json and metrics.jsonl, damaged: --resume and --rerun, the summary and its table refuse them or understand."""
    text = json.dumps(data.draw(damaged(good_run_config()))).encode()
    if data.draw(st.integers(0, 3)) == 0:
        text = data.draw(mutated([text, b"[" * 100_000], header=len(text)))
    rows = [data.draw(damaged(row(epoch, phase))) if data.draw(st.integers(0, 3)) == 0 else row(epoch, phase)
            for epoch in (1, 2) for phase in ("training", "validation")]
    lines = "\n".join(map(json.dumps, rows)).encode()
    if data.draw(st.integers(0, 3)) == 0:
        lines = data.draw(mutated([lines], header=len(lines)))
    again = data.draw(st.sampled_from(["--resume", "--rerun"]))
    with Case("record") as folder:
        training = folder / "seed-42" / "fold-1"
        training.mkdir(parents=True)
        (folder / "run.json").write_bytes(text)
        (training / "metrics.jsonl").write_bytes(lines)
        report.summary_table(report.summarize(folder, 2))
        config = parse_args([again, str(folder)])
        assert not re.search(r"[/\\]", config.comment + config.tb_prefix)
        report.compare_runs(folder, folder)


PROPERTIES = {recording: 40, cut_short: 4, table: 20, archive: 15, checkpoint: 10, weights: 1, record: 10}  # % of the cases


def run_cases(function, cases: int, seed_number: int) -> None:
    """Let hypothesis draw so many cases for one of the properties, the same for the same seed."""
    limits = settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seed(seed_number)(limits(function))()


def peak_bytes() -> int | None:
    """The most memory this process has had, or None where the system does not tell so."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = peak_bytes()
    for function, share in PROPERTIES.items():
        begin = time.perf_counter()
        run_cases(function, args.cases * share // 100, args.seed)
        name = function.__name__.replace("_", " ")
        print(f"{name:>12}: {counts[name, 'refused']:>6} refused, {counts[name, 'taken']:>6} taken, "
              f"{time.perf_counter() - begin:.0f} s", flush=True)
    peak = peak_bytes()
    memory = f"; most memory {peak / 1e9:.2f} GB, {before / 1e9:.2f} before the first" if peak else ""
    print(f"{sum(counts.values())} cases{memory}")
    return 1 if peak and peak - before > 0.5e9 else 0


if __name__ == "__main__":
    sys.exit(main())
