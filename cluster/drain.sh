#!/usr/bin/env bash
# Tells Ray that this node goes away, and waits until no run trains on it: drain.sh SECONDS [NODE_ID]
# A pod's preStop hook, or what a spot notice calls. RAY_ADDRESS and the token are in the environment.
# The run sees the notice, saves, and goes on elsewhere; whoever called ends the node after SECONDS at the latest.
set -u # no pipefail: grep -q below ends its pipe early
seconds=${1:?drain.sh SECONDS [NODE_ID]}
end=$((SECONDS + seconds))

timeout "$seconds" ray drain-node --address "$RAY_ADDRESS" ${2:+--node-id "$2"} \
  --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "node terminates" --deadline-remaining-seconds "$seconds" \
  || exit 1
[ "${2:-}" ] && exit 0 # another node: its processes are not here

# Ray names its processes; those that train are gone once the run has saved.
training() {
  cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | grep -q '^ray::RayTrainWorker'
}
while [ "$SECONDS" -lt "$end" ] && training; do
  sleep 1
done
