#!/usr/bin/env python3
"""A Ray cluster of several nodes on this machine, for trying things: a head without CPUs, and workers.

python cluster/local.py start --workers 2 --cpus 1      # every request needs the token of --token
python cluster/local.py status
python cluster/local.py stop                            # ends what start began, by process id, and nothing else

Everything listens on 127.0.0.1. Each node is one `ray start --block`, whose children belong to it; their ids are in
DIR/cluster.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = "127.0.0.1"
FOLDER = Path(tempfile.gettempdir()) / f"raychain-cluster-{os.getuid()}"
"""Short, because Ray's sockets lie in it."""
STARTED_S, ENDED_S = 180, 40
TRIES = 3
"""Starts of a node: on a machine with much else to do, Ray gives up on one after 30 seconds."""
PORTS = ("object-manager-port", "node-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "runtime-env-agent-port")  # fmt: skip
"""That two nodes of one machine cannot share."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""On Linux Ray takes the machine's outer address where it is told 127.0.0.1; with this, as on a laptop, it does not."""
RAY = ("-m", "raychain.backend_ray.loopback")
"""The ray command, which with LOOPBACK would start no worker nodes."""
COUNT = """
import sys
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(sys.argv[1])
print(len(status.active_nodes) + len(status.idle_nodes))
"""
"""How many nodes are alive."""
STOP_WAIT_S = 180
"""Between SIGTERM and SIGKILL of `ray job stop`, so that a run can save; Ray's default is 3."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("start", "status", "stop"))
    parser.add_argument("--dir", type=Path, default=FOLDER, help="state and logs")
    parser.add_argument("--token", type=Path, default=Path("~/.ray/auth_token"), help="file with the token")
    parser.add_argument("--workers", type=int, default=2, help="worker nodes")
    parser.add_argument("--cpus", type=int, default=1, help="logical CPUs of each worker")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each worker; each gets its own")
    options = parser.parse_args()
    state = options.dir / "cluster.json"
    if options.do == "start":
        return start(options, state)
    if not state.is_file():
        print(f"no cluster in {options.dir}", file=sys.stderr)
        return 2
    found = json.loads(state.read_text())
    if options.do == "status":
        alive = [node["name"] for node in found["nodes"] if process(node)]
        print(f"{found['address']}: {', '.join(alive) or 'nothing'} running")
        return 0 if len(alive) == len(found["nodes"]) else 1
    return stop(found, state)


def start(options: argparse.Namespace, state: Path) -> int:
    """Starts the nodes and prints what a client needs; nothing is left running where one does not come up."""
    token = options.token.expanduser().resolve()
    if not token.is_file():
        print(f"no token in {token}: make one with `ray get-auth-token --generate`, or give --token", file=sys.stderr)
        return 2
    if state.is_file() and any(process(node) for node in json.loads(state.read_text())["nodes"]):
        print(f"a cluster of {state.parent} is running: stop it, or give another --dir", file=sys.stderr)
        return 2
    options.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    port, dashboard, client = free_ports(3)
    environment = (
        os.environ
        | LOOPBACK
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        }
    )
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # for jobs' `python`
    environment.pop("RAY_AUTH_TOKEN", None)
    environment.pop("RAY_ADDRESS", None)
    head = ["--head", f"--port={port}", f"--dashboard-host={HERE}", f"--dashboard-port={dashboard}", "--num-cpus=0"]
    head += ["--num-gpus=0", f"--temp-dir={options.dir}", f"--ray-client-server-port={client}"]
    join = [f"--address={HERE}:{port}", f"--num-cpus={options.cpus}", f"--num-gpus={options.gpus}"]
    found: dict[str, Any] = {"address": f"{HERE}:{port}", "dashboard": f"http://{HERE}:{dashboard}", "nodes": []}
    for number in range(options.workers + 1):  # one after the other: Ray mixes up two that start at once
        name = f"worker {number}" if number else "head"
        if number and options.gpus:
            mine = range((number - 1) * options.gpus, number * options.gpus)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        # a folder of its own, as on machines: a node that unpacks a job's package would take it from under the others
        own = [*join, f"--temp-dir={options.dir / str(number)}"]
        for _ in range(TRIES):
            arguments, log = (own if number else head), options.dir / f"{name.replace(' ', '-')}.log"
            found["nodes"].append(launch(name, arguments, free_ports(len(PORTS)), environment, log))
            state.write_text(json.dumps(found, indent=2) + "\n")
            if wait_for(found, number + 1, environment):
                break
            end([found["nodes"].pop()])
        else:
            print(f"{name} did not come up: see {log}", file=sys.stderr)
            stop(found, state)
            return 1
    print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}")
    print(f"export RAY_API_SERVER_ADDRESS={found['dashboard']}  # ray job submit, and a browser")
    print(f"export RAY_ADDRESS={found['address']} {' '.join(map('='.join, LOOPBACK.items()))}  # raychain.run here")
    return 0


def launch(name: str, arguments: list[str], ports: list[int], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """A node in a session of its own; what identifies its process."""
    ray = [sys.executable, *RAY, "start", "--block", "--disable-usage-stats"]
    ray += [f"--node-ip-address={HERE}", *arguments]
    ray += [f"--{flag}={port}" for flag, port in zip(PORTS, ports, strict=True)]
    with log.open("w") as file:
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        started = subprocess.Popen(ray, env=environment, start_new_session=True, **quiet)
    return {"name": name, "pid": started.pid, "created": psutil.Process(started.pid).create_time()}


def wait_for(found: dict[str, Any], nodes: int, environment: dict[str, str]) -> bool:
    """Whether as many nodes are alive before STARTED_S seconds have passed."""
    deadline = time.monotonic() + STARTED_S
    while time.monotonic() < deadline and all(process(node) for node in found["nodes"]):
        ask = [sys.executable, "-c", COUNT, found["address"]]
        asked = subprocess.run(ask, env=environment, capture_output=True, text=True)
        if asked.stdout.strip().isdigit() and int(asked.stdout) >= nodes:
            return True
        time.sleep(1)
    return False


def stop(found: dict[str, Any], state: Path) -> int:
    """Ends every node, workers first."""
    ended = end(found["nodes"][::-1])
    state.unlink(missing_ok=True)
    print(f"ended {ended} processes of {found['address']}", file=sys.stderr)
    return 0


def end(nodes: list[dict[str, Any]]) -> int:
    """Asks the nodes' processes to end, and kills after ENDED_S seconds those that are left; how many there were."""
    family: list[psutil.Process] = []
    for node in nodes:
        if parent := process(node):
            family += [*parent.children(recursive=True), parent]
            parent.terminate()
            psutil.wait_procs([parent], timeout=ENDED_S)
    _, left = psutil.wait_procs(family, timeout=5)
    for member in left:  # psutil compares when they were made: another process under the same id is left alone
        member.kill()
    psutil.wait_procs(left, timeout=5)
    return len(family)


def process(node: dict[str, Any]) -> psutil.Process | None:
    """The node's process, if it is still the one that was started."""
    try:
        candidate = psutil.Process(node["pid"])
        same = abs(candidate.create_time() - node["created"]) < 0.01 and candidate.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return candidate if same else None


def free_ports(count: int) -> list[int]:
    """Free ports outside those that Ray's workers (10002 … 19999) and outgoing connections (32768 …) use."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe:
            if probe.connect_ex((HERE, port)):
                ports.append(port)
        if len(ports) == count:
            break
    return ports


if __name__ == "__main__":
    sys.exit(main())
