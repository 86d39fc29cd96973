"""The file of a saved prefix: tensors of safetensors, and in their metadata a JSON header and a digest of the file.

Nothing in it is code, and no number in it is believed before it was compared with the file, or with the model that the
prefix is for. The digest is over every byte of the file, its own digits apart: it finds damage. It is no signature.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_paged.errors import SavedPrefixError

_HEADER = "hf_paged.prefix"  # The only key of the metadata.
_DIGEST = "sha256"  # A field of the header.
_BLANK = "0" * 64  # In place of the digest while it is computed.
_LENGTH_BYTES = 8  # A safetensors file begins with the length of its own header, little-endian.
_LONGEST_HEADER = 16 * 2**20
_CHUNK = 2**20
_REMEDY = "save the prefix anew with hf_paged.save_prefix"


class PrefixFile:
    """A saved prefix that was opened, and is as it was written.

    Attributes
    ----------
    header : dict of str to str
        The fields of what was given to `write`, each as JSON: to be compared with what `as_json` makes.
    names : frozenset of str
        Of the tensors.
    """

    def __init__(self, path: str, tensors: Any, header: dict[str, str]):
        self._path, self._tensors, self.header = path, tensors, header
        self.names = frozenset(tensors.keys())

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the file, on the CPU. It maps the file, and is good while that is open.

        Raises
        ------
        SavedPrefixError
            If there is none, or one of another dtype or shape.
        """
        if name not in self.names:
            raise refused(self._path, f"it has no tensor {name}")
        tensor = self._tensors.get_tensor(name)
        if tensor.dtype != dtype or tensor.shape != shape:
            got, wanted = (f"{kind} {list(size)}" for kind, size in ((tensor.dtype, tensor.shape), (dtype, shape)))
            raise refused(self._path, f"its tensor {name} is {got}, where {wanted} is expected")
        return tensor


def refused(path: str, why: str, remedy: str = _REMEDY) -> SavedPrefixError:
    """The error of a file that is refused."""
    return SavedPrefixError(f"the saved prefix {path} is refused, and nothing was changed: {why}. Remedy: {remedy}")


def write(path: str, header: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a file, for the user alone, as its tokens can be read from it: whole, or not at all.

    Parameters
    ----------
    path : str
        A file that is there already is replaced when the new one is complete.
    header : mapping
        What JSON can say.
    tensors : dict of str to torch.Tensor
        Contiguous ones on the CPU.

    Raises
    ------
    SavedPrefixError
        If the system refuses. What was at `path` is as before, and nothing else is left there.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".hf_paged-{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, {_HEADER: json.dumps({**header, _DIGEST: _BLANK}, sort_keys=True)})
        os.chmod(temporary, 0o600)
        with open(temporary, "r+b") as file:
            _seal(file)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise SavedPrefixError(
            f"the prefix cannot be written to {path} ({error}), and what was there is as before. It takes {size:,} "
            "bytes beside what it replaces: free as much, or name a path in a folder that you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # It is not there where all went well.
            os.unlink(temporary)
    _sync_folder(folder)


def _seal(file: BinaryIO) -> None:
    """Enter the digest into a new file, and see it to the disk."""
    head = _head(file)
    assert head.count(_BLANK.encode()) == 1, "a header with another digest of zeros"
    digest = _digest(file, head, _BLANK)
    file.seek(head.index(_BLANK.encode()))
    file.write(digest.encode())
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    """See the new name to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def opened(path: str) -> Iterator[PrefixFile]:
    """Open a file and check that it is one of ours, whole and not altered.

    Raises
    ------
    SavedPrefixError
        If it is not.
    OSError
        If it cannot be opened: `FileNotFoundError` where there is none.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise refused(path, "it is no regular file")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        before = os.fstat(file.fileno())
        try:
            head = _head(file)
            tensors = stack.enter_context(safe_open(path, framework="pt"))
            header = _checked_header(file, head, tensors.metadata() or {})
        except (SafetensorError, ValueError) as error:
            raise refused(path, f"it is no saved prefix, or not a whole one ({error})") from error
        if not os.path.samestat(before, os.stat(path)):  # The reader has opened it by its name.
            raise refused(path, "it was replaced while it was read", "load it again")
        yield PrefixFile(path, tensors, header)


def _checked_header(file: BinaryIO, head: bytes, metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of a file whose digest is right.

    Raises
    ------
    ValueError
        If it is another kind of file, or was altered.
    """
    if metadata.keys() != {_HEADER}:
        raise ValueError("its metadata is not that of one")
    try:
        header = as_json(json.loads(metadata[_HEADER]))
    except (RecursionError, AttributeError) as error:
        raise ValueError("its header is no JSON object that can be read") from error
    recorded = header.pop(_DIGEST, "").strip('"')
    is_digest = bool(re.fullmatch("[0-9a-f]{64}", recorded)) and head.count(recorded.encode()) == 1
    if not is_digest or _digest(file, head, recorded) != recorded:
        raise ValueError("its content is not what was written: the digest differs")
    return header


def as_json(header: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a header as texts, which say more than Python compares: there, True is 1."""
    return {name: json.dumps(value, sort_keys=True) for name, value in header.items()}


def _head(file: BinaryIO) -> bytes:
    """The beginning of a file: the length of the header of safetensors, and that header.

    Raises
    ------
    ValueError
        If the file is shorter than it says, or the header larger than any of ours.
    """
    file.seek(0)
    length = file.read(_LENGTH_BYTES)
    size = int.from_bytes(length, "little")
    if size > _LONGEST_HEADER:
        raise ValueError(f"a header of {size:,} bytes, where {_LONGEST_HEADER:,} is the limit")
    return length + file.read(size)


def _digest(file: BinaryIO, head: bytes, recorded: str) -> str:
    """SHA-256 of a file, as if zeros stood where its header records the digest."""
    digest = hashlib.sha256(head.replace(recorded.encode(), _BLANK.encode()))
    file.seek(len(head))
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
