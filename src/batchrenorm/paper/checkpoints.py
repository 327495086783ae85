"""Keeping the state of a training so that whatever happens to the process, the latest whole state is on disk."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that at every moment either the old or the new one is there, whole.

    Args:
        path: of the file.
        state: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        OSError: it could not be written, say on a full disk; the old one is still there.
    """
    file = io.BytesIO()
    torch.save(state, file)
    write(path, file.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a state; only data, no code.

    Raises:
        ValueError: the file is damaged.
        OSError: it could not be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        # torch writes checksums and does not look at them.
        if (damaged := zipfile.ZipFile(content).testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        content.seek(0)
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # whatever torch makes of a damaged file, and that is a lot
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a checkpoint in {path}, got a file that cannot be read ({reason}); delete it, and that training "
            "starts over"
        ) from error


def write(path: Path, content: bytes) -> None:
    """Replace a file by another as one step.

    Raises:
        OSError: it could not be written; the old one is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"expected room for {path}, got: {os.strerror(error.errno or 0)}; what was there is kept"
        ) from error
