#!/usr/bin/env bash
# A real SLURM on one machine for the tests: slurmctld and two slurmd as nodes sim1 and sim2, with
# munge. Debian or Ubuntu, as root:
#
#   bash scripts/setup_slurm.sh start FOLDER    installs what is missing, starts, prints SLURM_CONF
#   bash scripts/setup_slurm.sh stop FOLDER     ends the daemons that it started
#
# Everything listens on loopback only and lives in FOLDER; the machine's own SLURM is not touched.
set -euo pipefail

verb=${1:?start or stop}
folder=$(realpath -m "${2:?a folder for configuration, state and logs}")

if [ "$verb" = stop ]; then
  for file in "$folder"/*.pid; do
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
  exit 0
fi

[ "$(id -u)" = 0 ] || { echo "setup_slurm.sh: needs root" >&2; exit 3; }
if ! command -v slurmctld slurmd munged >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2 ||
    { echo "setup_slurm.sh: slurm-wlm and munge cannot be installed" >&2; exit 3; }
fi

mkdir -p "$folder"/{state,spool1,spool2,log}
chmod 755 "$folder"
key="$folder/munge.key"
[ -f "$key" ] || (umask 077; head -c 1024 /dev/urandom > "$key")
munge_socket="$folder/munge.socket"
cores=$(nproc)

cat > "$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-16817}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$munge_socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
KillWait=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=sim1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${SLURM_TEST_PORT1:-16818} CPUs=$cores State=UNKNOWN
NodeName=sim2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=${SLURM_TEST_PORT2:-16819} CPUs=$cores State=UNKNOWN
PartitionName=test Nodes=sim1,sim2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
EOF

export SLURM_CONF="$folder/slurm.conf"
munged --key-file="$key" --socket="$munge_socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" --force
slurmctld -f "$SLURM_CONF"
for node in sim1 sim2; do
  mkdir -p "$folder/spool-$node"
  slurmd -f "$SLURM_CONF" -N "$node"
done
for _ in $(seq 60); do
  if [ "$(sinfo -h -o %T -N | sort -u)" = idle ]; then
    echo "SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 0.5
done
sinfo -N >&2
tail -n 20 "$folder"/log/*.log >&2
exit 1
