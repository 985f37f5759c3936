"""Jane Austen's six novels, from R's package janeaustenr, Debian's r-cran-janeaustenr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipetrgl.data.rdata import read_database
from pipetrgl.errors import DataError

LIBRARIES = (Path("/usr/lib/R/site-library"), Path("/usr/local/lib/R/site-library"))
"""Where Debian, and where R itself, installs packages."""


def novels(libraries: Sequence[Path] = LIBRARIES) -> bytes:
    """Their lines in UTF-8, novel after novel in the order of the package: that of their names in it.

    Raises:
        DataError: the package is not installed, or damaged.
    """
    for library in libraries:
        folder = library / "janeaustenr" / "data"
        if (folder / "Rdata.rdb").is_file():
            return _text(folder)
    looked = "".join(f"\n  {library / 'janeaustenr'}" for library in libraries)
    raise DataError(
        f"data.name: 'text' without data.root reads the novels of r-cran-janeaustenr, which was not found in{looked}\n"
        "Install it: apt-get install r-cran-janeaustenr. Or set data.root to a UTF-8 file."
    )


def _text(folder: Path) -> bytes:
    novels = read_database(folder, "Rdata")
    for name, lines in novels.items():
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise DataError(f"{folder}: '{name}' is no list of lines; this is another version of janeaustenr")
    return "".join(f"{line}\n" for lines in novels.values() for line in lines).encode()
