"""What a release holds: the source distribution everything that a build needs, the wheel everything that runs.
Run: pytest tests/test_release.py
You should see every file of csrc and of the package in them, and nothing that was compiled in the source distribution.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def files(*folders: str) -> set[str]:
    """What lies there and is not compiled."""
    return {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*")
            if p.is_file() and p.suffix not in (".so", ".pyc")}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The folder of a source distribution and of a wheel without kernels, which was built from what that holds."""
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("release")
    clone = folder / "clone"
    shutil.copytree(ROOT, clone, ignore=lambda where, names: [n for n in names if n.startswith(".") or n == "__pycache__" or Path(
        where) == ROOT and n not in ("csrc", "minireft", "tests", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")])

    def setup(where: Path, command: str) -> None:
        done = subprocess.run([sys.executable, "setup.py", "-q", command, "-d", str(folder)], cwd=where, capture_output=True,
                              text=True, env={**os.environ, "MINIREFT_KERNELS": "0"})
        assert done.returncode == 0, done.stderr[-2000:]

    setup(clone, "sdist")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("minireft-*/"))
    (source / "minireft/_kernels.so").write_bytes(b"built in place, for one machine")
    setup(source, "bdist_wheel")
    return folder


def test_a_source_distribution_holds_what_a_build_needs(released):
    with tarfile.open(next(released.glob("*.tar.gz"))) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert names >= files("csrc", "minireft") | {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert not [n for n in names if n.endswith(".so") or n.startswith("tests/")]


def test_a_wheel_built_from_it_holds_what_runs(released):
    with zipfile.ZipFile(next(released.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    assert names >= files("minireft") and "minireft/_kernels.so" not in names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"minireft"}
