"""docker/kubernetes.yaml, as those who run clusters would read it.

Names and types of its fields were compared with the API's own models; what is checked here is what
those allow and nobody wants.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ckpt.cli_commands import app
from ckpt.handoff.sizes import parse_size
from ckpt.handoff.sync import STOP_SECONDS
from ckpt.service.roots import STOP_S

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker" / "kubernetes.yaml").read_text("utf-8")
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))
SPARE_S = 5
"""Time for the interpreter to end, beyond every deadline of ours."""


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d["spec"] for d in DOCUMENTS if d["kind"] == kind}


PODS = {name: spec["template"]["spec"] for name, spec in of("Deployment").items()}
CONTAINERS = {c["name"]: (pod, c) for pod in PODS.values() for c in pod["containers"]}
OURS = ("service", "sidecar")

Container = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Container:
    return CONTAINERS[request.param]


def quantity(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def options(container: dict[str, Any]) -> dict[str, str]:
    """The options that a container's command is given; each is one that the command knows."""
    command, *words = container["args"]
    group = typer.main.get_command(app)
    known = {text for one in group.commands[command].params for text in one.opts}  # type: ignore[attr-defined]
    given = dict(word.split("=", 1) for word in words if word.startswith("--"))
    assert given.keys() <= known
    return given


def test_what_there_is() -> None:
    assert list(CONTAINERS) == ["service", "engine", "sidecar"]
    apis = {(d["kind"], d["apiVersion"]) for d in DOCUMENTS}
    assert apis == {
        ("Deployment", "apps/v1"),
        ("Service", "v1"),
        ("PodDisruptionBudget", "policy/v1"),
        ("NetworkPolicy", "networking.k8s.io/v1"),
    }


def test_no_container_may_more_than_it_must(container: Container) -> None:
    """What Pod Security's level "restricted" asks for."""
    pod, one = container
    limits = {**pod["securityContext"], **one["securityContext"]}
    assert limits["runAsNonRoot"] is True
    assert limits["runAsUser"] > 0
    assert limits["runAsGroup"] > 0
    assert limits["allowPrivilegeEscalation"] is False
    assert limits["capabilities"] == {"drop": ["ALL"]}
    assert limits["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"privileged", "procMount"} & limits.keys()
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    if one["name"] in OURS:
        assert limits["readOnlyRootFilesystem"] is True
        assert limits["runAsUser"] == 10001
        assert "USER 10001" in (ROOT / "docker" / "Dockerfile").read_text("utf-8")


def test_every_container_is_bounded(container: Container) -> None:
    pod, one = container
    assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
    memory = quantity(one["resources"]["limits"]["memory"])
    assert memory >= quantity(one["resources"]["requests"]["memory"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["name"]: mount for mount in one["volumeMounts"]}
    assert mounted.keys() <= volumes.keys()
    for name in mounted:
        if "emptyDir" in volumes[name]:
            size = quantity(volumes[name]["emptyDir"]["sizeLimit"])
            if volumes[name]["emptyDir"].get("medium") == "Memory":
                assert size < memory
        else:
            assert mounted[name]["readOnly"] is True, "a secret"
            assert volumes[name]["secret"]["defaultMode"] & 0o337 == 0
    if one["name"] in OURS:
        assert "/tmp" in {mount["mountPath"] for mount in mounted.values()}, "a read-only root"
        assert "cpu" not in one["resources"]["limits"], "throttled when it is needed most"


def test_every_container_is_probed(container: Container) -> None:
    _pod, one = container
    assert {"readinessProbe", "livenessProbe"} <= one.keys()
    ports = {port["name"] for port in one.get("ports", ())}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = one.get(name)
        if probe is None:
            continue
        assert probe["timeoutSeconds" if name != "startupProbe" else "periodSeconds"] > 1
        if "httpGet" in probe:
            assert probe["httpGet"]["port"] in ports
            path = probe["httpGet"]["path"]
        else:
            _python, script, path = probe["exec"]["command"]
            assert f"COPY docker/healthy.py {script}" in (ROOT / "docker/Dockerfile").read_text()
        wanted = {"service": ("/healthz", "/readyz"), "sidecar": ("/healthz", "/readyz")}
        live, ready = wanted.get(one["name"], ("/health", "/health"))
        assert path == (ready if name == "readinessProbe" else live)


def test_the_sidecars_window_is_where_its_probe_looks() -> None:
    _pod, sidecar = CONTAINERS["sidecar"]
    group = typer.main.get_command(app)
    (listen,) = [p for p in group.commands["sync"].params if "--listen" in p.opts]  # type: ignore[attr-defined]
    assert "--listen" not in options(sidecar), "loopback is its default"
    assert listen.default == f"127.0.0.1:{sidecar['env'][0]['value']}"
    assert sidecar["env"][0]["name"] == "HEALTH_PORT"


def test_nothing_is_killed_that_would_end_by_itself() -> None:
    pod, service = CONTAINERS["service"]
    pause = int(service["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(options(service)["--drain"])
    assert pod["terminationGracePeriodSeconds"] >= pause + drain + STOP_S + SPARE_S
    pod, sidecar = CONTAINERS["sidecar"]
    answer = float(options(sidecar)["--engine-timeout"])
    assert pod["terminationGracePeriodSeconds"] >= answer + STOP_SECONDS + SPARE_S


def test_the_cache_is_smaller_than_its_volume() -> None:
    pod, sidecar = CONTAINERS["sidecar"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "adapters"]
    bound = parse_size("--max-size", options(sidecar)["--max-size"])
    size = quantity(volume["emptyDir"]["sizeLimit"])
    assert size > bound
    resources = sidecar["resources"]
    assert quantity(resources["limits"]["ephemeral-storage"]) > size
    assert quantity(resources["requests"]["ephemeral-storage"]) >= bound
    _pod, engine = CONTAINERS["engine"]
    (here,) = [m for m in engine["volumeMounts"] if m["name"] == "adapters"]
    (there,) = [m for m in sidecar["volumeMounts"] if m["name"] == "adapters"]
    assert here["readOnly"] is True
    assert here["mountPath"] == there["mountPath"] == options(sidecar)["--cache"]


def test_keys_come_from_secrets_that_differ_by_role() -> None:
    """As their policies do; and none stands in the file."""
    found = {}
    for name in OURS:
        (source,) = CONTAINERS[name][1]["envFrom"]
        found[name] = source["secretRef"]["name"]
    assert len(set(found.values())) == 2
    for secret in found.values():
        assert f"create secret generic {secret} --from-env-file" in TEXT
    assert not re.search(r"value: .*(KEY|SECRET|TOKEN)", TEXT)
    for _pod, one in CONTAINERS.values():
        assert not any("KEY" in variable["name"] for variable in one.get("env", ()))


def test_ports_lead_to_pods_and_only_the_named_get_in() -> None:
    labels = {
        name: spec["template"]["metadata"]["labels"] for name, spec in of("Deployment").items()
    }
    for name, spec in of("Deployment").items():
        assert spec["selector"]["matchLabels"] == labels[name]
    for name, service in of("Service").items():
        assert service["selector"] == labels[name]
        assert service.get("type", "ClusterIP") == "ClusterIP"
        exposed = {p["name"] for c in PODS[name]["containers"] for p in c.get("ports", ())}
        assert {port["targetPort"] for port in service["ports"]} <= exposed
    policies = of("NetworkPolicy")
    assert policies.keys() == labels.keys(), "a pod that anybody in the cluster reaches"
    for name, policy in policies.items():
        assert policy["podSelector"]["matchLabels"] == labels[name]
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
            assert peers
            assert all(peers), "from anywhere"
            assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
    budget = of("PodDisruptionBudget")["ckpt-service"]
    assert budget["selector"]["matchLabels"] == labels["ckpt-service"]
    assert budget["minAvailable"] < of("Deployment")["ckpt-service"]["replicas"]


def test_the_service_is_open_with_tokens_alone() -> None:
    pod, service = CONTAINERS["service"]
    given = options(service)
    assert given["--listen"] == f"0.0.0.0:{service['ports'][0]['containerPort']}"
    folder, _, file = given["--token-file"].rpartition("/")
    (mount,) = [m for m in service["volumeMounts"] if m["mountPath"] == folder]
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    assert f"generic {volume['secret']['secretName']} --from-file={file}" in TEXT
