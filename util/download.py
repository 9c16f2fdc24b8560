"""Fetch the published ESC-50 and check it (training.py --download)."""
import errno
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from util.cache import in_threads
from util.errors import UserError, first_ten, reason
from util.tables import ESC50_TABLE, check_free, read_esc50
from util.waveforms import load_waveform

ESC50_URL = "https://github.com/karolpiczak/ESC-50/archive/master.zip"
MAX_ARCHIVE_BYTES = 2 * 10 ** 9  # the published archive has 0.6 GB
MAX_UNPACKED_BYTES = 4 * 10 ** 9  # and unpacks to 0.9 GB
ATTEMPTS = 5  # connections in a row that bring nothing new before the transfer fails
TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds between connections
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # other OSErrors are the archive's


def download(root: Path, url: str = ESC50_URL) -> None:
    """Fetch the published ESC-50 archive into `root`; do nothing where the data is already complete.

    A broken transfer continues where it stopped, also in a later call. Everything is unpacked and checked beside the root
    before the first file is moved into it. Raises UserError if the archive cannot be fetched or is not complete, or if the root
    holds something else.
    """
    root = root.resolve()  # resolved: what is beside a link may be another file system
    if not root.name:
        raise UserError(f"--data {root}: cannot be the data's own folder; name one below it")
    if (root / ESC50_TABLE).is_file() and not problems(root):
        print(f"{root}: already complete, nothing to download")
        return
    check_free(root, "--download")
    archive, unpacked = root.with_name(root.name + ".zip.part"), root.with_name(root.name + ".unpacked")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, archive)
        shutil.rmtree(unpacked, ignore_errors=True)  # left by a killed attempt
        try:
            try:
                source = unpack(archive, unpacked, url)
                if found := problems(source):
                    raise UserError(f"--download: the archive from {url} is not complete: {first_ten(found)}; try again later")
            except UserError:
                archive.unlink()  # a further attempt must not continue from it
                raise
            check_free(root, "--download", set(read_esc50(source)["filename"]))
            (root / ESC50_TABLE).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / ESC50_TABLE, root / ESC50_TABLE)  # first: if the rest is cut off, a later call goes on
            shutil.copytree(source, root, copy_function=move, dirs_exist_ok=True)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        archive.unlink()
    except OSError as error:
        raise UserError(f"--download: cannot write beside {root} ({error}); free some space or name another --data") from error


def fetch(url: str, path: Path) -> None:
    """Fetch `url` into `path`, continuing from the bytes already there if the server can."""
    failures = most = 0
    while True:
        have = path.stat().st_size if path.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                have = have if response.status == 206 else 0  # 200: the whole file, from its start
                length = response.headers.get("Content-Length")  # GitHub does not always say how long an archive is
                total = have + int(length) if length else None
                with open(path, "ab" if have else "wb") as file, \
                        tqdm(desc="download", total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                    while (block := response.read(1 << 20)) and file.tell() <= MAX_ARCHIVE_BYTES:
                        bar.update(file.write(block))
            if path.stat().st_size > MAX_ARCHIVE_BYTES:
                path.unlink()
                raise UserError(f"--download: {url}: sends more than {MAX_ARCHIVE_BYTES / 1e9:.0f} GB; that is not ESC-50")
            if total is None or path.stat().st_size >= total:
                return
            problem = f"the connection ended after {path.stat().st_size} of {total} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing after what is there: it is all there
                return
            problem = f"HTTP status {error.code}"
            if error.code < 500:
                raise UserError(f"--download: {url}: {problem}; fetch the archive by hand and unpack it into the folder that "
                                f"--data names") from error
        except (http.client.HTTPException, urllib.error.URLError, ssl.SSLError, ConnectionError, TimeoutError) as error:
            problem = reason(error)
        size = path.stat().st_size if path.exists() else 0
        failures, most = 0 if size > most else failures + 1, max(size, most)  # a server that starts again may never get further
        if failures == ATTEMPTS:
            raise UserError(f"--download: {url}: {problem}; check the connection and run the command again: it continues there")
        time.sleep(PAUSE)


def move(source: str, target: str) -> None:
    """Move a file of the archive; what is there already stays, but for a clip, which may be damaged."""
    if Path(target).parent.name == "audio" or not os.path.lexists(target):
        os.replace(source, target)


def unpack(archive: Path, folder: Path, url: str) -> Path:
    """Unpack into `folder`; returns the folder in it that holds meta/esc50.csv. UserError for an archive damaged or too large."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            if sum(member.file_size for member in zipped.infolist()) > MAX_UNPACKED_BYTES:
                raise UserError(f"it would unpack to more than {MAX_UNPACKED_BYTES / 1e9:.0f} GB")
            zipped.extractall(folder)  # keeps names within the folder, makes no links, reads no more than file_size says
        if not (table := next(folder.glob(f"*/{ESC50_TABLE.as_posix()}"), None)):
            raise UserError(f"it holds no {ESC50_TABLE}")
        return table.parents[1]
    except Exception as error:  # zipfile and its decompressors raise a dozen types
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise UserError(f"--download: what came from {url} is not a complete zip archive ({reason(error)}); it was removed, try "
                        f"again") from error


def problems(root: Path) -> list[str]:
    """What is wrong with a data folder: its table, or clips of the table that are missing or do not decode."""
    def check(function, path: Path):
        try:
            function(path)
        except UserError as error:
            return str(error)

    if problem := check(read_esc50, root):
        return [problem]
    found = in_threads(lambda name: check(load_waveform, root / "audio" / name), read_esc50(root)["filename"], "check")
    return list(filter(None, found))
