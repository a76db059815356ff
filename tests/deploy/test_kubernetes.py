"""deploy/kubernetes: it renders, its schemas hold, its policies hold, and its names are those of the server.

What needs no tool is checked without one. kubectl is the one that the variable KUBECTL names or that is on
the path, promtool and npm are on the path; without them the tests that need them skip.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.core import Metric

from tenuto import Client
from tenuto.errors import Refused, Unavailable
from tenuto.serving import callers, errors
from tenuto.serving.config import ServerConfig, variable_of
from tenuto.serving.errors import ConfigInvalid, TenutoError
from tenuto.serving.metrics import STAGES, ModelMetrics, ServerMetrics, TenutoCollector
from tenuto.serving.sequence import Ending
from tenuto.v1 import tenuto_pb2
from tests import toys
from tests.deploy import policy
from tests.deploy.collector import Collector
from tests.deploy.policy import (
    GPU,
    POLICIES,
    Check,
    Object,
    Objects,
    disruptions_come_one_by_one,
    gpus_are_asked_for,
    grace_holds_the_drain,
    images_have_a_tag,
    network_is_shut,
    new_pods_get_a_share,
    no_rights_in_the_cluster,
    no_service_links,
    one_namespace,
    pods_are_spread,
    ports_agree,
    probes_are_patient_enough,
    probes_spare_a_draining_pod,
    references_exist,
    resources_are_obeyed,
    restricted,
    scaling_down_is_slow,
    scaling_ignores_draining_pods,
    secrets_arrive_anew,
    selectors_find_the_pods,
    services_lead_to_ready_pods,
    settings_are_known,
    slots_are_what_a_pod_serves,
    traces_get_out,
)
from tests.integration.authority import Authority

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
HERE = Path(__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RENDER = FOLDER / "render.sh"
MONITORING = FOLDER / "components/monitoring"

OVERLAYS = ("cpu", "gpu", "kind")
SCALERS = ("autoscaling", "keda")
COMPONENTS = ("monitoring", *SCALERS, "tls", "mtls", "callers", "gateway", "tracing")
# What the others neither need nor touch: each of them alone, and all at once, is enough.
APART = {"callers", "gateway", "tracing"}
# What only works with another one.
NEEDS = {"autoscaling": "monitoring", "keda": "monitoring", "mtls": "tls"}
# The oldest that the README names, the newest that the schemas know, and some between.
VERSIONS = ("1.30", "1.32", "1.34", "1.36", "1.37")
CUSTOM = ("monitoring.coreos.com", "keda.sh", "cert-manager.io", "gateway.networking.k8s.io")
# Of Prometheus itself and of the operator's PodMonitor, not of the server.
THEIRS = {"up"}
THEIR_LABELS = {"namespace", "pod", "job"}


def combinations() -> Iterator[tuple[str, ...]]:
    """What README.md allows: one autoscaler at most, and none without what it needs."""
    for chosen in itertools.product((False, True), repeat=len(COMPONENTS)):
        names = tuple(name for name, wanted in zip(COMPONENTS, chosen, strict=True) if wanted)
        lacking = [name for name in names if NEEDS.get(name, name) not in names]
        apart = APART & set(names)
        if not lacking and not set(SCALERS) <= set(names) and (apart in (set(), APART) or len(names) == 1):
            yield names


# Every one of them with one overlay, and with the others none and as many as there may be: an overlay changes
# the Deployment alone, and a component adds to it what none of them has.
ALL = [(o, c) for o in OVERLAYS for c in combinations() if o == "cpu" or len(c) in (0, len(COMPONENTS) - 1)]


def read_all(text: str) -> Objects:
    # libyaml's loader reads five times as fast as Python's, where it is there.
    return [o for o in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if o]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- without kubectl ---------------------------------------------------------------------------------


def literals(folder: Path) -> dict[str, str]:
    """The settings of a kustomization."""
    maps = read(folder / "kustomization.yaml").get("configMapGenerator", [])
    return dict(pair.split("=", 1) for m in maps for pair in m["literals"])


def unrendered(*components: str) -> Objects:
    """Base and components without kubectl: what their files say, as the overlay `cpu` would have it."""
    objects: Objects = []
    for folder in (FOLDER / "base", *(FOLDER / "components" / name for name in components)):
        for name in read(folder / "kustomization.yaml").get("resources", []):
            objects += read_all((folder / name).read_text(encoding="utf-8"))
    name = "tenuto-settings-0123456789"
    folders = ("base", "overlays/cpu", *(f"components/{name}" for name in components))
    data = {key: value for folder in folders for key, value in literals(FOLDER / folder).items()}
    objects.append({"kind": "ConfigMap", "metadata": {"name": name}, "data": data})
    container = policy.container(objects)
    container["envFrom"][0]["configMapRef"]["name"] = name
    container["image"] += ":0"
    if set(SCALERS) & set(components):
        del policy.deployment(objects)["spec"]["replicas"]
    return objects


def problems(objects: Objects, checks: tuple[Check, ...] = POLICIES) -> list[str]:
    return [f"{check.__name__}: {text}" for check in checks for text in check(objects)]


@pytest.mark.parametrize(
    "components", [("monitoring", "autoscaling", "gateway", "tracing"), ("monitoring", "keda")]
)
def test_the_files_keep_every_policy(components: tuple[str, ...]) -> None:
    """Also where no kubectl is."""
    assert problems(unrendered(*components)) == []


def test_every_file_is_named_by_its_kustomization() -> None:
    """A file that nobody names is in no cluster."""
    for kustomization in FOLDER.rglob("kustomization.yaml"):
        content = read(kustomization)
        named = {*content.get("resources", []), *(p.get("path") for p in content.get("patches", []))}
        files = {p.name for p in kustomization.parent.iterdir()} - {"kustomization.yaml"}
        assert files - {"tests.yaml", "prometheus-adapter.yaml"} == {n for n in named if n and "/" not in n}


def test_overlays_and_components_are_the_ones_tested() -> None:
    """Each is in the README, too."""
    assert {p.name for p in (FOLDER / "overlays").iterdir()} == set(OVERLAYS)
    assert {p.name for p in (FOLDER / "components").iterdir()} == set(COMPONENTS)
    for name in (*OVERLAYS, *COMPONENTS):
        assert f"| `{name}` |" in README


def test_the_files_are_ascii() -> None:
    """kubectl 1.21 breaks off within other characters of a comment that it carries along."""
    assert [str(p) for p in FOLDER.rglob("*.yaml") if not p.read_bytes().isascii()] == []


def test_the_settings_build_a_config() -> None:
    """Of each overlay; and a drain that is not the default would have to change the grace."""
    for overlay in OVERLAYS:
        known = ServerConfig.build({}, literals(FOLDER / "base") | literals(FOLDER / "overlays" / overlay))
        assert known.drain_seconds == ServerConfig().drain_seconds
        assert (known.port, known.metrics_port) == (ServerConfig().port, ServerConfig().metrics_port)


def test_every_setting_that_is_named_exists() -> None:
    """In the README and in comments, too."""
    texts = [README, *(p.read_text(encoding="utf-8") for p in FOLDER.rglob("*.yaml"))]
    named = {name for text in texts for name in re.findall(r"\bTENUTO_[A-Z_]+", text)}
    assert len(named) > 10
    assert named - {variable_of(name) for name in ServerConfig.model_fields} == set()


def test_what_a_service_link_would_set_is_no_setting() -> None:
    """Why enableServiceLinks is false."""
    with pytest.raises(ConfigInvalid, match="TENUTO_PORT"):
        ServerConfig.build({}, {"TENUTO_PORT": "tcp://10.0.0.1:8001"})
    with pytest.raises(ConfigInvalid, match="TENUTO_SERVICE_HOST"):
        ServerConfig.build({}, {"TENUTO_SERVICE_HOST": "10.0.0.1"})


def test_the_tags_are_the_version() -> None:
    """An overlay runs what its checkout is; `kind` what was built last."""
    tags = {o: read(FOLDER / "overlays" / o / "kustomization.yaml")["images"][0]["newTag"] for o in OVERLAYS}
    assert tags == {"cpu": version("tenuto"), "gpu": version("tenuto") + "-cuda", "kind": "dev"}


def test_the_route_leads_to_methods_that_exist_and_to_no_operators_one() -> None:
    """Those that list and end sequences, and load and unload models, stay inside."""
    methods = set(tenuto_pb2.DESCRIPTOR.services_by_name["Tenuto"].methods_by_name)
    (rule,) = read(FOLDER / "components/gateway/route.yaml")["spec"]["rules"]
    routed = {m["method"]["method"] for m in rule["matches"]}
    assert {m["method"]["service"] for m in rule["matches"]} == {"tenuto.v1.Tenuto"}
    inside = {"ListSequences", "EndSequence", "LoadModel", "UnloadModel", "ReloadModel"}
    assert methods - routed == inside
    assert routed < methods


def test_the_certificate_has_the_names_of_both_services() -> None:
    """Short, and in the namespace of the overlays."""
    names = set(read(FOLDER / "components/tls/certificate.yaml")["spec"]["dnsNames"])
    services = [o["metadata"]["name"] for o in policy.of_kind(unrendered(), "Service")]
    tails = ("", ".tenuto", ".tenuto.svc", ".tenuto.svc.cluster.local")
    assert names == {service + tail for service in services for tail in tails}


@pytest.mark.parametrize(
    "deployment, setting, source",
    [
        ("base/deployment.yaml", "TENUTO_TOKEN_KEY_FILE", "=/dev/stdin"),
        ("components/callers/mount.yaml", "TENUTO_CALLERS", ""),
        ("components/mtls/mount.yaml", "TENUTO_TLS_CLIENT_CA", ""),
    ],
)
def test_the_readme_makes_the_secrets_that_the_pods_wait_for(
    deployment: str, setting: str, source: str
) -> None:
    """Under the names at which the server looks."""
    volumes = policy.pod([read(FOLDER / deployment)])["volumes"]
    (name,) = [v["secret"]["secretName"] for v in volumes if "secret" in v]
    file = Path(literals((FOLDER / deployment).parent)[setting]).name
    assert f"create secret generic {name} --from-file={file}{source}\n" in README
    assert name in policy.SECRETS_BY_HAND


def test_the_readmes_callers_are_taken(tmp_path: Path) -> None:
    """The command there writes a file that the server reads, with a token that nobody else has."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (command,) = re.findall(r"^printf .* > callers\.toml$", README, flags=re.MULTILINE)
    texts = []
    for _ in range(2):
        subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, timeout=30)
        texts.append((tmp_path / "callers.toml").read_bytes())
    assert texts[0] != texts[1]
    assert [list(callers.parse(text, "the README's")) for text in texts] == [["alice"], ["alice"]]


def test_no_token_stands_anywhere() -> None:
    """Whoever copies an example would have it."""
    texts = [README, *(p.read_text(encoding="utf-8") for p in FOLDER.rglob("*.yaml"))]
    assert [found for text in texts for found in re.findall(r"[0-9a-fA-F]{32,}", text)] == []


def test_a_file_of_a_patch_has_one_document() -> None:
    """kubectl 1.21 takes no file of two."""
    for kustomization in FOLDER.rglob("kustomization.yaml"):
        for path in (p["path"] for p in read(kustomization).get("patches", []) if "path" in p):
            assert len(read_all((kustomization.parent / path).read_text(encoding="utf-8"))) == 1, path


def test_the_slots_are_what_was_measured() -> None:
    """As docs/capacity.md has it; of a GPU it says that none was at hand, so there it is the default."""
    page = (ROOT / "docs/capacity.md").read_text(encoding="utf-8")
    measured = re.search(r"to 95 % of what the pod serves,\s+(\d+)\s+here", page)
    slots = {o: literals(FOLDER / "overlays" / o)["TENUTO_MAX_SEQUENCES"] for o in OVERLAYS}
    assert measured, "docs/capacity.md does not say what a pod serves"
    assert slots["cpu"] == measured[1]
    assert f"`cpu` has\n{measured[1]} a model" in README
    assert "No GPU was at hand" in page
    assert int(slots["gpu"]) == ServerConfig().max_sequences
    assert f"{ServerConfig().max_sequences:,}, since no GPU was" in README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


# --- a check that looks for a mistake is shown one ---------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """One change of the objects, and what a check has to say of it."""

    check: Check
    says: str
    kind: str  # of the object that is changed, and its name, if it is not the first of that kind
    path: tuple[str | int, ...]
    value: Any = None  # None: taken out

    def make(self, objects: Objects) -> None:
        node: Any = next(o for o in objects if self.kind in (o["kind"], policy.where(o)))
        for key in self.path[:-1]:
            node = node[key]
        if self.value is None:
            del node[self.path[-1]]
        else:
            node[self.path[-1]] = self.value


POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
DOWN = ("spec", "behavior", "scaleDown")
KEDA_DOWN = ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleDown")
NAME = "app.kubernetes.io/name"
D, HPA, KEDA = "Deployment", "HorizontalPodAutoscaler", "ScaledObject"
NET, PDB, SA = "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"
MONITOR = "PodMonitor"
TRACING, OUT = "NetworkPolicy tenuto-tracing", ("spec", "egress", 0)
SPREAD = (*POD, "topologySpreadConstraints", 0)
MISTAKES = [
    Mistake(selectors_find_the_pods, "Service tenuto", "Service", ("spec", "selector", NAME), "tenutto"),
    Mistake(selectors_find_the_pods, PDB, PDB, ("spec", "selector", "matchLabels", NAME), "x"),
    Mistake(selectors_find_the_pods, NET, NET, ("spec", "podSelector", "matchLabels"), {"app": "x"}),
    Mistake(selectors_find_the_pods, NET, NET, ("spec", "podSelector", "matchLabels")),
    Mistake(selectors_find_the_pods, MONITOR, MONITOR, ("spec", "selector", "matchLabels", NAME), "x"),
    Mistake(selectors_find_the_pods, "spread", D, (*SPREAD, "labelSelector", "matchLabels", NAME), "x"),
    Mistake(references_exist, "Deployment tenutto", HPA, ("spec", "scaleTargetRef", "name"), "tenutto"),
    Mistake(references_exist, "Deployment tenutto", KEDA, ("spec", "scaleTargetRef", "name"), "tenutto"),
    Mistake(references_exist, "Service x", "GRPCRoute", ("spec", "rules", 0, "backendRefs", 0, "name"), "x"),
    Mistake(references_exist, "ServiceAccount x", D, (*POD, "serviceAccountName"), "x"),
    Mistake(references_exist, "ServiceAccount default", D, (*POD, "serviceAccountName")),
    Mistake(references_exist, "Secret x", D, (*POD, "volumes", 0, "secret", "secretName"), "x"),
    Mistake(references_exist, "volume tmp", D, (*CONTAINER, "volumeMounts", 1)),
    Mistake(references_exist, "ConfigMap x", D, (*CONTAINER, "envFrom", 0, "configMapRef", "name"), "x"),
    Mistake(ports_agree, "pod: ports", D, (*CONTAINER, "ports", 0, "containerPort"), 9001),
    Mistake(ports_agree, "Service tenuto", "Service", ("spec", "ports", 0, "targetPort"), "metrics"),
    Mistake(ports_agree, MONITOR, MONITOR, ("spec", "podMetricsEndpoints", 0, "port"), "grpc"),
    Mistake(ports_agree, "GRPCRoute", "GRPCRoute", ("spec", "rules", 0, "backendRefs", 0, "port"), 80),
    Mistake(ports_agree, NET, NET, ("spec", "ingress", 0, "ports", 0, "port"), 50051),
    Mistake(ports_agree, "settings", "ConfigMap", ("data", "TENUTO_HOST")),
    Mistake(probes_spare_a_draining_pod, "livenessProbe: asks for 'readiness'", D,
            (*CONTAINER, "livenessProbe", "grpc", "service"), "readiness"),
    Mistake(probes_spare_a_draining_pod, "livenessProbe: asks for None", D,
            (*CONTAINER, "livenessProbe", "grpc", "service")),
    Mistake(probes_spare_a_draining_pod, "livenessProbe: asks for 'tenuto.v1.Tenuto'", D,
            (*CONTAINER, "livenessProbe", "grpc", "service"), "tenuto.v1.Tenuto"),
    Mistake(probes_spare_a_draining_pod, "readinessProbe: asks", D,
            (*CONTAINER, "readinessProbe", "grpc", "service"), "liveness"),
    Mistake(probes_spare_a_draining_pod, "startupProbe: there is none", D, (*CONTAINER, "startupProbe")),
    Mistake(probes_spare_a_draining_pod, "readinessProbe: port", D,
            (*CONTAINER, "readinessProbe", "grpc", "port"), 8002),
    Mistake(probes_are_patient_enough, "startupProbe", D, (*CONTAINER, "startupProbe", "failureThreshold")),
    Mistake(probes_are_patient_enough, "livenessProbe", D,
            (*CONTAINER, "livenessProbe", "failureThreshold"), 3),
    Mistake(probes_are_patient_enough, "progressDeadline", D, ("spec", "progressDeadlineSeconds"), 120),
    Mistake(grace_holds_the_drain, "terminationGrace", D, (*POD, "terminationGracePeriodSeconds"), 35),
    Mistake(grace_holds_the_drain, "terminationGrace", D, (*POD, "terminationGracePeriodSeconds")),
    Mistake(grace_holds_the_drain, "terminationGrace", "ConfigMap", ("data", "TENUTO_DRAIN_SECONDS"), "60"),
    Mistake(grace_holds_the_drain, "terminationGrace", D,
            (*CONTAINER, "lifecycle", "preStop", "sleep", "seconds"), 15),
    Mistake(grace_holds_the_drain, "preStop", D, (*CONTAINER, "lifecycle")),
    *(Mistake(restricted, name, D, (*POD, "securityContext", name))
      for name in ("runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile")),
    *(Mistake(restricted, name, D, (*CONTAINER, "securityContext", name))
      for name in ("allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities")),
    Mistake(restricted, "capabilities", D,
            (*CONTAINER, "securityContext", "capabilities", "add"), ["NET_ADMIN"]),
    Mistake(restricted, "privileged", D, (*CONTAINER, "securityContext", "privileged"), True),
    Mistake(restricted, "hostNetwork", D, (*POD, "hostNetwork"), True),
    Mistake(restricted, "/tmp", D, (*POD, "volumes", 1, "emptyDir", "sizeLimit")),
    Mistake(restricted, "hostPath", D, (*POD, "volumes", 1, "hostPath"), {"path": "/"}),
    Mistake(no_rights_in_the_cluster, "pod", D, (*POD, "automountServiceAccountToken")),
    Mistake(no_rights_in_the_cluster, SA, SA, ("automountServiceAccountToken",), True),
    Mistake(no_rights_in_the_cluster, "gives rights", "Service", ("kind",), "RoleBinding"),
    Mistake(no_service_links, "enableServiceLinks", D, (*POD, "enableServiceLinks")),
    Mistake(secrets_arrive_anew, "subPath", D, (*CONTAINER, "volumeMounts", 0, "subPath"), "keys"),
    Mistake(secrets_arrive_anew, "readOnly", D, (*CONTAINER, "volumeMounts", 0, "readOnly")),
    Mistake(secrets_arrive_anew, "everybody", D, (*POD, "volumes", 0, "secret", "defaultMode")),
    Mistake(secrets_arrive_anew, "is in the objects", "ConfigMap", ("kind",), "Secret"),
    Mistake(secrets_arrive_anew, "TOKEN_KEY_FILE", "ConfigMap", ("data", "TENUTO_TOKEN_KEY_FILE")),
    *(Mistake(secrets_arrive_anew, f"{name} is /elsewhere/x, in no secret's folder", "ConfigMap",
              ("data", name), "/elsewhere/x")
      for name in ("TENUTO_TLS_CERT", "TENUTO_TLS_KEY", "TENUTO_TLS_CLIENT_CA", "TENUTO_CALLERS")),
    Mistake(secrets_arrive_anew, "KEY: a secret in a variable", D, (*CONTAINER, "env"),
            [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]),
    Mistake(settings_are_known, "TENUTO_DRAIN", "ConfigMap", ("data", "TENUTO_DRAIN"), "30"),
    Mistake(settings_are_known, "TENUTO_DRAIN_SECONDS", "ConfigMap", ("data", "TENUTO_DRAIN_SECONDS"), "30s"),
    Mistake(settings_are_known, "or --insecure", "ConfigMap", ("data", "TENUTO_INSECURE")),
    Mistake(settings_are_known, "needs --tls-cert", "ConfigMap",
            ("data", "TENUTO_TLS_CLIENT_CA"), "/client-ca/ca.crt"),
    Mistake(settings_are_known, "no models", "ConfigMap", ("data", "TENUTO_REPOSITORY"), "/data"),
    Mistake(settings_are_known, "hash", "ConfigMap", ("metadata", "name"), "tenuto-settings"),
    Mistake(resources_are_obeyed, "not whole", D, (*CONTAINER, "resources", "limits", "cpu"), "1500m"),
    Mistake(resources_are_obeyed, "limit of cpu", D, (*CONTAINER, "resources", "limits", "cpu")),
    Mistake(resources_are_obeyed, "request of memory", D, (*CONTAINER, "resources", "requests", "memory")),
    Mistake(resources_are_obeyed, "fill 1Gi", D, (*CONTAINER, "resources", "limits", "memory"), "1Gi"),
    Mistake(resources_are_obeyed, "fill 2Gi", "ConfigMap", ("data", "TENUTO_VET_MEMORY_BYTES")),
    Mistake(resources_are_obeyed, "4 threads", "ConfigMap", ("data", "TENUTO_THREADS"), "4"),
    Mistake(resources_are_obeyed, "differs", D, (*CONTAINER, "resources", "limits", GPU), "1"),
    Mistake(gpus_are_asked_for, "TENUTO_DEVICE without", "ConfigMap", ("data", "TENUTO_DEVICE"), "cuda"),
    Mistake(gpus_are_asked_for, "runtimeClassName without", D, (*POD, "runtimeClassName"), "nvidia"),
    Mistake(disruptions_come_one_by_one, PDB, PDB, ("spec", "maxUnavailable"), "50%"),
    Mistake(disruptions_come_one_by_one, PDB, PDB, ("spec", "minAvailable"), 1),
    Mistake(disruptions_come_one_by_one, "there are 0", PDB, ("kind",), "Other"),
    Mistake(disruptions_come_one_by_one, "upgrade", D,
            ("spec", "strategy", "rollingUpdate", "maxSurge"), "25%"),
    Mistake(pods_are_spread, "hostname", D, SPREAD),
    Mistake(pods_are_spread, "version that leaves", D, (*SPREAD, "matchLabelKeys")),
    Mistake(images_have_a_tag, "tenuto", D, (*CONTAINER, "image"), "registry:5000/tenuto"),
    Mistake(images_have_a_tag, "latest", D, (*CONTAINER, "image"), "tenuto:latest"),
    Mistake(network_is_shut, "everybody to [8001]", NET, ("spec", "ingress", 0, "from")),
    Mistake(network_is_shut, "everybody", NET, ("spec", "ingress", 0, "from", 1, "namespaceSelector"), {}),
    Mistake(network_is_shut, "one rule a port", NET, ("spec", "ingress", 0, "ports")),
    Mistake(network_is_shut, "nobody gets to 8002", NET, ("spec", "ingress", 1)),
    Mistake(network_is_shut, "metrics", NET, ("spec", "ingress", 1, "from", 0),
            {"podSelector": {"matchLabels": {"a": "b"}}}),
    Mistake(network_is_shut, "lets out", NET, ("spec", "egress", 0, "ports", 0, "port"), 443),
    Mistake(network_is_shut, "lets out", NET, ("spec", "egress", 0, "to")),
    Mistake(network_is_shut, "lets out", TRACING, (*OUT, "to")),
    Mistake(network_is_shut, "lets out", TRACING, (*OUT, "to"), [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
    Mistake(network_is_shut, "lets out", TRACING, (*OUT, "to", 0), {"podSelector": {}}),
    Mistake(network_is_shut, "lets out", TRACING, (*OUT, "ports")),
    Mistake(network_is_shut, "lets out", "ConfigMap", ("data", "TENUTO_OTLP_ENDPOINT")),
    Mistake(traces_get_out, "no NetworkPolicy", TRACING, ("spec", "egress")),
    Mistake(traces_get_out, "no NetworkPolicy", TRACING, (*OUT, "ports", 0, "port"), 4317),
    Mistake(traces_get_out, "no NetworkPolicy", TRACING,
            (*OUT, "to", 0, "namespaceSelector", "matchLabels", "kubernetes.io/metadata.name"), "x"),
    *(Mistake(traces_get_out, says, "ConfigMap", ("data", "TENUTO_OTLP_ENDPOINT"), endpoint)
      for says, endpoint in (("no NetworkPolicy", "http://otel-collector.elsewhere.svc:4318/v1/traces"),
                             ("no NetworkPolicy", "http://otel-collector.observability.svc/v1/traces"),
                             ("no NetworkPolicy", "https://traces.example.com:4318/v1/traces"),
                             ("/v1/traces", "http://otel-collector.observability.svc:4318"))),
    Mistake(services_lead_to_ready_pods, "headless", "Service", ("spec", "clusterIP"), "None"),
    Mistake(services_lead_to_ready_pods, "not ready", "Service", ("spec", "publishNotReadyAddresses"), True),
    Mistake(services_lead_to_ready_pods, "h2c", "Service", ("spec", "ports", 0, "appProtocol")),
    *(Mistake(scaling_down_is_slow, says, kind, (*path, *key), value)
      for kind, path in ((HPA, DOWN), (KEDA, KEDA_DOWN))
      for says, key, value in (("one pod", ("policies", 0, "value"), 2),
                               ("one pod", ("policies",), None),
                               ("may still drain", ("policies", 0, "periodSeconds"), 30),
                               ("without waiting", ("stabilizationWindowSeconds",), 0))),
    Mistake(scaling_down_is_slow, "another pod", HPA, ("spec", "minReplicas"), 1),
    Mistake(scaling_down_is_slow, "another pod", KEDA, ("spec", "minReplicaCount"), 0),
    Mistake(scaling_down_is_slow, "has replicas", D, ("spec", "replicas"), 2),
    Mistake(scaling_ignores_draining_pods, "counts pods that drain", "PrometheusRule",
            ("spec", "groups", 0, "rules", 0, "expr"), "tenuto_sequence_slots_used"),
    Mistake(scaling_ignores_draining_pods, "nothing records", "PrometheusRule", ("kind",), "Other"),
    Mistake(scaling_ignores_draining_pods, "asks for nothing", KEDA,
            ("spec", "triggers", 0, "metadata", "query"), 'sum(tenuto_slots{namespace="tenuto"})'),
    Mistake(scaling_ignores_draining_pods, "another namespace", KEDA,
            ("spec", "triggers", 0, "metadata", "query"), "sum(pod:tenuto_slots_used:ratio)"),
    Mistake(scaling_ignores_draining_pods, "no answer", KEDA,
            ("spec", "triggers", 0, "metadata", "ignoreNullValues")),
    *(Mistake(new_pods_get_a_share, f"{kind} tenuto: {says}", kind, path, value)
      for kind, path, says, value in (
          (HPA, ("spec", "metrics", 0), "does not go by slots", None),
          (HPA, ("spec", "metrics", 0, "pods", "target", "averageValue"), "TENUTO_REBALANCE_ABOVE", "750m"),
          (KEDA, ("spec", "triggers", 0), "does not go by slots", None),
          (KEDA, ("spec", "triggers", 0, "metadata", "threshold"), "TENUTO_REBALANCE_ABOVE", "0.8"))),
    *(Mistake(new_pods_get_a_share, says, "ConfigMap", ("data", "TENUTO_REBALANCE_ABOVE"), value)
      for says, value in (("stays empty", None), ("stays empty", "0"), ("aims at", "0.6"), ("aims at", "0.5"),
                          ("refused already", "0.9"))),
    Mistake(slots_are_what_a_pod_serves, HPA, "ConfigMap", ("data", "TENUTO_MAX_SEQUENCES")),
    Mistake(one_namespace, "elsewhere", "Service", ("metadata", "namespace"), "elsewhere"),
]  # fmt: skip


def _id(mistake: Mistake) -> str:
    path = ".".join(map(str, mistake.path[-2:]))
    return f"{mistake.check.__name__}-{mistake.kind}-{path}-{mistake.value}"


@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{n}-{_id(m)}" for n, m in enumerate(MISTAKES)])
def test_a_mistake_is_named_by_its_check(mistake: Mistake) -> None:
    """One change, and the check that is for it says where."""
    scaler = "keda" if mistake.kind == KEDA or mistake.path[:2] == ("spec", "triggers") else "autoscaling"
    objects = unrendered("monitoring", scaler, "gateway", "tracing")
    assert list(mistake.check(objects)) == []
    mistake.make(objects)
    said = list(mistake.check(objects))
    assert [text for text in said if mistake.says in text], said


def test_two_autoscalers_are_named() -> None:
    """Rendering both fails already: the second finds no replicas to take out."""
    said = list(policy.scaling_down_is_slow(unrendered("monitoring", "autoscaling", "keda")))
    assert said == ["autoscalers: more than one of one Deployment"]


def test_every_check_is_shown_a_mistake() -> None:
    """A check that nobody saw fail may be unable to."""
    assert {m.check for m in MISTAKES} == set(POLICIES)


# --- rendered ----------------------------------------------------------------------------------------


def run_render(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RENDER), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=30,
        check=False,
    )


@functools.cache
def _rendered(overlay: str, components: tuple[str, ...]) -> Objects:
    """What kubectl makes of an overlay with components, in a kustomization like that of the README."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()

        def path(*parts: str) -> str:
            return os.path.relpath(FOLDER.joinpath(*parts), folder)

        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "tenuto",
            "resources": [path("overlays", overlay)],
            "components": [path("components", c) for c in components],
        }
        (folder / "kustomization.yaml").write_text(json.dumps(content))
        done = run_render(folder)
    assert done.returncode == 0, done.stderr
    return read_all(done.stdout)


Render = Callable[[str, tuple[str, ...]], Objects]


@pytest.fixture(scope="module")
def render() -> Render:
    """Renders, or skips with the text of render.sh where kubectl is missing or too old."""
    done = run_render(FOLDER / "base")
    if "kubectl kustomize 1.21 or newer is needed" in done.stderr:
        pytest.skip(done.stderr.strip())
    return _rendered


@pytest.mark.parametrize("text, says", [("v1.20.2", "is 1.20;"), ("v0.99.0", "is 0.99;"), ("", "no version")])
def test_an_old_kubectl_fails_with_that_text(tmp_path: Path, text: str, says: str) -> None:
    """Its own would be about a field `components` that it does not know."""
    old = tmp_path / "kubectl"
    old.write_text(f'#!/bin/sh\necho \'{{"clientVersion": {{"gitVersion": "{text}"}}}}\'\n')
    old.chmod(0o755)
    done = run_render(FOLDER / "overlays/cpu", KUBECTL=str(old))
    assert done.returncode == 1
    assert "KUBECTL_OLD: kubectl kustomize 1.21 or newer is needed" in done.stderr
    assert says in done.stderr


def test_a_missing_kubectl_fails_with_that_text(tmp_path: Path) -> None:
    """It says what to do."""
    done = run_render(FOLDER / "overlays/cpu", KUBECTL=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "KUBECTL_MISSING: kubectl kustomize 1.21 or newer is needed" in done.stderr
    assert "KUBECTL=" in done.stderr


@pytest.mark.parametrize("text", ["v1.21.0", "v1.32.4-dispatcher", "v2.0.0"])
def test_a_newer_kubectl_renders(tmp_path: Path, text: str) -> None:
    """With the folder that was named."""
    new = tmp_path / "kubectl"
    new.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = kustomize ]; then echo "rendered $2"; exit; fi\n'
        f'echo \'{{"clientVersion": {{"gitVersion": "{text}"}}}}\'\n'
    )
    new.chmod(0o755)
    assert run_render(tmp_path, KUBECTL=str(new)).stdout == f"rendered {tmp_path}\n"


@pytest.mark.timeout(300)  # 33 runs of kubectl, beside whatever else the machine does
def test_every_combination_keeps_every_policy(render: Render) -> None:
    """Each overlay, and each set of components that the README allows."""
    assert len(ALL) == 33
    found = {f"{o} {' '.join(c)}": problems(render(o, c)) for o, c in ALL}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_both_autoscalers_at_once_do_not_render(render: Render) -> None:
    """An error is better than two that pull at one Deployment."""
    with pytest.raises(AssertionError, match="replicas"):
        render("cpu", ("monitoring", *SCALERS))


def test_the_readmes_kustomization_renders(render: Render, tmp_path: Path) -> None:
    """As it stands there, at the place that it names; its settings are in what comes out."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    folder = os.path.relpath(FOLDER, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(block.replace("../tenuto/deploy/kubernetes", folder))
    done = run_render(tmp_path)
    assert done.returncode == 0, done.stderr
    objects = read_all(done.stdout)
    assert problems(objects) == []
    assert policy.settings(objects)["TENUTO_MAX_SEQUENCES"] == "300"


def test_a_changed_setting_rolls_the_pods(render: Render) -> None:
    """The ConfigMap's name is another one, and the pods name it."""
    names = set()
    for overlay in OVERLAYS:
        objects = render(overlay, ())
        (made,) = policy.of_kind(objects, "ConfigMap")
        assert policy.settings(objects) == made["data"]
        names.add(made["metadata"]["name"])
    assert len(names) == len(OVERLAYS)


def is_custom(o: Object) -> bool:
    return str(o["apiVersion"]).partition("/")[0] in CUSTOM


@functools.cache
def different_objects(render: Render) -> Objects:
    """Each object that any combination has, once. Nobody changes them."""
    texts = {json.dumps(o, sort_keys=True): o for overlay, names in ALL for o in render(overlay, names)}
    return list(texts.values())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_objects_are_valid_in_that_version(render: Render, kubernetes: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    validator: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate of PyPI")
    objects = [o for o in different_objects(render) if not is_custom(o)]
    assert len({o["kind"] for o in objects}) == 7
    for o in objects:
        validator.validate(o, kubernetes, strict=True)


@pytest.mark.parametrize("kubernetes", VERSIONS)
@pytest.mark.parametrize(
    "path, value", [(("spec", "replica"), 2), ((*POD, "terminationGracePeriodSeconds"), "45 s")]
)
def test_an_invalid_object_is_refused(kubernetes: str, path: tuple[str, ...], value: Any) -> None:
    """An unknown field, and a wrong type."""
    validator: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate of PyPI")
    objects = unrendered()
    Mistake(restricted, "", D, path, value).make(objects)
    with pytest.raises(validator.ValidationError):
        validator.validate(policy.deployment(objects), kubernetes, strict=True)


def test_older_versions_than_the_readme_names_do_not_know_the_sleep() -> None:
    """1.29 knows it behind a switch; 1.28 does not."""
    validator: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate of PyPI")
    assert f"Kubernetes {VERSIONS[0]} or newer" in README
    with pytest.raises(validator.ValidationError, match="sleep"):
        validator.validate(policy.deployment(unrendered()), "1.28", strict=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with custom_resources.mjs and the packages that it needs."""
    if not (npm := shutil.which("npm")) or not shutil.which("node"):
        pytest.skip("needs node and npm for the models of custom resources")
    folder = tmp_path_factory.mktemp("models")
    for name in ("package.json", "package-lock.json", "custom_resources.mjs"):
        shutil.copy(HERE / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("needs @kubernetes-models/*: npm gets no answer")
    if done.returncode:
        pytest.skip(f"needs @kubernetes-models/*: {' '.join(done.stderr.split())[:300]}")
    return folder


def problems_of_models(models: Path, objects: Objects) -> list[list[str]]:
    done = subprocess.run(
        ["node", "custom_resources.mjs"],
        cwd=models,
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [list(map(str, texts)) for texts in json.loads(done.stdout)]


@pytest.mark.timeout(300)  # npm fetches
def test_custom_resources_are_valid(render: Render, models: Path) -> None:
    """Their values, and every name in them."""
    objects = [o for o in different_objects(render) if is_custom(o)]
    assert {o["kind"] for o in objects} == {
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "Certificate",
        "GRPCRoute",
    }
    assert problems_of_models(models, objects) == [[]] * len(objects)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind, path, value, says",
    [
        ("ScaledObject", ("spec", "minReplicas"), 2, "unknown: /spec/minReplicas"),
        ("ScaledObject", ("spec", "minReplicaCount"), "2", "minReplicaCount must be integer"),
        ("ScaledObject", ("spec", "scaleTargetRef"), None, "scaleTargetRef"),
        ("GRPCRoute", ("spec", "rules", 0, "timeouts"), {"request": "0s"}, "unknown: /spec/rules/0/timeouts"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "intervall"), "15s", "endpoints/0/intervall"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "records"), "x", "rules/0/records"),
        ("Certificate", ("spec", "secretName"), None, "secretName"),
    ],
)
def test_an_invalid_custom_resource_is_refused(
    models: Path, kind: str, path: tuple[str | int, ...], value: Any, says: str
) -> None:
    """Unknown names too, which the cluster would drop in silence."""
    objects = unrendered("monitoring", "keda", "tls", "gateway")
    Mistake(restricted, "", kind, path, value).make(objects)
    ((*said,),) = problems_of_models(models, policy.of_kind(objects, kind))
    assert [text for text in said if says.lower() in text.lower()], said


# --- names that the server knows ---------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    port: int
    metrics: str


@contextmanager
def started(folder: Path, *components: str, **changes: object) -> Iterator[Running]:
    """`tenuto serve` with the settings of the ConfigMap, on its address as well, since a server refuses some
    settings on some addresses; but on free ports, and with other folders."""
    toys.write(folder, "accumulator", toys.accumulator())
    (folder / "keys").write_text("0" * 64)
    ours = {
        "TENUTO_REPOSITORY": str(folder),
        "TENUTO_TOKEN_KEY_FILE": str(folder / "keys"),
        "TENUTO_PORT": "0",
        "TENUTO_METRICS_PORT": "0",
        **{variable_of(name): str(value) for name, value in changes.items()},
    }
    settings = policy.settings(unrendered(*components))
    assert settings.keys() >= ours.keys()
    command = [sys.executable, "-m", "tenuto.serving.cli"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings | ours, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serving on \S+:(\d+), metrics on http://\S+:(\d+)/metrics", line)
            assert found, f"instead of the ready line came {line!r}"
            yield Running(int(found[1]), f"http://127.0.0.1:{found[2]}/metrics")
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_the_probes_ask_for_names_that_the_server_answers(server: Running) -> None:
    """Started with the settings of the ConfigMap, it is SERVING under each."""
    container = policy.container(unrendered())
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            name = container[probe]["grpc"]["service"]
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):  # a name with a typing error is no answer at all
            stub.Check(health_pb2.HealthCheckRequest(service="livenes"), timeout=30)


def test_the_probes_of_tls_need_neither_token_nor_certificate(tmp_path: Path) -> None:
    """With `tls`, `mtls` and `callers` together; whoever is no probe needs both."""
    ours, clients = Authority("ours"), Authority("clients")
    certificate, key = ours.sign().write(tmp_path)
    (tmp_path / "callers.toml").write_text('[alice]\ntokens = ["' + "a" * 32 + '"]\n')
    files = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": clients.write(tmp_path)}
    files |= {"callers": tmp_path / "callers.toml"}
    own = clients.sign("alice")
    with started(tmp_path, "tls", "mtls", "callers", **files) as server:
        container = policy.container([read(FOLDER / "components/tls/mount.yaml")])
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            url = server.metrics.replace("/metrics", container[probe]["httpGet"]["path"])
            with urlopen(url, timeout=30) as answer:
                assert answer.status == 200
        where = f"127.0.0.1:{server.port}"
        shown = grpc.ssl_channel_credentials(ours.pem, own.key, own.chain)
        with Client(where, token="a" * 32, credentials=shown) as client:
            assert [model.name for model in client.models()] == ["accumulator"]
        with Client(where, credentials=shown) as client, pytest.raises(Refused, match="no token"):
            client.models()
        showing_none = grpc.ssl_channel_credentials(ours.pem)
        with Client(where, token="a" * 32, credentials=showing_none) as client, pytest.raises(Unavailable):
            client.models()


def test_spans_go_to_the_path_of_the_collector(tmp_path: Path) -> None:
    """Of the setting in `tracing`, at another host."""
    pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
    endpoint = urlsplit(literals(FOLDER / "components/tracing")["TENUTO_OTLP_ENDPOINT"])
    with Collector() as collector:
        here = endpoint._replace(netloc=f"127.0.0.1:{collector.port}").geturl()
        with (
            started(tmp_path, "tracing", otlp_endpoint=here) as server,
            Client(f"127.0.0.1:{server.port}") as client,
            client.stream("accumulator") as stream,
        ):
            stream.send(np.ones(1, np.float32))
            next(stream)
        export = collector.next()
    assert export.path == "/v1/traces"
    assert b"tenuto.v1.Tenuto/Stream" in export.body


def scrape(server: Running) -> set[str]:
    """The names of the samples that a rule may ask for."""
    with urlopen(server.metrics, timeout=30) as response:
        text = response.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)", text, flags=re.MULTILINE))
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in kinds.items() for part in parts.get(kind, ("",))}


_NAME = re.compile(r"\b(?:pod|namespace):[\w:]+|\b(?:tenuto|process)_\w+|\bup\b")
_SELECTOR = re.compile(r"\b((?:tenuto|process)_\w+|up)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~?|!=|!~)\s*"([^"]*)"')


def rules() -> list[Object]:
    return [r for g in read(MONITORING / "rules.yaml")["spec"]["groups"] for r in g["rules"]]


def expressions() -> list[str]:
    """Every query in the folder."""
    triggers = read(FOLDER / "components/keda/scaled-object.yaml")["spec"]["triggers"]
    adapter = read(FOLDER / "components/autoscaling/prometheus-adapter.yaml")["rules"]
    return [
        *(r["expr"] for r in rules()),
        *(t["metadata"]["query"] for t in triggers),
        *(r["seriesQuery"] for r in adapter),
    ]


def test_every_metric_in_a_rule_is_exported(server: Running) -> None:
    """By a server that runs; or recorded by a rule."""
    named = {name for text in expressions() for name in _NAME.findall(text)}
    records = {r["record"] for r in rules() if "record" in r}
    assert len(named) > 15
    assert named - scrape(server) - records == THEIRS
    assert "tenuto_no_such_metric" not in scrape(server)


def collected() -> dict[str, Metric]:
    """Every family, with a sample of each label."""
    model = ModelMetrics("m", 1, "p")
    for counter in (model.chunks, model.ended, model.rejected):
        counter["x"] = 1
    server = ServerMetrics("0", models=[model])
    server.loads["m", "failed"] = 1
    return {s.name: family for family in TenutoCollector(server).collect() for s in family.samples}


def test_every_label_in_a_rule_is_one_that_the_metric_has() -> None:
    """A matcher of a label that is not there selects nothing, or everything."""
    families = collected()
    seen = set()
    for text in expressions():
        for name, matchers in _SELECTOR.findall(text):
            samples = [s for f in families.values() for s in f.samples if s.name == name]
            labels = {label for s in samples for label in s.labels} | THEIR_LABELS
            for label, _, _ in _MATCHER.findall(matchers):
                assert label in labels, f"{name} has no label {label}"
                seen.add(label)
    assert seen >= {"stage", "le", "reason", "result"}


def test_every_value_in_a_rule_is_one_that_the_server_writes() -> None:
    """Reasons, stages, outcomes, results and the bucket of the objective."""
    buckets = {
        s.labels["le"] for s in collected()["tenuto_chunk_latency_seconds_bucket"].samples if "le" in s.labels
    }
    reasons = {c.reason for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TenutoError)}
    known = {
        "reason": reasons | {e.name for e in Ending},
        "result": reasons | {"resumed", "loaded", "failed"},
        "outcome": {"answered", "dropped", "failed"},
        "stage": set(STAGES),
        "le": buckets,
    }
    for text in expressions():
        for label, _, value in _MATCHER.findall(text):
            if label in known:
                assert set(value.split("|")) <= known[label], f"{label} is never {value}"


def test_the_autoscaler_asks_for_what_the_adapter_serves() -> None:
    """Under the names that the adapter gives to series which are recorded, by pod and namespace."""
    adapter = read(FOLDER / "components/autoscaling/prometheus-adapter.yaml")["rules"]
    metrics = read(FOLDER / "components/autoscaling/autoscaler.yaml")["spec"]["metrics"]
    assert {m["pods"]["metric"]["name"] for m in metrics} == {r["name"]["as"] for r in adapter}
    recorded = {r["record"]: r["expr"] for r in rules() if "record" in r}
    for rule in adapter:
        series = rule["seriesQuery"].partition("{")[0]
        assert "max by (namespace, pod)" in recorded[series]
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_both_autoscalers_want_the_same() -> None:
    """Limits, targets and the way down, in each one's own words."""
    hpa = read(FOLDER / "components/autoscaling/autoscaler.yaml")["spec"]
    keda = read(FOLDER / "components/keda/scaled-object.yaml")["spec"]
    assert literals(FOLDER / "components/autoscaling") == literals(FOLDER / "components/keda")
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (keda["minReplicaCount"], keda["maxReplicaCount"])
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    targets = [policy.quantity(m["pods"]["target"]["averageValue"]) for m in hpa["metrics"]]
    assert targets == [policy.quantity(t["metadata"]["threshold"]) for t in keda["triggers"]]


# --- the rules, by promtool --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    return found


def run_promtool(promtool: str, folder: Path, spec: Object) -> subprocess.CompletedProcess[str]:
    """Checks the rules, and runs tests.yaml on them."""
    spec = copy.deepcopy(spec)
    for rule in (r for g in spec["groups"] for r in g["rules"] if "annotations" in r):
        del rule["annotations"]["description"]  # fixed text; tests.yaml says why
    (folder / "groups.yaml").write_text(yaml.safe_dump(spec))
    shutil.copy(MONITORING / "tests.yaml", folder)
    for arguments in (["check", "rules", "groups.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=folder, capture_output=True, text=True, timeout=50, check=False
        )
        if done.returncode:
            break
    return done


ALERTS = [r["alert"] for r in rules() if "alert" in r]
RECORDS = [r["record"] for r in rules() if "record" in r]


def test_the_rules_do_what_their_tests_say(promtool: str, tmp_path: Path) -> None:
    """Each alert fires, and is silent, when it should."""
    done = run_promtool(promtool, tmp_path, read(MONITORING / "rules.yaml")["spec"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire_and_to_be_silent() -> None:
    """In tests.yaml; and each has a severity, and texts that say what and what to do."""
    cases = [c for t in read(MONITORING / "tests.yaml")["tests"] for c in t.get("alert_rule_test", [])]
    assert {c["alertname"] for c in cases if c["exp_alerts"]} == set(ALERTS)
    assert {c["alertname"] for c in cases if not c["exp_alerts"]} == set(ALERTS)
    for rule in (r for r in rules() if "alert" in r):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("broken", ["vector(0) > 1", "vector(1)"])
def test_an_alert_that_never_or_always_fires_fails_its_test(
    promtool: str, tmp_path: Path, broken: str
) -> None:
    """Each of them, by name."""
    spec = read(MONITORING / "rules.yaml")["spec"]
    for rule in (r for g in spec["groups"] for r in g["rules"] if "alert" in r):
        rule["expr"] = broken
    done = run_promtool(promtool, tmp_path, spec)
    assert done.returncode != 0
    assert set(re.findall(r"alertname: (\w+)", done.stdout + done.stderr)) == set(ALERTS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_something_else_fails_a_test(promtool: str, tmp_path: Path, name: str) -> None:
    """Its own, or that of an alert which uses it."""
    spec = read(MONITORING / "rules.yaml")["spec"]
    (rule,) = [r for g in spec["groups"] for r in g["rules"] if r.get("record") == name]
    rule["expr"] = "vector(0)"
    done = run_promtool(promtool, tmp_path, spec)
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "part, other",
    [
        ("tenuto_draining == 1", "tenuto_draining == 2"),
        ("tenuto_model_retiring == 1", "tenuto_model_retiring == 2"),
        ("(tenuto_sequence_slots > 0)", "tenuto_sequence_slots"),
        ('{stage="queue"}[1m])) == 0', '{stage="queue"}[1m])) >= 0'),
        ("(tenuto_pending_chunks[1m]) > 0", "(tenuto_pending_chunks[1m]) >= 0"),
        ("(tenuto_engine_busy_ratio[1m]) > 0.95", "(tenuto_engine_busy_ratio[1m]) >= 0"),
    ],
)
def test_what_a_record_leaves_out_is_tested(promtool: str, tmp_path: Path, part: str, other: str) -> None:
    """Pods that drain, versions that retire, models without slots; and, as standing still, engines that take
    chunks, have none, or wait for a caller to read."""
    text = (MONITORING / "rules.yaml").read_text(encoding="utf-8")
    assert part in text
    done = run_promtool(promtool, tmp_path, yaml.safe_load(text.replace(part, other))["spec"])
    assert done.returncode != 0


@pytest.mark.parametrize("name", policy.SECRET_FILES)
def test_a_file_in_no_secrets_folder_is_found(render: Render, name: str) -> None:
    """Each that the server reads, with all components that have one."""
    objects = copy.deepcopy(render("cpu", ("tls", "mtls", "callers")))
    assert problems(objects) == []
    file = Path(policy.settings(objects)[variable_of(name)])
    mounts = policy.container(objects)["volumeMounts"]
    mounts.remove(next(m for m in mounts if m["mountPath"] == str(file.parent)))
    said = problems(objects)
    assert f"secrets_arrive_anew: settings: {variable_of(name)} is {file}, in no secret's folder" in said


@pytest.mark.parametrize("volume", ["tls", "client-ca", "callers", "token-keys"])
@pytest.mark.parametrize(
    "key, value, says",
    [("subPath", "x", "a subPath does not change"), ("readOnly", False, "is not readOnly")],
)
def test_a_secret_that_would_not_arrive_anew_is_found(
    render: Render, volume: str, key: str, value: object, says: str
) -> None:
    objects = copy.deepcopy(render("cpu", ("tls", "mtls", "callers")))
    mount = next(m for m in policy.container(objects)["volumeMounts"] if m["name"] == volume)
    mount[key] = value
    assert f"secrets_arrive_anew: {mount['mountPath']}: {says}" in "\n".join(problems(objects))


def test_mutual_tls_alone_is_no_server_that_starts(render: Render) -> None:
    """It goes on top of `tls`."""
    assert [text for text in problems(render("cpu", ("mtls",))) if "--tls-client-ca needs --tls-cert" in text]


@pytest.mark.parametrize(
    "path, value, says",
    [
        (("livenessProbe", "httpGet", "path"), "/readyz", "livenessProbe: asks for '/readyz' instead"),
        (("readinessProbe", "httpGet", "path"), "/livez", "readinessProbe: asks for '/livez' instead"),
        (("startupProbe", "httpGet", "port"), "grpc", "startupProbe: port grpc is not"),
        (("livenessProbe", "grpc"), {"port": 8001}, "livenessProbe: asks by gRPC"),
        (("livenessProbe",), None, "livenessProbe: asks by gRPC"),
    ],
)
def test_a_probe_that_would_never_find_an_encrypted_pod_is_found(
    render: Render, path: tuple[str, ...], value: Any, says: str
) -> None:
    objects = copy.deepcopy(render("cpu", ("tls",)))
    assert problems(objects) == []
    Mistake(probes_spare_a_draining_pod, "", D, (*CONTAINER, *path), value).make(objects)
    assert [text for text in problems(objects) if says in text]


def test_with_tls_settings_and_services_say_so(render: Render) -> None:
    objects = copy.deepcopy(render("cpu", ("tls",)))
    settings = policy.settings(objects)
    assert settings["TENUTO_TLS_CERT"] == "/tls/tls.crt"
    assert settings["TENUTO_INSECURE"] == "false"
    policy.config(objects).check_encryption()
    Mistake(
        services_lead_to_ready_pods, "", "Service", ("spec", "ports", 0, "appProtocol"), "kubernetes.io/h2c"
    ).make(objects)
    assert [text for text in problems(objects) if "does not say that it is https" in text]
