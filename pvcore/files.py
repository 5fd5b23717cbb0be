"""Files: written whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` and move it there, so that no reader ever meets half a file.

    Raises `OSError` with nothing changed at `path`.
    """
    # The same folder keeps the rename within one file system, where it is atomic.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
