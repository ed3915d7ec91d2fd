"""Decide, before anything of W&B is started, whether a run can be sent there: it must never ask, wait or fail.

    installed?   mode asked for?      login known?                 host answers within two seconds?
    no: off      disabled: off        no: off                      no: offline, files to be synced later
                 offline: offline     (not needed offline)         yes: online

Only environment variables, W&B's settings files and the netrc file are read, all without importing `wandb`.
"""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

DEFAULT_URL = "https://api.wandb.ai"
PROBE_TIMEOUT_S = 2.0
_TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Access:
    """How a run reaches W&B. `reason` is one line for the user where it is not simply online."""

    mode: Literal["online", "offline", "off"]
    url: str
    reason: str | None = None


def find_access(
    environ: Mapping[str, str], *, working_directory: Path | None = None, timeout_s: float = PROBE_TIMEOUT_S
) -> Access:
    """Decide the mode; takes at most `timeout_s`, and reads nothing from a terminal."""
    settings = _read_settings(environ, working_directory or Path.cwd())
    url = (environ.get("WANDB_BASE_URL") or settings.get("base_url") or DEFAULT_URL).rstrip("/")
    if not is_installed("wandb"):
        return Access("off", url, "not installed, the run continues without it; `pip install 'trietune[wandb]'`")
    mode = (environ.get("WANDB_MODE") or settings.get("mode") or "online").lower()
    if mode == "disabled" or environ.get("WANDB_DISABLED", settings.get("disabled", "")).lower() in _TRUE:
        return Access("off", url, "off, as its settings say (WANDB_MODE, WANDB_DISABLED)")
    if mode in ("offline", "dryrun"):
        return Access("offline", url)
    if not has_login(environ, settings, url):
        host = urlsplit(url).hostname or url
        return Access("off", url, f"no login for {host}, the run continues without it; `wandb login`, or WANDB_API_KEY")
    trouble = probe(url, timeout_s)
    if trouble:
        return Access("offline", url, f"{url} {trouble}; recorded offline")
    return Access("online", url)


def is_installed(package: str) -> bool:
    """Whether `package` could be imported; a mere folder of that name, such as W&B leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def has_login(environ: Mapping[str, str], settings: Mapping[str, str], url: str) -> bool:
    """Whether W&B would find a key by itself, and so would not ask for one."""
    if any(environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if settings.get("api_key") or settings.get("identity_token_file"):
        return True
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or os.path.expanduser("~"))  # noqa: PTH111
    candidates = [environ["NETRC"]] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in candidates:
        try:
            entry = netrc.netrc(os.path.expanduser(path)).authenticators(urlsplit(url).netloc)  # noqa: PTH111
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


def probe(url: str, timeout_s: float) -> str | None:
    """None if the server answers in time; otherwise what is wrong, to be read after its address.

    The request runs in a thread that is left behind when time is up: looking up a name has no timeout of its own.
    """
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(_ask(url, timeout_s)), daemon=True, name="wandb-probe")
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else f"did not answer within {timeout_s:g} s"


def _ask(url: str, timeout_s: float) -> str | None:
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        return "is not an http address"
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=timeout_s):  # noqa: S310  (the scheme is checked)
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"answers with HTTP status {error.code}" if error.code >= 500 else None
    except ssl.SSLError:
        return None  # somebody answers; W&B's own process has its own certificates, and decides
    except TimeoutError:
        return f"did not answer within {timeout_s:g} s"
    except OSError as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):
            return None
        return "cannot be reached: " + " ".join(str(cause).split())
    except Exception as error:  # a server that talks no HTTP
        return f"gives no usable answer ({type(error).__name__})"


def _read_settings(environ: Mapping[str, str], working_directory: Path) -> dict[str, str]:
    """W&B's own settings files, the user's first, the working directory's over it; unreadable ones count as empty."""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or os.path.expanduser("~"))  # noqa: PTH111
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    found: dict[str, str] = {}
    for path in (folder / "settings", working_directory / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text())
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found.update(parser["default"])
    return found
