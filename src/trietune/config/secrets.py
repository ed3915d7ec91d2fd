"""Take passwords and tokens out of text that is going to be shown or written.

s3://key:secret@host/runs          ->  s3://***@host/runs
s3://key:se/cr/et@host/runs        ->  s3://***@host/runs      a secret key of AWS has slashes in every second case
key:se/cr/et@host/runs             ->  ***@host/runs
https://host/runs?token=abc&x=1    ->  https://host/runs?token=***&x=1
"""

from __future__ import annotations

import re
from typing import Any

# An address that went through a path has lost one of its slashes. With a colon in it, what stands before the last `@`
# is a name and a password, whatever the characters: people paste them as they are.
_USER_INFO = re.compile(r"(:/{1,2})(?:[^/\s?#]+|[^/\s@:]*:\S*)@")
# Without a colon, slashes are those of a path, unless this looks drawn by chance.
_BARE_SECRET = re.compile(r"(:/{1,2}|(?<![\w/.@:+-]))([A-Za-z0-9/+=_-]{20,})@")
# Without a scheme, in an address that may have lost it; braces are those of a template.
_NO_SCHEME = re.compile(r"(?<![\w:/.@-])(//)?[\w.+%~-]+:(?!//)[^\s{}]{6,}@(?=[\w\[-])")
# The whole address as part of another one.
_ENCODED = re.compile(r"(%3A(?:%2F|/){1,2})[^\s?#&]+%40", re.IGNORECASE)
# As a line of a shell has it, or a header of a request.
_ASSIGNED = re.compile(
    r"(\b(?:[A-Z][A-Z0-9_]*_)?(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|SECRET_KEY)=|\bBearer\s+(?=\S*\d))"
    r"[^\s'\"`]{6,}"
)
_QUERY = re.compile(
    r"([?&;][\w.%-]*(?:token|secret|password|passwd|pwd|signature|sig|credential|api[_-]?key|access[_-]?key|key)=)[^&;#\s]+",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}|A[KS]IA[0-9A-Z]{16}"
    r"|[0-9a-f]{40}(?=@))"
)


def without_secrets(value: object) -> Any:
    """The same value (text, or lists and mappings of it) with what looks like a credential replaced by `***`."""
    if isinstance(value, str):
        masked = _BARE_SECRET.sub(_mask_if_random, _USER_INFO.sub(r"\1***@", value))
        masked = _NO_SCHEME.sub(lambda found: f"{found[1] or ''}***@", masked)
        masked = _ASSIGNED.sub(r"\1***", _ENCODED.sub(r"\1***%40", masked))
        return _TOKENS.sub("***", _QUERY.sub(r"\1***", masked))
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(item) for item in value)
    return value


def _mask_if_random(found: re.Match[str]) -> str:
    text = found[2]
    kinds = (str.isupper, str.islower, str.isdigit)
    is_random = all(any(is_kind(char) for char in text) for is_kind in kinds)
    return f"{found[1]}***@" if is_random else found[0]
