"""Debian packages: our reader on packages written here, and apt-get's part played by a script."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from miniature_debs import write_deb

from nemo_slam.data.corpora import apt
from nemo_slam.data.corpora.deb import read_deb
from nemo_slam.data.corpora.files import CorpusError

FILES = {"usr/share/a.txt": b"alpha", "usr/share/sub/b.bin": bytes(range(256)) * 300, "usr/share/empty": b""}


@pytest.mark.parametrize("compression", ["xz", "gz", "none"])
def test_read_deb(tmp_path, compression):
    deb = write_deb(tmp_path / "mini_1.0_all.deb", FILES, compression)
    assert dict(read_deb(deb)) == FILES


def test_read_deb_compressed_with_zstd(tmp_path):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb to write and read a zstd package with")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: mini\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    deb = tmp_path / "mini_1_all.deb"
    built = subprocess.run(["dpkg-deb", "-Zzstd", "--build", tree, deb], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"this dpkg-deb does not write zstd: {built.stderr}")
    assert dict(read_deb(deb)) == FILES
    deb.write_bytes(deb.read_bytes()[:-40] + bytes(40))
    with pytest.raises(CorpusError, match="damaged"):
        dict(read_deb(deb))


def test_truncated_at_any_place_is_an_error(tmp_path):
    whole = write_deb(tmp_path / "mini_1.0_all.deb", FILES).read_bytes()
    cut = tmp_path / "cut_1.0_all.deb"
    for size in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        cut.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=str(cut)):
            dict(read_deb(cut))


def test_damaged_data_is_an_error(tmp_path):
    deb = write_deb(tmp_path / "mini_1.0_all.deb", FILES)
    content = bytearray(deb.read_bytes())
    content[-200:-100] = bytes(100)
    deb.write_bytes(content)
    with pytest.raises(CorpusError, match="damaged"):
        dict(read_deb(deb))


APT_GET = """#!/bin/sh
echo "$@" >> "$APT_LOG"
case "$*" in
  *" update") exit "${UPDATE_STATUS:-0}" ;;
  *" download "*)
    [ -n "$OFFLINE" ] && { echo "E: Unable to locate package $OFFLINE" >&2; exit 100; }
    seen=
    for word in "$@"; do
      [ -n "$seen" ] && [ "$word" != "$FORGET" ] && echo "package $word" > "${word}_1%3a2.0-1_all.deb"
      [ "$word" = download ] && seen=yes
    done ;;
esac
exit 0
"""


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """A stand-in for apt-get, and the log of how it was called."""
    tool = tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text(APT_GET)
    tool.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("APT_LOG", str(log))
    return log


def test_fetch_keeps_everything_of_apt_in_the_folder(tmp_path, apt_get):
    folder = tmp_path / "packages"
    debs = apt.fetch(["one", "two"], folder)
    assert {name: deb.name for name, deb in debs.items()} == {
        name: f"{name}_1%3a2.0-1_all.deb" for name in ("one", "two")
    }
    assert apt.version(debs["one"]) == "1:2.0-1"
    calls = apt_get.read_text().splitlines()
    assert [call.split("-oAcquire")[-1].split()[1] for call in calls] == ["update", "download"]
    for call in calls:
        assert f"-oDir::State::Lists={folder}/apt-" in call
        assert f"-oDir::Cache={folder}/apt-" in call
    assert [path.name for path in folder.iterdir()] == ["debs"]


def test_fetch_asks_only_for_what_is_missing(tmp_path, apt_get):
    folder = tmp_path / "packages"
    write_deb(folder / "debs" / "one_1.0_all.deb", FILES)
    (folder / "apt-old" / "arriving").mkdir(parents=True)
    (folder / "apt-old" / "arriving" / "two_1.0_all.deb").write_bytes(b"half of it")  # of a killed call: not trusted
    debs = apt.fetch(["one", "two"], folder)
    assert debs["one"].name == "one_1.0_all.deb"
    assert debs["two"].read_text() == "package two\n"
    assert [path.name for path in folder.iterdir()] == ["debs"]
    assert apt_get.read_text().splitlines()[-1].endswith("download two")
    apt_get.write_text("")
    assert apt.fetch(["one", "two"], folder) == debs
    assert apt_get.read_text() == ""


def test_packages_put_there_by_hand_need_no_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    deb = write_deb(tmp_path / "packages" / "debs" / "one_1.0_all.deb", FILES)
    assert apt.fetch(["one"], tmp_path / "packages") == {"one": deb}


def _names_the_ways_out(error: pytest.ExceptionInfo) -> bool:
    return all(way in str(error.value) for way in ("mini_librispeech", "synthetic", "manifests"))


def test_without_apt_get_the_error_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="apt-get not found") as error:
        apt.fetch(["one"], tmp_path / "packages")
    assert _names_the_ways_out(error)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"OFFLINE": "one"},
            r"(?s)apt-get download failed \(exit status 100\); is this machine offline.*locate",
        ),
        ({"UPDATE_STATUS": "7"}, r"apt-get update failed \(exit status 7\)"),
        ({"FORGET": "one"}, "brought no one"),
    ],
)
def test_a_failing_apt_get_is_explained(tmp_path, apt_get, monkeypatch, setting, message):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError, match=message) as error:
        apt.fetch(["one"], Path(tmp_path / "packages"))
    assert _names_the_ways_out(error)
