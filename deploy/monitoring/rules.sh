#!/bin/sh
# Prints the rules of deploy/kubernetes/components/monitoring as a file that Prometheus itself reads:
#   deploy/monitoring/rules.sh > rules.yml
# There they are `spec.groups` of a PrometheusRule; a rule file begins with `groups`.
set -eu
sed -n '/^  groups:$/,$ s/^  //p' "$(dirname "$0")/../kubernetes/components/monitoring/rules.yaml"
