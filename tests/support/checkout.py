"""The files of this checkout, and copies of it."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "hf_paged.egg-info" / "SOURCES.txt"  # In an unpacked source archive, the list of its files.


def checkout_files() -> set[str]:
    """Paths of all files that belong to the project, new ones included, from the root."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = done.stdout.strip("\0").split("\0")
    else:
        names = [name for name in SOURCES.read_text().splitlines() if not name.startswith("hf_paged.egg-info/")]
    return {name for name in names if (ROOT / name).is_file()}


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout as a clone without symbolic links would have it; files alone, no history."""
    for name in checkout_files():
        if not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder
