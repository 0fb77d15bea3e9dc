#!/usr/bin/env bash
# slurm_up.sh FOLDER [NODES]: a real Slurm on the loopback interface, for tests: munge, a
# controller and NODES daemons, as root, without systemd. slurm_down.sh ends it.
set -euo pipefail
folder=${1:?a folder}
nodes=${2:-4}
mkdir -p "$folder"/{etc,run,state,log,devices}
for i in $(seq 1 "$nodes"); do mkdir -p "$folder/spool/n$i"; done
touch "$folder"/devices/nvidia{0,1} # pretend GPUs
dd if=/dev/urandom of="$folder/etc/munge.key" bs=128 count=1 status=none
chmod 600 "$folder/etc/munge.key"
# JAX resolves the name of the first node.
grep -q ' n1 ' /etc/hosts || echo "127.0.0.1 $(seq -f 'n%g' -s ' ' 1 "$nodes") " >>/etc/hosts

cat >"$folder/etc/gres.conf" <<END
NodeName=n[1-$nodes] Name=gpu Type=h100 File=$folder/devices/nvidia[0-1]
END

# A job that is put back into the queue waits for as long as its credential lives: five
# seconds here, two minutes by default.
cat >"$folder/etc/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange=60001-60999
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmdSpoolDir=$folder/spool/%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=3600
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-$((17000 + nodes))] CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:h100:2 State=UNKNOWN
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=spot Nodes=n[1-$nodes] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
END

export SLURM_CONF=$folder/etc/slurm.conf
munged --force --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" \
  --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
  --seed-file="$folder/run/munged.seed" --num-threads=2
slurmctld -c -f "$SLURM_CONF"
for i in $(seq 1 "$nodes"); do slurmd -N "n$i" -f "$SLURM_CONF"; done
for _ in $(seq 1 100); do
  [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = "$nodes" ] && exit 0
  sleep 0.1
done
sinfo
tail -20 "$folder"/log/slurmctld.log
exit 1
