"""Types of JSON and YAML documents before they have been checked: whatever a user, a file or another program wrote.

Functions that take or give such values say so by these names; what has been checked has types of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Json]
JsonMapping: TypeAlias = Mapping[str, Json]
