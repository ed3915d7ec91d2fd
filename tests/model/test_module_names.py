"""Patterns in an adapter's configuration and in our own keys: matched as PEFT would, and always in good time."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from model.families import FAMILIES
from trietune.device.options import Mesh, Sharding
from trietune.errors import UserError
from trietune.io.name_patterns import PatternError, matching
from trietune.model.adapter.adapter import adapter_files, add_adapter, load_adapter_files
from trietune.model.adapter.config import CONFIG_FILE, parse_config
from trietune.model.base.folder import ModelFolder
from trietune.model.module_names import resolve_patterns

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

NAMES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(12) for part in "qkvo"] + ["model", "lm_head"]
ENDLESS = (
    "(.|.)*X", "(.|.)+X", "(a|a|[a-z_.0-9])*X", r"(\w|\w|\.)*X", "(?:.?){40}.{40}X", "(.*.*)*X", "((.)*)*X", "(.+)+X",
    r"([\w.]+)*X", r"(\w+\.?)+X", "(?=(.|.)*X)q_proj", "(?!(.|.)*X)(.|.)*Y", "(.|.)*(.|.)*X", "(?:(?:.|.)|.)*X",
    "(.*)*(.*)*(.*)*X",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Any) -> ModelFolder:
    return ModelFolder(path=tmp_path, name="base", source="folder")


@pytest.fixture
def files(base: ModelFolder) -> dict[str, bytes]:
    peft_model = add_adapter(FAMILIES["llama"](), r=4, alpha=8, target_modules=["q_proj", "v_proj"], base=base)
    return {name: bytes(data) for name, data in adapter_files(peft_model, base).items()}  # type: ignore[arg-type]


def change(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    document = {**json.loads(files[CONFIG_FILE]), **changes}
    return {**files, CONFIG_FILE: json.dumps(document).encode()}


@pytest.mark.slow
def test_pythons_own_matcher_would_be_busy_for_ever() -> None:
    for pattern in ("(.|.)*X", "(?=(.|.)*X)q_proj"):
        script = f"import re; re.fullmatch({pattern!r}, {NAMES[0]!r})"
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", script], timeout=3, check=False)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_of_a_file_is_endless(pattern: str, files: dict[str, bytes]) -> None:
    for changes in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"rank_pattern": {pattern: 4}},
        {"alpha_pattern": {pattern: 4}},
        {"layers_pattern": pattern, "layers_to_transform": [0]},
    ):
        with contextlib.suppress(UserError):
            load_adapter_files(FAMILIES["llama"](), change(files, **changes), where="x")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_of_our_own_keys_is_endless(pattern: str, base: ModelFolder) -> None:
    with pytest.raises(UserError, match="lora_target_modules"):
        add_adapter(FAMILIES["llama"](), r=4, alpha=8, target_modules=pattern, base=base)
    mesh = Mesh((1,), ("model",), None, (Sharding(pattern, ("model",)),))
    with contextlib.suppress(UserError):
        assert mesh.axes_of(NAMES[0]) is None


def test_time_is_counted_over_all_names() -> None:
    with pytest.raises(PatternError, match=r"takes longer than 0\.05 seconds"):
        matching("(?:(?:(.|.)*)X|(.|.)*Y)(?=(.|.)*Z)", [name + "a" * 2000 for name in NAMES] * 50, seconds=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.layers\.1\..*_proj"},
        {"target_modules": r"(?!.*mlp).*_proj"},
        {"target_modules": r".*(?<!gate)_proj"},
        {"target_modules": r"(?i).*Q_PROJ"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\..*q_proj": 2}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3, r".*layers\.1.*": 2}},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj|k_proj": 2},
            "alpha_pattern": {"^.*v_proj": 32},
        },
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0, "layers_pattern": "lay(ers)?"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": r".*q_proj|lm_head"},
    ],
)
def test_what_is_matched_is_what_peft_matches(changes: dict[str, Any]) -> None:
    def shapes(network: PreTrainedModel, config: LoraConfig) -> dict[str, Any]:
        peft_model = get_peft_model(network, config, autocast_adapter_dtype=False)
        scales = {
            name: dict(module.scaling) for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)
        }
        sizes = {name: tuple(p.shape) for name, p in peft_model.named_parameters() if p.requires_grad}
        return {"sizes": sizes, "scales": scales}

    theirs = shapes(FAMILIES["llama"](), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **changes))
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **changes)
    network = FAMILIES["llama"]()
    resolve_patterns(config, [name for name, _ in network.named_modules() if name], where="here")
    assert shapes(network, config) == theirs
    assert theirs["sizes"], "nothing is matched at all"
    for key in ("target_modules", "exclude_modules"):
        assert not isinstance(getattr(config, key), str) or getattr(config, key) == "all-linear"


def test_a_name_within_another_is_told_from_it() -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="head|a\\.b")
    resolve_patterns(config, ["head", "deep.head", "a.b", "x.a.b", "c"], where="here")
    assert set(config.target_modules or ()) == {"head", "a.b"}
    assert set(config.exclude_modules or ()) == {"deep.head", "x.a.b"}


@pytest.mark.parametrize("pattern", ["a{e<=1}b", "(?|a|b)", r"\p{L}+", "[[:alpha:]]+", "(?R)", "(", "a" * 5000])
def test_a_pattern_that_is_none_to_python_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        matching(pattern, NAMES)


def test_names_are_those_that_re_finds() -> None:
    for pattern in (
        r".*q_proj",
        r"model\.layers\.(1|3)\..*",
        r"(?=.*\.1\.)(?!.*v_proj).*",
        r"[^.]+",
        r"model(\.\w+)*?",
    ):
        assert matching(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]
        assert matching(pattern, NAMES, whole=False) == [name for name in NAMES if re.search(pattern, name)]


def test_a_loaded_adapter_with_a_pattern_gives_its_numbers(base: ModelFolder) -> None:
    peft_model = add_adapter(FAMILIES["llama"](), r=4, alpha=8, target_modules=r".*layers\.1\..*_proj", base=base)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    files = {name: bytes(data) for name, data in adapter_files(peft_model, base).items()}  # type: ignore[arg-type]
    assert isinstance(json.loads(files[CONFIG_FILE])["target_modules"], list)
    parse_config(files[CONFIG_FILE], where="x")
    tokens = torch.arange(3, 19)[None]
    peft_model.train(False)
    with torch.no_grad():
        expected = peft_model(tokens).logits
        for again in (files, change(files, target_modules=r".*layers\.1\..*_proj")):
            loaded = load_adapter_files(FAMILIES["llama"](), again, where="x")
            assert torch.equal(loaded(tokens).logits, expected)
