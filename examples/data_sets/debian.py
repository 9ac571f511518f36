"""Debian packages that data sets come from: downloaded without root, checked and unpacked."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class PackageUnavailable(SystemExit):
    """The Debian package could not be fetched or unpacked; a program that does not catch this ends with the remedy."""


@dataclass(frozen=True)
class Package:
    """One version of a package; `otherwise` completes the remedy, as "; or use --data species"."""

    name: str
    version: str  # with its Debian release
    sha256: str
    otherwise: str = ""

    def fetch(self, cache: Path) -> Path:
        """The checked .deb, downloaded with apt-get unless it stands in `cache`; no root needed."""
        package = next(cache.glob(f"{self.name}_*.deb"), None)
        if package is None:
            self._run(["apt-get", "download", self.name], cache)
            package = next(cache.glob(f"{self.name}_*.deb"))
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise PackageUnavailable(
                f"{package} has sha256 {digest}, not {self.sha256}: another version, or a broken download.\n"
                f"Remedy: delete it and put {self.name} {self.version} there{self.otherwise}."
            )
        return package

    @contextmanager
    def unpacked(self, cache: Path) -> Iterator[Path]:
        """A temporary folder with the package's files; the .deb stays in `cache`."""
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            self._run(["dpkg-deb", "--extract", str(self.fetch(cache)), folder])
            yield Path(folder)

    def _run(self, command: list[str], folder: Path | None = None) -> None:
        remedy = (
            f"Remedy: on Debian 12, run `apt-get update` (as root) and try again; elsewhere, put the .deb\n"
            f"of {self.name} {self.version} into the --cache folder (dpkg-deb is still needed){self.otherwise}."
        )
        if shutil.which(command[0]) is None:
            raise PackageUnavailable(
                f"{command[0]} is not installed, so {self.name} cannot be downloaded or unpacked.\n{remedy}"
            )
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackageUnavailable(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}\n{remedy}")
