import http.server
import io
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import soundfile

import dsets
from util import download as roots
from conftest import write_root


class Server:
    """A web server on 127.0.0.1 with one archive; `behave` says how often and how it fails before it serves."""

    def __init__(self, content: bytes):
        self.content, self.ranges, self.drops, self.supports_ranges, self.status = content, [], 0, True, 200
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                if server.status != 200:
                    self.send_error(server.status)
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.supports_ranges else 0
                if asked and server.supports_ranges and start >= len(server.content):
                    self.send_error(416)
                    return
                body = server.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if server.drops:
                    server.drops -= 1
                    body = body[:len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/master.zip"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def zip_of(root: Path, extra: dict[str, bytes] | None = None, leave_out: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("ESC-50-master/README.md", "about")
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.name != leave_out:
                zipped.write(path, Path("ESC-50-master") / path.relative_to(root))
        for name, content in (extra or {}).items():
            zipped.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_root(tmp_path_factory.mktemp("published") / "root", num_classes=2, folds=2, clips=1)


@pytest.fixture
def server(published, monkeypatch):
    monkeypatch.setattr(roots, "PAUSE", 0)
    server = Server(zip_of(published))
    yield server
    server.http.shutdown()
    server.http.server_close()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_whole(root: Path, published: Path) -> None:
    assert files_of(root) == {**files_of(published), "README.md": b"about"}
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # nothing beside it


def refused(root: Path, server: Server, words: str) -> None:
    with pytest.raises(dsets.UserError, match=words) as refusal:
        roots.download(root, server.url)
    assert "\n" not in str(refusal.value)
    assert not (root / "meta" / "esc50.csv").exists()


def test_download_gives_the_published_files(server, published, tmp_path):
    root = tmp_path / "data" / "ESC-50"
    roots.download(root, server.url)
    check_whole(root, published)
    assert len(dsets.ESC50(root)) == 4


def test_download_changes_nothing_when_the_data_is_whole(server, tmp_path, capsys):
    root = tmp_path / "data" / "ESC-50"
    roots.download(root, server.url)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    roots.download(root, server.url)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert len(server.ranges) == 1 and "already whole" in capsys.readouterr().out


def test_download_mends_a_root_with_a_missing_and_a_damaged_clip(server, published, tmp_path):
    root = tmp_path / "data" / "ESC-50"
    roots.download(root, server.url)
    first, second = sorted((root / "audio").iterdir())[:2]
    first.unlink()
    second.write_bytes(b"damaged")
    roots.download(root, server.url)
    check_whole(root, published)


@pytest.mark.parametrize("supports_ranges", [True, False])
def test_download_goes_on_after_dropped_connections(server, published, tmp_path, supports_ranges):
    server.drops, server.supports_ranges = 2, supports_ranges
    root = tmp_path / "data" / "ESC-50"
    roots.download(root, server.url)
    check_whole(root, published)
    half, quarter = len(server.content) // 2, (len(server.content) + 1) // 2 // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + quarter if supports_ranges else half}-"]


def test_download_goes_on_in_a_later_call(server, published, tmp_path, monkeypatch):
    monkeypatch.setattr(roots, "ATTEMPTS", 1)
    root = tmp_path / "ESC-50"
    part = tmp_path / "ESC-50.zip.part"
    part.write_bytes(server.content[:1000])  # a killed process left it
    roots.download(root, server.url)
    assert server.ranges == ["bytes=1000-"]
    check_whole(root, published)


def test_download_of_an_archive_that_was_all_there(server, published, tmp_path):
    (tmp_path / "ESC-50.zip.part").write_bytes(server.content)
    roots.download(tmp_path / "ESC-50", server.url)
    check_whole(tmp_path / "ESC-50", published)


def test_download_gives_up_with_a_remedy_when_nothing_comes(server, tmp_path):
    server.status = 503
    refused(tmp_path / "ESC-50", server, "HTTP status 503; check the connection and run the command again")
    assert len(server.ranges) == roots.ATTEMPTS
    server.status = 404
    refused(tmp_path / "ESC-50", server, "HTTP status 404; fetch the archive by hand")
    server.http.shutdown()
    server.http.server_close()
    refused(tmp_path / "ESC-50", server, "refused.*; check the connection")


def test_download_gives_up_on_a_server_that_begins_anew_and_always_drops(server, tmp_path):
    server.supports_ranges, server.drops = False, 10 ** 6
    refused(tmp_path / "ESC-50", server, "the connection ended after .* bytes; check the connection")
    assert len(server.ranges) == 1 + roots.ATTEMPTS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_download_does_not_wait_on_a_pipe_in_the_root(server, published, tmp_path):
    shutil.copytree(published, tmp_path / "ESC-50", ignore=shutil.ignore_patterns("features"))
    wav = sorted((tmp_path / "ESC-50" / "audio").iterdir())[0]
    wav.unlink()
    os.mkfifo(wav)
    roots.download(tmp_path / "ESC-50", server.url)
    check_whole(tmp_path / "ESC-50", published)


def test_download_into_the_root_of_all_folders_is_refused(server):
    with pytest.raises(dsets.UserError, match="--data .*: cannot be the data's own folder; name one below it"):
        roots.download(Path("/"), server.url)


def test_download_refuses_garbage_and_a_truncated_archive(server, published, tmp_path):
    whole = server.content
    for content in (b"<html>busy</html>" * 100, whole[:len(whole) // 2], whole[:200] + b"\0" * 5000 + whole[5200:]):
        server.content = content
        refused(tmp_path / "ESC-50", server, "is not a whole zip archive .*; it was removed, try again")
    server.content = whole
    roots.download(tmp_path / "ESC-50", server.url)
    check_whole(tmp_path / "ESC-50", published)


@pytest.mark.parametrize("name", ["ESC-50-master/../../evil", "../evil", "/evil", "ESC-50-master/..\\..\\evil",
                                  "ESC-50-master/C:/evil", "evil"])
def test_download_refuses_names_that_lead_out_of_the_folder(server, published, tmp_path, name):
    server.content = zip_of(published, {name: b"evil"})
    refused(tmp_path / "data" / "ESC-50", server, "may lead out of the folder; that is not ESC-50")
    assert not list(tmp_path.rglob("evil")) and not Path("/evil").exists()


def test_download_refuses_links(server, published, tmp_path):
    buffer = io.BytesIO(server.content)
    with zipfile.ZipFile(buffer, "a") as zipped:
        link = zipfile.ZipInfo("ESC-50-master/audio/link.wav")
        link.external_attr = 0o120777 << 16
        zipped.writestr(link, "/etc/passwd")
    server.content = buffer.getvalue()
    refused(tmp_path / "ESC-50", server, "link.wav', which may lead out of the folder")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_download_refuses_a_name_twice(server, published, tmp_path):
    server.content = zip_of(published, {"ESC-50-master/meta/esc50.csv": b"other"})
    refused(tmp_path / "ESC-50", server, "holds 'ESC-50-master/meta/esc50.csv' twice")


def test_download_refuses_an_archive_that_unpacks_to_too_much(server, tmp_path, monkeypatch):
    monkeypatch.setattr(roots, "MAX_UNPACKED_BYTES", 10 ** 6)
    refused(tmp_path / "ESC-50", server, "would unpack to more than .* that is not ESC-50")
    assert not (tmp_path / "ESC-50").exists()


def test_download_refuses_a_server_that_never_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(roots, "MAX_ARCHIVE_BYTES", 10 ** 6)
    refused(tmp_path / "ESC-50", server, "sends more than .* that is not ESC-50")
    assert list(tmp_path.iterdir()) == []


def test_download_refuses_an_archive_without_a_clip_of_the_table(server, published, tmp_path):
    name = sorted(path.name for path in (published / "audio").iterdir())[0]
    server.content = zip_of(published, leave_out=name)
    refused(tmp_path / "ESC-50", server, f"is not whole: .*{name}: no such file")


def test_the_demo_is_an_esc50_root(tmp_path, monkeypatch):
    monkeypatch.setattr(roots, "DEMO_CLIPS_PER_CLASS", 2)
    root = tmp_path / "demo"
    roots.write_demo(root)
    table = dsets.read_table(root)
    assert len(table) == 100 and table["target"].nunique() == 50
    assert table.groupby("category").size().eq(2).all()
    assert roots.problems(root) == []
    for name in table["filename"][::10]:
        info = soundfile.info(root / "audio" / name)
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (44_100, 220_500, 1, "PCM_16")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    roots.write_demo(root)  # once
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    roots.write_demo(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(root)


def test_the_whole_demo_has_every_class_in_every_fold(tmp_path, monkeypatch):
    monkeypatch.setattr(roots, "demo_clip", lambda target, rng: [0.0])
    roots.write_demo(tmp_path)
    table = dsets.read_table(tmp_path)
    assert table.groupby(["fold", "target"]).size().tolist() == [2] * 250


def test_demo_sounds_are_loud_enough_and_differ():
    import numpy as np
    clips = [roots.demo_clip(target, np.random.default_rng([target, take])) for target in (0, 27, 49) for take in (0, 1)]
    for clip in clips:
        assert clip.shape == (220_500,) and 0.1 <= np.abs(clip).max() <= 0.9
    assert len({clip.tobytes() for clip in clips}) == 6


def test_the_demo_does_not_overwrite_another_data_set(own_root):
    before = files_of(own_root)
    with pytest.raises(dsets.UserError, match="--demo: .* holds another data set; leave out --data"):
        roots.write_demo(own_root)
    assert files_of(own_root) == before
