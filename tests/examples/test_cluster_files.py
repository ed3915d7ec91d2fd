"""Job files for clusters: their scripts parse, their resources are what the cluster knows, their commands exist."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from trietune.cli.app import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
SCHEMAS = json.loads((Path(__file__).parent / "schemas" / "cluster.json").read_text())


def resources() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, resource)
        for path in sorted(CLUSTER.glob("*.yaml"))
        for resource in YAML(typ="safe", pure=True).load_all(path)
    ]


def check(resource: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[resource["kind"]]).validate(resource)


def check_command(arguments: list[str]) -> None:
    """The arguments after `trietune` name a command and options that there are."""
    import typer.main

    command = typer.main.get_command(app)
    with command.make_context("trietune", list(arguments), resilient_parsing=False):
        pass
    name, *rest = arguments
    found = command.get_command(None, name)  # type: ignore[attr-defined, arg-type]
    assert found is not None
    found.make_context(name, rest)


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("name", "resource"), resources(), ids=lambda value: value if isinstance(value, str) else "")
def test_resources_are_those_of_the_cluster(name: str, resource: dict[str, Any]) -> None:
    check(resource)


def test_a_misspelt_field_would_be_noticed() -> None:
    for _, resource in resources():
        resource["spec"]["entrypiont"] = "x"
        with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
            check(resource)


def test_the_train_job_starts_torchrun_with_our_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    runtime, job = (resource for name, resource in resources() if name == "trainjob.yaml")
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert trainer["command"] == ["torchrun"]
    # As Kubeflow hands them over.
    monkeypatch.setenv("PET_NNODES", str(trainer["numNodes"]))
    monkeypatch.setenv("PET_NPROC_PER_NODE", str(trainer["numProcPerNode"]))
    parsed = get_args_parser().parse_args(trainer["args"])
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2", "8")
    assert (parsed.module, parsed.training_script) == (True, "trietune")
    check_command(parsed.training_script_args)


def test_the_ray_job_runs_our_command_with_workers_that_there_are() -> None:
    ((_, job),) = (pair for pair in resources() if pair[0] == "rayjob.yaml")
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "trietune"
    check_command(arguments)
    workers = arguments[arguments.index("--num-workers") + 1].split(",")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cards = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert [int(number) for number in workers] == [cards * group["minReplicas"], cards * group["maxReplicas"]]
