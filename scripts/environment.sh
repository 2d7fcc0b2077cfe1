# Sourced by the scripts: makes .venv beside this checkout and installs the package into it, once a change of its needs.
# Usage: . scripts/environment.sh [EXTRAS]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}
venv=${MLX_DISTILL_VENV:-$root/.venv}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "mlx-distill needs Python 3.11 or later. On a Mac:  brew install python@3.12" >&2
  exit 1
}

if [ ! -x "$venv/bin/python" ]; then
  echo "Making $venv" >&2
  "$(find_python)" -m venv "$venv"
fi

# What the installation depends on; when it is as it was, there is nothing to install.
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum; echo "$extras")
installed=$venv/.mlx-distill-installed
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing mlx-distill${extras:+ with [$extras]} into $venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}" >&2
  echo "$wanted" >"$installed"
fi
export PATH="$venv/bin:$PATH"
