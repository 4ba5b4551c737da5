"""Ray stays behind one package, of which one file knows Ray's private modules and does without where they moved."""

from __future__ import annotations

import ast
import importlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from raychain.backend_ray import cluster, internals
from raychain.backend_ray.environment import absent, environment

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent
BACKEND = ROOT / "raychain" / "backend_ray"
PRIVATE = ("ray._private", "ray._raylet", "ray._common")
DRIVERS = ("raychain.runs.driver", "raychain.runs.group", "raychain.searching.driver", "raychain.searching.running")
"""Modules that run chains on Ray, through `backend_ray`."""


def imports(file: Path) -> Iterator[str]:
    """Every module of Ray that a file imports, inside functions too, and every attribute path under `ray`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ray")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ray" and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and (path := dotted(node)).startswith("ray."):
            yield path


def dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression, else nothing."""
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_private_modules_of_ray_are_imported_in_one_file():
    sources = [
        file for folder in ("raychain", "cluster", "experiments", "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(file.relative_to(ROOT))
        for file in sources
        if any(name.startswith(PRIVATE) or "._internal" in name for name in imports(file))
    }
    assert found == {"raychain/backend_ray/internals.py"}


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch):
    """Makes a module of Ray impossible to import, as in a version that has it elsewhere."""
    monkeypatch.setattr(internals, "_told", set())
    return lambda module: monkeypatch.setitem(sys.modules, module, None)


def test_where_ray_has_no_coordinator_the_public_function_is_asked(ray_session, missing, monkeypatch, caplog):
    import ray.autoscaler.sdk

    asked: list[list[dict[str, float]]] = []
    request = ray.autoscaler.sdk.request_resources
    monkeypatch.setattr(
        ray.autoscaler.sdk, "request_resources", lambda *, bundles: (asked.append(bundles), request(bundles=bundles))
    )
    missing("ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client")
    for _ in range(2):
        demand = cluster.Demand({"CPU": 1})
        demand.want(2, running=1)
        demand.want(2, running=1)
        demand.want(1, running=2)
        demand.want(0)
        demand.close()
    worker = {"CPU": 1}
    assert asked == [[worker] * 3, [worker] * 3, []] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_of_many_processes_alone_ray_does_not_warn(missing, capsys, caplog):
    worker = importlib.import_module("ray._private.worker")

    def told(number: int) -> None:
        warning = f"{number} PYTHON worker processes have been started on node: x"
        worker.print_to_stdstream({"lines": [warning], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        worker.print_to_stdstream({"lines": [f"{number} other"], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    with internals.many_processes():
        told(31)
    told(32)
    said = capsys.readouterr().out
    assert ("31 PYTHON" in said, "32 PYTHON" in said, "31 other" in said) == (False, True, True)
    missing("ray._private")
    with internals.many_processes():
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_coordinator_of_this_ray_is_known(ray_session, missing, caplog):
    assert isinstance(internals.requests("test", {"CPU": 1}), internals.Coordinated)
    assert not caplog.records


def test_worker_groups_have_no_process_for_datasets_or_for_lost_controllers(ray_session):
    def callbacks(trainer: type[Any]) -> set[str]:
        made = trainer(print, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
        return {type(callback).__name__ for callback in made}

    spared = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert callbacks(TorchTrainer) - callbacks(internals.lean(TorchTrainer)) == spared


def test_the_state_of_each_node_is_known(ray_session, missing, caplog):
    (node,) = cluster.nodes()
    assert node.id == ray.get_runtime_context().get_node_id()
    assert (node.total["CPU"], node.leaving) == (4, False)
    assert not cluster.launching()
    assert not caplog.records


def test_where_ray_does_not_tell_the_state_of_each_node_its_totals_are_what_is_known(ray_session, missing, caplog):
    group = ray.util.placement_group([{"CPU": 3}])
    try:
        ray.get(group.ready())
        missing("ray.autoscaler.v2.sdk")
        assert (cluster.capacity({"CPU": 1}), cluster.room({"CPU": 1}), cluster.room({"CPU": 2})) == (4, 1, 0)
        assert cluster.describe({"CPU": 1}) == "1 node (4 CPU)"
        assert not cluster.leaving()
        assert not cluster.launching()
        assert len(caplog.records) == 1
    finally:
        ray.util.remove_placement_group(group)


def test_what_the_controller_imports_does_without_torch():
    """It would start before the workers import theirs, and hold 0.3 GiB."""
    code = (
        "import raychain.backend_ray.process_group, raychain.backend_ray.worker, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_node_is_not_started_where_it_would_be_open_to_the_network(monkeypatch):
    monkeypatch.delattr("ray._private.services.resolve_ip_for_localhost")
    with pytest.raises(RuntimeError, match="cannot be kept to this machine's own address"):
        internals.stay_on_loopback()


def test_variables_are_set_while_somebody_needs_them_and_no_users_is_changed(monkeypatch):
    monkeypatch.setenv("GIVEN", "user")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    before = dict(os.environ)
    settings = {"GIVEN": "ours", "EMPTY": "ours", "ABSENT": "ours"}
    first, second = environment(settings), environment(settings)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [os.environ[name] for name in settings] == ["user", "ours", "ours"]
    with absent("GIVEN"):
        assert "GIVEN" not in os.environ
    second.__exit__(None, None, None)
    assert dict(os.environ) == before


def of_the_process() -> dict[str, Any]:
    """What a library has no business to change in the process that calls it."""
    names = [None, *logging.root.manager.loggerDict]
    return {
        "streams": (sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "levels": {name: logging.getLogger(name).level for name in names},
        "formats": [(handler, handler.formatter) for handler in logging.getLogger("ray").handlers],
        "warnings": list(warnings.filters),
    }


@pytest.mark.slow
@pytest.mark.long
def test_a_run_leaves_the_process_as_it_was(tree, tmp_path):
    """In a process of its own, in which everything is imported: what an import of torch changes is no run's doing."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree | {"evaluate": {}}))
    ours = ("RAY_TRAIN_", "RAY_ACCEL_")  # as in a shell; this process has some of them
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    code = IMPORT + UNCHANGED.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["succeeded"]


IMPORT = """
import importlib, pkgutil, sys, raychain, raychain.api
names = [module.name for module in pkgutil.walk_packages(raychain.__path__, "raychain.")]
commands = {f"raychain.{module.name}" for module in pkgutil.iter_modules(raychain.api.__path__)}  # `python -m` alone
names = [name for name in names if name not in commands and not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
UNCHANGED = """
import logging
sys.path.insert(0, {tests!r})
import aiohttp.web, botocore.httpsession, yaml  # a run imports the first two, which add filters of warnings
from raychain.runs import driver
from raychain.config.loading import validate
from test_backend_ray import of_the_process
tree = yaml.safe_load(open(sys.argv[1]))
logging.getLogger("ray").setLevel(logging.CRITICAL)
before, inside, handle = of_the_process(), [], driver.RunLog.dispatch
driver.RunLog.dispatch = lambda log, event: (inside.append(of_the_process()), handle(log, event))
print(raychain.run(validate(tree))["status"])
after = of_the_process()
assert inside and all(state["streams"] == before["streams"] for state in inside)
for kind, was in before.items():
    now = after[kind]
    if isinstance(was, dict):
        was, now = set(was.items()), set(now.items())
        now -= {{(name, level) for name, level in now if kind == "levels" and name not in before[kind]}}
    if was != now:
        print(kind, [x for x in was if x not in now], [x for x in now if x not in was])
"""
