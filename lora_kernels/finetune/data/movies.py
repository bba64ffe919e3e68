"""10,605 sentences of movie reviews, each rated by people from -4 to 4 (Hutto and Gilbert, VADER, ICWSM 2014).

The source distribution of the package vaderSentiment 3.3.2 (MIT licence) contains them; pip downloads it once. Both
hashes are fixed: pip refuses another archive before it runs any of its code, and the text is checked at every reading.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lora_kernels.atomic_write import atomic_write
from lora_kernels.finetune.data.files import DataError, Examples

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TEXT = "movieReviewSnippets_GroundTruth.txt"
TEXT_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL = 0.5
_LIMIT = 64 << 20  # bytes of one member; the largest real one has 2.3 MB


def cache_folder() -> Path:
    """Return the folder of downloaded data: XDG_CACHE_HOME/lora_kernels, by default ~/.cache/lora_kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"


def movie_reviews(archive: Path | None = None, neutral: float = NEUTRAL) -> Examples:
    """Load sentences labelled positive (rating > 0) or negative; those with \\|rating\\| < ``neutral`` are left out.

    archive: a local vaderSentiment-3.3.2.tar.gz; None uses the cache, which pip fills.
    Raises DataError if the data cannot be downloaded or has another hash.
    """
    if archive is not None:
        return parse(check(text_of(read_archive(archive)), TEXT_SHA256, TEXT), neutral)
    cached = cache_folder() / TEXT
    if not cached.exists():
        atomic_write(cached, check(text_of(fetch()), TEXT_SHA256, TEXT))
    return parse(check(cached.read_bytes(), TEXT_SHA256, f"{cached} (delete it to fetch it again)"), neutral)


def parse(data: bytes, neutral: float = NEUTRAL) -> Examples:
    """Parse lines of id, rating and sentence separated by tabs. Raises DataError with the line number."""
    texts, labels = [], []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            _, rating_text, text = line.decode("utf-8").split("\t", 2)
            rating = float(rating_text)
        except ValueError:
            raise DataError(f"{TEXT}, line {number}: expected id, rating and sentence, got {line[:60]!r}") from None
        if abs(rating) >= neutral and text.strip():
            texts.append(text.strip())
            labels.append(int(rating > 0))
    return Examples(texts, labels, ("negative", "positive"))


def check(data: bytes, sha256: str, name: str) -> bytes:
    """Return ``data``. Raises DataError if its SHA-256 is another."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(f"{name} was refused: its SHA-256 is {found}, expected {sha256}")
    return data


def read_archive(path: Path) -> bytes:
    """Read the source distribution and check its hash."""
    try:
        return check(path.read_bytes(), ARCHIVE_SHA256, str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def fetch() -> bytes:
    """Download the source distribution with pip, which checks the hash before it opens the archive."""
    with tempfile.TemporaryDirectory(prefix="lora_kernels-") as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{ARCHIVE_SHA256}\n")
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirement), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(
                f"pip could not fetch vaderSentiment 3.3.2: {reason}; needed are pip, setuptools and a package index, "
                f"or the archive by hand: --data {ARCHIVE}"
            )
        return read_archive(Path(folder) / ARCHIVE)


def text_of(archive: bytes) -> bytes:
    """Extract the file of sentences from the nested archive, in memory."""
    return member(member(archive, INNER), f"hutto_ICWSM_2014/{TEXT}")


def member(archive: bytes, name: str, limit: int = _LIMIT) -> bytes:
    """Read the regular file ``name`` of a .tar.gz. Raises DataError for links, large members, damaged archives."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for entry in tar:
                if entry.size > limit:
                    raise DataError(f"archive: {entry.name[:80]!r} has {entry.size} bytes, over {limit}")
                if entry.name != name:
                    continue
                file = tar.extractfile(entry) if entry.isreg() else None
                if file is None:
                    raise DataError(f"archive: {name!r} is not a regular file")
                return file.read(limit)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"archive: not a readable .tar.gz ({error})") from error
    raise DataError(f"archive: {name!r} is missing")
