import http.server
import io
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

import dsets
from conftest import write_root
from util import download
from util.errors import UserError


class Server:
    """A web server on 127.0.0.1 with one archive; its attributes say how often and how it fails."""

    def __init__(self, content: bytes):
        self.content, self.ranges, self.drops, self.supports_ranges, self.status = content, [], 0, True, 200
        self.sends_length = True
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
                if server.sends_length:
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
    monkeypatch.setattr(download, "PAUSE", 0)
    server = Server(zip_of(published))
    yield server
    server.http.shutdown()
    server.http.server_close()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_complete(root: Path, published: Path, extra: dict[str, bytes] | None = None) -> None:
    assert files_of(root) == {**files_of(published), "README.md": b"about", **(extra or {})}
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # nothing beside it


def refuse(root: Path, server: Server, words: str = "--download") -> None:
    """One line that holds the words, and no data folder."""
    with pytest.raises(UserError) as refusal:
        download.download(root, server.url)
    assert "\n" not in str(refusal.value) and words in str(refusal.value)
    assert not (root / "meta" / "esc50.csv").exists()


# --- the transfer -----------------------------------------------------------------------------------------------------

def test_download_gives_the_published_files(server, published, tmp_path):
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    check_complete(root, published)
    assert len(dsets.ESC50(root)) == 4


@pytest.mark.parametrize("sends_length", [True, False])
def test_download_tells_the_size_only_where_the_server_does(server, published, tmp_path, monkeypatch, sends_length):
    totals = []

    class Bar(download.tqdm):
        def __init__(self, *arguments, **options):
            totals.append(options["total"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(download, "tqdm", Bar)
    server.sends_length = sends_length
    download.download(tmp_path / "data" / "ESC-50", server.url)
    check_complete(tmp_path / "data" / "ESC-50", published)
    assert totals == [len(server.content) if sends_length else None]


def test_download_changes_nothing_when_the_data_is_complete(server, tmp_path, capsys):
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    download.download(root, server.url)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert len(server.ranges) == 1 and str(root) in capsys.readouterr().out


def test_download_repairs_a_folder_with_a_missing_and_a_damaged_clip(server, published, tmp_path):
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    first, second = sorted((root / "audio").iterdir())[:2]
    first.unlink()
    second.write_bytes(b"damaged")
    download.download(root, server.url)
    check_complete(root, published)


@pytest.mark.parametrize("supports_ranges", [True, False])
def test_download_goes_on_after_dropped_connections(server, published, tmp_path, supports_ranges):
    server.drops, server.supports_ranges = 2, supports_ranges
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    check_complete(root, published)
    half, quarter = len(server.content) // 2, (len(server.content) + 1) // 2 // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + quarter if supports_ranges else half}-"]


def test_download_goes_on_in_a_later_call(server, published, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    (tmp_path / "ESC-50.zip.part").write_bytes(server.content[:1000])  # a killed process left it
    download.download(tmp_path / "ESC-50", server.url)
    assert server.ranges == ["bytes=1000-"]
    check_complete(tmp_path / "ESC-50", published)


def test_download_of_an_archive_that_was_all_there(server, published, tmp_path):
    (tmp_path / "ESC-50.zip.part").write_bytes(server.content)
    download.download(tmp_path / "ESC-50", server.url)
    check_complete(tmp_path / "ESC-50", published)


def test_download_gives_up_when_nothing_comes(server, tmp_path):
    server.status = 503
    refuse(tmp_path / "ESC-50", server, "503")
    assert len(server.ranges) == download.ATTEMPTS
    server.status = 404
    refuse(tmp_path / "ESC-50", server, "404")
    assert len(server.ranges) == download.ATTEMPTS + 1, "another attempt would not help"
    server.http.shutdown()
    server.http.server_close()
    refuse(tmp_path / "ESC-50", server, server.url)


def test_download_gives_up_on_a_server_that_begins_anew_and_always_drops(server, tmp_path):
    server.supports_ranges, server.drops = False, 10 ** 6
    refuse(tmp_path / "ESC-50", server, server.url)
    assert len(server.ranges) == 1 + download.ATTEMPTS


def test_download_refuses_a_server_that_never_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 10 ** 6)
    refuse(tmp_path / "ESC-50", server, server.url)
    assert list(tmp_path.iterdir()) == []


# --- the folder -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_download_does_not_wait_on_a_pipe_in_the_folder(server, published, tmp_path):
    shutil.copytree(published, tmp_path / "ESC-50", ignore=shutil.ignore_patterns("features"))
    wav = sorted((tmp_path / "ESC-50" / "audio").iterdir())[0]
    wav.unlink()
    os.mkfifo(wav)
    download.download(tmp_path / "ESC-50", server.url)
    check_complete(tmp_path / "ESC-50", published)


def test_download_into_the_folder_of_all_folders_is_refused(server):
    with pytest.raises(UserError, match="--data"):
        download.download(Path("/"), server.url)
    assert server.ranges == []


@pytest.mark.parametrize("name", ["metadata.csv", "dog/a.wav", "audio.txt", "audio/mine.wav"])
def test_download_into_a_folder_of_other_files_is_refused_and_changes_nothing(server, tmp_path, name):
    root = tmp_path / "sounds"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(b"mine")
    refuse(root, server, str(root))
    assert server.ranges == [] and files_of(root) == {name: b"mine"}


@pytest.mark.parametrize("name, requests", [("mine.wav", 0), ("5-9-A-0.wav", 1)])  # of another kind; of no clip of ESC-50
def test_download_replaces_no_other_data_set_of_esc50s_layout(server, published, tmp_path, name, requests):
    root = tmp_path / "ESC-50"
    shutil.copytree(published, root, ignore=shutil.ignore_patterns("features"))
    clip = sorted((root / "audio").iterdir())[0]
    (root / "meta" / "esc50.csv").write_text((root / "meta" / "esc50.csv").read_text().replace(clip.name, name))
    clip.unlink()  # so it is not complete
    before = files_of(root)
    with pytest.raises(UserError, match=f"{root}.*{name}"):
        download.download(root, server.url)
    assert len(server.ranges) == requests and files_of(root) == before
    assert (tmp_path / "ESC-50.zip.part").exists() == bool(requests), "what was fetched is good: it is kept for the next call"


def test_download_replaces_no_file_but_clips_and_the_table(server, published, tmp_path):
    root = tmp_path / "ESC-50"
    shutil.copytree(published, root, ignore=shutil.ignore_patterns("features"))
    sorted((root / "audio").iterdir())[0].unlink()
    for name in ("README.md", "thesis.txt"):
        (root / name).write_bytes(b"mine")
    download.download(root, server.url)
    assert files_of(root) == files_of(published) | {"README.md": b"mine", "thesis.txt": b"mine"}


def test_download_into_an_empty_folder(server, published, tmp_path):
    root = tmp_path / "data" / "ESC-50"
    root.mkdir(parents=True)
    download.download(root, server.url)
    check_complete(root, published)


def test_a_download_that_was_killed_while_files_were_moved_goes_on(server, published, tmp_path, monkeypatch):
    root, moved = tmp_path / "data" / "ESC-50", []

    def replace(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(download.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            download.download(root, server.url)
    with pytest.raises(UserError, match="wav"):  # half of it is not taken for the whole
        dsets.ESC50(root)
    shutil.rmtree(root / "features")
    download.download(root, server.url)
    check_complete(root, published)


def test_download_below_a_file_is_refused(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refuse(tmp_path / "file" / "ESC-50", server)
    assert server.ranges == []


# --- the archive ------------------------------------------------------------------------------------------------------

def test_download_refuses_garbage_and_a_truncated_archive(server, published, tmp_path):
    complete = server.content
    for content in (b"<html>busy</html>" * 100, complete[:len(complete) // 2], complete[:200] + b"\0" * 5000 + complete[5200:]):
        server.content = content
        refuse(tmp_path / "ESC-50", server, server.url)
        assert list(tmp_path.iterdir()) == [], "a further attempt must not continue from it"
    server.content = complete
    download.download(tmp_path / "ESC-50", server.url)
    check_complete(tmp_path / "ESC-50", published)


@pytest.mark.parametrize("name, kept", [
    ("ESC-50-master/../../evil", "evil"), ("../evil", None), ("/evil", None), ("ESC-50-master/..\\..\\evil", "..\\..\\evil"),
    ("ESC-50-master/C:/evil", "C:/evil"), ("evil", None)])
@pytest.mark.skipif(os.name != "posix", reason="elsewhere zipfile writes such names in other ways")
def test_names_that_lead_out_of_the_folder_stay_in_it(server, published, tmp_path, name, kept):
    server.content = zip_of(published, {name: b"evil"})
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    check_complete(root, published, {kept: b"evil"} if kept else {})
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not Path("/evil").exists()


def test_links_become_plain_files(server, published, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (tmp_path / "data").mkdir()
    buffer = io.BytesIO(server.content)
    with zipfile.ZipFile(buffer, "a") as zipped:
        for name, target in (("audio/link.wav", secret), ("out", tmp_path)):
            link = zipfile.ZipInfo(f"ESC-50-master/{name}")
            link.create_system, link.external_attr = 3, 0o120777 << 16
            zipped.writestr(link, str(target))
    server.content = buffer.getvalue()
    root = tmp_path / "data" / "ESC-50"
    download.download(root, server.url)
    assert not any(path.is_symlink() for path in root.rglob("*"))
    check_complete(root, published, {"audio/link.wav": str(secret).encode(), "out": str(tmp_path).encode()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret"]


def test_an_archive_that_writes_through_its_own_link_is_refused(server, published, tmp_path):
    (tmp_path / "data").mkdir()
    buffer = io.BytesIO(server.content)
    with zipfile.ZipFile(buffer, "a") as zipped:
        link = zipfile.ZipInfo("ESC-50-master/out")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        zipped.writestr(link, str(tmp_path))
        zipped.writestr("ESC-50-master/out/evil", b"evil")
    server.content = buffer.getvalue()
    refuse(tmp_path / "data" / "ESC-50", server)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_twice_the_last_counts(server, published, tmp_path):
    server.content = zip_of(published, {"ESC-50-master/meta/esc50.csv": b"other"})
    refuse(tmp_path / "ESC-50", server, "esc50.csv")


@pytest.mark.parametrize("name", ["ESC-50-master/" + "a" * 300, "ESC-50-master/audio", "ESC-50-master/meta/esc50.csv/a"])
def test_names_that_no_file_can_have_are_refused(server, published, tmp_path, name):
    server.content = zip_of(published, {name: b"evil"})
    refuse(tmp_path / "data" / "ESC-50", server)
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and list((tmp_path / "data").iterdir()) == []


def test_download_refuses_an_archive_that_unpacks_to_too_much(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 10 ** 6)
    refuse(tmp_path / "ESC-50", server, server.url)
    assert list(tmp_path.iterdir()) == []


def test_download_refuses_an_archive_that_lies_about_what_it_unpacks_to(server, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("ESC-50-master/meta/esc50.csv", b"\0" * 10 ** 7)
    content = bytearray(buffer.getvalue())
    place = content.rindex(b"PK\x01\x02") + 24  # the member's size in the archive's directory
    assert int.from_bytes(content[place:place + 4], "little") == 10 ** 7
    content[place:place + 4] = (1000).to_bytes(4, "little")
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 10 ** 6)
    server.content = bytes(content)
    refuse(tmp_path / "ESC-50", server, server.url)
    assert list(tmp_path.iterdir()) == []


def test_download_refuses_an_archive_without_a_clip_of_the_table(server, published, tmp_path):
    name = sorted(path.name for path in (published / "audio").iterdir())[0]
    server.content = zip_of(published, leave_out=name)
    refuse(tmp_path / "ESC-50", server, name)
