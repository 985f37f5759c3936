"""Where the files of a data set are looked for, with the one error that tells what was looked for and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipetrgl.config.schema import DataConfig
from pipetrgl.errors import DataError

VARIABLE = "PIPETRGL_DATA"


def find(
    config: DataConfig,
    environ: Mapping[str, str],
    inner: Sequence[str],
    files: Sequence[str],
    advice: str,
    usual: Sequence[Path] = (),
    suffixes: Sequence[str] = ("",),
) -> Path:
    """The first folder that holds every one of `files`.

    Looks in `data.root` alone if it is set, else in $PIPETRGL_DATA and then in the usual places.

    Args:
        inner: folders to try below `data.root` and $PIPETRGL_DATA, before these themselves.
        files: names in the folder.
        advice: how to get the data set, for the error.
        usual: complete paths.
        suffixes: endings with any of which a file counts as there.
    Raises:
        DataError: no folder holds them all.
    """
    folders = _folders(config, environ, inner, usual)
    missing = {
        folder: [name for name in files if not any((folder / f"{name}{suffix}").exists() for suffix in suffixes)]
        for folder in folders
    }
    for folder in folders:
        if not missing[folder]:
            return folder
    looked = (
        "".join(f"\n  {folder}: {_shortage(folder, files, missing[folder])}" for folder in folders)
        or f"\n  nowhere: data.root and ${VARIABLE} are unset"
    )
    raise DataError(
        f"data.name: the files of '{config.name}' were not found. Looked in{looked}\n{advice} "
        f"Or set data.root, or ${VARIABLE}, to the folder that holds them."
    )


def _folders(config: DataConfig, environ: Mapping[str, str], inner: Sequence[str], usual: Sequence[Path]) -> list[Path]:
    base = config.root or environ.get(VARIABLE)
    below = [Path(base).expanduser() / name for name in (*inner, ".")] if base else []
    return below if config.root else [*below, *usual]


def _shortage(folder: Path, files: Sequence[str], missing: Sequence[str]) -> str:
    if not folder.is_dir():
        return "no such folder"
    if len(missing) == len(files):
        return f"no {files[0]}"
    return f"lacks {', '.join(missing)}"
