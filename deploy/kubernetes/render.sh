#!/bin/sh
# Prints the objects of a folder, as `kubectl apply -k` would send them:  ./render.sh overlays/cpu
# An older kubectl fails at components with a text that nobody understands, so its version is looked at first.
# Another kubectl than the one on the path: KUBECTL=/where/kubectl ./render.sh overlays/cpu
set -eu

kubectl=${KUBECTL:-kubectl}
fix='install it, or name one: KUBECTL=/where/kubectl'
if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
if ! command -v "$kubectl" >/dev/null; then
  echo "error: KUBECTL_MISSING: kubectl kustomize 1.21 or newer is needed, there is no $kubectl; $fix" >&2
  exit 1
fi
version=$("$kubectl" version --client -o json 2>/dev/null |
  sed -n 's/.*"gitVersion": *"v\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | head -n 1)
major=${version% *} minor=${version#* }
shown="of no version that can be read"
if [ -n "$version" ]; then shown="$major.$minor"; fi
if [ "${major:-0}" -lt 1 ] || { [ "$major" -eq 1 ] && [ "$minor" -lt 21 ]; }; then
  echo "error: KUBECTL_OLD: kubectl kustomize 1.21 or newer is needed, $kubectl is $shown; $fix" >&2
  exit 1
fi
exec "$kubectl" kustomize "$1"
