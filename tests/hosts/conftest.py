"""Two machines: network namespaces of this one, with a cable between them and no other way out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from run.conftest import overrides, reviews, tiny_model  # noqa: F401  (fixtures)

HERE = Path(__file__).parent


def why_not() -> str | None:
    """Why there can be no namespaces here."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    probe = f"tt-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    reason = why_not() if own else None
    for item in own:
        item.add_marker(pytest.mark.slow)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True, slots=True)
class Hosts:
    """Machines 0 and 1.

    Attributes:
        names: of their namespaces.
        cards: of their network cards.
    """

    names: tuple[str, str]
    cards: tuple[str, str]

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def start(self, number: int, *command: str) -> subprocess.Popen[str]:
        """A command on one of the machines."""
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **environment,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "NO_COLOR": "1",
                "GLOO_SOCKET_IFNAME": self.cards[number],
            },
            start_new_session=True,
        )

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[0], "link", "set", self.cards[0], "down")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    mark = f"{os.getpid() % 100000}"
    made = Hosts((f"tt-a{mark}", f"tt-b{mark}"), (f"tta{mark}", f"ttb{mark}"))
    for name in made.names:
        ip("netns", "add", name)
    try:
        ip("link", "add", made.cards[0], "netns", made.names[0], "type", "veth", "peer", "name", made.cards[1],
           "netns", made.names[1])  # fmt: skip
        for number in (0, 1):
            ip("-n", made.names[number], "addr", "add", f"{made.address(number)}/24", "dev", made.cards[number])
            ip("-n", made.names[number], "link", "set", "lo", "up")
            ip("-n", made.names[number], "link", "set", made.cards[number], "up")
        yield made
    finally:
        for name in made.names:
            ip("netns", "del", name)
