"""What must hold of the objects in deploy/kubernetes beyond their schemas.

A check takes the objects of one rendering and yields what is wrong as texts, nothing if all is well. What is
a fact of the server (ports, names, seconds) comes from its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from tenuto.serving.config import ServerConfig, variable_of
from tenuto.serving.errors import ConfigInvalid
from tenuto.serving.server import LIVENESS, READINESS

Object = dict[str, Any]
Objects = list[Object]
Check = Callable[[Objects], Iterator[str]]

# What the end takes beyond the drain: threads that are joined, and the last replies (serving/server.py).
END_SECONDS = 5
# Secrets that somebody makes by hand.
SECRETS_BY_HAND = {"tenuto-token-keys", "tenuto-callers", "tenuto-client-ca"}
# Settings that name a file of a secret.
SECRET_FILES = ("token_key_file", "tls_cert", "tls_key", "tls_client_ca", "callers")
GPU = "nvidia.com/gpu"
NOT_DRAINING = "unless on (namespace, pod) tenuto_draining == 1"
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
# What an autoscaler's figure of slots in use has in its name.
SLOTS_USED = "slots_used"
_UNITS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{f"{k}i": Decimal(1024**n) for n, k in enumerate("KMG", 1)},
}


def of_kind(objects: Objects, *kinds: str) -> Objects:
    return [o for o in objects if o["kind"] in kinds]


def where(o: Object) -> str:
    return f"{o['kind']} {o['metadata']['name']}"


def deployment(objects: Objects) -> Object:
    (found,) = of_kind(objects, "Deployment")
    return found


def pod(objects: Objects) -> Object:
    """The pod's spec."""
    spec: Object = deployment(objects)["spec"]["template"]["spec"]
    return spec


def container(objects: Objects) -> Object:
    (found,) = pod(objects)["containers"]
    assert isinstance(found, dict)
    return found


def settings(objects: Objects) -> dict[str, str]:
    """The variables that the server gets, from the ConfigMaps that it names."""
    maps = {o["metadata"]["name"]: o["data"] for o in of_kind(objects, "ConfigMap")}
    names = [e["configMapRef"]["name"] for e in container(objects).get("envFrom", [])]
    return {key: value for name in names for key, value in maps.get(name, {}).items()}


def config(objects: Objects) -> ServerConfig:
    """Raises: ConfigInvalid."""
    return ServerConfig.build({}, settings(objects))


def quantity(text: str | int) -> Decimal:
    """`500m`, `2`, `2Gi` as a number."""
    match = re.fullmatch(r"([\d.]+)(m|[KMG]i|)", str(text))
    assert match, f"{text!r} is no quantity that this reads"
    return Decimal(match[1]) * _UNITS[match[2]]


def grace_seconds(objects: Objects) -> int:
    return int(pod(objects).get("terminationGracePeriodSeconds", 30))


def recorded(objects: Objects) -> dict[str, str]:
    """The series that rules record, and how."""
    groups = [g for o in of_kind(objects, "PrometheusRule") for g in o["spec"]["groups"]]
    return {r["record"]: r["expr"] for g in groups for r in g["rules"] if "record" in r}


def _at(node: Any, *path: str, default: Any = None) -> Any:
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def _pod_selectors(objects: Objects) -> Iterator[tuple[str, Any]]:
    """Every selector that is to find the server's pods; None where an object has none."""
    for o in of_kind(objects, "Service"):
        yield where(o), _at(o, "spec", "selector")
    for o in of_kind(objects, "Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield where(o), _at(o, "spec", "selector", "matchLabels")
    for o in of_kind(objects, "NetworkPolicy"):
        yield where(o), _at(o, "spec", "podSelector", "matchLabels")
    for rule in pod(objects).get("topologySpreadConstraints", []):
        yield f"topology spread over {rule['topologyKey']}", _at(rule, "labelSelector", "matchLabels")


def selectors_find_the_pods(objects: Objects) -> Iterator[str]:
    """A selector with a typing error selects nothing, and an empty one everything; nobody complains."""
    labels = deployment(objects)["spec"]["template"]["metadata"]["labels"]
    for name, selector in _pod_selectors(objects):
        if not selector or not selector.items() <= labels.items():
            yield f"{name}: {selector} does not select {labels}"


def _references(objects: Objects) -> Iterator[tuple[str, str, str]]:
    """Who names what kind by which name."""
    yield "pod", "ServiceAccount", pod(objects).get("serviceAccountName", "default")
    for source in container(objects).get("envFrom", []):
        yield "pod", "ConfigMap", _at(source, "configMapRef", "name", default="")
    for volume in pod(objects).get("volumes", []):
        if "secret" in volume:
            yield "pod", "Secret", volume["secret"]["secretName"]
    for o in of_kind(objects, *SCALERS):
        target = o["spec"]["scaleTargetRef"]
        yield where(o), target.get("kind", "Deployment"), target["name"]
    for name, backend in _backends(objects):
        yield name, "Service", backend["name"]


def _backends(objects: Objects) -> Iterator[tuple[str, Object]]:
    for o in of_kind(objects, "GRPCRoute"):
        for rule in o["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                yield where(o), backend


def references_exist(objects: Objects) -> Iterator[str]:
    """What one object calls another by, is there; each volume is mounted."""
    have = {(o["kind"], o["metadata"]["name"]) for o in objects}
    have |= {("Secret", name) for name in SECRETS_BY_HAND}
    have |= {("Secret", o["spec"]["secretName"]) for o in of_kind(objects, "Certificate")}
    for who, kind, name in _references(objects):
        if (kind, name) not in have:
            yield f"{who}: names {kind} {name}, which is not there"
    volumes = {v["name"] for v in pod(objects).get("volumes", [])}
    mounts = {m["name"] for m in container(objects).get("volumeMounts", [])}
    for name in sorted(volumes ^ mounts):
        yield f"volume {name}: is not both there and mounted"


def ports_agree(objects: Objects) -> Iterator[str]:
    """The ports are the server's, wherever they stand."""
    known = config(objects)
    ports = {p["name"]: p["containerPort"] for p in container(objects)["ports"]}
    if ports != {"grpc": known.port, "metrics": known.metrics_port}:
        yield f"pod: ports {ports} are not {known.port} and {known.metrics_port} of the settings"
    for o in of_kind(objects, "Service"):
        for p in o["spec"]["ports"]:
            if ports.get(p["targetPort"], p["targetPort"]) != known.port or p["port"] != known.port:
                yield f"{where(o)}: {p['port']} to {p['targetPort']} is not {known.port}"
    for o in of_kind(objects, "PodMonitor"):
        for endpoint in o["spec"]["podMetricsEndpoints"]:
            if ports.get(endpoint["port"]) != known.metrics_port:
                yield f"{where(o)}: port {endpoint['port']} is not the metrics' one"
    for name, backend in _backends(objects):
        if backend["port"] != known.port:
            yield f"{name}: port {backend['port']} is not {known.port}"
    for o, port in ((o, p) for o, rule in _rules(objects, "ingress") for p in _ports(rule)):
        if port not in (known.port, known.metrics_port):
            yield f"{where(o)}: lets port {port} in, where nothing listens"
    if known.host in ("127.0.0.1", "::1", "localhost"):
        yield f"settings: the server listens on {known.host}, which no probe reaches"


def _rules(objects: Objects, direction: str) -> Iterator[tuple[Object, Object]]:
    for o in of_kind(objects, "NetworkPolicy"):
        for rule in o["spec"].get(direction, []):
            yield o, rule


def _ports(rule: Object) -> list[int]:
    return [p["port"] for p in rule.get("ports", [])]


def probes_spare_a_draining_pod(objects: Objects) -> Iterator[str]:
    """Liveness asks for the one name that stays SERVING in a drain; readiness for one that does not. By gRPC,
    or where the server speaks TLS, which the kubelet's gRPC does not, over HTTP."""
    port = config(objects).port
    wanted = {"startupProbe": LIVENESS, "livenessProbe": LIVENESS, "readinessProbe": READINESS}
    for probe, service in wanted.items():
        if config(objects).tls_cert is not None:
            yield from _probe_over_http(container(objects).get(probe, {}), probe, service)
            continue
        grpc = _at(container(objects), probe, "grpc")
        if grpc is None:
            yield f"{probe}: there is none by gRPC"
        elif grpc.get("service") != service:
            yield f"{probe}: asks for {grpc.get('service')!r} instead of {service!r}"
        elif grpc["port"] != port:
            yield f"{probe}: port {grpc['port']} is not {port}"


def _probe_over_http(found: dict[str, Any], probe: str, service: str) -> Iterator[str]:
    path = {LIVENESS: "/livez", READINESS: "/readyz"}[service]
    http = found.get("httpGet")
    if http is None or "grpc" in found:
        yield f"{probe}: asks by gRPC, and the server speaks TLS"
    elif http.get("path") != path:
        yield f"{probe}: asks for {http.get('path')!r} instead of {path!r}"
    elif http["port"] != "metrics":
        yield f"{probe}: port {http['port']} is not that of the metrics"


def _patience_seconds(objects: Objects, probe: str) -> float:
    """How long a probe may fail before something is done."""
    found = container(objects).get(probe, {})
    return float(found.get("periodSeconds", 10) * found.get("failureThreshold", 3))


def probes_are_patient_enough(objects: Objects) -> Iterator[str]:
    """A start may take as long as the check of a model that hangs; a hanging run ends the server itself."""
    known = config(objects)
    start = _patience_seconds(objects, "startupProbe")
    if start < 2 * known.vet_seconds:
        yield f"startupProbe: gives up after {start:g} s; one check may take {known.vet_seconds:g} s"
    if start >= deployment(objects)["spec"].get("progressDeadlineSeconds", 600):
        yield f"progressDeadlineSeconds: shorter than the {start:g} s that a start may take"
    live = _patience_seconds(objects, "livenessProbe")
    if live <= known.run_seconds:
        yield f"livenessProbe: kills after {live:g} s; a hanging run ends it after {known.run_seconds:g}"


def grace_holds_the_drain(objects: Objects) -> Iterator[str]:
    """preStop, drain and end fit between the wish to end a pod and its kill."""
    stop = _at(container(objects), "lifecycle", "preStop", "sleep", "seconds", default=0)
    needed = stop + config(objects).drain_seconds + END_SECONDS
    if stop <= 0:
        yield "preStop: there is no sleep; the pod refuses while others still send to it"
    if grace_seconds(objects) < needed:
        have = grace_seconds(objects)
        yield f"terminationGracePeriodSeconds: {have} is less than the {needed:g} of preStop, drain and end"


def restricted(objects: Objects) -> Iterator[str]:
    """The pod security standard `restricted`, and nothing that may be written but /tmp."""
    whole, inner = pod(objects).get("securityContext", {}), container(objects).get("securityContext", {})
    wanted = [
        (whole, ("runAsNonRoot",), True),
        (whole, ("runAsUser",), 10001),
        (whole, ("runAsGroup",), 10001),
        (whole, ("fsGroup",), 10001),
        (whole, ("seccompProfile", "type"), "RuntimeDefault"),
        (inner, ("allowPrivilegeEscalation",), False),
        (inner, ("readOnlyRootFilesystem",), True),
        (inner, ("capabilities",), {"drop": ["ALL"]}),
        *((inner, (name,), None) for name in ("privileged", "runAsUser", "runAsNonRoot", "seccompProfile")),
    ]
    for context, path, value in wanted:
        if _at(context, *path) != value:
            yield f"securityContext: {'.'.join(path)} is {_at(context, *path)!r} instead of {value!r}"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod(objects).get(key):
            yield f"pod: {key} is on"
    volumes = {v["name"]: v for v in pod(objects)["volumes"]}
    mounted = {m["mountPath"]: volumes.get(m["name"], {}) for m in container(objects)["volumeMounts"]}
    if not _at(mounted.get("/tmp"), "emptyDir", "sizeLimit"):
        yield "/tmp: there is no emptyDir with a sizeLimit"
    for path, volume in mounted.items():
        if "hostPath" in volume:
            yield f"{path}: a hostPath"


def no_rights_in_the_cluster(objects: Objects) -> Iterator[str]:
    """The server never speaks to Kubernetes, so no token for that lies in its pods."""
    for o in of_kind(objects, "ServiceAccount"):
        if o.get("automountServiceAccountToken") is not False:
            yield f"{where(o)}: automountServiceAccountToken is not false"
    if pod(objects).get("automountServiceAccountToken") is not False:
        yield "pod: automountServiceAccountToken is not false"
    for o in objects:
        if "Role" in o["kind"]:
            yield f"{where(o)}: gives rights"


def no_service_links(objects: Objects) -> Iterator[str]:
    """Kubernetes would set TENUTO_PORT to the Service's URL, and the server ends with status 2."""
    if pod(objects).get("enableServiceLinks") is not False:
        yield "pod: enableServiceLinks is not false"


def secrets_arrive_anew(objects: Objects) -> Iterator[str]:
    """Secrets are whole folders, read-only, not for everybody; none is in the objects."""
    for o in of_kind(objects, "Secret"):
        yield f"{where(o)}: is in the objects, and so in a repository"
    secrets = {v["name"]: v["secret"] for v in pod(objects)["volumes"] if "secret" in v}
    mounts = [m for m in container(objects)["volumeMounts"] if m["name"] in secrets]
    for mount in mounts:
        if "subPath" in mount or "subPathExpr" in mount:
            yield f"{mount['mountPath']}: a subPath does not change when the secret does"
        if not mount.get("readOnly"):
            yield f"{mount['mountPath']}: is not readOnly"
        if secrets[mount["name"]].get("defaultMode", 0o644) & 0o007:
            yield f"{mount['mountPath']}: everybody may read it"
    for variable in container(objects).get("env", []):
        if _at(variable, "valueFrom", "secretKeyRef"):
            yield f"{variable['name']}: a secret in a variable never changes"
    for name in SECRET_FILES:
        file = getattr(config(objects), name)
        if file is None and name != "token_key_file":
            continue
        if file is None or str(file.parent) not in [m["mountPath"] for m in mounts]:
            yield f"settings: {variable_of(name)} is {file}, in no secret's folder"


def settings_are_known(objects: Objects) -> Iterator[str]:
    """The server starts with them, and a change of them rolls the pods."""
    try:
        known = config(objects)
        known.check_encryption()
    except ConfigInvalid as error:
        yield f"settings: {error}"
        return
    if str(known.repository) != "/models":
        yield f"settings: the image has no models at {known.repository}"
    for o in of_kind(objects, "ConfigMap"):
        if not re.search(r"-[a-z0-9]{10}$", o["metadata"]["name"]):
            yield f"{where(o)}: has no hash in its name"


def resources_are_obeyed(objects: Objects) -> Iterator[str]:
    """A limit of whole CPUs, and memory for what the server may take."""
    resources = container(objects).get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for kind, have in (("limit", limits), ("request", requests)):
        for what in {"cpu", "memory"} - have.keys():
            yield f"resources: there is no {kind} of {what}"
    known = config(objects)
    cpus = quantity(limits.get("cpu", 1))
    if cpus % 1:
        yield f"resources: a limit of {cpus} CPUs is not whole; threads are"
    if known.threads > cpus:
        yield f"resources: {known.threads} threads on {cpus} CPUs"
    # A tenth at least is the server itself.
    memory, bounded = quantity(limits.get("memory", "8Gi")), known.vet_memory_bytes + known.max_pending_bytes
    if bounded > memory * Decimal("0.9"):
        yield f"resources: TENUTO_VET_MEMORY_BYTES and TENUTO_MAX_PENDING_BYTES fill {limits.get('memory')}"
    if limits.get(GPU) != requests.get(GPU):
        yield f"resources: {GPU} differs between limit and request"


def gpus_are_asked_for(objects: Objects) -> Iterator[str]:
    """CUDA, its image, a GPU, a runtime that has it, and leave to run beside it: all or none."""
    have = {
        "TENUTO_DEVICE": config(objects).device == "cuda",
        "image": container(objects)["image"].endswith("-cuda"),
        GPU: GPU in _at(container(objects), "resources", "limits", default={}),
        "runtimeClassName": bool(pod(objects).get("runtimeClassName")),
        "tolerations": any(t.get("key") == GPU for t in pod(objects).get("tolerations", [])),
    }
    if len(set(have.values())) > 1:
        there = [name for name, value in have.items() if value]
        yield f"GPU: {', '.join(there)} without {', '.join(name for name in have if name not in there)}"


def disruptions_come_one_by_one(objects: Objects) -> Iterator[str]:
    """Of the pods, one at a time may be sent away, by an eviction as by an upgrade."""
    budgets = of_kind(objects, "PodDisruptionBudget")
    if len(budgets) != 1:
        yield f"PodDisruptionBudget: there are {len(budgets)}"
    for o in budgets:
        if o["spec"].get("maxUnavailable") != 1 or "minAvailable" in o["spec"]:
            yield f"{where(o)}: is not maxUnavailable 1 alone"
    rolling = _at(deployment(objects), "spec", "strategy", "rollingUpdate", default={})
    if {rolling.get("maxSurge"), rolling.get("maxUnavailable")} != {0, 1}:
        yield f"Deployment: an upgrade by {rolling} is not one pod at a time"


def pods_are_spread(objects: Objects) -> Iterator[str]:
    """Over nodes and zones, counted anew for each version."""
    rules = {r["topologyKey"]: r for r in pod(objects).get("topologySpreadConstraints", [])}
    for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone"):
        if key not in rules:
            yield f"topology spread: none over {key}"
        elif "pod-template-hash" not in rules[key].get("matchLabelKeys", []):
            yield f"topology spread over {key}: counts pods of the version that leaves"


def images_have_a_tag(objects: Objects) -> Iterator[str]:
    """One that says which build; `latest` is another one tomorrow."""
    image = container(objects)["image"]
    if image.rpartition("/")[2].partition(":")[2] in ("", "latest"):
        yield f"image {image}: has no tag that stays"


def network_is_shut(objects: Objects) -> Iterator[str]:
    """gRPC from named clients, metrics from a namespace; outwards questions for names, and traces."""
    known = config(objects)
    types = {t for o in of_kind(objects, "NetworkPolicy") for t in o["spec"].get("policyTypes", [])}
    if types != {"Ingress", "Egress"}:
        yield f"NetworkPolicy: {sorted(types)} is not Ingress and Egress"
    for o, rule in _rules(objects, "ingress"):
        ports, sources = _ports(rule), rule.get("from", [])
        if len(ports) != 1:
            yield f"{where(o)}: a rule of ports {ports}; one rule a port"
        if not sources or not all(_selects_some(s) for s in sources):
            yield f"{where(o)}: lets everybody to {ports}"
        if known.metrics_port in ports and not all("namespaceSelector" in s for s in sources):
            yield f"{where(o)}: metrics are not for one namespace alone"
    for o, rule in _rules(objects, "egress"):
        names = bool(rule.get("to")) and set(_ports(rule)) == {53}
        if not names and not _leads_to(_collector(objects), rule):
            yield f"{where(o)}: lets out more than questions for names and traces"
    inward = {port for _, rule in _rules(objects, "ingress") for port in _ports(rule)}
    for port in sorted({known.port, known.metrics_port} - inward):
        yield f"NetworkPolicy: nobody gets to {port}"


def _selects_some(source: Object) -> bool:
    """Whether it names somebody: an empty selector is everybody."""
    selectors = [source[key] for key in ("podSelector", "namespaceSelector") if key in source]
    return bool(selectors) and all(s.get("matchLabels") or s.get("matchExpressions") for s in selectors)


def _collector(objects: Objects) -> tuple[str, int] | None:
    """The namespace and the port of who gets the traces; "" where its host is not NAME.NAMESPACE.svc."""
    endpoint = urlsplit(config(objects).otlp_endpoint)
    if endpoint.hostname is None:
        return None
    inside = re.fullmatch(r"[^.]+\.([^.]+)\.svc(\.cluster\.local)?", endpoint.hostname)
    return inside[1] if inside else "", endpoint.port or {"https": 443}.get(endpoint.scheme, 80)


def _leads_to(collector: tuple[str, int] | None, rule: Object) -> bool:
    """Whether a rule outwards leads there, and nowhere else."""
    if collector is None:
        return False
    namespace, port = collector
    chosen = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    to = rule.get("to", [])
    return bool(to) and _ports(rule) == [port] and all(t.get("namespaceSelector") == chosen for t in to)


def traces_get_out(objects: Objects) -> Iterator[str]:
    """The network is shut outwards, so spans would be lost in silence but for lines in the log."""
    collector, endpoint = _collector(objects), config(objects).otlp_endpoint
    if collector is None:
        return
    if not any(_leads_to(collector, rule) for _, rule in _rules(objects, "egress")):
        yield f"settings: TENUTO_OTLP_ENDPOINT is {endpoint}, and no NetworkPolicy lets the server out to it"
    if urlsplit(endpoint).path != "/v1/traces":
        yield f"settings: TENUTO_OTLP_ENDPOINT is {endpoint}, not a URL that ends in /v1/traces"


def services_lead_to_ready_pods(objects: Objects) -> Iterator[str]:
    """One that balances and one with every address, both of pods that are ready, and of one protocol."""
    spoken = "kubernetes.io/h2c" if config(objects).tls_cert is None else "https"
    services = of_kind(objects, "Service")
    if sorted(o["spec"].get("clusterIP") == "None" for o in services) != [False, True]:
        yield "Service: there is not one that is headless and one that is not"
    for o in services:
        if o["spec"].get("publishNotReadyAddresses"):
            yield f"{where(o)}: gives out pods that are not ready"
        if any(p.get("appProtocol") != spoken for p in o["spec"]["ports"]):
            yield f"{where(o)}: does not say that it is {spoken}"


def scaling_down_is_slow(objects: Objects) -> Iterator[str]:
    """One pod a period, longer than a drain, after minutes without need; one autoscaler at most."""
    advanced = ("advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleDown")
    paths = {"HorizontalPodAutoscaler": ("behavior", "scaleDown"), "ScaledObject": advanced}
    scalers = [(o, paths[o["kind"]]) for o in of_kind(objects, *paths)]
    if len(scalers) > 1:
        yield "autoscalers: more than one of one Deployment"
    if scalers and "replicas" in deployment(objects)["spec"]:
        yield "Deployment: has replicas, although there is an autoscaler"
    for o, path in scalers:
        down = _at(o["spec"], *path, default={})
        policies = down.get("policies", [])
        if [(p["type"], p["value"]) for p in policies] != [("Pods", 1)]:
            yield f"{where(o)}: does not go down by one pod"
        if any(p["periodSeconds"] < grace_seconds(objects) for p in policies):
            yield f"{where(o)}: takes the next pod while the last may still drain"
        if down.get("stabilizationWindowSeconds", 300) < 300:
            yield f"{where(o)}: goes down without waiting"
        if o["spec"].get("minReplicas", o["spec"].get("minReplicaCount", 0)) < 2:
            yield f"{where(o)}: leaves sequences without another pod to go to"


def scaling_ignores_draining_pods(objects: Objects) -> Iterator[str]:
    """What is scaled on is recorded, and without pods that drain."""
    rules = recorded(objects)
    scaled = [name for name in rules if name.startswith("pod:")]
    if of_kind(objects, *SCALERS) and not scaled:
        yield "autoscaler: nothing records what it scales on"
    for name in scaled:
        if not rules[name].rstrip().endswith(NOT_DRAINING):
            yield f"{name}: counts pods that drain"
    for o in of_kind(objects, "ScaledObject"):
        for metadata in (t["metadata"] for t in o["spec"]["triggers"]):
            query = metadata["query"]
            if not any(name in query for name in scaled):
                yield f"{where(o)}: {query} asks for nothing that is recorded"
            if f'namespace="{o["metadata"].get("namespace", "tenuto")}"' not in query:
                yield f"{where(o)}: {query} is of another namespace"
            if metadata.get("ignoreNullValues") != "false":
                yield f"{where(o)}: takes no answer for 0"


def _slots_aimed_at(scaler: Object) -> Iterator[Decimal]:
    """The share of its slots that a pod should use, as an autoscaler has it."""
    for metric in _at(scaler, "spec", "metrics", default=[]):
        if SLOTS_USED in _at(metric, "pods", "metric", "name", default=""):
            yield quantity(metric["pods"]["target"]["averageValue"])
    for trigger in _at(scaler, "spec", "triggers", default=[]):
        if SLOTS_USED in trigger["metadata"]["query"]:
            yield quantity(trigger["metadata"]["threshold"])


def new_pods_get_a_share(objects: Objects) -> Iterator[str]:
    """Streams last for hours: without rebalancing a pod that an autoscaler adds stays empty, and goes again.
    At what the autoscaler aims at, pods that are as full as they should be send sequences in circles."""
    above = config(objects).rebalance_above
    for o in of_kind(objects, *SCALERS):
        aimed = list(_slots_aimed_at(o))
        if not aimed:
            yield f"{where(o)}: does not go by slots"
        if not above:
            yield f"{where(o)}: there is no TENUTO_REBALANCE_ABOVE; what it adds stays empty"
        elif any(above <= share for share in aimed):
            yield f"{where(o)}: TENUTO_REBALANCE_ABOVE {above:g} is not above what it aims at"
        elif above >= 1 - config(objects).resume_reserve:
            yield f"{where(o)}: TENUTO_REBALANCE_ABOVE {above:g} is where new sequences are refused already"


def slots_are_what_a_pod_serves(objects: Objects) -> Iterator[str]:
    """The default is a bound of memory: a pod is late long before it has used a share of that."""
    for o in of_kind(objects, *SCALERS):
        if variable_of("max_sequences") not in settings(objects):
            yield f"{where(o)}: goes by slots, and no TENUTO_MAX_SEQUENCES says how many a pod serves"


def one_namespace(objects: Objects) -> Iterator[str]:
    """A component's objects have none of their own, and would go where the shell points."""
    names = {str(o["metadata"].get("namespace")) for o in objects}
    if len(names) > 1:
        yield f"objects: are in {' and '.join(sorted(names))}"


POLICIES: tuple[Check, ...] = (
    selectors_find_the_pods,
    references_exist,
    ports_agree,
    probes_spare_a_draining_pod,
    probes_are_patient_enough,
    grace_holds_the_drain,
    restricted,
    no_rights_in_the_cluster,
    no_service_links,
    secrets_arrive_anew,
    settings_are_known,
    resources_are_obeyed,
    gpus_are_asked_for,
    disruptions_come_one_by_one,
    pods_are_spread,
    images_have_a_tag,
    network_is_shut,
    traces_get_out,
    services_lead_to_ready_pods,
    scaling_down_is_slow,
    scaling_ignores_draining_pods,
    new_pods_get_a_share,
    slots_are_what_a_pod_serves,
    one_namespace,
)
