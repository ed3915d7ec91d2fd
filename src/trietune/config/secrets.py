"""Take passwords and tokens out of text that is going to be shown or written.

s3://key:secret@host/runs          ->  s3://***@host/runs
https://host/runs?token=abc&x=1    ->  https://host/runs?token=***&x=1
"""

from __future__ import annotations

import re
from typing import Any

# An address that went through a path has lost one of its slashes.
_USER_INFO = re.compile(r"(:/{1,2})[^/\s?#]+@")
_QUERY = re.compile(
    r"([?&;][\w.%-]*(?:token|secret|password|passwd|pwd|signature|sig|credential|api[_-]?key|access[_-]?key|key)=)[^&;#\s]+",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|[0-9a-f]{40}(?=@))"
)


def without_secrets(value: Any) -> Any:
    """The same value (text, or lists and mappings of it) with what looks like a credential replaced by `***`."""
    if isinstance(value, str):
        return _TOKENS.sub("***", _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", value)))
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(item) for item in value)
    return value
