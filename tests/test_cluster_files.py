"""`cluster/`: every file fits the tool it is for, nothing is public, secret or unpinned, and no data is uploaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
RAY_UP = ("aws", "gcp")
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml") if path.name != "kustomization.yaml")
FILES = sorted(path for path in (*CLUSTER.rglob("*"), ROOT / ".rayignore") if path.is_file() and path.suffix != ".pyc")
RAY = "2.60.0"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def ray_cluster(name: str = "raycluster.yaml") -> dict[str, Any]:
    spec = load(CLUSTER / "kuberay" / name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups() -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in ray_cluster()["workerGroupSpecs"]}


@pytest.mark.ray
@pytest.mark.parametrize("cloud", RAY_UP)
def test_ray_up_files_pass_rays_own_check(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(CLUSTER / f"{cloud}.yaml"))
    validate_config(config)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert any("--dashboard-host=127.0.0.1" in command for command in commands)
    assert {"--env RAY_AUTH_MODE=token", "--env RAY_JOB_STOP_WAIT_TIME_S=180"} <= set(config["docker"]["run_options"])
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


@pytest.mark.ray
@pytest.mark.parametrize("cloud", RAY_UP)
def test_spot_is_preferred_and_on_demand_takes_its_place_where_launches_fail(cloud, tmp_path, monkeypatch) -> None:
    """Ray's own scheduler decides, on the file's node types."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # or boto waits a minute and a half for it
    monkeypatch.setenv("HOME", str(tmp_path))  # the file mounts the user's token, which a bare machine does not have
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef" * 4)
    config = AutoscalingConfig(load(CLUSTER / f"{cloud}.yaml"))
    for spot_available, expected in ((1.0, "gpu-spot"), (0.0, "gpu-on-demand")):
        availability = {"gpu-spot": spot_available, "gpu-on-demand": 1.0}
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 12})]),
            cloud_resource_availabilities=availability,
            recoverable_resource_availabilities=availability,
        )
        launched = ResourceDemandScheduler().schedule(request).to_launch
        assert [(launch.instance_type, launch.count) for launch in launched] == [(expected, 1)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_only_documented_fields(name: str) -> None:
    schema = load(Path(__file__).parent / "kuberay_fields.yaml")
    manifest = load(CLUSTER / "kuberay" / name)
    jsonschema.validate(manifest, {**schema["kinds"][manifest["kind"]], "definitions": schema["definitions"]})


def test_the_kustomization_lists_files_that_exist() -> None:
    listed = load(CLUSTER / "kuberay" / "kustomization.yaml")["resources"]
    assert set(listed) == set(MANIFESTS) - {"rayjob.yaml"}


def test_the_rayjob_brings_the_same_cluster() -> None:
    cluster, job = ray_cluster(), ray_cluster("rayjob.yaml")
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert cluster == job


def test_the_head_trains_nothing_and_the_autoscaler_is_on() -> None:
    spec = ray_cluster()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token", "secretName": "raychain-ray-token"}
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    waits = {item["name"]: item["value"] for item in head["env"]}
    assert (
        int(waits["RAY_JOB_STOP_WAIT_TIME_S"])
        < spec["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    )


@pytest.mark.parametrize("group", ["gpu-on-demand", "gpu-spot"])
def test_workers_are_elastic_have_a_cache_and_say_when_they_go(group: str) -> None:
    found = groups()[group]
    assert found["minReplicas"] < found["maxReplicas"]
    pod = found["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "cache", "mountPath": "/cache"} in worker["volumeMounts"]
    *program, seconds = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert program == ["/bin/bash", "/opt/raychain/drain.sh"]
    assert 15 < int(seconds) < pod["terminationGracePeriodSeconds"] - 15, "SIGTERM needs some of the grace too"
    assert "drain.sh" in (CLUSTER / "Dockerfile").read_text()


def test_spot_and_on_demand_workers_never_want_the_same_node() -> None:
    def terms(group: str) -> list[dict[str, Any]]:
        affinity = groups()[group]["template"]["spec"]["affinity"]["nodeAffinity"]
        return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    (never,) = terms("gpu-on-demand")
    any_of = [expression for term in terms("gpu-spot") for expression in term["matchExpressions"]]
    assert [(e["key"], e["values"]) for e in never["matchExpressions"]] == [(e["key"], e["values"]) for e in any_of]
    assert {e["operator"] for e in never["matchExpressions"]} == {"NotIn"}
    assert {e["operator"] for e in any_of} == {"In"}


PUBLIC = r"0\.0\.0\.0|\[?::\]?/0|LoadBalancer|NodePort|hostNetwork|hostPort|kind: Ingress|enableIngress: true"
SECRET = (
    r"AKIA[0-9A-Z]{16}|-----BEGIN|gh[pousr]_[A-Za-z0-9]{20}|xox[bp]-|AIza[0-9A-Za-z_-]{30}"
    r"|(?i:password|secret_access_key|auth_token|api_key)\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{16,}|\b[0-9a-f]{40,}\b"
)
UNPINNED = r":latest\b|@latest\b|image: [^:\s]+\s*$|FROM [^:\s$]+\s*$"


@pytest.mark.parametrize("what", ["public", "secret", "unpinned"])
def test_a_scan_finds_nothing(what: str) -> None:
    pattern = re.compile({"public": PUBLIC, "secret": SECRET, "unpinned": UNPINNED}[what], re.MULTILINE)
    found = [(path.name, match.group()) for path in FILES for match in pattern.finditer(path.read_text())]
    assert len(FILES) > 10
    assert not found


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (PUBLIC, "--dashboard-host=0.0.0.0"),
        (PUBLIC, "serviceType: LoadBalancer"),
        (SECRET, "auth_token: 1f0c9d2e7a6b4c3d8e9f"),
        (SECRET, "aws_secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCY"),
        (UNPINNED, "image: rayproject/ray:latest"),
        (UNPINNED, "image: rayproject/ray\n"),
        (UNPINNED, "FROM rayproject/ray"),
    ],
)
def test_the_scan_would_find(pattern: str, text: str) -> None:
    assert re.search(pattern, text, re.MULTILINE)


def constraints() -> dict[str, str]:
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_images_and_ray_are_one_version() -> None:
    said = {version for path in FILES for version in re.findall(r"rayproject/ray:(\d[\d.]*)", path.read_text())}
    assert said == {RAY}
    assert ray_cluster()["rayVersion"] == RAY == constraints()["ray"]
    images = re.findall(r"^ARG RAY_IMAGE=(\S+)|^FROM (\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert images == [(f"rayproject/ray:{RAY}-py311-gpu", ""), ("", "${RAY_IMAGE}")]


def test_the_image_installs_pinned_versions_as_its_user() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^RUN pip install (.*)", dockerfile, re.MULTILINE) == [
        "--no-cache-dir -c constraints.txt './source[cluster,demo,wandb,mlflow]' \\"
    ]
    assert re.findall(r"^USER (\w+)", dockerfile, re.MULTILINE)[-1] == "ray"
    for source in re.findall(r"^COPY --chown=\S+ (.+) \S+$", dockerfile, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()


def test_the_pinned_versions_are_allowed_and_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = constraints()
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + [
        entry for name in ("cluster", "demo", "wandb", "mlflow") for entry in extras[name]
    ]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


@pytest.mark.ray
def test_a_submitted_working_directory_has_the_code_and_no_data(tmp_path: Path) -> None:
    """What a task of a job finds of a checkout in which things were tried."""
    work = tmp_path / "work"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, work / name)
    for ignore in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / ignore, work / ignore)
    left = ["data/demo/train/00000.tar", "runs/demo/run.json", "mine/a.tar", "mine/grown/open_clip_model.safetensors",
            "weights.pt", "cache/shards/a.arrow", ".venv/bin/python", ".venv-gpu/bin/python", ".env", "key.pem",
            "wandb/run.log", ".mypy_cache/a.json", "raychain/__pycache__/a.pyc", "table.parquet"]  # fmt: skip
    for name in left:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    (work / "mine.yaml").write_text("name: mine\n")
    arrived = subprocess.run([sys.executable, "-c", ARRIVED, work], capture_output=True, text=True, cwd=tmp_path)
    assert arrived.returncode == 0, arrived.stderr
    names = set(arrived.stdout.split())
    assert {"raychain/run.py", "experiments/demo.yaml", "mine.yaml", "pyproject.toml"} <= names
    assert not names & set(left)
    code = {name for name in tracked if name.startswith(("raychain/", "experiments/"))}
    assert code <= names, "an ignore rule hides code"
    with zipfile.ZipFile(tmp_path / "package.zip", "w", zipfile.ZIP_DEFLATED) as package:
        for name in names:
            package.write(work / name, name)
    assert (tmp_path / "package.zip").stat().st_size < 4 * 2**20


ARRIVED = """
import pathlib, sys
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=10**8, runtime_env={"working_dir": sys.argv[1]})
files = ray.remote(lambda: [str(path) for path in pathlib.Path().rglob("*") if path.is_file()])
print(*ray.get(files.remote()), sep="\\n")
"""


@pytest.mark.ray
@pytest.mark.long
def test_a_local_cluster_listens_here_alone_wants_the_token_drains_and_stops_whole(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("c")
    token = folder / "token"
    program = [sys.executable, str(CLUSTER / "local.py")]
    where = ["--dir", str(folder / "r"), "--token", str(token), "--workers", "1"]
    missing = subprocess.run([*program, "start", *where], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "ray get-auth-token --generate" in missing.stderr
    token.write_text("0123456789abcdef" * 4)
    started = subprocess.run([*program, "start", *where], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    state = json.loads((folder / "r" / "cluster.json").read_text())
    family = {member.pid: member for node in state["nodes"] for member in members(node["pid"])}
    try:
        listening = {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in family}
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
        said = dict(re.findall(r"\b(RAY_\w+)=(\S+)", started.stdout))
        assert said["RAY_ADDRESS"] == state["address"]
        trusted = plain | said
        assert len(nodes(trusted)) == 2
        refused = subprocess.run([sys.executable, "-c", NODES], env=trusted | {"RAY_AUTH_TOKEN_PATH": os.devnull},
                                 capture_output=True, text=True)  # fmt: skip
        assert refused.returncode != 0
        worker = next(node for _, node, cpus in nodes(trusted) if cpus)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        drained = subprocess.run(["bash", str(CLUSTER / "drain.sh"), "60", worker], env=trusted | {"PATH": path},
                                 capture_output=True, text=True)  # fmt: skip
        assert drained.returncode == 0, drained.stderr
    finally:
        stopped = subprocess.run([*program, "stop", *where], capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr
    assert not [pid for pid, member in family.items() if member.is_running()]
    assert subprocess.run([*program, "status", *where], capture_output=True).returncode == 2


def members(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


NODES = """
import os
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(os.environ["RAY_ADDRESS"])
for node in status.active_nodes + status.idle_nodes:
    print(node.node_status, node.node_id, int(node.total_resources().get("CPU", 0)))
"""


def nodes(environment: dict[str, str]) -> list[tuple[str, str, int]]:
    """(status, id, CPUs) of each that is alive."""
    asked = subprocess.run([sys.executable, "-c", NODES], env=environment, capture_output=True, text=True, check=True)
    return [(status, node, int(cpus)) for status, node, cpus in map(str.split, asked.stdout.splitlines())]
